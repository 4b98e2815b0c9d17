r"""Meta-training: learn the numbers of an update rule by truncated back-propagation through its own updates.

In a window of K steps from θ_0, with u_i the update made at step i and h_k the gradient of the meta-loss at θ_k,

    θ_k = θ_0 − α Σ_{i<k} u_i       ⇒       ∂/∂φ Σ_k meta-loss(θ_k) = ∂/∂φ ( −α Σ_i u_i · Σ_{k>i} h_k )

where the gradients that enter the rule are taken as given. So the model is differentiated once a step, never through
its own gradient, and the window is differentiated through the rule alone, memory included. The next window goes on
from θ_K and the detached memory; every episode starts again from the source model and an empty memory.

The meta-loss is the adaptation loss itself, which needs no labels, or the cross-entropy where images have labels.
With K = 1, one domain at a time, batches of two and α = 10⁻⁴ this is the recipe of arXiv 2412.16901 (`RELEASED`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mgg_edge.errors import MggEdgeError, UsageError, WeightsError
from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.objective import Objective
from mgg_edge.learn.rules import UpdateRule
from mgg_edge.learn.statistics import SourceStatistics

__all__ = ["RELEASED", "Domain", "Learner", "MetaProgress", "MetaRecipe", "MetaTrainer"]

MAX_GRADIENT_NORM = 1.0
MOMENT_DECAYS = (0.9, 0.99)


@dataclass(frozen=True)
class Domain:
    """Shifted images to meta-train on.

    Attributes:
        name: such as `fog:3`.
        frames: u8[M, H, W, 3] at model size.
        labels: i64[M], or None where there are none.
    """

    name: str
    frames: Tensor
    labels: Tensor | None = None

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """`count` different images and their labels; all of them, in a new order, if there are fewer."""
        chosen = torch.randperm(len(self.frames), generator=generator)[:count]
        return self.frames[chosen], None if self.labels is None else self.labels[chosen]


@dataclass(frozen=True)
class MetaRecipe:
    """How to meta-train.

    Attributes:
        iterations: meta-updates.
        horizon: K, steps of one window; with 1, each update is judged by the next batch alone.
        windows: windows of one episode; 0 never resets, as in the released recipe.
        episodes: episodes side by side, each with a domain and a batch size of its own.
        batch_sizes: batch sizes to draw from, each at least 2.
        signal_batch: images the meta-loss is taken over, at least those of the step.
        learning_rate: α of the inner updates; the same as at test time.
        meta_learning_rate: peak rate of Adam on the learned numbers, with a cosine to zero.
        supervised: cross-entropy as meta-loss; the domains must have labels.
        seed: of everything drawn.
    """

    iterations: int = 300
    horizon: int = 8
    windows: int = 3
    episodes: int = 4
    batch_sizes: tuple[int, ...] = (4, 8, 16)
    signal_batch: int = 32
    learning_rate: float = 1e-3
    meta_learning_rate: float = 1e-2
    supervised: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"iterations": 1, "horizon": 1, "windows": 0, "episodes": 1, "signal_batch": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise UsageError(f"meta-training: expected {name} of at least {bound}, found {getattr(self, name)}")
        if not self.batch_sizes or min(self.batch_sizes) < 2:
            raise UsageError(f"meta-training: expected batches of at least 2 frames, found {self.batch_sizes}")
        for name in ("learning_rate", "meta_learning_rate"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise UsageError(f"meta-training: expected {name} in (0, 1], found {getattr(self, name)}")


RELEASED = MetaRecipe(
    iterations=2560, horizon=1, windows=0, episodes=1, batch_sizes=(2,), signal_batch=0, learning_rate=1e-4
)


class MetaProgress(NamedTuple):
    """Meta-updates made, and the mean meta-loss of the last window."""

    iteration: int
    loss: float


class Signal(NamedTuple):
    """What one batch says: gradient for the rule [N], gradient of the meta-loss [N], and the meta-loss."""

    gradient: Tensor
    meta_gradient: Tensor
    meta_loss: float


@dataclass(frozen=True)
class Learner:
    """The model that adapts, and the loss it adapts to.

    Attributes:
        backbone: the source model.
        objective: the loss at test time.
        statistics: source statistics.
    """

    backbone: Backbone
    objective: Objective
    statistics: SourceStatistics

    def signal(self, theta: Tensor, frames: Tensor, labels: Tensor | None, adapt_count: int) -> Signal:
        """Gradients at θ [N]: of the loss on the first `adapt_count` frames, of the meta-loss on all of them.

        The meta-loss is the cross-entropy if there are labels, and otherwise the loss itself.
        """
        theta = theta.detach().requires_grad_()
        backbone, source = self.backbone, self.statistics.constants()
        logits, features = backbone.forward(frames, backbone.split(theta), backbone.constants())

        def loss(count: int) -> Tensor:
            mean, std = source["statistics.mean"], source["statistics.std"]
            return self.objective(logits[:count], features[:count], mean, std).loss

        adapt_count = min(adapt_count, len(frames))
        adapt_loss = loss(adapt_count)
        if labels is None and adapt_count == len(frames):
            (gradient,) = torch.autograd.grad(adapt_loss, theta)
            return Signal(gradient, gradient, float(adapt_loss.detach()))
        meta_loss = loss(len(frames)) if labels is None else functional.cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(adapt_loss, theta, retain_graph=True)
        (meta_gradient,) = torch.autograd.grad(meta_loss, theta)
        return Signal(gradient, meta_gradient, float(meta_loss.detach()))


class _Episode:
    """One model adapting to one domain."""

    def __init__(self, learner: Learner, domain: Domain, batch: int, recipe: MetaRecipe) -> None:
        self._learner, self._domain, self._batch, self._recipe = learner, domain, batch, recipe
        self.theta = learner.backbone.theta()

    def signal(self, generator: torch.Generator) -> Signal:
        frames, labels = self._domain.draw(max(self._batch, self._recipe.signal_batch), generator)
        return self._learner.signal(self.theta, frames, labels if self._recipe.supervised else None, self._batch)


class MetaTrainer:
    """Trains the numbers of an update rule in place.

    Args:
        rule: where to start; its numbers are changed.
        learner: the model and its loss.
        domains: shifted domains to draw episodes from.
        recipe: how to train.

    Raises:
        UsageError: no domains, or a supervised recipe and a domain without labels.
    """

    def __init__(self, rule: UpdateRule, learner: Learner, domains: Sequence[Domain], recipe: MetaRecipe) -> None:
        if not domains:
            raise UsageError("meta-training: expected at least one domain, found none")
        if recipe.supervised and (bare := [domain.name for domain in domains if domain.labels is None]):
            raise UsageError(f"meta-training: the supervised meta-loss needs labels, and domain '{bare[0]}' has none")
        self.rule, self.recipe = rule, recipe
        self._learner, self._domains = learner, tuple(domains)
        self._optimiser = torch.optim.Adam(rule.parameters(), lr=recipe.meta_learning_rate, betas=MOMENT_DECAYS)
        self._generator = torch.Generator().manual_seed(recipe.seed)
        self.iteration = 0

    def train(self) -> Iterator[MetaProgress]:
        """Train until the recipe's iterations are made; yields after every meta-update.

        Raises:
            MggEdgeError: a meta-gradient that is not finite; the numbers are then as before.
        """
        recipe = self.recipe
        while self.iteration < recipe.iterations:
            episodes = self._begin()
            state = self.rule.init(self._learner.backbone.norms.size * recipe.episodes)
            signals = [episode.signal(self._generator) for episode in episodes]
            window = 0
            while self.iteration < recipe.iterations and (recipe.windows == 0 or window < recipe.windows):
                surrogate, loss, state, signals = self._window(episodes, state, signals)
                self._update(surrogate)
                window += 1
                yield MetaProgress(self.iteration, loss)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on, as tensors; taken between two episodes, going on is exact."""
        moments = self._optimiser.state_dict()["state"]
        names = [name for name, _ in self.rule.named_parameters()]
        state = {f"rule.{name}": value.detach().clone() for name, value in self.rule.named_parameters()}
        for index, entry in moments.items():
            state |= {f"optimiser.{names[index]}.{key}": torch.as_tensor(value) for key, value in entry.items()}
        return {**state, "iteration": torch.tensor(self.iteration), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            WeightsError: a tensor is missing or has another shape.
        """
        moments: dict[int, dict[str, Any]] = {}
        with torch.no_grad():
            for index, (name, value) in enumerate(self.rule.named_parameters()):
                saved = state.get(f"rule.{name}")
                if saved is None or saved.shape != value.shape:
                    raise WeightsError(
                        f"meta-training state: expected '{name}' {list(value.shape)}, found "
                        f"{'nothing' if saved is None else list(saved.shape)}"
                    )
                value.copy_(saved)
                prefix = f"optimiser.{name}."
                entry = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
                moments |= {index: entry} if entry else {}
        self._optimiser.load_state_dict({**self._optimiser.state_dict(), "state": moments})
        self._generator.set_state(state["generator"])
        self.iteration = int(state["iteration"])

    def _begin(self) -> list[_Episode]:
        count, recipe, generator = self.recipe.episodes, self.recipe, self._generator
        domains = torch.randint(len(self._domains), (count,), generator=generator).tolist()
        batches = torch.randint(len(recipe.batch_sizes), (count,), generator=generator).tolist()
        return [
            _Episode(self._learner, self._domains[domain], recipe.batch_sizes[batch], recipe)
            for domain, batch in zip(domains, batches, strict=True)
        ]

    def _window(
        self, episodes: Sequence[_Episode], state: Any, signals: list[Signal]
    ) -> tuple[Tensor, float, Any, list[Signal]]:
        """Surrogate whose gradient is the meta-gradient, mean meta-loss, detached state, and the last signals."""
        updates: list[Tensor] = []
        ahead: list[Tensor] = []
        losses: list[float] = []
        state = type(state)(*(value.detach() for value in state))
        for _ in range(self.recipe.horizon):
            update, state = self.rule.update(torch.cat([signal.gradient for signal in signals]), state)
            updates.append(update)
            for episode, change in zip(episodes, update.detach().chunk(len(episodes)), strict=True):
                episode.theta = episode.theta - self.recipe.learning_rate * change
            signals = [episode.signal(self._generator) for episode in episodes]
            # Each episode counts the same, however large its gradients.
            ahead.append(torch.cat([unit(signal.meta_gradient) for signal in signals]))
            losses += [signal.meta_loss for signal in signals]
        later = torch.stack(ahead).flip(0).cumsum(0).flip(0)  # [K, M·N], Σ_{k>i} h_k
        surrogate = -(torch.stack(updates) * later).sum() / (self.recipe.horizon * updates[0].numel())
        return surrogate, sum(losses) / len(losses), state, signals

    def _update(self, surrogate: Tensor) -> None:
        progress = self.iteration / self.recipe.iterations
        for group in self._optimiser.param_groups:
            group["lr"] = self.recipe.meta_learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        self._optimiser.zero_grad()
        surrogate.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.rule.parameters()), MAX_GRADIENT_NORM)
        if not bool(torch.isfinite(norm)):
            raise MggEdgeError(f"meta-training: the meta-gradient of iteration {self.iteration} is not finite")
        self._optimiser.step()
        self.iteration += 1


def unit(gradient: Tensor) -> Tensor:
    """The gradient [N] in units of its mean size."""
    return gradient / (gradient.abs().mean() + torch.finfo(gradient.dtype).tiny)
