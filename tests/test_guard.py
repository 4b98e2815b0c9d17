"""The guard refuses every unsound step, and NaN never passes a comparison."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from mgg_edge.errors import UsageError
from mgg_edge.manifest import RuleInfo
from mgg_edge.runtime.adaptation.guard import (
    BreachCode,
    StepLimits,
    check_logits,
    check_step,
    default_limits,
    drift_ratio,
)
from mgg_edge.runtime.engines.engine import Diagnostics
from mgg_edge.state import AdaptState

SOUND = Diagnostics(entropy=0.7, discrepancy=0.1, loss=0.8, gradient_norm=2.0, update_norm=1.0)
LIMITS = StepLimits(max_update=0.01)
NOT_FINITE = [math.nan, math.inf, -math.inf]


def state(theta: float = 0.0, m: float = 0.0, size: int = 5) -> AdaptState:
    return AdaptState({"theta": np.full(size, theta, np.float32), "m": np.full(size, m, np.float32)})


def with_one(name: str, value: float) -> AdaptState:
    arrays = {key: array.copy() for key, array in state().items()}
    arrays[name][-1] = value
    return AdaptState(arrays)


def test_a_sound_step_passes():
    assert check_step(state(), state(0.005, m=100.0), SOUND, LIMITS) is None


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", ["theta", "m"])
def test_state_must_be_finite(name: str, value: float):
    breach = check_step(state(), with_one(name, value), SOUND, StepLimits(math.inf))
    assert breach == (BreachCode.NON_FINITE, f"state '{name}' is not finite")


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", Diagnostics._fields)
def test_diagnostics_must_be_finite(name: str, value: float):
    breach = check_step(state(), state(), SOUND._replace(**{name: value}), LIMITS)
    assert breach == (BreachCode.NON_FINITE, f"{name} is not finite")


@pytest.mark.parametrize("value", [0.011, -0.011, 1.0, 3e38])
def test_one_scalar_that_moves_too_far_is_enough(value: float):
    breach = check_step(state(), with_one("theta", value), SOUND, LIMITS)
    assert breach is not None
    assert breach.code is BreachCode.UPDATE


def test_the_bound_itself_is_allowed():
    assert check_step(state(), with_one("theta", 0.5), SOUND, StepLimits(0.5)) is None


def test_the_difference_does_not_overflow():
    far = StepLimits(max_update=1e39)
    assert check_step(with_one("theta", -3e38), with_one("theta", 3e38), SOUND, far) is None


def test_a_previous_state_with_nan_never_passes():
    assert check_step(with_one("theta", math.nan), state(), SOUND, StepLimits(math.inf)) is not None


@pytest.mark.parametrize(
    "candidate",
    [
        state(size=6),
        AdaptState({"theta": np.zeros(5, np.float64), "m": np.zeros(5, np.float32)}),
        AdaptState({"theta": np.zeros(5, np.float32)}),
        AdaptState({"m": np.zeros(5, np.float32), "theta": np.zeros(5, np.float32)}),
    ],
    ids=["shape", "dtype", "missing", "order"],
)
def test_the_candidate_must_look_like_the_state(candidate: AdaptState):
    breach = check_step(state(), candidate, SOUND, LIMITS)
    assert breach is not None
    assert breach.code is BreachCode.SHAPE


@pytest.mark.parametrize("bound", [math.nan, -1e-9, -math.inf])
def test_limits_are_checked(bound: float):
    with pytest.raises(UsageError, match=r"limits\.max_update: expected a number of at least 0"):
        StepLimits(bound)


def rule_info(bound: float | None) -> RuleInfo:
    return RuleInfo("some", 1e-3, {}, "", bound, None, "burst")


@pytest.mark.parametrize("bound", [1e-3, 1e-2])
def test_default_limits_let_sound_steps_pass(bound: float):
    limits = default_limits(rule_info(bound))
    before = np.linspace(-8, 8, 1001, dtype=np.float32)  # rounding of θ is part of the step
    after = before - np.float32(bound)
    assert check_step(AdaptState({"theta": before}), AdaptState({"theta": after}), SOUND, limits) is None


@pytest.mark.parametrize(("bound", "update"), [(1e-3, 1.5e-3), (1e-2, 1.5e-2), (None, 0.101)])
def test_default_limits_refuse_more_than_the_rule_can_do(bound: float | None, update: float):
    assert check_step(state(), state(update), SOUND, default_limits(rule_info(bound))) is not None


class TestDrift:
    SOURCE = state(1.0)  # ‖θ₀‖ = √5

    def judge(self, theta: float, max_drift: float):
        near = state(1.0 + theta)
        return check_step(near, near, SOUND, StepLimits(1.0, max_drift), self.SOURCE)

    def test_the_ball_is_closed_and_counted_from_the_source_not_from_the_step_before(self):
        radius = drift_ratio(state(1.25), self.SOURCE, StepLimits(1.0, 1.0))
        assert radius == pytest.approx(0.25 * math.sqrt(5))
        assert self.judge(0.25, radius) is None
        breach = self.judge(0.25, radius * (1 - 1e-9))
        assert breach is not None
        assert breach.code is BreachCode.DRIFT

    @pytest.mark.parametrize("bound", [math.nan, -1.0])
    def test_the_bound_is_checked(self, bound: float):
        with pytest.raises(UsageError, match=r"limits\.max_drift: expected a number of at least 0"):
            StepLimits(1.0, bound)

    def test_the_default_is_half_the_source_s_norm_and_never_nothing(self):
        rule = rule_info(1e-3)
        assert default_limits(rule).max_drift == math.inf
        assert default_limits(rule, self.SOURCE).max_drift == pytest.approx(0.5 * math.sqrt(5))
        assert default_limits(rule, state(0.0)).max_drift == pytest.approx(0.1 * math.sqrt(5))

    def test_a_rule_that_has_learned_its_ball_is_held_to_it(self):
        rule = dataclasses.replace(rule_info(1e-3), max_drift=0.4)
        assert default_limits(rule, self.SOURCE).max_drift == 0.4

    def test_the_ratio(self):
        assert drift_ratio(self.SOURCE, self.SOURCE, StepLimits(1.0, 2.0)) == 0
        assert drift_ratio(state(3.0), self.SOURCE, StepLimits(1.0, math.inf)) == 0
        assert drift_ratio(state(3.0), self.SOURCE, StepLimits(1.0, 0.0)) == math.inf


@pytest.mark.parametrize("value", NOT_FINITE)
def test_logits_must_be_finite(value: float):
    logits = np.zeros((2, 3), np.float32)
    assert check_logits(logits) is None
    logits[1, 2] = value
    assert check_logits(logits) == (BreachCode.NON_FINITE, "logits are not finite")
