"""What a step costs: forward and adaptation step of the exported bundle beside PyTorch, in one run.

    python benchmarks/step.py [--backbone NAME] [--batch B] [--threads T] [--repeats R]
    python benchmarks/step.py --beside tent,eata,sar --compiled     PyTorch's published methods, and torch.compile

Prints a table and, last, one JSON line. Implementations alternate within every repeat, so that a busy machine slows all
of them;
figures are medians. After timing, the exported step is compared with PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mgg_edge.export import ExportRequest, compose, export_bundle
from mgg_edge.learn import AdaptStep, measure_statistics
from mgg_edge.learn.images import synthetic_frames
from mgg_edge.learn.methods import Source, build_method
from mgg_edge.runtime import Bundle, open_engine
from mgg_edge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from mgg_edge.runtime.engines.self_test import update_distance

OURS = ("forward", "step", "torch_forward", "openvino_forward")
MAX_UPDATE_DISTANCE = 1e-3  # relative L2, both float32, without what is left to chance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--beside", default="", help="published methods in PyTorch, such as tent,eata,sar")
    parser.add_argument("--openvino", action="store_true", help="the step by that engine as well")
    parser.add_argument("--precision", default="float32", help="bfloat16: OpenVINO's products, where there are such")
    parser.add_argument(
        "--compiled", action="store_true", help="the step in PyTorch by torch.compile; needs a compiler"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    request = ExportRequest(options.backbone, image_size=options.image_size, norm_statistics="source")
    step, labels, origins = compose(request)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mgg"
        start = time.perf_counter()
        # The infer graph gets the step's batch, so that both do the same forward; the check is timed apart.
        export_bundle(
            step,
            path,
            adapt_batch=options.batch,
            infer_batch=options.batch,
            labels=labels,
            origins=origins,
            parity_steps=5,
            precision=options.precision,
        )
        export_s, size_bytes = time.perf_counter() - start, path.stat().st_size
        engine = OnnxRuntimeEngine(Bundle.load(path), threads=options.threads)
        other = open_engine(Bundle.load(path), "openvino", threads=options.threads) if options.openvino else None

    size = step.backbone.preprocess
    frames = synthetic_frames(options.batch, size.height, size.width, 0)
    run = runners(step, engine, frames) | beside(step, frames, options.beside, compiled=options.compiled)
    if other is not None:
        pixels = frames.numpy()
        print(other.name)
        run |= {"openvino_forward": lambda: other.infer(pixels), "openvino_step": lambda: other.adapt(pixels)}
    times_ms = measure(run, options.repeats)
    distance = distance_of_updates(step, engine, frames)
    if not distance <= MAX_UPDATE_DISTANCE:
        raise SystemExit(f"the exported update is {distance:.1e} from PyTorch's")
    report(options, times_ms, {"export_s": export_s, "bundle_mb": size_bytes / 1e6, "update_distance": distance})


def runners(step: AdaptStep, engine: OnnxRuntimeEngine, frames: torch.Tensor) -> dict[str, Callable[[], object]]:
    constants, state, pixels = step.constants(), step.initial_state(), frames.numpy()
    norms = step.backbone.split(state["theta"])

    def torch_forward() -> object:
        with torch.no_grad():
            return step.backbone.forward(frames, norms, constants)

    return {
        "forward": lambda: engine.infer(pixels),
        "step": lambda: engine.adapt(pixels),
        "torch_forward": torch_forward,
        "torch_step": lambda: step.adapt(frames, state, constants),
    }


def beside(step: AdaptStep, frames: torch.Tensor, names: str, *, compiled: bool) -> dict[str, Callable[[], object]]:
    """The same batch in PyTorch: the step compiled, published methods as their authors run them."""
    constants, state = step.constants(), step.initial_state()
    found: dict[str, Callable[[], object]] = {}
    if compiled:
        fast = torch.compile(step.adapt)
        found["compiled_step"] = lambda: fast(frames, state, constants)
    if not names:
        return found
    pictures = synthetic_frames(64, *frames.shape[1:3], 1)
    source = Source(measure_statistics(step.backbone, pictures.split(8)), pictures)
    for name in names.split(","):
        method = build_method(name, step.backbone, source)
        begun = method.init()
        found[name] = lambda method=method, begun=begun: method.step(frames, begun)
    return found


def measure(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    times_ms: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat >= 2:  # the first two warm up
                times_ms[name].append((time.perf_counter() - start) * 1e3)
    return times_ms


def distance_of_updates(step: AdaptStep, engine: OnnxRuntimeEngine, frames: torch.Tensor) -> float:
    source = step.backbone.theta().numpy()
    expected = step.adapt(frames, step.initial_state(), step.constants()).state["theta"].numpy() - source
    engine.adapt(frames.numpy())
    found = engine.candidate["theta"] - source
    return update_distance(found.astype(np.float64), expected.astype(np.float64))


def report(options: argparse.Namespace, times_ms: dict[str, list[float]], facts: dict[str, float]) -> None:
    medians = {name: statistics.median(values) for name, values in times_ms.items()}
    print(f"{options.backbone}, batch {options.batch}, {options.threads} threads, {options.repeats} repeats")
    print(f"{'':14} {'median ms':>10} {'min':>8} {'max':>8}")
    for name, values in times_ms.items():
        print(f"{name:14} {medians[name]:10.1f} {min(values):8.1f} {max(values):8.1f}")
    ratios = {
        "step_over_forward": medians["step"] / medians["forward"],
        **{f"{name}_over_step": medians[name] / medians["step"] for name in medians if name not in OURS},
    }
    for name, value in {**ratios, **facts}.items():
        print(f"{name:22} {value:.3g}")
    result = {"backbone": options.backbone, "batch": options.batch, "threads": options.threads}
    timings = {f"{name}_ms": round(value, 2) for name, value in medians.items()}
    print(
        json.dumps(
            {**result, **timings, **{name: float(f"{value:.3g}") for name, value in {**ratios, **facts}.items()}}
        )
    )


if __name__ == "__main__":
    main()
