r"""EATA: entropy of reliable and non-redundant images alone, and RDumb, the same with a reset every 1,000 steps.

    reliable        H(x) < E₀ = 0.4 ln C                                                     equation 3
    not redundant   |cos(p(x), m)| < ε,   m ← 0.9 m + 0.1 mean p(x) over the images used     equations 4, 5
    L = mean_x exp(E₀ − H(x)) · H(x)  +  β Σ_i F_i (θ_i − θ₀_i)²                             equations 2, 8
    F = mean over batches of (∂ cross-entropy(f(x), argmax f(x)) / ∂θ)², clean images        equation 9

The mean m starts with the first batch's; a batch without any image left changes nothing. ε is 0.05 for 1,000 classes
and 0.4 for 10 in the paper: for other numbers the default is the line through both in log-log scale, since cosines with
an even m shrink as 1/√C. Sources: EATA arXiv 2204.02610, github mr-eggplant/EATA (MIT); RDumb arXiv 2306.05401, github
oripress/CCC, which resets θ, momentum and m and has no Fisher term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mgg_edge.errors import UsageError
from mgg_edge.learn.methods.base import Classifier, RateOptions, SourceKnowledge, Weights, descend, entropy, paper_rate

__all__ = ["Eata", "EataOptions", "EataState", "RDumb", "default_redundancy"]

FISHER_BATCH = 64
MEAN_DECAY = 0.9


@dataclass(frozen=True)
class EataOptions(RateOptions):
    """Settings of EATA and RDumb.

    Attributes:
        margin: E₀ as a share of ln C.
        redundancy: ε; None for `default_redundancy`.
        fisher_weight: β; 0 leaves the regulariser out (ETA).
        fisher_images: source images F is taken over, at most.
        reset_steps: RDumb's period in steps; 0 never resets.
    """

    margin: float = 0.4
    redundancy: float | None = None
    fisher_weight: float = 2000.0
    fisher_images: int = 2000
    reset_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.margin > 0.0 and self.fisher_weight >= 0.0 and self.fisher_images >= 1 and self.reset_steps >= 0):
            raise UsageError(f"eata: expected a positive margin and weights of at least 0, found {self}")


class EataState(NamedTuple):
    """Attributes: weights; mean f[C], m, or None before the first image used; step: batches seen."""

    weights: Weights
    mean: Tensor | None
    step: int


def default_redundancy(classes: int) -> float:
    """ε for C classes: 0.4 at 10, 0.05 at 1,000."""
    return 0.4 * (classes / 10) ** (math.log(0.05 / 0.4) / math.log(100))


class Eata:
    """EATA, or ETA without the Fisher term.

    Args:
        classifier: the model.
        options: settings.
        source: clean images for the Fisher term.
    """

    name: ClassVar[str] = "eata"

    def __init__(self, classifier: Classifier, options: EataOptions, source: SourceKnowledge) -> None:
        self._classifier, self.options, self._source = classifier, options, source
        classes = classifier.backbone.classes
        self._margin = options.margin * math.log(classes)
        self._redundancy = default_redundancy(classes) if options.redundancy is None else options.redundancy

    @cached_property
    def fisher(self) -> Tensor:
        """F f[N]."""
        total, batches = torch.zeros_like(self._classifier.theta), 0
        for frames in self._source.frames[: self.options.fisher_images].split(FISHER_BATCH):
            gradient, _ = self._classifier.gradient(self._classifier.theta, partial(self._guess, frames))
            total, batches = total + gradient.square(), batches + 1
        return total / batches

    def init(self) -> EataState:
        """The source model at rest, nothing seen."""
        return EataState(Weights.of(self._classifier), None, 0)

    def step(self, frames: Tensor, state: EataState) -> tuple[Tensor, EataState]:
        """Logits f[B, C] before the update, and the next state."""
        if self.options.reset_steps and state.step % self.options.reset_steps == 0:
            state = EataState(Weights.of(self._classifier), None, state.step)
        weights, after = state.weights, state.step + 1

        def loss(theta: Tensor) -> tuple[Tensor, Any]:
            output = self._classifier.moving(frames, theta, weights.statistics)
            used = self._choose(output.logits.detach(), state.mean)
            entropies = entropy(output.logits)
            weight = used * torch.exp(self._margin - entropies.detach())
            value = (weight * entropies).sum() / used.sum().clamp(min=1.0)
            return value + self._anchor(theta), (output, used)

        gradient, (output, used) = self._classifier.gradient(weights.theta, loss)
        logits = output.logits.detach()
        moved = weights._replace(statistics=output.statistics)
        if not bool(used.any()):
            return logits, EataState(moved, state.mean, after)
        rate = paper_rate(self._classifier, self.options, len(frames))
        moved = descend(moved, gradient, rate, self.options)
        return logits, EataState(moved, self._mean(logits[used.bool()], state.mean), after)

    def predict(self, frames: Tensor, state: EataState) -> Tensor:
        """Logits f[B, C] of the adapted model."""
        return self._classifier.frozen(frames, state.weights.theta, state.weights.statistics)

    def _choose(self, logits: Tensor, mean: Tensor | None) -> Tensor:
        """1 for images that are reliable and not redundant: f[B]."""
        used = entropy(logits) < self._margin
        if mean is not None:
            used &= functional.cosine_similarity(mean[None], logits.softmax(1), dim=1).abs() < self._redundancy
        return used.to(logits.dtype)

    def _mean(self, logits: Tensor, mean: Tensor | None) -> Tensor:
        current = logits.softmax(1).mean(0)
        return current if mean is None else MEAN_DECAY * mean + (1 - MEAN_DECAY) * current

    def _anchor(self, theta: Tensor) -> Tensor | float:
        if not self.options.fisher_weight:
            return 0.0
        return self.options.fisher_weight * (self.fisher * (theta - self._classifier.theta).square()).sum()

    def _guess(self, frames: Tensor, theta: Tensor) -> tuple[Tensor, None]:
        """Cross-entropy of the model's own answers, under statistics that move as in adaptation."""
        logits = self._classifier.moving(frames, theta, self._classifier.statistics()).logits
        return functional.cross_entropy(logits, logits.detach().argmax(1)), None


class RDumb(Eata):
    """ETA that goes back to the source model every 1,000 steps."""

    name: ClassVar[str] = "rdumb"
