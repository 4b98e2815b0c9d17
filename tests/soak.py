"""A long run of the whole device half, and what it does to memory, descriptors and threads.

    python tests/soak.py --frames 1000000        as `scripts/soak` calls it

Synthetic frames with faults go through reader, adapter, JSON lines, live page and metrics. Resident memory is read
at every 1/200 of the run; the mean of the last quarter must not be more than 8 MiB above that of the second.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import toy
from mgg_edge.runtime import Adapter, session
from mgg_edge.runtime.adaptation.adapter import Prediction
from mgg_edge.runtime.outputs.http_server import LiveServer
from mgg_edge.runtime.outputs.http_view import CameraView
from mgg_edge.runtime.outputs.metrics import process_figures
from mgg_edge.runtime.outputs.sinks import JsonLines
from mgg_edge.runtime.pipeline import Reader
from mgg_edge.runtime.sources.source import Frame
from mgg_edge.runtime.sources.source_synthetic import SyntheticSource

LIMIT_MIB = 8.0
SAMPLES = 200
FAULTS = "black+white+frozen+torn+noise+shape+backwards"


@dataclass(frozen=True)
class SoakReport:
    """What a soak run found.

    Attributes:
        frames: inferred.
        growth_mib: resident memory, mean of the last quarter less that of the second.
        descriptors, threads: fewest and most from the second quarter on.
        adds_up: captured = inferred + dropped.
        failures: of the bounds above; none is a pass.
    """

    frames: int
    dropped: int
    adapt_steps: int
    growth_mib: float
    resident_mib: float
    descriptors: tuple[int, int]
    threads: tuple[int, int]
    adds_up: bool
    frames_per_s: float
    failures: tuple[str, ...] = ()


class Sampler:
    """A sink that reads the process's figures now and then, and lets a leak in where the test wants one."""

    def __init__(self, every: int, address: str, leak: Callable[[], object] | None) -> None:
        self.rows: list[tuple[float, ...]] = []
        self._every, self._address, self._leak, self._seen = every, address, leak, 0
        self._leaked: list[object] = []

    def write(self, frame: Frame, _: Prediction) -> None:
        self._seen += 1
        if self._leak is not None:
            self._leaked.append(self._leak())
        if self._seen % self._every:
            return
        for path in ("metrics", "status", "picture/soak"):
            with urllib.request.urlopen(self._address + path, timeout=30) as answer:  # noqa: S310 - our own server
                answer.read()
        gc.collect()
        self.rows.append(tuple(value for _, value in process_figures().values()))

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


def soak(bundle: Path, frames: int, leak: Callable[[], object] | None = None) -> SoakReport:
    """Run so many frames and judge."""
    text = f"synthetic:frames={frames},width=32,height=24,share=0.05,faults={FAULTS}"
    start_s = time.perf_counter()
    with Adapter.open(bundle, threads=1, adapt="always") as adapter, Path(os.devnull).open("w") as null:
        reader = Reader(SyntheticSource.parse(text))
        view = CameraView("soak", adapter, reader)
        with LiveServer(("127.0.0.1", 0), {"version": "soak", "bundle_id": "", "engine": "", "bundle": ""}) as server:
            server.cameras = (view,)
            sampler = Sampler(max(20, frames // SAMPLES), server.address, leak)
            summary = session.run(reader, adapter, [JsonLines(null), view, sampler], heartbeat=view.beat)
    if summary.failure is not None:
        raise summary.failure
    table = np.array(sampler.rows)
    memory_mib, descriptors, threads = (
        table[:, 0] / 2**20,
        table[:, list(process_figures()).index("open_fds")],
        table[:, 1],
    )
    quarter = len(table) // 4
    growth_mib = float(memory_mib[-quarter:].mean() - memory_mib[quarter : 2 * quarter].mean())
    spans = [(int(values[quarter:].min()), int(values[quarter:].max())) for values in (descriptors, threads)]
    adds_up = summary.frames_read == summary.frames_inferred + summary.frames_dropped == frames
    failures = [f"memory grew by {growth_mib:.1f} MiB"] * (not growth_mib <= LIMIT_MIB)
    # The live page's thread of one answer may still be going when the next begins.
    failures += [
        f"{what} went from {low} to {high}"
        for what, (low, high) in zip(("descriptors", "threads"), spans, strict=True)
        if not high - low <= 2
    ]
    failures += ["frames do not add up"] * (not adds_up)
    return SoakReport(
        summary.frames_inferred,
        summary.frames_dropped,
        summary.adapt_steps,
        round(growth_mib, 2),
        round(float(memory_mib[-1]), 1),
        spans[0],
        spans[1],
        adds_up,
        round(frames / (time.perf_counter() - start_s), 1),
        tuple(failures),
    )


def _leak_memory(frames: int) -> Callable[[], object]:
    size = int(LIMIT_MIB * 2**20 * 4 / frames)  # twice what is allowed, over half of the run

    def leak() -> mmap.mmap:
        memory = mmap.mmap(-1, size)  # from the system, not from what was freed before
        memory.write(bytes(size))
        return memory

    return leak


def _leak_descriptors(_frames: int) -> Callable[[], object]:
    return lambda: os.open(os.devnull, os.O_RDONLY)


LEAKS = {"memory": _leak_memory, "descriptors": _leak_descriptors}


def main() -> None:
    """Soak, print one JSON line, and fail if a bound was broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--leak", choices=LEAKS, help="positive control: something grows")
    words = parser.parse_args()
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        leak = None if words.leak is None else LEAKS[words.leak](words.frames)
        report = soak(toy.write_bundle(Path(folder) / "toy.mgg"), words.frames, leak)
    print(json.dumps(asdict(report)))
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
