"""What a bundle costs on this machine: inference, the step, its verification, a film, and what a run needs to begin.

Everything that is compared is run in turns, so that a busy machine slows all of it; figures are medians, with minima
beside them. Numbers are compared after the timing, so that nothing is fast because it is wrong.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import EngineError, ParityError, UsageError
from mgg_edge.manifest import OUTPUTS
from mgg_edge.runtime import session
from mgg_edge.runtime.adaptation.adapter import Adapter, AdapterSettings
from mgg_edge.runtime.adaptation.adapter_step import Stepper
from mgg_edge.runtime.adaptation.buffer import Batch
from mgg_edge.runtime.adaptation.guard_collapse import ClassWindow
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Engine, Inference
from mgg_edge.runtime.engines.onnxruntime_import import import_onnxruntime, mapped, quiet_options
from mgg_edge.runtime.engines.self_test import half_limits
from mgg_edge.runtime.session_summary import Percentiles
from mgg_edge.runtime.sources.source_open import open_source
from mgg_edge.state import AdaptState

__all__ = ["Cost", "Start", "film_cost", "inference_costs", "measure_start", "step_costs", "swap_cost"]

Frames = npt.NDArray[np.uint8]
Function = Callable[[], Any]
WARM_UP = 3
PLAIN_LIMIT = 1e-3  # largest |difference| of logits over their largest; what doctor allows of other machines
STEPS_OF_CHILD = 2
CHILD_TIMEOUT_S = 600

_CHILD = """
import json, pathlib, re, resource, sys, time
start = time.perf_counter()
import numpy as np
from mgg_edge.runtime import Adapter
path, engine, threads, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
opening = time.perf_counter()
adapter = Adapter.open(path, engine=engine, adapt="always", threads=threads)
info, batch = adapter.manifest.preprocess, adapter.manifest.adapt_batch
frames = np.random.default_rng(0).integers(0, 256, (batch * steps + 1, info.height, info.width, 3), np.uint8)
opened = time.perf_counter()
adapter(frames[0])
first = time.perf_counter()
for frame in frames[1:]:
    adapter(frame)
status = pathlib.Path("/proc/self/status")
if status.exists():  # what getrusage tells there is no less than the parent had when it started this process
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) / 1e3
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
adapter.close()
print(json.dumps({"cold_start_ms": (first - start) * 1e3, "open_ms": (opened - opening) * 1e3, "peak_rss_mb": peak}))
"""


@dataclass(frozen=True)
class Cost:
    """Time of one call, milliseconds. Attributes: median and minimum."""

    median: float
    minimum: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Cost:
        """Of some measured times."""
        return cls(statistics.median(times_ms), min(times_ms))


@dataclass(frozen=True)
class Start:
    """A run in a process of its own, up to its second step.

    Attributes:
        cold_start_ms: from the first import to the first prediction.
        open_ms: of it, opening the bundle.
        peak_rss_mb: largest memory of the process, MB.
    """

    cold_start_ms: float
    open_ms: float
    peak_rss_mb: float


def inference_costs(
    bundle: Bundle, engine: Engine, threads: int, rounds: int, plain: Path | None = None
) -> dict[str, Cost]:
    """One call of the infer graph: `forward` with θ fed, `settled` with θ folded in, `plain` the user's own model.

    `settled` gives logits alone, as with `--adapt off` and rules of the schedule `window`; `settled_features` all.

    Args:
        bundle: of the engine.
        engine: open.
        threads: of the plain session, as the engine has.
        rounds: calls of each, in turns.
        plain: an ONNX file of one input, f32[b,3,H,W] of scaled pixels, whose first output is the logits; or None.

    Raises:
        UsageError: a plain file of another signature.
        EngineError: ONNX Runtime refuses it.
        ParityError: what settled inference or the plain file answers is not what the forward does (the plain file's
            answers are looked at where the model returns logits).
    """
    frames, state = _frames(bundle, bundle.manifest.infer_batch), bundle.initial_state
    unfolded: Inference = partial(engine.infer, state=state)
    functions: dict[str, Function] = {"forward": _logits_of(unfolded, frames)}
    for name, features in (("settled", False), ("settled_features", True)):
        # Where nothing is folded, a model at rest infers as one that moves.
        functions[name] = _logits_of(engine.settle(state, features=features) or unfolded, frames)
    if plain is not None:
        run_plain, images = _plain(plain, threads), _scaled(bundle, frames)
        functions["plain"] = lambda: run_plain(images)
    costs = _in_turns(functions, rounds)
    expected = functions["forward"]()
    largest = np.abs(expected).max()
    in_half = half_limits(bundle.manifest, engine.name).get("logits_limit", 0.0)
    for name, function in functions.items():
        if name == "plain" and bundle.manifest.backbone.outputs != OUTPUTS[0]:
            continue
        found = function()
        distance = float(np.abs(found - expected).max() / largest) if found.shape == expected.shape else np.inf
        if not distance <= max(PLAIN_LIMIT, in_half / largest):
            raise ParityError(f"bench: the logits of '{name}' are {distance:.1e} from those of the forward pass")
    return costs


def step_costs(bundle: Bundle, engine: Engine, rounds: int) -> tuple[dict[str, Cost], int]:
    """`step`, the adapt graph alone; `attempt`, a step with its checks; `verified`, with verification as well.

    Returns:
        The costs, and how many canaries a verification looks at.
    """
    size = bundle.manifest.adapt_batch
    stepper = Stepper(bundle, engine, AdapterSettings())
    batch, previous = Batch(_frames(bundle, size), tuple(range(size))), bundle.initial_state
    varied = ClassWindow(classes=tuple(range(ClassWindow().settings.window)))
    functions: dict[str, Function] = {
        "step": lambda: engine.adapt(batch.frames),
        "attempt": lambda: stepper.attempt(previous, batch, None),
        "verified": lambda: stepper.attempt(previous, batch, varied),
    }
    return _in_turns(functions, rounds), len(stepper.canaries.frames)


def film_cost(bundle: Bundle, engine: Engine, source: str, limit: int | None) -> tuple[float, Percentiles, int]:
    """A run of a source as `mgg-edge run` makes it, but for its outputs; the engine is closed with it.

    Returns:
        Frames a second from the first frame asked for to the last, time of an inference, and steps made.
    """
    with Adapter(bundle, engine) as adapter, open_source(source) as pictures:
        summary = session.run(pictures, adapter, limit=limit)
    if summary.failure is not None:
        raise summary.failure
    return summary.frames_inferred / summary.wall_s, summary.infer_ms, summary.adapt_steps


def swap_cost(bundle: Bundle, engine: Engine, frames: int) -> tuple[float, float] | None:
    """99th percentile of an inference, ms: alone, and while one θ after another is folded in beside it.

    Worse than any run: there a folding follows frames through which θ stood still. None where nothing is folded.
    """
    picture, state = _frames(bundle, bundle.manifest.infer_batch), bundle.initial_state
    settled = engine.settle(state, features=False)
    if settled is None:
        return None
    stop = threading.Event()

    def fold() -> None:
        for number in range(1, 1 << 30):
            if stop.is_set():
                return
            theta = np.asarray(state["theta"], np.float32) * np.float32(1 + 1e-6 * number)
            engine.settle(AdaptState({**state, "theta": theta}), features=False)

    def percentile() -> float:
        return float(np.percentile(_times_ms(lambda: settled(picture), frames), 99))

    percentile()
    alone = percentile()
    beside = threading.Thread(target=fold, name="folding", daemon=True)
    beside.start()
    try:
        return alone, percentile()
    finally:
        stop.set()
        beside.join()


def measure_start(bundle: Bundle, engine: str, threads: int) -> Start:
    """Start a process of its own that predicts and adapts, and ask what it took.

    Raises:
        EngineError: it failed.
    """
    words = [str(bundle.path), engine, str(threads), str(STEPS_OF_CHILD)]
    done = subprocess.run(  # noqa: S603 - this interpreter with a fixed program
        [sys.executable, "-c", _CHILD, *words], capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise EngineError(f"bench: a fresh process failed: {done.stderr.strip().splitlines()[-1:]}")
    return Start(**json.loads(done.stdout))


def _logits_of(inference: Inference, frames: Frames) -> Function:
    return lambda: inference(frames)[0]


def _in_turns(functions: Mapping[str, Function], rounds: int) -> dict[str, Cost]:
    """Costs of functions, each round in another order: what ran before has filled the caches."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    names, rng = list(functions), np.random.default_rng(0)
    for turn in range(rounds + WARM_UP):
        for name in rng.permutation(names):
            (time_ms,) = _times_ms(functions[name], 1)
            if turn >= WARM_UP:
                times[name].append(time_ms)
    return {name: Cost.of(values) for name, values in times.items()}


def _times_ms(function: Function, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start_s = time.perf_counter()
        function()
        times.append((time.perf_counter() - start_s) * 1e3)
    return times


def _frames(bundle: Bundle, count: int) -> Frames:
    size = bundle.manifest.preprocess
    return np.random.default_rng(0).integers(0, 256, (count, size.height, size.width, 3), np.uint8)


def _scaled(bundle: Bundle, frames: Frames) -> npt.NDArray[np.float32]:
    size = bundle.manifest.preprocess
    scaled = (frames / 255 - np.array(size.mean)) / np.array(size.std)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


def _plain(path: Path, threads: int) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    if not path.is_file():
        raise UsageError(f"{path}: no such ONNX file")
    ort = import_onnxruntime()
    options = quiet_options(ort)
    options.intra_op_num_threads = threads
    # Threads that spin after their run would take the processor from whatever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with mapped(f"{path}: cannot load the graph"):
        plain = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs, outputs = plain.get_inputs(), plain.get_outputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)":
        found = ", ".join(f"{one.name}: {one.type}" for one in inputs)
        raise UsageError(f"{path}: expected one input of float32 pixels [b,3,H,W], found {found}")
    name, first = inputs[0].name, outputs[0].name

    def run(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with mapped(f"{path}: cannot run the graph"):
            return np.asarray(plain.run([first], {name: images})[0])

    return run
