"""The whole loop of an adapter: gate, buffer, schedule, guard, budget and worker together, on scripted steps."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import toy
from mgg_edge.errors import EngineError, StateError, UsageError
from mgg_edge.runtime import Adapter, AdapterSettings, Bundle, StepLimits, open_engine
from mgg_edge.runtime.adaptation.adapter_budget import Budget
from mgg_edge.runtime.adaptation.buffer import Batch
from mgg_edge.runtime.adaptation.guard_canary import CanarySettings
from mgg_edge.runtime.adaptation.guard_collapse import CollapseSettings
from mgg_edge.runtime.adaptation.guard_ladder import LadderSettings
from mgg_edge.runtime.adaptation.schedule import Always, BurstSettings, Phase
from mgg_edge.state import AdaptState
from scripted_engine import ScriptedEngine, healing, moved

FREE = StepLimits(max_update=1.0)
# Canaries of a random classifier on random frames are chance: tests that are not about them do without.
NO_CANARIES = AdapterSettings(limits=FREE, canary=CanarySettings(capacity=0))


@pytest.fixture
def engine(loaded_toy: Bundle) -> ScriptedEngine:
    return ScriptedEngine(loaded_toy, moved())


class Notes:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.frames: list[tuple] = []
        self.events: list = []

    def frame(self, seen, published, refusal) -> None:
        self.frames.append((seen.index, published, refusal))

    def event(self, event) -> None:
        self.events.append(event)

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


def run(adapter: Adapter, count: int, seed: int = 0) -> list:
    return [adapter(frame) for frame in toy.frames(count, seed)]


class TestGateAndBuffer:
    def test_frames_add_up(self, loaded_toy: Bundle, engine: ScriptedEngine):
        adapter = Adapter(loaded_toy, engine, settings=NO_CANARIES)
        black = np.zeros((8, 8, 3), np.uint8)
        for frame in toy.frames(10):
            adapter(frame, 1.0)
            adapter(frame, 2.0)
            adapter(black, 3.0)
        counters = adapter.counters
        assert counters.frames_inferred == 30
        assert counters.frames_inferred == counters.frames_admitted + sum(counters.frames_refused.values())
        assert {"time", "dark", "duplicate"} < set(counters.frames_refused)
        assert all(isinstance(name, str) and type(name) is str for name in counters.to_dict()["frames_refused"])

    def test_what_the_gate_refuses_is_never_learned_from(self, loaded_toy: Bundle, engine: ScriptedEngine):
        notes = Notes()
        adapter = Adapter(loaded_toy, engine, settings=NO_CANARIES, journal=notes)
        for number, frame in enumerate(toy.frames(20)):
            adapter(np.full((8, 8, 3), 255, np.uint8) if number % 3 == 0 else frame)
        learned = [index for event in notes.events for index in event.frames]
        assert learned == [number for number in range(20) if number % 3][: len(learned)]
        assert all(frame.max() - frame.min() > 100 for batch in engine.adapted for frame in batch)
        assert [refusal for _, _, refusal in notes.frames[::3]] == ["blown"] * 7

    def test_10_000_equal_frames_leave_theta_as_it_is(self, toy_bundle: Path):
        with Adapter.open(toy_bundle, threads=1) as adapter:
            before = adapter.state().digest()
            frame = toy.frames(1)[0]
            for _ in range(10_000):
                adapter(frame)
            assert adapter.state().digest() == before
            assert adapter.counters.frames_refused == {"duplicate": 9_999}

    def test_positive_control_without_gate_and_buffer_equal_frames_move_theta(
        self, toy_bundle: Path, loaded_toy: Bundle
    ):
        engine = open_engine(loaded_toy, threads=1)
        with Adapter(loaded_toy, engine, gate=OpenGate(), buffer=PlainBuffer(), limits=FREE) as adapter:
            frame = toy.frames(1)[0]
            for _ in range(100):
                adapter(frame)
            assert adapter.state().digest() != loaded_toy.initial_state.digest()

    def test_parts_of_one_s_own(self, loaded_toy: Bundle, engine: ScriptedEngine):
        @dataclasses.dataclass(frozen=True)
        class EverySecond(OpenGate):
            seen: int = 0

            def admit(self, seen, /):
                return dataclasses.replace(self, seen=self.seen + 1), "odd" if self.seen % 2 else None

        @dataclasses.dataclass(frozen=True)
        class Once(Always):
            name: str = "once"
            done: bool = False

            def observe(self, drift, /):
                return self, "hold" if self.done else "adapt"

            def stepped(self):
                return dataclasses.replace(self, done=True), False

        from mgg_edge.runtime.adaptation.schedule import Action

        class Typed(Once):
            def observe(self, drift, /):
                return self, Action.HOLD if self.done else Action.ADAPT

        adapter = Adapter(
            loaded_toy, engine, adapt=Typed(), gate=EverySecond(), buffer=PlainBuffer(), settings=NO_CANARIES
        )
        run(adapter, 30)
        assert adapter.schedule_name == "once"
        assert adapter.counters.frames_refused == {"odd": 15}
        assert adapter.counters.adapt_steps == 1


@dataclasses.dataclass(frozen=True)
class OpenGate:
    """Admits everything."""

    def admit(self, seen, /):
        return self, None


@dataclasses.dataclass(frozen=True)
class PlainBuffer:
    """Takes everything in order."""

    held: tuple = ()

    def add(self, seen, /):
        return dataclasses.replace(self, held=(*self.held, seen))

    def drop_old(self, index, /):
        return self

    @property
    def is_ready(self) -> bool:
        return len(self.held) >= toy.BATCH

    def batch(self) -> Batch:
        held = self.held[: toy.BATCH]
        return Batch(np.stack([seen.frame for seen in held]), tuple(seen.index for seen in held))

    def clear(self):
        return PlainBuffer()


HOSTILE = {
    "black": np.zeros((8, 8, 3), np.uint8),
    "white": np.full((8, 8, 3), 255, np.uint8),
    "grey": np.full((8, 8, 3), 128, np.uint8),
    "torn": np.concatenate([toy.frames(1, 9)[0][:4], np.full((4, 8, 3), 128, np.uint8)]),
    "frozen": toy.frames(1, 8)[0],
    "nan": np.full((8, 8, 3), np.nan, np.float32),
    "inf": np.full((8, 8, 3), np.inf, np.float32),
    "shape": np.zeros((8, 3), np.uint8),
    "channels": np.zeros((8, 8, 4), np.uint8),
    "empty": np.zeros((0, 8, 3), np.uint8),
    "nothing": None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_commit_nothing_that_is_not_finite(toy_bundle: Path, name: str):
    notes = Notes()
    with Adapter.open(toy_bundle, threads=1, journal=notes) as adapter:
        time_s, refused = 0.0, 0
        for frame in toy.frames(60, seed=4):
            time_s += -0.01 if name == "frozen" else 0.04  # and time that runs backwards
            adapter(frame, time_s)
            try:
                adapter(HOSTILE[name], time_s + 0.001)
            except UsageError:
                refused += 1
            assert np.isfinite(adapter.state()["theta"]).all()
        assert refused == (60 if HOSTILE[name] is None or name in ("nan", "inf", "shape", "channels", "empty") else 0)
    before = Bundle.load(toy_bundle).initial_state
    for event in notes.events:
        assert event.state.non_finite() is None
        if event.kind == "refuse":
            assert event.state.digest() == before.digest()
        before = event.state


class TestBatches:
    def test_a_batch_equals_frames_one_by_one(self, toy_bundle: Path):
        frames = toy.frames(4)
        with Adapter.open(toy_bundle, threads=1) as single, Adapter.open(toy_bundle, threads=1) as several:
            one = [single(frame, number) for number, frame in enumerate(frames)]
            many = several.predict_batch(frames, range(4))
            assert [p.logits.tobytes() for p in one] == [p.logits.tobytes() for p in many]
            assert [(p.label, p.step) for p in one] == [(p.label, p.step) for p in many]
            assert single.state().digest() == several.state().digest()
            assert several.counters == single.counters
            assert several.counters.adapt_steps == 1

    def test_frames_of_different_sizes(self, toy_bundle: Path):
        with Adapter.open(toy_bundle, adapt="off") as adapter:
            frames = [np.full((*size, 3), 90, np.uint8) for size in ((8, 8), (30, 40), (1, 1))]
            assert len(adapter.predict_batch(frames)) == 3
            assert adapter.predict_batch([]) == []
            assert adapter.counters.frames_inferred == 3

    def test_times_must_be_one_a_frame(self, toy_bundle: Path):
        with Adapter.open(toy_bundle) as adapter, pytest.raises(UsageError, match="times_s: expected 4 times"):
            adapter.predict_batch(toy.frames(4), [0.0])

    def test_one_bad_frame_refuses_the_batch_whole(self, toy_bundle: Path):
        with Adapter.open(toy_bundle) as adapter:
            with pytest.raises(UsageError):
                adapter.predict_batch([toy.frames(1)[0], np.zeros(3)])
            assert adapter.counters.frames_inferred == 0


@pytest.fixture
def blocked(loaded_toy: Bundle, engine: ScriptedEngine) -> Iterator[Adapter]:
    """An adapter in the background whose first step waits for `engine.gate`."""
    engine.gate.clear()
    adapter = Adapter(loaded_toy, engine, background=True, settings=NO_CANARIES)
    run(adapter, 4)
    assert engine.begun.wait(10)
    yield adapter
    engine.gate.set()
    adapter.close()


class TestBackground:
    def test_inference_never_waits_for_a_step(self, blocked: Adapter, engine: ScriptedEngine):
        predictions = run(blocked, 200, seed=1)
        assert {p.step for p in predictions} == {0}
        assert blocked.counters.frames_inferred == 204
        assert blocked.counters.adapt_steps == 0
        engine.gate.set()
        blocked.drain()
        assert blocked.counters.adapt_steps == 1
        assert run(blocked, 1, seed=2)[0].step >= 1

    def test_positive_control_in_the_foreground_it_waits(self, loaded_toy: Bundle, engine: ScriptedEngine):
        engine.gate.clear()
        adapter = Adapter(loaded_toy, engine, settings=NO_CANARIES)
        caller = threading.Thread(target=run, args=(adapter, 10))
        caller.start()
        assert engine.begun.wait(10)
        time.sleep(0.05)
        assert adapter.counters.frames_inferred == 4
        engine.gate.set()
        caller.join()

    def test_the_batch_that_waits_is_of_recent_frames(self, blocked: Adapter, engine: ScriptedEngine):
        run(blocked, 2000, seed=1)
        engine.gate.set()
        blocked.drain()
        run(blocked, 1, seed=2)
        blocked.drain()
        assert len(engine.adapted) == 2
        late = toy.frames(2000, seed=1)[500:]
        assert all((late == frame).all(axis=(1, 2, 3)).any() for frame in engine.adapted[1][:-1])

    def test_a_state_loaded_meanwhile_makes_the_step_void(self, blocked: Adapter, engine: ScriptedEngine):
        loaded = AdaptState({**blocked.state(), "theta": blocked.state()["theta"] + np.float32(0.5)})
        blocked.load_state(loaded)
        engine.gate.set()
        blocked.drain()
        assert blocked.state().digest() == loaded.digest()
        assert blocked.counters.adapt_steps == 0
        run(blocked, 4, seed=3)
        blocked.drain()
        np.testing.assert_array_equal(blocked.state()["theta"], loaded["theta"] + np.float32(0.01))

    def test_logits_that_are_not_finite_lead_back_to_the_source_without_waiting(
        self, blocked: Adapter, loaded_toy: Bundle, engine: ScriptedEngine
    ):
        huge = np.full(toy.THETA, 3e38, np.float32)
        blocked.load_state(AdaptState({**blocked.state(), "theta": huge}))
        (prediction,) = run(blocked, 1, seed=5)
        assert np.isfinite(prediction.logits).all()
        assert not prediction.adapted
        engine.gate.set()
        blocked.drain()
        assert blocked.state().digest() == loaded_toy.initial_state.digest()
        assert blocked.counters.rejected == {"non-finite": 1}

    def test_what_nobody_foresaw_ends_adaptation_and_not_inference(
        self, loaded_toy: Bundle, caplog: pytest.LogCaptureFixture
    ):
        def broken(state, frames):
            raise ZeroDivisionError("a bug")

        adapter = Adapter(loaded_toy, ScriptedEngine(loaded_toy, broken), background=True)
        with caplog.at_level(logging.ERROR):
            run(adapter, 4)
            adapter.drain()
        assert isinstance(adapter.failure, ZeroDivisionError)
        assert "a bug" in caplog.text
        assert len(run(adapter, 50)) == 50
        adapter.close()

    def test_closing_waits_for_the_step_and_leaves_no_thread(self, loaded_toy: Bundle, engine: ScriptedEngine):
        before = threading.active_count()
        with Adapter(loaded_toy, engine, background=True, settings=NO_CANARIES) as adapter:
            run(adapter, 40)
        assert threading.active_count() == before
        assert adapter.counters.adapt_steps == len(engine.adapted) >= 1
        adapter.close()

    @pytest.mark.skipif(os.uname().sysname != "Linux", reason="threads have priorities of their own on Linux only")
    def test_steps_are_made_at_the_lowest_priority(self, loaded_toy: Bundle):
        found = []

        def look(state, frames):
            found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return moved()(state, frames)

        with Adapter(loaded_toy, ScriptedEngine(loaded_toy, look), background=True) as adapter:
            run(adapter, 4)
            adapter.drain()
        assert found == [19]
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19, "inference keeps its own"

    def test_off_starts_no_thread(self, toy_bundle: Path):
        before = threading.active_count()
        with Adapter.open(toy_bundle, adapt="off", background=True):
            assert threading.active_count() == before

    def test_every_prediction_is_of_one_whole_state(self, toy_bundle: Path, loaded_toy: Bundle):
        """No torn θ: each prediction equals, bit for bit, plain inference under the state of its version."""
        notes, frames = Notes(), toy.frames(3000)
        with Adapter.open(toy_bundle, threads=1, background=True, journal=notes) as adapter:
            predictions = [adapter(frame) for frame in frames]
            adapter.drain()
            assert adapter.counters.adapt_steps > 5
        plain = open_engine(loaded_toy, threads=1, with_adapt=False)
        versions = set()
        for (index, published, _), prediction in zip(notes.frames, predictions, strict=True):
            versions.add(published.version)
            logits, _ = plain.infer(frames[index][None], published.state)
            assert logits[0].tobytes() == prediction.logits.tobytes()
            assert (published.step, published.adapted) == (prediction.step, prediction.adapted)
        assert len(versions) > 10
        plain.close()

    def test_several_threads_share_an_adapter(self, toy_bundle: Path):
        with Adapter.open(toy_bundle, threads=1, background=True) as adapter:
            threads = [threading.Thread(target=run, args=(adapter, 200, seed)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            adapter.drain()
            counters = adapter.counters
            assert counters.frames_inferred == 800
            assert counters.frames_inferred == counters.frames_admitted + sum(counters.frames_refused.values())
            assert adapter.state().non_finite() is None


class TestBudget:
    def test_a_step_expected_to_take_longer_is_not_begun(self):
        budget, late = Budget(limit_ms=10).measured(11)
        assert late
        asked = []
        for _ in range(40):
            budget, refusal = budget.ask(True, False, 0.0)
            asked.append(refusal)
        assert [number for number, refusal in enumerate(asked) if refusal is None] == [15, 31]
        assert set(asked) == {None, "budget"}

    def test_it_recovers_with_the_median(self):
        budget = Budget(limit_ms=10)
        for elapsed_ms in (50, 9, 9):
            budget, _ = budget.measured(elapsed_ms)
        assert budget.ask(True, False, 0.0)[1] is None

    def test_work_that_waits_longer_than_the_budget_is_dropped(self):
        budget, refusal = Budget(limit_ms=10).ask(True, True, 1.0)
        assert refusal is None
        budget, refusal = budget.ask(True, True, 1.009)
        assert refusal is None
        budget, refusal = budget.ask(True, True, 1.0101)
        assert refusal == "busy"
        assert budget.due_s is None

    def test_without_a_limit_nothing_is_refused(self):
        budget, late = Budget().measured(1e9)
        assert not late
        assert budget.ask(True, True, 1e9)[1] is None

    def test_in_the_loop(self, loaded_toy: Bundle):
        def slow(state, frames):
            time.sleep(0.02)
            return moved()(state, frames)

        settings = dataclasses.replace(NO_CANARIES, budget_ms=5)
        adapter = Adapter(loaded_toy, ScriptedEngine(loaded_toy, slow), settings=settings)
        run(adapter, 4 * 16)
        counters = adapter.counters
        assert (counters.adapt_steps, counters.adapt_late) == (1, 1)
        assert counters.adapt_dropped == {"budget": 15}
        run(adapter, 4)
        assert adapter.counters.adapt_steps == 2, "every sixteenth is tried"

    def test_late_work_in_the_background(self, loaded_toy: Bundle, engine: ScriptedEngine):
        engine.gate.clear()
        settings = dataclasses.replace(NO_CANARIES, budget_ms=1)
        with Adapter(loaded_toy, engine, background=True, settings=settings) as adapter:
            run(adapter, 8)
            time.sleep(0.01)
            run(adapter, 1, seed=1)
            assert adapter.counters.adapt_dropped == {"busy": 1}
            engine.gate.set()

    @pytest.mark.parametrize("value", [0, -1, math.nan])
    def test_settings(self, value: float):
        with pytest.raises(UsageError, match="budget_ms: expected a number above 0"):
            AdapterSettings(budget_ms=value)


def domain(seed: int, count: int = 4000) -> Iterator[np.ndarray]:
    """Frames of one of several looks: a fixed pattern over changing noise."""
    pattern = np.random.default_rng(100 + seed).uniform(-90, 90, (8, 8, 3))
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield np.clip(128 + pattern + random.normal(0, 12, (8, 8, 3)), 0, 255).astype(np.uint8)


class TestBurst:
    SETTINGS = dataclasses.replace(
        NO_CANARIES,
        burst=BurstSettings(updates=12, settle_frames=64, wake_ratio=1.3, rest_ratio=1.1, patience_frames=16),
        drift_window_frames=16,
    )

    def adapter(self, bundle: Bundle, **options) -> Adapter:
        return Adapter(
            bundle, ScriptedEngine(bundle, healing(bundle)), adapt="burst", settings=self.SETTINGS, **options
        )

    def show(self, adapter: Adapter, seed: int, count: int) -> int:
        """Updates made while a domain was shown."""
        before = adapter.counters.adapt_steps
        for frame in domain(seed, count):
            adapter(frame)
        return adapter.counters.adapt_steps - before

    def test_it_freezes_wakes_learns_and_restores_what_it_knew(self, loaded_toy: Bundle):
        notes = Notes()
        adapter = self.adapter(loaded_toy, journal=notes)
        assert self.show(adapter, 1, 600) == 12
        known, low = adapter.state().digest(), adapter.drift
        assert self.show(adapter, 2, 600) == 12, "another domain wakes it"
        assert adapter.counters.wakes == 1
        assert adapter.counters.restores == 0
        assert self.show(adapter, 1, 600) == 0, "the first one is known"
        assert (adapter.counters.wakes, adapter.counters.restores) == (2, 1)
        assert adapter.state().digest() == known
        assert adapter.drift == pytest.approx(low, rel=0.2)
        assert self.show(adapter, 2, 600) == 0
        assert adapter.counters.restores == 2
        reasons = [event.reason for event in notes.events if event.kind == "restore"]
        assert reasons == ["source", "fits", "fits"], "domain 2 is learned from the source, not from domain 1"

    def test_a_domain_that_stays_costs_nothing_more(self, loaded_toy: Bundle):
        adapter = self.adapter(loaded_toy)
        self.show(adapter, 1, 300)
        engine = adapter._engine
        probes = engine.probes
        assert self.show(adapter, 1, 2000) == 0
        assert engine.probes - probes == 2000, "one inference a frame, no more"
        assert adapter.counters.wakes == 0

    def test_back_to_the_source_s_own_domain_restores_the_source(self, loaded_toy: Bundle):
        adapter = self.adapter(loaded_toy)
        # Statistics of a domain the source fits: those of its own features.
        features = toy.reference_infer(np.stack(list(domain(5, 400))), toy.initial_state()["theta"], toy.weights())[1]
        weights = {**loaded_toy.weights, "statistics.mean": features.mean(0), "statistics.std": features.std(0) + 0.1}
        bundle = dataclasses.replace(loaded_toy, weights=weights)
        adapter = self.adapter(bundle)
        self.show(adapter, 5, 400)
        self.show(adapter, 2, 400)
        assert adapter.adapted
        self.show(adapter, 5, 400)
        assert adapter.drift is not None
        assert adapter.drift < 0.3

    def test_a_wake_infers_the_batch_once_for_each_state(self, loaded_toy: Bundle):
        adapter = self.adapter(loaded_toy)
        self.show(adapter, 1, 600)
        engine, costs = adapter._engine, []
        for frame in domain(2, 300):
            before = engine.probes
            adapter(frame)
            costs.append(engine.probes - before - 1)
        assert adapter.counters.wakes == 1
        # the present state, which is the one snapshot there is, then the source, then the step's own forward pass
        assert next(cost for cost in costs if cost) == 3 * toy.BATCH

    def test_a_covered_lens_does_not_wake_it(self, loaded_toy: Bundle):
        adapter = self.adapter(loaded_toy)
        self.show(adapter, 1, 400)
        for _ in range(500):
            adapter(np.zeros((8, 8, 3), np.uint8))
        assert adapter.counters.wakes == 0

    def test_in_the_background(self, loaded_toy: Bundle):
        with self.adapter(loaded_toy, background=True) as adapter:
            for seed in (1, 2, 1):
                for frame in domain(seed, 600):
                    adapter(frame)
                    adapter.drain()
            assert (adapter.counters.adapt_steps, adapter.counters.restores) == (24, 1)

    def test_a_bundle_without_statistics(self, loaded_toy: Bundle):
        weights = {name: value for name, value in loaded_toy.weights.items() if not name.startswith("statistics")}
        bundle = dataclasses.replace(loaded_toy, weights=weights)
        with pytest.raises(UsageError, match="source statistics"):
            self.adapter(bundle)


class TestGuard:
    def test_10_000_adversarial_steps_stay_within_the_ball(self, loaded_toy: Bundle):
        random = np.random.default_rng(0)
        direction = random.choice([-1, 1], toy.THETA).astype(np.float32)

        def outward(state, frames):
            push = np.where(random.random(toy.THETA) < 0.9, direction, -direction) * np.float32(0.0999)
            return {**state, "theta": state["theta"] + push, "step": state["step"] + 1}

        ratios = self.adversarial(loaded_toy, outward, AdapterSettings(canary=CanarySettings(capacity=0)))
        assert len(ratios) == 10_000
        assert max(ratios) <= 1 + 1e-6
        assert max(ratios) > 0.9, "the bound was reached"

    def test_positive_control_without_the_ball_they_leave_it(self, loaded_toy: Bundle):
        settings = AdapterSettings(limits=StepLimits(0.1), canary=CanarySettings(capacity=0))
        ratios = self.adversarial(loaded_toy, moved(0.09), settings, count=500)
        assert max(ratios) > 10

    def adversarial(self, bundle: Bundle, propose, settings: AdapterSettings, count: int = 10_000) -> list[float]:
        from mgg_edge.runtime.adaptation.adapter_events import Work
        from mgg_edge.runtime.adaptation.guard import default_limits, drift_ratio
        from mgg_edge.runtime.adaptation.schedule import Action

        adapter = Adapter(bundle, ScriptedEngine(bundle, propose), settings=settings)
        work = Work(Action.ADAPT, Batch(toy.frames(toy.BATCH), (0, 1, 2, 3)))
        limits = default_limits(bundle.manifest.rule, bundle.initial_state)
        ratios = []
        for _ in range(count):
            adapter._learner.perform(work)
            ratios.append(drift_ratio(adapter.state(), bundle.initial_state, limits))
        assert adapter.counters.adapt_steps + adapter.counters.adapt_rejected == count
        return ratios

    SETTINGS = AdapterSettings(
        limits=FREE,
        canary=CanarySettings(min_probability=0.6, min_frames=2, per_class=3),
        ladder=LadderSettings(verify_every=2, refusals=3, freeze_frames=40),
    )

    def test_canaries_bring_back_the_last_good_state(self, loaded_toy: Bundle):
        """Steps that are small and finite and turn the classifier round: only canaries notice."""

        def turn(state, frames):
            theta = state["theta"].copy()
            theta[: toy.FEATURES] -= np.float32(0.3)  # γ from 1 to −1 in seven steps
            return {**state, "theta": theta, "step": state["step"] + 1}

        notes = Notes()
        adapter = Adapter(loaded_toy, ScriptedEngine(loaded_toy, turn), settings=self.SETTINGS, journal=notes)
        run(adapter, 200)
        assert adapter.counters.rejected.get("canary", 0) > 0
        assert "rollback" in notes.kinds
        assert adapter.state()["theta"][0] > 0
        without = dataclasses.replace(self.SETTINGS, canary=CanarySettings(capacity=0))
        careless = Adapter(loaded_toy, ScriptedEngine(loaded_toy, turn), settings=without)
        run(careless, 200)
        assert careless.state()["theta"][0] < -1, "positive control"

    def test_collapse_is_noticed(self, loaded_toy: Bundle):
        """β towards one class: everything becomes that class."""
        towards = loaded_toy.weights["backbone.head"][:, 0]

        def collapse(state, frames):
            theta = state["theta"].copy()
            theta[toy.FEATURES :] += 0.2 * towards / np.abs(towards).max()
            return {**state, "theta": theta, "step": state["step"] + 1}

        settings = dataclasses.replace(
            self.SETTINGS,
            canary=CanarySettings(capacity=0),
            collapse=CollapseSettings(window=16, min_probability=0.3),
        )
        adapter = Adapter(loaded_toy, ScriptedEngine(loaded_toy, collapse), settings=settings)
        labels = {p.label for p in run(adapter, 400)[-60:]}
        assert adapter.counters.rejected.get("collapse", 0) > 0
        assert len(labels) > 1
        off = dataclasses.replace(settings, collapse=CollapseSettings(window=100_000))
        careless = Adapter(loaded_toy, ScriptedEngine(loaded_toy, collapse), settings=off)
        assert len({p.label for p in run(careless, 400)[-60:]}) == 1, "positive control"

    def test_the_ladder_ends_frozen_with_the_source_and_thaws(self, loaded_toy: Bundle):
        def bad(state, frames):
            return {**state, "theta": state["theta"] + np.float32(5)}

        engine = ScriptedEngine(loaded_toy, moved(0.001))
        adapter = Adapter(loaded_toy, engine, settings=dataclasses.replace(self.SETTINGS, canary=CanarySettings(0)))
        run(adapter, 4 * 41)  # one commit after the last verification
        assert adapter.adapted
        engine.propose = bad
        run(adapter, 4 * 3 * 4, seed=1)
        assert list(adapter.counters.rollbacks) == ["last-good", "older", "source", "frozen"]
        assert adapter.state().digest() == loaded_toy.initial_state.digest()
        steps = len(engine.adapted)
        run(adapter, 39, seed=2)
        assert len(engine.adapted) == steps, "frozen"
        engine.propose = moved(0.001)
        run(adapter, 60, seed=3)
        assert len(engine.adapted) > steps, "thawed"
        assert adapter.adapted

    def test_a_failing_engine_is_no_reason_to_give_up_what_was_learned(self, loaded_toy: Bundle):
        engine = ScriptedEngine(loaded_toy, moved(0.001))
        adapter = Adapter(loaded_toy, engine, settings=NO_CANARIES)
        run(adapter, 40)
        before = adapter.state().digest()

        def broken(state, frames):
            raise EngineError("lost the device")

        engine.propose = broken
        run(adapter, 400, seed=1)
        assert adapter.state().digest() == before
        assert adapter.counters.rejected == {"engine": 100}
        assert adapter.counters.rollbacks == {}

    def test_verification_costs_inferences_only_when_it_is_due(self, loaded_toy: Bundle):
        engine = ScriptedEngine(loaded_toy, moved(0.001))
        settings = AdapterSettings(limits=FREE, ladder=LadderSettings(verify_every=5))
        adapter = Adapter(loaded_toy, engine, settings=settings)
        costs = []
        for frame in toy.frames(4 * 10):
            before = engine.probes
            adapter(frame)
            costs.append(engine.probes - before - 1)
        steps = costs[3::4]
        assert [cost > toy.BATCH for cost in steps] == [False, False, False, False, True] * 2
        assert all(cost == 0 for number, cost in enumerate(costs) if number % 4 != 3)


class TestCheckpoints:
    @pytest.mark.parametrize("adapt", ["always", "burst"])
    @pytest.mark.parametrize("cut", [40, 400, 620, 1000])
    def test_a_resumed_run_goes_on_bit_for_bit(self, loaded_toy: Bundle, adapt: str, cut: int):
        settings = dataclasses.replace(TestBurst.SETTINGS, canary=CanarySettings(capacity=0))
        frames = [frame for seed in (1, 2, 1) for frame in domain(seed, 600)]

        def fresh() -> Adapter:
            return Adapter(loaded_toy, ScriptedEngine(loaded_toy, healing(loaded_toy)), adapt=adapt, settings=settings)

        first = fresh()
        for frame in frames[:cut]:
            first(frame)
        # From a moment when no pictures are held: what a state file does not keep.
        watch = first._learner.watch
        first._learner.watch = dataclasses.replace(watch, buffer=watch.buffer.clear(), gate=type(watch.gate)())
        second = fresh()
        second.resume(first.checkpoint())
        for number, frame in enumerate(frames[cut:]):
            one, two = first(frame), second(frame)
            assert one.logits.tobytes() == two.logits.tobytes(), number
            assert (one.step, one.adapted) == (two.step, two.adapted)
        assert first.state().digest() == second.state().digest()
        assert first.counters.restores == (adapt == "burst")

    def test_another_bundle_is_refused_with_both_ids(self, loaded_toy: Bundle, engine: ScriptedEngine):
        adapter = Adapter(loaded_toy, engine)
        other = dataclasses.replace(adapter.checkpoint(), bundle_id="f" * 64)
        with pytest.raises(StateError, match=f"{loaded_toy.id}.*{'f' * 64}"):
            adapter.resume(other)

    @pytest.mark.parametrize(
        "change",
        [
            {"state": AdaptState({"theta": np.zeros(3, np.float32)})},
            {"older": AdaptState({"theta": np.zeros(3, np.float32)})},
            {"snapshots": ((AdaptState({"theta": np.zeros(3, np.float32)}), 1.0),)},
            {"ladder_numbers": {"rung": 9, "commits": 0, "verifications": 0, "refused": 0, "frozen_frames": 0}},
            {"ladder_numbers": {"rung": -1, "commits": 0, "verifications": 0, "refused": 0, "frozen_frames": 0}},
            {"ladder_numbers": {}},
        ],
    )
    def test_what_does_not_fit_is_refused_and_changes_nothing(self, loaded_toy: Bundle, engine: ScriptedEngine, change):
        adapter = Adapter(loaded_toy, engine, settings=NO_CANARIES)
        run(adapter, 8)
        before = adapter.state().digest()
        with pytest.raises(StateError):
            adapter.resume(dataclasses.replace(adapter.checkpoint(), **change))
        assert adapter.state().digest() == before

    def test_another_schedule_starts_anew(self, loaded_toy: Bundle, engine: ScriptedEngine):
        adapter = Adapter(loaded_toy, engine, settings=NO_CANARIES)
        run(adapter, 8)
        other = Adapter(loaded_toy, ScriptedEngine(loaded_toy, moved()), adapt="burst", settings=NO_CANARIES)
        other.resume(adapter.checkpoint())
        assert other.state().digest() == adapter.state().digest()
        assert other._learner.watch.schedule.phase is Phase.ADAPTING
