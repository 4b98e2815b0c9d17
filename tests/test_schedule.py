"""Drift, the schedules as state machines, and the bank of snapshots."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from mgg_edge.errors import StateError, UsageError
from mgg_edge.runtime import Bundle
from mgg_edge.runtime.adaptation.schedule import (
    SCHEDULES,
    Action,
    Always,
    Burst,
    BurstSettings,
    Off,
    Phase,
    schedule_of,
)
from mgg_edge.runtime.adaptation.schedule_bank import Snapshot, SnapshotBank, best_fit
from mgg_edge.runtime.adaptation.schedule_drift import DriftMeter, SourceStatistics
from mgg_edge.state import AdaptState

QUICK = BurstSettings(updates=2, settle_frames=3, wake_ratio=1.5, rest_ratio=1.2, patience_frames=4, min_drift=0.1)


def statistics(size: int = 4) -> SourceStatistics:
    return SourceStatistics(np.arange(size, dtype=np.float32), np.full(size, 2, np.float32))


class TestDrift:
    def test_the_formula(self):
        own = statistics()
        assert own.drift(own.mean) == 0
        assert own.drift(own.mean + 2) == pytest.approx(1)
        offset = np.array([2, -2, 4, 0], np.float32)
        assert own.drift(own.mean + offset) == pytest.approx(math.sqrt((1 + 1 + 4 + 0) / 4))

    def test_the_mean_is_exact_until_the_window_is_full(self):
        random = np.random.default_rng(0)
        frames = random.normal(size=(10, 4)).astype(np.float32)
        meter = DriftMeter(statistics(), window=32)
        for row in frames:
            meter = meter.observe(row)
        np.testing.assert_allclose(meter.mean, frames.mean(0, dtype=np.float64), rtol=1e-12)

    def test_it_forgets(self):
        own = statistics()
        meter = DriftMeter(own, window=8)
        for _ in range(20):
            meter = meter.observe(own.mean + 20)
        assert meter.drift == pytest.approx(10)
        for _ in range(100):
            meter = meter.observe(own.mean)
        assert meter.drift < 1e-4

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_one_bad_frame_does_not_poison_the_mean_for_ever(self, value: float):
        own = statistics()
        meter = DriftMeter(own).observe(own.mean + 2)
        bad = own.mean.copy()
        bad[0] = value
        assert meter.observe(bad) is meter

    def test_before_the_first_frame_and_after_a_restart(self):
        own = statistics()
        meter = DriftMeter(own)
        assert meter.drift == 0
        assert meter.observe(own.mean + 9).restart() == meter

    def test_a_feature_that_was_constant_on_the_source_does_not_decide_alone(self, loaded_toy: Bundle):
        weights = {**loaded_toy.weights, "statistics.std": np.array([0, 1, 1, 1, 1, 1], np.float32)}
        own = SourceStatistics.of(dataclasses.replace(loaded_toy, weights=weights))
        assert own.std[0] == pytest.approx(0.01 * 5 / 6)
        assert math.isfinite(own.drift(own.mean + 1))
        nothing = {**loaded_toy.weights, "statistics.std": np.zeros(6, np.float32)}
        assert (SourceStatistics.of(dataclasses.replace(loaded_toy, weights=nothing)).std > 0).all()

    def test_a_bundle_without_statistics(self, loaded_toy: Bundle):
        weights = {name: value for name, value in loaded_toy.weights.items() if name != "statistics.mean"}
        with pytest.raises(UsageError, match="expected source statistics to measure drift by, found none"):
            SourceStatistics.of(dataclasses.replace(loaded_toy, weights=weights))


def feed(schedule: Burst, *drifts: float) -> tuple[Burst, list[Action]]:
    actions = []
    for drift in drifts:
        schedule, action = schedule.observe(drift)
        actions.append(action)
    return schedule, actions


def step(schedule: Burst, count: int) -> tuple[Burst, list[bool]]:
    froze = []
    for _ in range(count):
        schedule, frozen = schedule.stepped()
        froze.append(frozen)
    return schedule, froze


def frozen(baseline: float = 1.0) -> Burst:
    schedule, _ = step(Burst(QUICK), 2)
    schedule, _ = feed(schedule, 9.0, 9.0, baseline)
    assert (schedule.phase, schedule.baseline) == (Phase.FROZEN, baseline)
    return schedule


class TestBurst:
    def test_k_updates_then_it_freezes(self):
        schedule, actions = feed(Burst(QUICK), 1.0, 99.0, math.nan)
        assert actions == [Action.ADAPT] * 3
        schedule, froze = step(schedule, 3)
        assert froze == [False, True, False]
        assert feed(schedule, 1.0)[1] == [Action.HOLD]

    def test_the_baseline_is_the_drift_after_settling(self):
        schedule, _ = step(Burst(QUICK), 2)
        schedule, actions = feed(schedule, 7.0, 5.0, 3.0)
        assert actions == [Action.HOLD] * 3
        assert (schedule.phase, schedule.baseline) == (Phase.FROZEN, 3.0)

    def test_it_wakes_after_enough_frames_of_high_drift(self):
        _, actions = feed(frozen(), 1.5, 1.5, 1.5, 1.5, 0.0)
        assert actions == [Action.HOLD] * 3 + [Action.WAKE] * 2

    def test_hysteresis(self):
        assert Action.WAKE not in feed(frozen(), *[1.49] * 50)[1], "between the thresholds nothing counts"
        assert Action.WAKE not in feed(frozen(), *[1.5, 1.5, 1.5, 1.2] * 20)[1], "a calm frame starts the count anew"
        assert Action.WAKE in feed(frozen(), *[1.5, 1.3] * 4)[1], "one in between does not"

    def test_a_small_drift_never_wakes_it(self):
        assert Action.WAKE not in feed(frozen(0.001), *[0.149] * 50)[1]
        assert Action.WAKE in feed(frozen(0.001), *[0.151] * 4)[1]

    def test_it_wakes_when_the_drift_falls_as_well(self):
        """What was learned in bad weather must not stay when better weather comes."""
        assert feed(frozen(), *[0.66] * 4)[1] == [Action.HOLD] * 3 + [Action.WAKE]
        assert Action.WAKE not in feed(frozen(), *[0.67] * 50)[1], "between the thresholds nothing counts"
        assert Action.WAKE not in feed(frozen(), *[0.66, 0.66, 0.66, 0.84] * 20)[1]
        assert Action.WAKE in feed(frozen(), *[0.66, 1.5] * 2)[1], "up and down are both another drift"
        assert Action.WAKE not in feed(frozen(0.12), *[0.0] * 50)[1], "small numbers are equal"

    def test_without_a_smallest_drift_zero_differs_from_everything_else(self):
        schedule = dataclasses.replace(frozen(), settings=dataclasses.replace(QUICK, min_drift=0.0))
        assert Action.WAKE in feed(schedule, *[0.0] * 4)[1]
        assert Action.WAKE not in feed(dataclasses.replace(schedule, baseline=0.0), *[0.0] * 50)[1]

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_drift_that_is_not_finite_changes_nothing(self, value: float):
        for schedule in (frozen(), step(Burst(QUICK), 2)[0]):
            assert schedule.observe(value) == (schedule, Action.HOLD)

    def test_after_a_wake_with_and_without_a_snapshot(self):
        woken, _ = feed(frozen(), *[2.0] * 4)
        assert woken.stepped() == (woken, False), "a wake is answered before steps are made"
        restored = woken.woken(True)
        assert (restored.phase, restored.settle_left) == (Phase.SETTLING, 3)
        learning = woken.woken(False)
        assert (learning.phase, learning.updates_left) == (Phase.ADAPTING, 2)

    def test_numbers_bring_it_back(self):
        for schedule in (Burst(QUICK), step(Burst(QUICK), 1)[0], frozen(1.25), feed(frozen(), 2.0, 2.0)[0]):
            assert Burst(QUICK).recall(schedule.numbers()) == schedule

    def test_numbers_of_a_schedule_that_knew_nothing(self):
        assert frozen().recall({}) == Burst(QUICK)

    @pytest.mark.parametrize(
        "change", [{"phase": 4.0}, {"phase": -1.0}, {"baseline": math.nan}, {"baseline": math.inf}, {"more": 1.0}]
    )
    def test_wrong_numbers(self, change: dict[str, float]):
        with pytest.raises(StateError, match="state: expected"):
            Burst(QUICK).recall({**frozen().numbers(), **change})

    @pytest.mark.parametrize(
        ("name", "value"),
        [("updates", 0), ("settle_frames", 0), ("patience_frames", 0), ("min_drift", -1), ("rest_ratio", 1.3)]
        + [("rest_ratio", 0.9), ("wake_ratio", math.nan), ("min_drift", math.nan)],
    )
    def test_settings(self, name: str, value: float):
        with pytest.raises(UsageError, match=r"burst\."):
            BurstSettings(**{name: value})


def test_always_and_off():
    for schedule, action in ((Always(), Action.ADAPT), (Off(), Action.HOLD)):
        assert schedule.observe(99.0) == (schedule, action)
        assert schedule.stepped() == (schedule, False)
        assert schedule.reset() is schedule.woken(True) is schedule.recall({"phase": 3.0}) is schedule
        assert schedule.numbers() == {}


def test_schedules_by_name():
    assert [schedule_of(name).name for name in SCHEDULES] == list(SCHEDULES)
    assert schedule_of("burst", QUICK) == Burst(QUICK)
    with pytest.raises(UsageError, match="adapt: expected one of auto, always, window, burst, off, found 'never'"):
        schedule_of("never")


def state(*theta: float) -> AdaptState:
    return AdaptState({"theta": np.array(theta, np.float32)})


class TestBank:
    SOURCE = state(0, 0)

    def bank(self, *snapshots: Snapshot, capacity: int = 2) -> SnapshotBank:
        bank = SnapshotBank(self.SOURCE, capacity)
        for snapshot in snapshots:
            bank = bank.keep(snapshot)
        return bank

    def test_the_one_not_used_for_longest_leaves(self):
        a, b, c = (Snapshot(state(*theta), 1.0) for theta in ((1, 0), (0, 1), (-1, 0)))
        assert self.bank(a, b, c).snapshots == (b, c)
        assert self.bank(a, b).used(a).keep(c).snapshots == (a, c)
        assert self.bank(a, b, capacity=0).snapshots == ()

    def test_one_domain_has_one_snapshot(self):
        a, again, b = (Snapshot(state(*theta), 1.0) for theta in ((1, 0), (1.1, 0.1), (0, 1)))
        assert self.bank(a, b, again).snapshots == (b, again)

    def test_the_source_is_always_a_candidate_with_the_best_fit_of_the_others(self):
        assert self.bank().candidates == (Snapshot(self.SOURCE, 0.0),)
        bank = self.bank(Snapshot(state(1, 0), 0.3), Snapshot(state(0, 1), 0.2))
        assert bank.candidates[-1] == Snapshot(self.SOURCE, 0.2)
        assert self.bank().used(self.bank().candidates[0]).snapshots == ()

    @pytest.mark.parametrize(
        ("drifts", "fits", "present", "chosen"),
        [
            ((0.5, 0.9), (0.5, 0.5), 1.0, 0),
            ((0.9, 0.5), (0.5, 0.5), 1.0, 1),
            ((0.81, 0.9), (0.9, 0.9), 1.0, None),  # hardly better than the present θ
            ((0.7, 0.9), (0.5, 0.5), 1.0, None),  # better, but not as good as it once was
            ((0.7, 0.9), (0.6, 0.5), 1.0, 0),
            ((0.5,), (0.0,), 1.0, None),
            ((math.nan, 0.5), (9.0, 9.0), 1.0, 1),
            ((math.nan, math.inf), (9.0, 9.0), 1.0, None),
            ((0.5,), (0.5,), math.nan, None),
            ((), (), 1.0, None),
        ],
    )
    def test_which_fits(self, drifts: tuple, fits: tuple, present: float, chosen: int | None):
        assert best_fit(drifts, [Snapshot(self.SOURCE, fit) for fit in fits], present) == chosen


@pytest.mark.parametrize("default", ["burst", "window"])
def test_auto_is_the_schedule_of_the_bundle_s_rule(default):
    assert schedule_of("auto", default=default).name == default
    assert schedule_of("off", default=default).name == "off"


def test_window_adapts_on_every_batch_for_ever():
    schedule = schedule_of("window")
    for _ in range(100):
        schedule, action = schedule.observe(0.0)
        assert action is Action.ADAPT
        schedule, froze = schedule.stepped()
        assert not froze
