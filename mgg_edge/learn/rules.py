"""Update rules: pure functions from a gradient and a state to a direction and a new state.

    state = rule.init(n)
    direction, state = rule.update(gradient, state)        θ ← θ − α · direction

The learning rate α is applied by the adaptation step, so that every rule shares it. Rules are modules only so
that their learned numbers, if any, can be passed in from outside (`torch.func.functional_call`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Adam", "AdamState", "Sgd", "SgdState", "StatelessSgdState", "UpdateRule"]


class UpdateRule(nn.Module, ABC):
    """Interface of every update rule.

    Attributes:
        name: what manifests and the command line call it.
        default_learning_rate: α used when the user names none.
    """

    name: ClassVar[str]
    default_learning_rate: ClassVar[float]

    @abstractmethod
    def init(self, size: int, dtype: torch.dtype = torch.float32) -> Any:
        """State for `size` scalars before the first update, a NamedTuple of tensors."""

    @abstractmethod
    def update(self, gradient: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Direction u [N] and the next state for a gradient [N]; neither argument is changed."""

    def forward(self, gradient: Tensor, state: Any) -> tuple[Tensor, Any]:
        """`update`, so that `functional_call` can run it with other numbers."""
        return self.update(gradient, state)

    def options(self) -> dict[str, float | str]:
        """Settings that are not learned, by name."""
        return {}


class StatelessSgdState(NamedTuple):
    """Plain gradient descent remembers nothing."""


class SgdState(NamedTuple):
    """Attributes: momentum: f[N], the velocity."""

    momentum: Tensor


class Sgd(UpdateRule):
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


class Adam(UpdateRule):
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

    def options(self) -> dict[str, float | str]:
        """Moment decays and ε."""
        return {"beta1": self.beta1, "beta2": self.beta2, "epsilon": self.epsilon}


def moments(gradient: Tensor, m: Tensor, v: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """m ← β₁m + (1−β₁)g and v ← β₂v + (1−β₂)g², each [N]."""
    return beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient.square()
