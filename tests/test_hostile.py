"""5 % and 20 % of hostile frames: at most 2 points lost on the clean ones, and none in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hostile_stream import accuracy
from mgg_edge.runtime import Adapter, AdapterSettings, Bundle, StepLimits
from mgg_edge.runtime.adaptation.guard_canary import CanarySettings
from mgg_edge.runtime.adaptation.guard_collapse import CollapseSettings
from scripted_engine import ScriptedEngine, misled
from test_adapter_loop import OpenGate, PlainBuffer

POINTS = 2.0
UNGUARDED = AdapterSettings(
    limits=StepLimits(1e9), canary=CanarySettings(capacity=0), collapse=CollapseSettings(window=1_000_000)
)
Opener = Callable[[], Adapter]


@pytest.fixture(params=["entropy-step", "misled-step"])
def opener(request: pytest.FixtureRequest, toy_bundle: Path, loaded_toy: Bundle) -> Opener:
    if request.param == "entropy-step":
        return lambda: Adapter.open(toy_bundle, threads=1)
    return lambda: Adapter(loaded_toy, ScriptedEngine(loaded_toy, misled(loaded_toy)))


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_hostile_frames_cost_at_most_two_points_and_leave_no_trace(opener: Opener, share: float):
    with opener() as undisturbed, opener() as disturbed:
        expected, expected_last = accuracy(undisturbed, 0.0)
        found, found_last = accuracy(disturbed, share)
        refused = sum(disturbed.counters.frames_refused.values())
    assert expected > 95
    assert found >= expected - POINTS
    assert found_last >= expected_last - POINTS, "recovers"
    assert refused > 0.4 * share * 4000, "black, white and frozen ones are not learned from"


def test_positive_control_without_gate_and_guard_they_cost_more(loaded_toy: Bundle):
    def opened() -> Adapter:
        engine = ScriptedEngine(loaded_toy, misled(loaded_toy))
        return Adapter(loaded_toy, engine, gate=OpenGate(), buffer=PlainBuffer(), settings=UNGUARDED)

    assert accuracy(opened(), 0.2)[0] < accuracy(opened(), 0.0)[0] - POINTS


def test_the_guard_alone_holds_what_passes_an_open_gate(loaded_toy: Bundle):
    engine = ScriptedEngine(loaded_toy, misled(loaded_toy))
    adapter = Adapter(loaded_toy, engine, gate=OpenGate(), buffer=PlainBuffer())
    assert accuracy(adapter, 0.2)[0] > 96
    assert adapter.counters.adapt_rejected > 0
