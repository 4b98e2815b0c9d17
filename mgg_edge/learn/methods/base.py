"""What every adaptation method is: pure functions over a frozen state.

    state = method.init()
    logits, state = method.step(frames, state)      answer a batch of the stream and learn from it
    logits = method.predict(frames, state)          answer under a state, learn nothing

`Classifier` is the backbone as methods use it, `Weights` what gradient descent on its norm parameters θ remembers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mgg_edge.errors import UsageError
from mgg_edge.learn.backbone import NORM_STATISTICS, Backbone
from mgg_edge.learn.statistics import SourceStatistics

__all__ = [
    "Classifier",
    "Method",
    "RateOptions",
    "Source",
    "SourceKnowledge",
    "Weights",
    "descend",
    "entropy",
    "paper_rate",
]

REFERENCE_BATCH = 64
LAYER_NORM_RATE = 1e-3
BATCH_NORM_RATE = 2.5e-4
SMALL_BATCH = 32
OPTIMISERS = ("sgd", "adam")
SQUARE_DECAY, ADAM_EPSILON = 0.999, 1e-8


class Method(Protocol):
    """An adaptation method; none of its functions changes an argument."""

    @property
    def name(self) -> str:
        """What results and the command line call it."""

    def init(self) -> Any:
        """State before the first batch."""

    def step(self, frames: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits f[B, C] of frames u8[B, H, W, 3], B ≥ 1, as the method answers them, and the next state."""

    def predict(self, frames: Tensor, state: Any) -> Tensor:
        """Logits f[B, C] of frames u8[B, H, W, 3] with the state frozen."""


class SourceKnowledge(Protocol):
    """What methods may know of the source domain: no labels. Methods read of it what they use, and when they use it."""

    @property
    def statistics(self) -> SourceStatistics:
        """Of the backbone's features."""

    @property
    def frames(self) -> Tensor:
        """Clean images u8[M, H, W, 3], M ≥ 1."""


@dataclass(frozen=True)
class Source:
    """Knowledge of the source domain that is at hand, see `SourceKnowledge`."""

    statistics: SourceStatistics
    frames: Tensor


@dataclass(frozen=True)
class RateOptions:
    """How θ follows its gradient, see `descend`.

    Attributes:
        learning_rate: α; None takes the paper's rule, see `paper_rate`.
        rate_factor: multiplies α.
        momentum: μ in [0, 1); of Adam β₁.
        nesterov: whether momentum is Nesterov's; Adam knows none.
        optimiser: `sgd` or `adam`.
    """

    learning_rate: float | None = None
    rate_factor: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    optimiser: str = OPTIMISERS[0]

    def __post_init__(self) -> None:
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        if not (0.0 < rate < math.inf and 0.0 < self.rate_factor < math.inf):
            raise UsageError(f"learning rate: expected positive numbers, found {rate} and factor {self.rate_factor}")
        if not 0.0 <= self.momentum < 1.0:
            raise UsageError(f"momentum: expected a number in [0, 1), found {self.momentum}")
        if self.optimiser not in OPTIMISERS:
            raise UsageError(f"optimiser: expected one of {', '.join(OPTIMISERS)}, found '{self.optimiser}'")
        if self.nesterov and self.optimiser != OPTIMISERS[0]:
            raise UsageError(f"nesterov: expected the optimiser {OPTIMISERS[0]}, found {self.optimiser}")


class Output(NamedTuple):
    """Attributes: logits f[B, C], features f[B, D], statistics f[M] after the batch or None."""

    logits: Tensor
    features: Tensor
    statistics: Tensor | None


class Classifier:
    """A backbone with its constants at hand.

    Attributes:
        backbone: the model.
        constants: as `Backbone.constants` gives them.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.constants = backbone, backbone.constants()

    @cached_property
    def theta(self) -> Tensor:
        """θ₀ f[N]."""
        return self.backbone.theta()

    @cached_property
    def has_layer_norm(self) -> bool:
        """Whether any of its norms is a LayerNorm."""
        return any(isinstance(module, nn.LayerNorm) for module in self.backbone.model.modules())

    def statistics(self) -> Tensor | None:
        """S₀ f[M], statistics of batch normalisation where they move."""
        return self.backbone.initial_state().get(NORM_STATISTICS)

    def moving(self, frames: Tensor, theta: Tensor, statistics: Tensor | None, weight: float | None = None) -> Output:
        """Logits while the statistics move with the batch: by `weight`, or as far as the backbone was told."""
        norms = self.backbone.split(theta)
        output = self.backbone.forward_moving(frames, norms, self.constants, statistics, weight)
        moved = output.moved.get(NORM_STATISTICS, statistics)
        return Output(output.logits, output.features, None if moved is None else moved.detach())

    def frozen(self, frames: Tensor, theta: Tensor, statistics: Tensor | None) -> Tensor:
        """Logits f[B, C] with everything at rest."""
        with torch.no_grad():
            return self.backbone.forward(frames, self.backbone.split(theta), self.constants, statistics)[0]

    def gradient(self, theta: Tensor, loss: Callable[[Tensor], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """∂loss/∂θ f[N] at θ, and what `loss` returned beside its scalar."""
        leaf = theta.detach().requires_grad_()
        value, kept = loss(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return gradient, kept


class Weights(NamedTuple):
    """What moves.

    Attributes:
        theta: θ f[N].
        momentum: b f[N], the velocity of gradient descent or Adam's first moment.
        statistics: f[M] of batch normalisation, or None.
        square: v f[N], Adam's second moment.
        updates: made so far.
    """

    theta: Tensor
    momentum: Tensor
    statistics: Tensor | None
    square: Tensor
    updates: int

    @classmethod
    def of(cls, classifier: Classifier) -> Weights:
        """The source model at rest."""
        zeros = torch.zeros_like(classifier.theta)
        return cls(classifier.theta, zeros, classifier.statistics(), zeros, 0)


def descend(weights: Weights, gradient: Tensor, rate: float, options: RateOptions) -> Weights:
    """One update as `torch.optim` makes it.

    sgd     b ← μb + g,  θ ← θ − αb;  with Nesterov's momentum θ ← θ − α(g + μb)
    adam    b ← β₁b + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  θ ← θ − α b̂/(√v̂ + ε),  b̂ = b/(1−β₁ᵗ),  v̂ = v/(1−β₂ᵗ)
    """
    updates, decay = weights.updates + 1, options.momentum
    if options.optimiser == "adam":
        mean = decay * weights.momentum + (1 - decay) * gradient
        square = SQUARE_DECAY * weights.square + (1 - SQUARE_DECAY) * gradient.square()
        scale = (square / (1 - SQUARE_DECAY**updates)).sqrt() + ADAM_EPSILON
        theta = weights.theta - rate * mean / (1 - decay**updates) / scale
        return weights._replace(theta=theta, momentum=mean, square=square, updates=updates)
    velocity = decay * weights.momentum + gradient
    direction = gradient + decay * velocity if options.nesterov else velocity
    return weights._replace(theta=weights.theta - rate * direction, momentum=velocity, updates=updates)


def paper_rate(classifier: Classifier, options: RateOptions, batch: int, *, alone: float = 1.0) -> float:
    """Learning rate for batches of B, by the rule of SAR's and DeYO's repositories.

    With LayerNorm 1e-3 · B/64; otherwise 2.5e-4, and 2.5e-4 · 2B/64 for B < 32. A rate in the options is not scaled.

    Args:
        classifier: says which kind of norm there is.
        options: a rate of one's own, and the factor.
        batch: B.
        alone: further factor for B = 1.
    """
    if options.learning_rate is not None:
        return options.learning_rate * options.rate_factor
    if classifier.has_layer_norm:
        rate = LAYER_NORM_RATE * batch / REFERENCE_BATCH
    else:
        rate = BATCH_NORM_RATE * (2 * batch / REFERENCE_BATCH if batch < SMALL_BATCH else 1.0)
    return rate * options.rate_factor * (alone if batch == 1 else 1.0)


def entropy(logits: Tensor) -> Tensor:
    """H(softmax(logits)) in nats: f[B, C] to f[B]."""
    log_probability = logits.log_softmax(dim=1)
    return -(log_probability.exp() * log_probability).sum(dim=1)
