"""Decides whether an adaptation step may be committed. Pure, and closed on failure: NaN never passes.

A candidate θ' of a step from θ passes `check_step` if and only if

    shape       its arrays have the names, types and shapes of the state before
    non-finite  every array and every diagnostic is finite
    update      |θ' − θ| ≤ max_update for every scalar
    drift       ‖θ' − θ₀‖₂ ≤ max_drift, θ₀ the source model's

max_drift is the rule's own bound, where it has learned one; otherwise half of ‖θ₀‖₂, and at least 0.1 √N: beyond it
little of the trained model is left. A candidate out there is refused, not projected back: what is committed is always
exactly what the exported step computed.

Two more checks look at what a candidate predicts: `guard_canary` and `guard_collapse`. What follows a breach is
decided by `guard_ladder`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mgg_edge.compat import StrEnum
from mgg_edge.errors import UsageError
from mgg_edge.manifest import RuleInfo
from mgg_edge.runtime.engines.engine import Diagnostics
from mgg_edge.state import AdaptState

__all__ = ["Breach", "BreachCode", "StepLimits", "check_logits", "check_step", "default_limits", "drift_ratio"]

_ROUNDING = 1e-5  # θ is of order 1 to 10 in float32: subtracting two of them is off by up to 1e-6
_UNBOUNDED_RULE_MAX_UPDATE = 0.1  # SGD's update follows the gradient; norm parameters are of order 1
_DRIFT_FRACTION, _LEAST_DRIFT_PER_SCALAR = 0.5, 0.1


class BreachCode(StrEnum):
    """Kinds of refused or failed steps; the names are stable."""

    SHAPE = "shape"
    NON_FINITE = "non-finite"
    UPDATE = "update"
    DRIFT = "drift"
    CANARY = "canary"
    COLLAPSE = "collapse"
    CALM = "calm"
    ENGINE = "engine"


class Breach(NamedTuple):
    """Why a step is refused: its kind, for counters, and a sentence for people."""

    code: BreachCode
    message: str


@dataclass(frozen=True)
class StepLimits:
    """Bounds of one step.

    Attributes:
        max_update: largest |Δθ| of one scalar, at least 0.
        max_drift: largest ‖θ − θ₀‖₂, at least 0.

    Raises:
        UsageError: a bound that is not a number of at least 0.
    """

    max_update: float
    max_drift: float = math.inf

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value >= 0):
                raise UsageError(f"limits.{name}: expected a number of at least 0, found {value}")


def default_limits(rule: RuleInfo, source: AdaptState | None = None) -> StepLimits:
    """Bounds that every sound step keeps: the rule's own where its update is bounded.

    Args:
        rule: the update rule.
        source: the source model's state, from which the drift is counted; None leaves the drift unbounded.
    """
    max_update = _UNBOUNDED_RULE_MAX_UPDATE
    if rule.max_update is not None:
        max_update = rule.max_update + _ROUNDING
    if source is None:
        return StepLimits(max_update)
    if rule.max_drift is not None:
        return StepLimits(max_update, rule.max_drift)
    theta = source["theta"].astype(np.float64)
    largest = max(_DRIFT_FRACTION * float(np.linalg.norm(theta)), _LEAST_DRIFT_PER_SCALAR * math.sqrt(theta.size))
    return StepLimits(max_update, largest)


def check_logits(logits: npt.NDArray[np.float32]) -> Breach | None:
    """Refuses a step whose predictions before the update are not finite."""
    return None if np.isfinite(logits).all() else Breach(BreachCode.NON_FINITE, "logits are not finite")


def check_step(
    previous: AdaptState,
    candidate: AdaptState,
    diagnostics: Diagnostics,
    limits: StepLimits,
    source: AdaptState | None = None,
) -> Breach | None:
    """Judge one step.

    Args:
        previous: the committed state the step started from.
        candidate: the state it proposes.
        diagnostics: its scalars.
        limits: bounds on the step.
        source: the source model's state; None leaves out the drift.

    Returns:
        Why the step must be refused, or None if it may be committed.
    """
    if candidate.specs != previous.specs:
        return Breach(BreachCode.SHAPE, f"state: expected {previous.specs}, found {candidate.specs}")
    for name, value in zip(Diagnostics._fields, diagnostics, strict=True):
        if not math.isfinite(value):
            return Breach(BreachCode.NON_FINITE, f"{name} is not finite")
    if (array := candidate.non_finite()) is not None:
        return Breach(BreachCode.NON_FINITE, f"state '{array}' is not finite")
    if not (float(np.abs(_change(candidate, previous)).max()) <= limits.max_update):
        return Breach(BreachCode.UPDATE, "theta moves further in one step than the update rule allows")
    if source is not None and not (float(np.linalg.norm(_change(candidate, source))) <= limits.max_drift):
        return Breach(BreachCode.DRIFT, "theta moves further from the source model than is allowed in all")
    return None


def drift_ratio(state: AdaptState, source: AdaptState, limits: StepLimits) -> float:
    """‖θ − θ₀‖₂ over the largest allowed; 0 where drift is not bounded."""
    return float(np.linalg.norm(_change(state, source))) / limits.max_drift if limits.max_drift else math.inf


def _change(state: AdaptState, reference: AdaptState) -> npt.NDArray[np.float64]:
    # float64 so that the difference of two large float32 numbers cannot overflow to Inf.
    change: npt.NDArray[np.float64] = np.subtract(state["theta"], reference["theta"], dtype=np.float64)
    return change
