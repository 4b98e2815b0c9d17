"""The micro-buffer takes distinct frames and is immutable."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest

from mgg_edge.errors import UsageError
from mgg_edge.manifest import PreprocessInfo
from mgg_edge.runtime.adaptation.buffer import MIN_DIFFERENCE_LEVELS, FrameBuffer
from mgg_edge.runtime.adaptation.gate import Observation
from mgg_edge.runtime.adaptation.gate_thumbnail import difference_levels, thumbnail
from mgg_edge.runtime.preprocess import fit


def flat(level: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def seen(frame: np.ndarray, index: int = 0) -> Observation:
    nothing = np.zeros(1, np.float32)
    return Observation.of(index, frame, nothing, nothing)


def fill(*levels: int, capacity: int = 4, **settings: int) -> FrameBuffer:
    buffer = FrameBuffer(capacity, **settings)
    for index, level in enumerate(levels):
        buffer = buffer.add(seen(flat(level), index))
    return buffer


def levels(buffer: FrameBuffer) -> list[int]:
    return [int(one.frame[0, 0, 0]) for one in buffer.held]


def test_fills_with_distinct_frames():
    buffer = fill(10, 20, 30, 40)
    assert buffer.is_ready
    batch = buffer.batch()
    assert (batch.frames.shape, batch.frames.dtype) == ((4, 32, 32, 3), np.uint8)
    assert batch.frames[:, 0, 0, 0].tolist() == [10, 20, 30, 40]
    assert batch.indices == (0, 1, 2, 3)


def test_near_duplicates_of_any_held_frame_are_left_out():
    assert levels(fill(10, 20, 11, 10, 21, 19)) == [10, 20]


@pytest.mark.parametrize(("difference", "held"), [(int(MIN_DIFFERENCE_LEVELS) - 1, 1), (int(MIN_DIFFERENCE_LEVELS), 2)])
def test_the_threshold(difference: int, held: int):
    # Luma weights sum to 1 only up to float32 rounding: exactly representable levels keep the bound exact enough.
    assert len(fill(0, difference).held) == held


def test_a_full_buffer_gives_up_the_older_one_of_its_closest_pair_for_a_more_distant_frame():
    assert levels(fill(10, 20, 100, 200, 150)) == [20, 100, 200, 150]


def test_a_full_buffer_refuses_a_frame_closer_than_its_closest_pair():
    assert levels(fill(10, 20, 100, 200, 107)) == [10, 20, 100, 200]
    assert levels(fill(10, 20, 100, 200, 110)) == [10, 20, 100, 200], "as close is not better"


def test_the_least_distance_within_a_full_buffer_never_falls():
    random = np.random.default_rng(0)
    buffer, least = FrameBuffer(6), 0.0
    for index in range(400):
        buffer = buffer.add(seen(random.integers(0, 256, (16, 16, 3), np.uint8) // random.integers(1, 9), index))
        apart = [difference_levels(a.thumbnail, b.thumbnail) for a in buffer.held for b in buffer.held if a is not b]
        assert buffer.distances[np.isfinite(buffer.distances)].min(initial=np.inf) == pytest.approx(
            min(apart, default=np.inf)
        )
        if len(buffer.held) == 6:
            assert min(apart) >= least
            least = min(apart)
    assert least > 10


def test_frames_leave_when_they_are_too_old():
    buffer = fill(10, 20, 30, max_age_frames=5)
    assert levels(buffer.drop_old(5)) == [10, 20, 30]
    assert levels(buffer.drop_old(6)) == [20, 30]
    assert levels(buffer.add(seen(flat(90), 7))) == [30, 90]
    assert levels(buffer.drop_old(100)) == []
    assert buffer.drop_old(100).add(seen(flat(10), 100)).held[0].index == 100


def test_patience_waits_for_more_frames_than_the_batch_holds():
    assert fill(10, 60, 110, 160).is_ready
    patient = fill(10, 60, 110, 160, patience_frames=6)
    assert not patient.is_ready
    more = patient.add(seen(flat(210), 4)).add(seen(flat(211), 5))
    assert more.is_ready
    assert not more.clear().is_ready
    assert more.clear().offered == 0


def test_adding_changes_nothing_in_place():
    first = fill(10)
    second = first.add(seen(flat(50)))
    assert (len(first.held), len(second.held)) == (1, 2)
    assert (first.distances.shape, second.distances.shape) == ((1, 1), (2, 2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.capacity = 3


def test_frames_are_copied_as_callers_reuse_memory():
    picture = flat(10)
    buffer = FrameBuffer(2).add(seen(picture))
    picture[:] = 99
    assert buffer.held[0].frame.max() == 10


def test_clear_keeps_the_settings():
    cleared = fill(10, 20, max_age_frames=7, patience_frames=9).clear()
    assert (cleared.capacity, cleared.max_age_frames, cleared.patience_frames) == (4, 7, 9)
    assert (cleared.held, cleared.distances.size) == ((), 0)


def test_a_batch_of_a_buffer_that_is_not_full():
    with pytest.raises(UsageError, match="buffer: expected 4 frames, found 1"):
        fill(10).batch()


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (15, 17), (16, 16), (224, 224), (223, 97)])
def test_thumbnail_is_the_mean_luma_of_cells(size: tuple[int, int]):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    small = thumbnail(picture)
    assert small.shape == tuple(min(16, extent) for extent in size)
    luma = picture @ np.array([0.299, 0.587, 0.114])
    rows, columns = (np.arange(min(16, extent) + 1) * extent // min(16, extent) for extent in size)
    for row in {0, small.shape[0] - 1}:
        for column in {0, small.shape[1] - 1}:
            cell = luma[rows[row] : rows[row + 1], columns[column] : columns[column + 1]]
            assert small[row, column] == pytest.approx(cell.mean(), abs=1e-3)


def test_thumbnail_of_a_bright_large_picture_does_not_overflow():
    assert thumbnail(flat(255, 2048, 2048)).max() == pytest.approx(255, abs=1e-2)


def test_sensor_noise_is_not_a_new_frame():
    random = np.random.default_rng(0)
    scene = random.integers(0, 256, (224, 224, 3)).astype(float)
    noisy = [np.clip(scene + random.normal(0, 8, scene.shape), 0, 255).astype(np.uint8) for _ in range(3)]
    buffer = FrameBuffer(4)
    for frame in noisy:
        buffer = buffer.add(seen(frame))
    assert len(buffer.held) == 1


def test_a_moving_street_scene_fills_batches(videos: Path):
    info = PreprocessInfo(224, 224, "shortest-side", 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)
    buffer, batches = FrameBuffer(8), 0
    with av.open(str(videos / "bikes.mp4")) as container:
        for frame in container.decode(video=0):
            buffer = buffer.add(seen(fit(frame, info)))
            if buffer.is_ready:
                buffer, batches = buffer.clear(), batches + 1
    assert 5 <= batches < 250 // 8, "every frame, or hardly any, counts as distinct"
