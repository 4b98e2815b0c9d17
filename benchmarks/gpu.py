"""Everything that only a GPU can tell: parity, times and a soak of the GPU engines. `scripts/gpu_check` runs it.

    python benchmarks/gpu.py --out gpu.json [--engines cuda,tensorrt] [--bundles FOLDER] [--minutes 6]

For each bundle and engine, in parts; the file is written after every one, so that a run cut off still tells:

    self-test  the results recorded at export, as `mgg-edge doctor --bundle` compares them
    parity     steps from the same states as the processor's engine: distances of logits and of everything remembered
    times      forward and step at the same batch, in turns with PyTorch eager on the GPU; medians; step over forward
    beside     p99 of inference while another thread adapts without pause, over that of inference alone
    soak       frames through an adapter: memory and files of the process, non-finite states
    exact      with --exact: steps against float64 in PyTorch (`export/parity.py`), which takes minutes

Bundles are exported here, or ready-made ones of a folder (`--export-to FOLDER` makes them, where there is PyTorch).
When the minutes are over, what is left is named and left out. `--precision float16` exports with products in half
precision.

Judged are the self-test, and in float32 parity: a figure outside ends with exit code 4, after the file is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mgg_edge.errors import MggEdgeError
from mgg_edge.runtime import Adapter, Bundle, Engine, open_engine
from mgg_edge.runtime.doctor import package_versions
from mgg_edge.runtime.engines.cuda import open_cuda
from mgg_edge.runtime.engines.self_test import self_test
from mgg_edge.state import AdaptState

BATCH, SIDE, SEED = 8, {"efficientnet_lite0": 160}, 20_000
BACKBONES = ("vit_tiny_patch16_224", "efficientnet_lite0")
RULES = ("mgg", "forward", "statistics")
NORM_STATISTICS = {"statistics": "mix:0.3"}
# Distances of a step from the processor's, relative: what two right float32 implementations differ by, with room.
MOST_LOGITS, MOST_MOVED = 1e-4, 1e-2
WITHOUT_TORCH = "no PyTorch with CUDA"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--engines", default="cuda,tensorrt", help="comma-separated")
    parser.add_argument("--bundles", type=Path, help="folder of ready-made bundles, instead of exporting here")
    parser.add_argument("--export-to", type=Path, help="only export the bundles, into this folder")
    parser.add_argument("--backbones", default=",".join(BACKBONES), help="to export; comma-separated")
    parser.add_argument("--rules", default=",".join(RULES), help="likewise")
    parser.add_argument("--precision", default="float32", help="of the export: float32, float16 or bfloat16")
    parser.add_argument("--minutes", type=float, default=6.0, help="after which no further part begins")
    parser.add_argument("--steps", type=int, default=20, help="of parity")
    parser.add_argument("--exact", action="store_true", help="and parity with float64 over as many steps")
    parser.add_argument("--repeats", type=int, default=50, help="of each timing")
    parser.add_argument("--soak", type=int, default=2_000, help="frames")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    if options.export_to is not None:
        print(json.dumps([str(path) for path in exported(options, options.export_to)]))
        return
    report: Row = {"date": time.strftime("%Y-%m-%d"), "machine": machine(options.engines), "rows": []}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for path in found_bundles(options.bundles) if options.bundles else exported(options, Path(folder)):
            for engine in options.engines.split(","):
                row: Row = {"bundle": path.stem, "engine": engine}
                report["rows"].append(row)
                for part in measure(path, engine, options, deadline):
                    row |= part
                    options.out.write_text(json.dumps(report, indent=1))
                failed |= bool(row.get("outside"))
                print(json.dumps(row), file=sys.stderr, flush=True)
    options.out.write_text(json.dumps(report, indent=1))
    print(table(report["rows"]))
    print(f"{options.out}: {len(report['rows'])} rows")
    raise SystemExit(4 if failed else 0)


def found_bundles(folder: Path) -> list[Path]:
    """Bundles of a folder, at least one."""
    paths = sorted(folder.glob("*.mgg"))
    if not paths:
        raise SystemExit(f"error: {folder}: expected bundles (*.mgg), found none")
    return paths


def exported(options: argparse.Namespace, folder: Path) -> Iterator[Path]:
    """Bundles of random weights for every backbone and rule, as they are made; norms decide which rules there are."""
    from mgg_edge.export import ExportRequest, compose, export_bundle

    folder.mkdir(parents=True, exist_ok=True)
    for backbone in options.backbones.split(","):
        for rule in options.rules.split(","):
            request = ExportRequest(
                backbone, rule=rule, image_size=SIDE.get(backbone), norm_statistics=NORM_STATISTICS.get(rule, "source")
            )
            path = folder / f"{backbone}-{rule}.mgg"
            try:
                step, labels, origins = compose(request)
                export_bundle(
                    step, path, adapt_batch=BATCH, infer_batch=BATCH, labels=labels, origins=origins, parity_steps=5,
                    precision=options.precision,
                )  # fmt: skip
            except MggEdgeError as error:
                print(f"{path.stem}: not exported: {error}", file=sys.stderr)
                continue
            yield path


def machine(engines: str) -> Row:
    """What the figures belong to."""
    versions = {name: version for name, version in package_versions().items() if version is not None}
    found: Row = {"system": platform.platform(), "python": platform.python_version(), "packages": versions}
    if engines == "cpu":
        return found
    try:
        return found | open_cuda().device._asdict()
    except MggEdgeError as error:
        return found | {"device": str(error)}


def measure(path: Path, name: str, options: argparse.Namespace, deadline: float) -> Iterator[Row]:
    """The figures of one bundle on one engine, part by part; what went wrong, and what there was no time for."""
    bundle, started = Bundle.load(path), time.perf_counter()
    try:
        engine = open_engine(bundle, name)
    except MggEdgeError as error:
        yield {"error": str(error)}
        return
    yield {"name": engine.name, "open_s": round(time.perf_counter() - started, 1)}
    parts: dict[str, Callable[[], Row]] = {
        "self-test": lambda: recorded(bundle, engine),
        "parity": lambda: parity(bundle, engine, options.steps),
        "times": lambda: times(bundle, engine, options.repeats),
        "beside": lambda: beside(bundle, engine, options.repeats),
        "soak": lambda: soak(path, name, bundle.manifest.preprocess.height, options.soak),
    }
    if options.exact:
        parts["exact"] = lambda: exact(bundle, engine, options.steps)
    left = []
    for part, run in parts.items():
        if time.monotonic() > deadline:
            left.append(part)
            continue
        try:
            yield run()
        except MggEdgeError as error:
            yield {f"{part} failed": str(error)}
    engine.close()
    if left:
        yield {"no time for": left}


def pictures(bundle: Bundle, seed: int) -> np.ndarray:
    """Frames u8[B, H, W, 3] of soft random shapes."""
    size, batch = bundle.manifest.preprocess, bundle.manifest.adapt_batch
    coarse = np.random.default_rng([SEED, seed]).integers(0, 256, (batch, 8, 8, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((size.width, size.height))) for one in coarse])


def recorded(bundle: Bundle, engine: Engine) -> Row:
    """What the engine says of the pictures that the export recorded results of."""
    found = self_test(bundle, engine)
    row: Row = {"self_test": {quantity: value for quantity, value, _ in found.rows}}
    return row if found.passed else row | {"outside": "self-test"}


def parity(bundle: Bundle, engine: Engine, steps: int) -> Row:
    """Largest relative distances from the processor's engine, each step from the state that the processor made."""
    other = open_engine(bundle, "cpu")
    state, worst = dict(other.state()), {"logits": 0.0, "moved": 0.0}
    try:
        for number in range(steps):
            frames = pictures(bundle, number)
            for one in (engine, other):
                one.load_state(AdaptState(state))
            (ours, _), (theirs, _) = engine.adapt(frames), other.adapt(frames)
            worst["logits"] = max(worst["logits"], relative(ours, theirs))
            after = {name: np.array(value) for name, value in other.candidate.items()}
            moved = [relative(engine.candidate[name] - state[name], after[name] - state[name]) for name in after]
            worst["moved"] = max(worst["moved"], float(np.median(moved)))
            state = after
    finally:
        other.close()
    judged = bundle.manifest.precision == "float32"
    outside = judged and not (worst["logits"] <= MOST_LOGITS and worst["moved"] <= MOST_MOVED)
    row: Row = {"parity_steps": steps, "parity": {name: float(f"{value:.2e}") for name, value in worst.items()}}
    return row | {"outside": "parity"} if outside else row


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """‖found − expected‖ / ‖expected‖; the first alone where nothing is expected."""
    difference, norm = (float(np.linalg.norm(np.asarray(one, np.float64))) for one in (found - expected, expected))
    return difference / norm if norm > 0 else difference


def exact(bundle: Bundle, engine: Engine, steps: int) -> Row:
    """The judge of exports, on this engine."""
    import torch

    from mgg_edge.export.parity import check_parity, measure_parity
    from mgg_edge.export.restore import restore_step

    batches = (torch.from_numpy(pictures(bundle, number)) for number in range(steps))
    found = measure_parity(restore_step(bundle), engine, batches, bundle.manifest.infer_batch)
    check_parity(found)
    return {"exact": {one.quantity: [one.torch_float32, one.engine] for one in found.info.judged}}


def eager_step(bundle: Bundle, frames: np.ndarray) -> Callable[[], object] | None:
    """The same step in PyTorch on the GPU; None without one."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    from mgg_edge.export.restore import restore_step

    step = restore_step(bundle, any_movement=True)
    constants = {key: value.cuda() for key, value in step.constants().items()}
    start = {key: value.cuda() for key, value in step.initial_state().items()}

    def run() -> None:
        step.adapt(torch.from_numpy(frames).cuda(), start, constants)
        torch.cuda.synchronize()

    return run


def times(bundle: Bundle, engine: Engine, repeats: int) -> Row:
    """Medians, engine and PyTorch in turns."""
    frames, state = pictures(bundle, 0), engine.state()
    shown = frames[: bundle.manifest.infer_batch]
    work: dict[str, Callable[[], object]] = {
        "forward_ms": lambda: engine.infer(shown, state), "step_ms": lambda: engine.adapt(frames)
    }  # fmt: skip
    eager = eager_step(bundle, frames)
    if eager is not None:
        work["torch_step_ms"] = eager
    found: dict[str, list[float]] = {key: [] for key in work}
    for _ in range(repeats):
        for key, run in work.items():
            started = time.perf_counter()
            run()
            found[key].append((time.perf_counter() - started) * 1e3)
    medians = {key: round(statistics.median(values[2:] or values), 3) for key, values in found.items()}
    row: Row = medians | {"step_over_forward": round(medians["step_ms"] / medians["forward_ms"], 2)}
    return row if eager is not None else row | {"torch_step_ms": WITHOUT_TORCH}


def beside(bundle: Bundle, engine: Engine, repeats: int) -> Row:
    """p99 of inference, alone and while another thread adapts."""
    state, stop, pixels = engine.state(), threading.Event(), pictures(bundle, 0)
    shown = pixels[: bundle.manifest.infer_batch]

    def p99() -> float:
        values = []
        for _ in range(20 * repeats):
            started = time.perf_counter()
            engine.infer(shown, state)
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


def soak(path: Path, name: str, edge: int, frames: int) -> Row:
    """Memory and files at a quarter and at the end of a long run that adapts on every batch."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (64, 8, 8, 3), np.uint8)  # fine noise would look the same each time
    shown = np.stack([np.asarray(Image.fromarray(one).resize((edge, edge))) for one in coarse])
    marks = []
    with Adapter.open(path, engine=name, adapt="always") as adapter:
        for number in range(frames):
            adapter(shown[number % 64])
            if number in (frames // 4, frames - 1):
                marks.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, open_files()))
        finite = all(np.isfinite(array).all() for array in adapter.state().values())
        steps = adapter.counters.adapt_steps
    (rss, files), (rss_end, files_end) = marks
    growth = {"rss_growth_mib": round((rss_end - rss) / 1024, 1), "files_growth": files_end - files}
    return {"soak_frames": frames, "soak_steps": steps, "finite": finite, **growth}


def table(rows: list[Row]) -> str:
    """What people look for first."""
    names = ("bundle", "name", "forward_ms", "step_ms", "torch_step_ms", "step_over_forward")
    lines = ["| " + " | ".join((*names, "parity", "verdict")) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        verdict = f"outside: {row['outside']}" if "outside" in row else row.get("error", "within")
        if "no time for" in row:
            verdict += f"; no time for {', '.join(row['no time for'])}"
        distances = " / ".join(f"{value:.1e}" for value in row.get("parity", {}).values())
        lines.append("| " + " | ".join(str(row.get(name, "")) for name in names) + f" | {distances} | {verdict} |")
    return "\n".join(lines)


def open_files() -> int:
    """Of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


if __name__ == "__main__":
    main()
