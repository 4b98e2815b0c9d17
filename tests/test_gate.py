"""The gate: each reason alone, in order, and what must not trip it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from mgg_edge.errors import UsageError
from mgg_edge.manifest import PreprocessInfo
from mgg_edge.runtime.adaptation.gate import FrameGate, GateReason, GateSettings, Observation
from mgg_edge.runtime.preprocess import fit
from mgg_edge.runtime.sources.video import VideoSource

NOTHING = np.zeros(3, np.float32)


def scene(seed: int, level: float = 128.0, contrast: float = 30.0) -> np.ndarray:
    """A picture u8[32,32,3] whose 16 × 16 cells are constant."""
    cells = level + contrast * np.random.default_rng(seed).uniform(-1, 1, (16, 16, 1))
    return np.clip(np.repeat(np.repeat(cells, 2, 0), 2, 1).repeat(3, 2), 0, 255).astype(np.uint8)


def seen(frame: np.ndarray, time_s: float | None = None, **changes: np.ndarray) -> Observation:
    return dataclasses.replace(Observation.of(0, frame, NOTHING, NOTHING, time_s), **changes)


def verdicts(frames: list[np.ndarray], times: list[float] | None = None, gate: FrameGate | None = None) -> list:
    gate, found = gate or FrameGate(), []
    for number, frame in enumerate(frames):
        gate, reason = gate.admit(seen(frame, None if times is None else times[number]))
        found.append(reason)
    return found


def moving(count: int) -> list[np.ndarray]:
    """A scene that changes by about 3 levels a frame."""
    base = scene(0).astype(int)
    return [np.clip(base + 3 * number, 0, 255).astype(np.uint8) for number in range(count)]


class TestContent:
    @pytest.mark.parametrize(
        ("frame", "reason"),
        [
            (np.zeros((32, 32, 3), np.uint8), GateReason.DARK),
            (np.full((32, 32, 3), 255, np.uint8), GateReason.BLOWN),
            (np.full((32, 32, 3), 90, np.uint8), GateReason.FLAT),
            (scene(0, level=5, contrast=5), GateReason.DARK),
            (scene(0, level=250, contrast=5), GateReason.BLOWN),
            (scene(0, contrast=5), GateReason.FLAT),
            (scene(0, level=20, contrast=15), None),
            (scene(0, level=235, contrast=15), None),
            (scene(0), None),
        ],
    )
    def test_first_frame(self, frame: np.ndarray, reason: GateReason | None):
        assert verdicts([frame]) == [reason]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", ["logits", "features"])
    def test_what_is_not_finite(self, name: str, value: float):
        bad = NOTHING.copy()
        bad[1] = value
        gate, reason = FrameGate().admit(seen(scene(0), **{name: bad}))
        assert reason is GateReason.NOT_FINITE
        assert gate == FrameGate()

    def test_a_lens_cap_in_between_is_no_scene_cut(self):
        black = np.zeros((32, 32, 3), np.uint8)
        frames = moving(20)
        frames[10:10] = [black] * 5
        found = verdicts(frames)
        assert found[10:15] == [GateReason.DARK] * 5
        assert found[:10] + found[15:] == [None] * 20

    def test_sensor_noise_does_not_make_a_flat_picture_a_scene(self):
        noise = np.random.default_rng(0).normal(128, 8, (224, 224, 3)).astype(np.uint8)
        assert verdicts([noise]) == [GateReason.FLAT]


class TestTime:
    def test_it_must_increase(self):
        found = verdicts(moving(5), [0.0, 0.1, 0.1, 0.05, 0.2])
        assert found == [None, None, GateReason.TIME, GateReason.TIME, None]

    def test_a_clock_set_back_costs_one_frame(self):
        found = verdicts(moving(5), [1000.0, 1000.1, 3.0, 3.1, 3.2])
        assert found == [None, None, GateReason.TIME, None, None]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_times_that_are_not_finite_are_forgotten(self, value: float):
        assert verdicts(moving(3), [1.0, value, 2.0]) == [None, GateReason.TIME, None]

    def test_a_source_without_a_clock(self):
        assert verdicts(moving(3)) == [None] * 3


class TestScenes:
    def test_a_cut_and_the_frames_after_it(self):
        frames = [*moving(10), *[np.clip(scene(9).astype(int) + 3 * n, 0, 255).astype(np.uint8) for n in range(6)]]
        frames[10:] = [np.flipud(frame) // 2 for frame in frames[10:]]
        found = verdicts(frames)
        assert found[:10] == [None] * 10
        assert found[10:13] == [GateReason.SCENE_CUT] * 3
        assert set(found[13:]) <= {None, GateReason.DUPLICATE}

    def test_a_folder_of_photographs_has_no_cuts(self):
        assert verdicts([scene(seed, contrast=100) for seed in range(20)]) == [None] * 20

    def test_a_second_cut_while_settling_starts_anew(self):
        first, second, third = scene(1, 60), scene(2, 120), scene(3, 200)
        found = verdicts([*moving(10), first, second, *[third] * 5], gate=FrameGate(GateSettings(cut_ratio=1.0)))
        assert found[10:15] == [GateReason.SCENE_CUT] * 5
        assert found[15] is None

    def test_fast_motion_is_no_cut(self):
        frames = [np.roll(scene(0, contrast=80), 2 * number, axis=1) for number in range(20)]
        assert verdicts(frames) == [None] * 20


class TestDuplicates:
    def test_a_still_picture_is_admitted_once(self):
        assert verdicts([scene(0)] * 100) == [None] + [GateReason.DUPLICATE] * 99

    def test_slow_change_is_measured_from_the_frame_admitted_last(self):
        base = scene(0).astype(int)
        frames = [(base + number).astype(np.uint8) for number in range(9)]
        gate = FrameGate(GateSettings(min_difference=1.5))
        assert [reason is None for reason in verdicts(frames, gate=gate)] == [True, False] * 4 + [True]

    def test_noise_on_a_still_scene(self):
        random = np.random.default_rng(0)
        base = np.repeat(np.repeat(scene(0), 7, 0), 7, 1).astype(float)
        noisy = [np.clip(base + random.normal(0, 8, base.shape), 0, 255).astype(np.uint8) for _ in range(4)]
        assert verdicts(noisy) == [None] + [GateReason.DUPLICATE] * 3


def test_the_gate_is_immutable():
    gate = FrameGate()
    following, _ = gate.admit(seen(scene(0), 1.0))
    assert gate == FrameGate()
    assert following is not gate
    with pytest.raises(dataclasses.FrozenInstanceError):
        following.time_s = 0.0


def test_reasons_have_stable_names():
    names = ["not-finite", "time", "dark", "blown", "flat", "scene-cut", "duplicate"]
    assert [str(reason) for reason in GateReason] == names


@pytest.mark.parametrize("value", [-1.0, math.nan])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(GateSettings)])
def test_settings_are_checked(name: str, value: float):
    with pytest.raises(UsageError, match=rf"gate\.{name}: expected a number of at least 0"):
        GateSettings(**{name: value})


def test_a_street_video_is_admitted_but_for_its_cuts_and_still_moments(videos: Path):
    info = PreprocessInfo(224, 224, "shortest-side", 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)
    gate, found = FrameGate(), []
    with VideoSource(videos / "bikes.mp4") as video:
        for frame in video:
            gate, reason = gate.admit(seen(fit(frame.image, info), frame.time_s))
            found.append(reason)
    assert found.count(None) > 150
    # Its editor cut at these frames; anyone can look.
    assert [i for i in range(1, 250) if found[i] == "scene-cut" != found[i - 1]] == [30, 137, 187, 242]
    assert set(found) == {None, GateReason.SCENE_CUT, GateReason.DUPLICATE}
