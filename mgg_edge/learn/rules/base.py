"""Update rules: pure functions from what a batch says and a state to a new θ and a new state.

    state = rule.init(N)
    proposal = rule.step(θ, evidence, state, source, rate)          proposal.theta, proposal.update, proposal.state

There are two families. *Gradient rules* need the gradient of the loss under the current θ; most of them give a
direction u with θ ← θ − αu (`GradientRule`). *Statistics rules* (`needs_gradient` is False) need features alone, taken
under the source model's θ₀; a step with one of them has no backward pass.

Rules are modules only so that their learned numbers, if any, can be passed in from outside
(`torch.func.functional_call`). Everything else a rule looks at is an argument.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["CLEAN_WINDOWS", "Evidence", "GradientRule", "Proposal", "SourceNumbers", "UpdateRule", "knot_weights"]

# Frames M at which Δ_clean(M), the discrepancy of clean frames from their own source statistics, is known.
CLEAN_WINDOWS = (2, 4, 8, 16, 32, 64, 128)


class Evidence(NamedTuple):
    """What one batch of B frames says.

    Attributes:
        gradient: f[N], g = ∂L/∂θ under θ; None for rules that need none.
        features: f[B, D], under θ, or under θ₀ for rules that need no gradient.
        discrepancy: f[], Δ of the batch.
    """

    gradient: Tensor | None
    features: Tensor
    discrepancy: Tensor


class SourceNumbers(NamedTuple):
    """What is known of the source.

    Attributes:
        theta: f[N], θ₀.
        mean, std: f[D], μ_S and σ_S.
        clean_discrepancy: f[7], Δ_clean at `CLEAN_WINDOWS`.
    """

    theta: Tensor
    mean: Tensor
    std: Tensor
    clean_discrepancy: Tensor

    def clean_at(self, frames: Tensor) -> Tensor:
        """Δ_clean f[] of a window of `frames` f[]: linear in log M between the known ones, in logarithms."""
        return (knot_weights(frames, CLEAN_WINDOWS) * self.clean_discrepancy.log()).sum().exp()


class Proposal(NamedTuple):
    """What a rule proposes: θ f[N], the update f[N] that leads from the old one to it (old − new), and its state."""

    theta: Tensor
    update: Tensor
    state: Any


class UpdateRule(nn.Module, ABC):
    """Interface of every update rule.

    Attributes:
        name: what manifests and the command line call it.
        default_learning_rate: rate used when the user names none.
        max_learning_rate: largest sound rate; a learned rule must not be made to go faster than it has learned.
        needs_gradient: whether a step differentiates the loss.
        schedule: when to adapt by default: `burst` or `window`.
        knows_calm: whether it moves nothing by itself where there is no weather, whatever passes.
    """

    name: ClassVar[str]
    default_learning_rate: float
    max_learning_rate: float = math.inf
    needs_gradient: ClassVar[bool] = True
    schedule: ClassVar[str] = "burst"
    knows_calm: ClassVar[bool] = False

    @abstractmethod
    def init(self, size: int, dtype: torch.dtype = torch.float32) -> Any:
        """State for `size` scalars before the first update, a NamedTuple of tensors."""

    @abstractmethod
    def step(self, theta: Tensor, evidence: Evidence, state: Any, source: SourceNumbers, rate: Tensor) -> Proposal:
        """One step from θ f[N] at a rate f[]; no argument is changed."""

    def forward(self, theta: Tensor, evidence: Evidence, state: Any, source: SourceNumbers, rate: Tensor) -> Proposal:
        """`step`, so that `functional_call` can run it with other numbers."""
        return self.step(theta, evidence, state, source, rate)

    def options(self) -> dict[str, float | str]:
        """Arguments of the constructor that are not learned, by name."""
        return {}

    def largest_update(self, rate: float) -> float | None:  # noqa: ARG002
        """Bound on |Δθ| of every scalar in one step, or None where there is none."""
        return None

    def largest_drift(self, rate: float) -> float | None:  # noqa: ARG002
        """Bound on ‖θ − θ₀‖₂ beyond which the rule has no experience, or None where none is known."""
        return None


class GradientRule(UpdateRule):
    """A rule that gives a direction: θ ← θ − α · u."""

    @abstractmethod
    def update(self, gradient: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Direction u [N] and the next state for a gradient [N]; neither argument is changed."""

    def step(self, theta: Tensor, evidence: Evidence, state: Any, source: SourceNumbers, rate: Tensor) -> Proposal:  # noqa: ARG002
        """θ − αu."""
        direction, state = self.update(require_gradient(evidence), state)
        update = rate * direction
        return Proposal(theta - update, update, state)


def require_gradient(evidence: Evidence) -> Tensor:
    """The gradient of a batch.

    Raises:
        ValueError: there is none.
    """
    if evidence.gradient is None:
        raise ValueError("update rule: expected a gradient, found none")
    return evidence.gradient


def knot_weights(value: Tensor, knots: tuple[int, ...]) -> Tensor:
    """Weights f[K] of linear interpolation in log₂ between knots 2, 4, 8 …, the outer ones beyond the ends.

    Args:
        value: f[], positive.
        knots: ascending, each twice the one before.
    """
    first, count = math.log2(knots[0]), len(knots)
    place = (value.log() / math.log(2) - first).clamp(0, count - 1)
    return torch.relu(1 - (place - torch.arange(count, dtype=value.dtype, device=value.device)).abs())
