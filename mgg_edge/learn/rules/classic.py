"""The optimisers every learned rule is measured against: gradient descent and Adam."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mgg_edge.learn.rules.base import GradientRule

__all__ = ["Adam", "AdamState", "Sgd", "SgdState", "StatelessSgdState", "moments"]


class StatelessSgdState(NamedTuple):
    """Plain gradient descent remembers nothing."""


class SgdState(NamedTuple):
    """Attributes: momentum: f[N], the velocity."""

    momentum: Tensor


class Sgd(GradientRule):
    """Gradient descent, u = g; with momentum μ, b ← μb + g and u = b.

    Args:
        momentum: μ in [0, 1).
    """

    name = "sgd"
    default_learning_rate = 1e-3

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum: expected a number in [0, 1), found {momentum}")
        self.momentum = momentum

    def init(self, size: int, dtype: torch.dtype = torch.float32) -> SgdState | StatelessSgdState:
        """Zero velocity for `size` scalars, or nothing without momentum."""
        return SgdState(torch.zeros(size, dtype=dtype)) if self.momentum else StatelessSgdState()

    def update(
        self, gradient: Tensor, state: SgdState | StatelessSgdState
    ) -> tuple[Tensor, SgdState | StatelessSgdState]:
        """Direction [N] and the new velocity."""
        if isinstance(state, StatelessSgdState):
            return gradient, state
        momentum = self.momentum * state.momentum + gradient
        return momentum, SgdState(momentum)

    def options(self) -> dict[str, float | str]:
        """The momentum."""
        return {"momentum": self.momentum}


class AdamState(NamedTuple):
    """Attributes: m, v: f[N], moments of the gradient; step: f[], updates made so far."""

    m: Tensor
    v: Tensor
    step: Tensor


class Adam(GradientRule):
    """u = m̂ / (√v̂ + ε), with bias-corrected moments (arXiv 1412.6980).

    Args:
        beta1, beta2: decay of the first and second moment, in [0, 1).
        epsilon: ε, positive.
    """

    name = "adam"
    default_learning_rate = 1e-3

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> None:
        super().__init__()
        for label, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{label}: expected a number in [0, 1), found {value}")
        if not epsilon > 0.0:
            raise ValueError(f"epsilon: expected a positive number, found {epsilon}")
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon

    def init(self, size: int, dtype: torch.dtype = torch.float32) -> AdamState:
        """Zero moments for `size` scalars."""
        return AdamState(torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype), torch.zeros((), dtype=dtype))

    def update(self, gradient: Tensor, state: AdamState) -> tuple[Tensor, AdamState]:
        """Direction [N] and the new moments."""
        step = state.step + 1
        m, v = moments(gradient, state.m, state.v, self.beta1, self.beta2)
        mean = m / (1 - self.beta1**step)
        scale = (v / (1 - self.beta2**step)).sqrt() + self.epsilon
        return mean / scale, AdamState(m, v, step)

    def largest_update(self, rate: float) -> float:
        """Ten times α: |m̂|/√v̂ stays near 1, and only a burst after silence goes higher."""
        return 10 * rate

    def options(self) -> dict[str, float | str]:
        """Moment decays and ε."""
        return {"beta1": self.beta1, "beta2": self.beta2, "epsilon": self.epsilon}


def moments(gradient: Tensor, m: Tensor, v: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """m ← β₁m + (1−β₁)g and v ← β₂v + (1−β₂)g², each [N]."""
    return beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient.square()
