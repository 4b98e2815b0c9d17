"""What a run needs beside arithmetic: memory of a step beside PyTorch's, and time that is not the engine's.

    scripts/bench footprint                                       three minutes on one core
    PYTHONPATH=. python benchmarks/footprint.py --batches 8,64    half an hour and 16 GB: exports are checked in float64

Peak memory is that of a process of its own which makes two steps of `mgg`, less what it has after its imports: ours on
ONNX Runtime, the same step in PyTorch, eager. Time is that of frames of the packaged reader through `Adapter`, as a
program embeds it, without adaptation and with its own, beside calls of its engine alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mgg_edge.export import ExportRequest, compose, export_bundle
from mgg_edge.files import packaged_file
from mgg_edge.runtime import Adapter, Bundle, open_engine
from mgg_edge.runtime.demo import DEFAULT_BUNDLE
from mgg_edge.runtime.sources.source_demo import demo_frames, packaged_faces

NETS = {"vit_tiny_patch16_224": 224, "efficientnet_lite0": 160}
STRETCH = 100

_MEMORY = """
import pathlib, re
def megabytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) / 1e3
"""
_OURS = """
import sys, numpy as np, onnxruntime
from mgg_edge.runtime import Bundle, open_engine
before = megabytes("VmRSS")
bundle = Bundle.load(sys.argv[1])
engine, size = open_engine(bundle, sys.argv[2], threads=1), bundle.manifest.preprocess
frames = np.random.default_rng(0).integers(0, 256, (bundle.manifest.adapt_batch, size.height, size.width, 3), np.uint8)
for _ in range(2):
    engine.adapt(frames)
    engine.commit()
print(megabytes("VmHWM") - before)
"""
_TORCH = """
import sys, torch
from mgg_edge.export import ExportRequest, compose
from mgg_edge.learn.images import synthetic_frames
torch.set_num_threads(1)
before = megabytes("VmRSS")
name, side, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
step, _, _ = compose(ExportRequest(name, "random", image_size=side, rule="mgg", norm_statistics="source"))
frames, state, constants = synthetic_frames(batch, side, side, 0), step.initial_state(), step.constants()
for _ in range(2):
    state = step.adapt(frames, state, constants).state
print(megabytes("VmHWM") - before)
"""


def memory(folder: Path, batches: Sequence[int]) -> list[dict[str, Any]]:
    """Megabytes of a step by net and batch."""
    found = []
    for name, side in NETS.items():
        for batch in batches:
            step, labels, origins = compose(
                ExportRequest(name, "random", image_size=side, rule="mgg", norm_statistics="source")
            )
            path = folder / f"{name}-{batch}.mgg"
            export_bundle(step, path, adapt_batch=batch, labels=labels, origins=origins, parity_steps=5)
            row = {"net": name, "batch": batch, "onnxruntime_mb": _child(_OURS, path, "cpu")}
            found.append({**row, "torch_mb": _child(_TORCH, name, side, batch)})
            print(f"{name}, batch {batch}: {found[-1]}", file=sys.stderr, flush=True)
    return found


def _child(program: str, *words: object) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY + program, *map(str, words)], stdout=subprocess.PIPE, text=True, check=True
    )
    return round(float(done.stdout.split()[-1]), 1)


class Timed:
    """An engine whose calls are timed, and those of what it gives out.

    Attributes:
        spent_ms: in all calls since it was last set to 0.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self.spent_ms = engine, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        return self._timed(found) if name in ("infer", "adapt", "settle", "commit") else found

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **options)
            self.spent_ms += (time.perf_counter() - start) * 1e3
            return self._timed(result) if callable(result) else result

        return call


def times() -> dict[str, float]:
    """Milliseconds of a frame at rest, of them around the engine, and the engine's share of an adapting run."""
    bundle, frames = Bundle.load(packaged_file(DEFAULT_BUNDLE)), list(demo_frames(packaged_faces(), STRETCH, 0))
    whole, around = [], []
    engine = Timed(open_engine(bundle, "cpu", threads=1))
    with Adapter(bundle, engine, adapt="off") as adapter:
        for frame in frames:
            engine.spent_ms, start = 0.0, time.perf_counter()
            adapter(frame.image)
            whole.append((time.perf_counter() - start) * 1e3)
            around.append(whole[-1] - engine.spent_ms)
    engine = Timed(open_engine(bundle, "cpu", threads=1))
    with Adapter(bundle, engine) as adapter:
        adapter(frames[0].image)
        engine.spent_ms, start = 0.0, time.perf_counter()
        for frame in frames[1:]:
            adapter(frame.image)
        share = engine.spent_ms / ((time.perf_counter() - start) * 1e3)
    return {"frame_ms": statistics.median(whole), "around_ms": statistics.median(around), "engine_share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="8", help="of the step, comma-separated")
    batches = [int(batch) for batch in parser.parse_args().batches.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        found = {"times": times(), "memory": memory(Path(folder), batches)}
    print("| step of `mgg`, one thread | batch | here, MB | PyTorch, MB | ratio |\n|---|---|---|---|---|")
    for row in found["memory"]:
        ours, torch = row["onnxruntime_mb"], row["torch_mb"]
        print(f"| {row['net']} | {row['batch']} | {ours:.0f} | {torch:.0f} | {ours / torch:.2f} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
