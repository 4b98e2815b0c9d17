"""Nothing grows: 20,000 frames here, 1,000,000 by `scripts/soak`."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from soak import LIMIT_MIB, soak

FRAMES = 20_000


def test_memory_descriptors_and_threads_stay_as_they_are(toy_bundle: Path) -> None:
    report = soak(toy_bundle, FRAMES)
    assert not report.failures, report
    assert report.frames + report.dropped == FRAMES
    assert report.adapt_steps > 100


def test_control_a_leak_of_memory_is_found(toy_bundle: Path) -> None:
    frames = 800
    size = int(LIMIT_MIB * 2**20 * 4 / frames)  # twice what is allowed, over half of the run

    def leak() -> mmap.mmap:
        memory = mmap.mmap(-1, size)  # from the system: freed memory of other tests must not be used up first
        memory.write(bytes(size))
        return memory

    report = soak(toy_bundle, frames, leak=leak)
    assert any("memory grew" in failure for failure in report.failures), report


def test_control_a_leak_of_descriptors_is_found(toy_bundle: Path) -> None:
    kept: list[int] = []
    report = None
    try:
        report = soak(toy_bundle, 400, leak=lambda: kept.append(os.open(os.devnull, os.O_RDONLY)))
    finally:
        for handle in kept:
            os.close(handle)
    assert any("descriptors went" in failure for failure in report.failures), report
