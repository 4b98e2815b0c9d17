"""Decides whether an adaptation step may be committed. Pure, and closed on failure: NaN never passes.

A candidate passes if and only if
    its arrays have the names, types and shapes of the previous state,
    every array, every diagnostic is finite,
    |θ' − θ| ≤ max_update for every scalar.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mgg_edge.errors import UsageError
from mgg_edge.manifest import RuleInfo
from mgg_edge.runtime.engine import Diagnostics
from mgg_edge.state import AdaptState

__all__ = ["StepLimits", "check_step", "default_limits"]

# |u| ≤ 1 for MGG by its tanh; for Adam |m̂|/√v̂ stays near 1, and only a burst after silence goes higher.
_LARGEST_UPDATE = {"mgg": 1.0, "adam": 10.0}
_ROUNDING = 1e-5  # θ is of order 1 to 10 in float32: subtracting two of them is off by up to 1e-6
_UNBOUNDED_RULE_MAX_UPDATE = 0.1  # SGD's update follows the gradient; norm parameters are of order 1


@dataclass(frozen=True)
class StepLimits:
    """Bounds of one step.

    Attributes:
        max_update: largest |Δθ| of one scalar, at least 0.

    Raises:
        UsageError: a bound that is not a number of at least 0.
    """

    max_update: float

    def __post_init__(self) -> None:
        if not (self.max_update >= 0):
            raise UsageError(f"limits.max_update: expected a number of at least 0, found {self.max_update}")


def default_limits(rule: RuleInfo) -> StepLimits:
    """Bounds that every sound step of the rule keeps: a multiple of its learning rate where its update is bounded."""
    if rule.name in _LARGEST_UPDATE:
        return StepLimits(_LARGEST_UPDATE[rule.name] * rule.learning_rate + _ROUNDING)
    return StepLimits(_UNBOUNDED_RULE_MAX_UPDATE)


def check_step(previous: AdaptState, candidate: AdaptState, diagnostics: Diagnostics, limits: StepLimits) -> str | None:
    """Judge one step.

    Args:
        previous: the committed state the step started from.
        candidate: the state it proposes.
        diagnostics: its scalars.
        limits: bounds on the step.

    Returns:
        Why the step must be refused, or None if it may be committed.
    """
    if candidate.specs != previous.specs:
        return f"state: expected {previous.specs}, found {candidate.specs}"
    for name, value in zip(Diagnostics._fields, diagnostics, strict=True):
        if not math.isfinite(value):
            return f"{name} is not finite"
    if (array := candidate.non_finite()) is not None:
        return f"state '{array}' is not finite"
    # float64 so that the difference of two large float32 numbers cannot overflow to Inf.
    change = np.subtract(candidate["theta"], previous["theta"], dtype=np.float64)
    if not (float(np.abs(change).max()) <= limits.max_update):
        return "theta moves further in one step than the update rule allows"
    return None
