"""Everything that only a GPU can tell: parity, times and a soak of the GPU engines. `scripts/gpu_check` runs it.

    python benchmarks/gpu.py --out gpu.json [--engines tensorrt,cuda] [--soak 20000] [--steps 50]

For each backbone, rule and engine:

    parity   50 steps against float64, beside PyTorch float32 on the processor (export/parity.py), TF32 off everywhere
    times    forward and step at the same batch, in turns with PyTorch eager on the GPU; medians; step over forward
    beside   p99 of inference while another thread adapts without pause, over that of inference alone
    soak     frames through an adapter: memory and files of the process, non-finite states

`--precision float16` does all of it with products in half precision, whose parity is stated, not judged.

Nothing is judged here but parity in float32: a figure outside ends with exit code 4, after the file is written.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mgg_edge.errors import MggEdgeError, ParityError
from mgg_edge.export import ExportRequest, compose, export_bundle
from mgg_edge.export.parity import check_parity, measure_parity
from mgg_edge.learn import AdaptStep
from mgg_edge.learn.images import synthetic_frames
from mgg_edge.runtime import Adapter, Bundle, Engine, open_engine
from mgg_edge.runtime.doctor import package_versions
from mgg_edge.runtime.engines.cuda import open_cuda

BATCH, SEED = 8, 20_000
BACKBONES = ("vit_tiny_patch16_224", "vit_small_patch16_224", "efficientnet_lite0")
RULES = ("mgg", "forward", "adam")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--engines", default="tensorrt,cuda", help="comma-separated")
    parser.add_argument("--backbones", default=",".join(BACKBONES), help="comma-separated")
    parser.add_argument("--rules", default=",".join(RULES), help="comma-separated")
    parser.add_argument("--precision", default="float32", help="float32, float16 or bfloat16")
    parser.add_argument("--steps", type=int, default=50, help="of the parity check")
    parser.add_argument("--repeats", type=int, default=50, help="of each timing")
    parser.add_argument("--soak", type=int, default=20_000, help="frames")
    options = parser.parse_args()
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(options.engines), "rows": []}
    failed = False
    for backbone in options.backbones.split(","):
        for rule in options.rules.split(","):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.mgg"
                step, labels, origins = compose(ExportRequest(backbone, rule=rule))
                export_bundle(
                    step, path, adapt_batch=BATCH, infer_batch=BATCH, labels=labels, origins=origins, parity_steps=1,
                    precision=options.precision,
                )  # fmt: skip
                for engine in options.engines.split(","):
                    row = {"backbone": backbone, "rule": rule, "engine": engine, "batch": BATCH}
                    row["precision"] = options.precision
                    try:
                        row |= measure(step, path, engine, options)
                    except MggEdgeError as error:
                        row["error"] = str(error)
                        failed |= isinstance(error, ParityError)
                    report["rows"].append(row)
                    print(json.dumps(row), flush=True)
    options.out.write_text(json.dumps(report, indent=1))
    print(f"{options.out}: {len(report['rows'])} rows")
    raise SystemExit(4 if failed else 0)


def machine(engines: str) -> dict[str, Any]:
    """What the figures belong to."""
    versions = {name: version for name, version in package_versions().items() if version is not None}
    device = open_cuda().device if engines != "cpu" else None
    return {"system": platform.platform(), "python": platform.python_version(), "packages": versions} | (
        {} if device is None else device._asdict()
    )


def measure(step: AdaptStep, path: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one bundle on one engine."""
    bundle, size = Bundle.load(path), step.backbone.preprocess
    started = time.perf_counter()
    engine = open_engine(bundle, name)
    row: dict[str, Any] = {"name": engine.name, "open_s": round(time.perf_counter() - started, 1)}
    try:
        batches = (synthetic_frames(BATCH, size.height, size.width, SEED + index) for index in range(options.steps))
        parity = measure_parity(step, engine, batches, BATCH)
        info = parity.info
        row["parity"] = {f"{one.quantity} {one.step}": [one.torch_float32, one.engine] for one in info.rows}
        row["logits_max"] = info.logits_max
        frames = synthetic_frames(BATCH, size.height, size.width, 0)
        row |= times(step, engine, frames, options.repeats)
        row |= beside(engine, frames.numpy(), options.repeats)
        if options.precision == "float32":
            check_parity(parity)
    finally:
        engine.close()
    return row | soak(path, name, size.height, options.soak)


def times(step: AdaptStep, engine: Engine, frames: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Medians, engine and PyTorch in turns."""
    pixels, state = frames.numpy(), engine.state()
    work: dict[str, Callable[[], object]] = {
        "forward_ms": lambda: engine.infer(pixels, state), "step_ms": lambda: engine.adapt(pixels)
    }  # fmt: skip
    if torch.cuda.is_available():
        constants = {key: value.cuda() for key, value in step.constants().items()}
        start = {key: value.cuda() for key, value in step.initial_state().items()}

        def eager() -> None:
            step.adapt(frames.cuda(), start, constants)
            torch.cuda.synchronize()

        work["torch_step_ms"] = eager
    found: dict[str, list[float]] = {key: [] for key in work}
    for _ in range(repeats):
        for key, run in work.items():
            started = time.perf_counter()
            run()
            found[key].append((time.perf_counter() - started) * 1e3)
    medians = {key: round(statistics.median(values[2:]), 3) for key, values in found.items()}
    return medians | {"step_over_forward": round(medians["step_ms"] / medians["forward_ms"], 2)}


def beside(engine: Engine, pixels: np.ndarray, repeats: int) -> dict[str, Any]:
    """p99 of inference, alone and while another thread adapts."""
    state, stop = engine.state(), threading.Event()

    def p99() -> float:
        values = []
        for _ in range(20 * repeats):
            started = time.perf_counter()
            engine.infer(pixels, state)
            values.append((time.perf_counter() - started) * 1e3)
        return float(np.percentile(values, 99))

    def adapt() -> None:
        while not stop.is_set():
            engine.adapt(pixels)

    alone, worker = p99(), threading.Thread(target=adapt)
    worker.start()
    try:
        together = p99()
    finally:
        stop.set()
        worker.join()
    return {"infer_p99_ms": round(alone, 3), "infer_p99_adapting_ms": round(together, 3)}


def soak(path: Path, name: str, edge: int, frames: int) -> dict[str, Any]:
    """Memory and files at a quarter and at the end of a long run that adapts on every batch."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (64, 8, 8, 3), np.uint8)  # fine noise would look the same each time
    pictures = np.stack([np.asarray(Image.fromarray(one).resize((edge, edge))) for one in coarse])
    marks = []
    with Adapter.open(path, engine=name, adapt="always") as adapter:
        for number in range(frames):
            adapter(pictures[number % 64])
            if number in (frames // 4, frames - 1):
                marks.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, open_files()))
        finite = all(np.isfinite(array).all() for array in adapter.state().values())
        steps = adapter.counters.adapt_steps
    (rss, files), (rss_end, files_end) = marks
    growth = {"rss_growth_mib": round((rss_end - rss) / 1024, 1), "files_growth": files_end - files}
    return {"soak_frames": frames, "soak_steps": steps, "finite": finite, **growth}


def open_files() -> int:
    """Of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


if __name__ == "__main__":
    main()
