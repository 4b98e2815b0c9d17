"""The micro-buffer takes distinct frames and is immutable."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest

from mgg_edge.errors import UsageError
from mgg_edge.manifest import PreprocessInfo
from mgg_edge.runtime.buffer import MIN_DIFFERENCE_LEVELS, FrameBuffer, thumbnail
from mgg_edge.runtime.preprocess import fit


def flat(level: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def fill(*levels: int, capacity: int = 4) -> FrameBuffer:
    buffer = FrameBuffer(capacity)
    for level in levels:
        buffer = buffer.add(flat(level))
    return buffer


def test_fills_with_distinct_frames():
    buffer = fill(10, 20, 30, 40)
    assert buffer.is_full
    assert buffer.batch().shape == (4, 32, 32, 3)
    assert buffer.batch()[:, 0, 0, 0].tolist() == [10, 20, 30, 40]


def test_near_duplicates_of_any_held_frame_are_left_out():
    buffer = fill(10, 20, 11, 10, 21, 19)
    assert [int(frame[0, 0, 0]) for frame in buffer.frames] == [10, 20]


@pytest.mark.parametrize(("difference", "held"), [(int(MIN_DIFFERENCE_LEVELS) - 1, 1), (int(MIN_DIFFERENCE_LEVELS), 2)])
def test_the_threshold(difference: int, held: int):
    # Luma weights sum to 1 only up to float32 rounding: exactly representable levels keep the bound exact enough.
    assert len(fill(0, difference).frames) == held


def test_a_full_buffer_stays_as_it_is():
    buffer = fill(10, 20, capacity=2)
    assert buffer.add(flat(200)) is buffer


def test_adding_changes_nothing_in_place():
    first = fill(10)
    second = first.add(flat(50))
    assert (len(first.frames), len(second.frames)) == (1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.capacity = 3


def test_frames_are_copied_as_callers_reuse_memory():
    picture = flat(10)
    buffer = FrameBuffer(2).add(picture)
    picture[:] = 99
    assert buffer.frames[0].max() == 10


def test_clear_keeps_the_capacity():
    assert fill(10, 20).clear() == FrameBuffer(4)


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
        buffer = buffer.add(frame)
    assert len(buffer.frames) == 1


def test_a_moving_street_scene_fills_batches(videos: Path):
    info = PreprocessInfo(224, 224, "shortest-side", 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)
    buffer, batches = FrameBuffer(8), 0
    with av.open(str(videos / "bikes.mp4")) as container:
        for frame in container.decode(video=0):
            buffer = buffer.add(fit(frame, info))
            if buffer.is_full:
                buffer, batches = buffer.clear(), batches + 1
    assert 5 <= batches < 250 // 8, "every frame, or hardly any, counts as distinct"
