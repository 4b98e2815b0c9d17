r"""Three methods that leave every weight alone and change what comes out: LAME, T3A and FOA's activation shift.

LAME (arXiv 2201.05718, section 4): assignments y of a batch, one row an image, from
    y_i ∝ p(x_i) · exp( Σ_j w_ij y_j ),   iterated from y = p until its energy rests,   w the 5-nearest-neighbour graph

T3A (Iwasawa and Matsuo, NeurIPS 2021, section 3): each class keeps the K embeddings
    of least entropy, the last layer's row among them; logit_c = e(x) · ω_c/‖ω_c‖,   ω_c = Σ of its supports e/‖e‖

FOA's shift (arXiv 2404.01650, equations 7 to 9), without its evolution of prompts:
    e(x) + μ_S − μ(t),   μ(t) = 0.9 μ(t−1) + 0.1 μ_B(t),   μ(t−1) in use at step t; nothing at the first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mgg_edge.errors import UsageError
from mgg_edge.learn.methods.base import Classifier, SourceKnowledge, entropy
from mgg_edge.learn.methods.head import Head
from mgg_edge.learn.methods.unadapted import Nothing

__all__ = ["T3A", "Foa", "FoaOptions", "FoaState", "Lame", "LameOptions", "T3AOptions", "T3AState", "assign"]

AFFINITIES = ("knn", "rbf", "linear")
MAX_ITERATIONS = 100
FLOOR = 1e-10
CHUNK = 64


@dataclass(frozen=True)
class LameOptions:
    """Settings.

    Attributes:
        affinity: `knn`, `rbf` or `linear`, over normalised embeddings.
        neighbours: k.
    """

    affinity: str = "knn"
    neighbours: int = 5

    def __post_init__(self) -> None:
        if self.affinity not in AFFINITIES or self.neighbours < 1:
            raise UsageError(f"lame: expected an affinity of {', '.join(AFFINITIES)} and a neighbour, found {self}")


class Lame:
    """Laplacian-adjusted maximum-likelihood estimation of a batch's labels.

    Args:
        classifier: the model.
        options: settings.

    Raises:
        UnsupportedError: the model has no linear last layer.
    """

    name: ClassVar[str] = "lame"

    def __init__(self, classifier: Classifier, options: LameOptions | None = None) -> None:
        self._head, self.options = Head(classifier, self.name), options or LameOptions()

    def init(self) -> Nothing:
        """The empty state: every batch stands alone."""
        return Nothing()

    def step(self, frames: Tensor, state: Nothing) -> tuple[Tensor, Nothing]:
        """Log-assignments f[B, C]."""
        return self.predict(frames, state), state

    def predict(self, frames: Tensor, state: Nothing) -> Tensor:  # noqa: ARG002
        """Log-assignments f[B, C]; they depend on the other frames."""
        logits, embedding = self._head(frames)
        graph = _affinity(functional.normalize(embedding, dim=1), self.options)
        return assign(logits.softmax(1), graph).clamp(min=FLOOR).log()


def assign(probability: Tensor, graph: Tensor) -> Tensor:
    """y f[B, C] for p f[B, C] and w f[B, B]."""
    unary = -torch.log(probability + FLOOR)
    assignment, energy = probability, torch.inf
    for iteration in range(MAX_ITERATIONS):
        pairwise = graph @ assignment
        assignment = (pairwise - unary).softmax(1)
        inner = unary - pairwise + torch.log(assignment.clamp(min=1e-20))
        now = float((inner * assignment).sum())
        if iteration > 1 and abs(now - energy) <= 1e-8 * abs(energy):
            break
        energy = now
    return assignment


def _affinity(embedding: Tensor, options: LameOptions) -> Tensor:
    """w f[B, B] over normalised embeddings f[B, E]."""
    count = len(embedding)
    if options.affinity == "linear":
        return embedding @ embedding.T
    distance = torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist")
    if options.affinity == "knn":
        nearest = distance.topk(min(options.neighbours + 1, count), largest=False).indices[:, 1:]
        return torch.zeros(count, count).scatter_(1, nearest, 1.0)
    scale = distance.topk(min(options.neighbours, count), largest=False).values[:, -1].mean()
    # All frames equal, as in a batch of one: every distance is 0 and every affinity 1.
    return torch.exp(-distance.square() / (2 * scale.square()).clamp(min=1e-20))


@dataclass(frozen=True)
class T3AOptions:
    """Attributes: supports: K, embeddings a class keeps; −1 keeps all."""

    supports: int = 20

    def __post_init__(self) -> None:
        if self.supports < 1 and self.supports != -1:
            raise UsageError(f"t3a: expected at least 1 support a class, or -1 for all, found {self.supports}")


class T3AState(NamedTuple):
    """Attributes: embeddings f[S, E], labels i64[S] and entropies f[S] of all supports."""

    embeddings: Tensor
    labels: Tensor
    entropies: Tensor


class T3A:
    """Test-time template adjustment.

    Args:
        classifier: the model.
        options: settings.

    Raises:
        UnsupportedError: the model has no linear last layer.
    """

    name: ClassVar[str] = "t3a"

    def __init__(self, classifier: Classifier, options: T3AOptions | None = None) -> None:
        self._head, self.options = Head(classifier, self.name), options or T3AOptions()
        self._classes = classifier.backbone.classes

    def init(self) -> T3AState:
        """The rows of the last layer as supports, under the label the layer gives them."""
        logits = self._head.logits(self._head.weight)
        return T3AState(self._head.weight, logits.argmax(1), entropy(logits))

    def step(self, frames: Tensor, state: T3AState) -> tuple[Tensor, T3AState]:
        """Logits f[B, C] by the templates after these frames joined the supports."""
        logits, embedding = self._head(frames)
        grown = T3AState(
            torch.cat([state.embeddings, embedding]),
            torch.cat([state.labels, logits.argmax(1)]),
            torch.cat([state.entropies, entropy(logits)]),
        )
        state = self._select(grown)
        return self._compare(embedding, state), state

    def predict(self, frames: Tensor, state: T3AState) -> Tensor:
        """Logits f[B, C] by the templates as they are."""
        return self._compare(self._head(frames)[1], state)

    def _select(self, state: T3AState) -> T3AState:
        if self.options.supports < 0:
            return state
        order = state.entropies.argsort(stable=True)
        kept = [order[state.labels[order] == label][: self.options.supports] for label in range(self._classes)]
        chosen = torch.cat(kept)
        return T3AState(state.embeddings[chosen], state.labels[chosen], state.entropies[chosen])

    def _compare(self, embedding: Tensor, state: T3AState) -> Tensor:
        member = functional.one_hot(state.labels, self._classes).to(embedding.dtype)  # [S, C]
        templates = functional.normalize(state.embeddings, dim=1).T @ member  # [E, C]
        return embedding @ functional.normalize(templates, dim=0)


@dataclass(frozen=True)
class FoaOptions:
    """Attributes: decay: of μ(t); strength: how much of the shift is made."""

    decay: float = 0.9
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.decay <= 1.0 and self.strength >= 0.0):
            raise UsageError(f"foa: expected a decay in [0, 1] and a strength of at least 0, found {self}")


class FoaState(NamedTuple):
    """Attributes: mean: μ(t) f[E], or None before the first batch."""

    mean: Tensor | None


class Foa:
    """Back-to-source shift of the embeddings.

    Args:
        classifier: the model.
        options: settings.
        source: clean images μ_S is taken over.

    Raises:
        UnsupportedError: the model has no linear last layer.
    """

    name: ClassVar[str] = "foa"

    def __init__(self, classifier: Classifier, options: FoaOptions, source: SourceKnowledge) -> None:
        self._head, self.options = Head(classifier, self.name), options
        self._source_mean = torch.cat([self._head(frames)[1] for frames in source.frames.split(CHUNK)]).mean(0)

    def init(self) -> FoaState:
        """No shift yet."""
        return FoaState(None)

    def step(self, frames: Tensor, state: FoaState) -> tuple[Tensor, FoaState]:
        """Logits f[B, C] under the shift of the batches before, and the next state."""
        logits, embedding = self._head(frames)
        mean, decay = embedding.mean(0), self.options.decay
        after = mean if state.mean is None else decay * state.mean + (1 - decay) * mean
        return logits + self._shift(state), FoaState(after)

    def predict(self, frames: Tensor, state: FoaState) -> Tensor:
        """Logits f[B, C] under the shift reached."""
        return self._head(frames)[0] + self._shift(state)

    def _shift(self, state: FoaState) -> Tensor:
        if state.mean is None:
            return torch.zeros_like(self._head.bias)
        return self.options.strength * self._head.weight @ (self._source_mean - state.mean)
