"""Latency of inference with adaptation in the background, against adaptation off.

    scripts/bench latency          two minutes; on a machine that does nothing else, or it measures the others

ViT-Tiny at 224 pixels, `mgg`, batch 8, one thread of the engine, or the bundle that is named. Frames of moving noise
come at a fixed rate, as from a camera; both adapters of a pair run in turn, so that both see the same machine. Prints a
table and, last, one JSON line: median and 99th percentile of one call, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from mgg_edge.runtime import Adapter

PAIR = ("off", "always")
TURNS = 4


def frames(count: int, side: int = 64) -> np.ndarray:
    """Coarse noise that changes with every frame: all of it is admitted and distinct."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def calls_ms(adapter: Adapter, pictures: np.ndarray, rate: float) -> list[float]:
    times = []
    due_s = time.perf_counter()
    for picture in pictures:
        due_s += 1 / rate
        time.sleep(max(0.0, due_s - time.perf_counter()))
        start_s = time.perf_counter()
        adapter(picture)
        times.append((time.perf_counter() - start_s) * 1e3)
    return times


def measure(bundle: str, count: int, rate: float) -> dict[str, dict[str, float]]:
    pictures = frames(count // TURNS)
    adapters = {adapt: Adapter.open(bundle, adapt=adapt, threads=1, background=True) for adapt in PAIR}
    times: dict[str, list[float]] = {adapt: [] for adapt in PAIR}
    for adapter in adapters.values():
        calls_ms(adapter, pictures[:20], rate)  # warm up
    for _ in range(TURNS):
        for adapt, adapter in adapters.items():
            times[adapt] += calls_ms(adapter, pictures, rate)
            adapter.drain()
    steps = adapters["always"].counters.adapt_steps
    for adapter in adapters.values():
        adapter.close()
    found = {
        adapt: {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99))}
        for adapt, values in times.items()
    }
    return found | {
        "ratio": {q: found["always"][q] / found["off"][q] for q in ("p50", "p99")},
        "steps": {"made": steps},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", help="another bundle")
    parser.add_argument("--frames", type=int, default=800)
    parser.add_argument("--rate", type=float, default=12.0, help="frames a second")
    parser.add_argument("--cores", default="1,2", help="numbers of cores, comma-separated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(options.bundle or example(Path(folder) / "x.mgg"), options)


def example(path: Path) -> str:
    """A bundle to measure with."""
    from mgg_edge.export import ExportRequest, compose, export_bundle

    step, labels, origins = compose(ExportRequest("vit_tiny_patch16_224"))
    export_bundle(step, path, adapt_batch=8, labels=labels, origins=origins, parity_steps=5)
    return str(path)


def report(bundle: str, options: argparse.Namespace) -> None:
    """Measure and print, for each number of cores."""
    available, results = sorted(os.sched_getaffinity(0)), {}
    for cores in map(int, options.cores.split(",")):
        os.sched_setaffinity(0, available[:cores])
        results[cores] = measure(bundle, options.frames, options.rate)
        found = results[cores]
        for adapt in PAIR:
            print(f"{cores} cores  {adapt:7} p50 {found[adapt]['p50']:7.2f} ms  p99 {found[adapt]['p99']:7.2f} ms")
        print(f"{cores} cores  ratio   p50 {found['ratio']['p50']:7.2f}     p99 {found['ratio']['p99']:7.2f}")
    print(json.dumps({"rate": options.rate, "cores": results}))


if __name__ == "__main__":
    main()
