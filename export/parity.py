"""Does the exported step compute what PyTorch computes?

Two correct float32 implementations part company: the normalised gradient g/√v flips sign where g ≈ 0, and errors
feed back through θ and the memory. A fixed bound on the state would therefore be wrong both ways. Instead both
are measured against the same step in float64, each along its own trajectory on the same frames:

    pass  ⇔  ‖engine − float64‖ ≤ 2 · ‖PyTorch float32 − float64‖     for logits, accumulated update and memory,
             at steps 1, 5, 20 and 50, and every logit within 1e-3 of float64 throughout, or within twice what
             PyTorch float32 strays where that is more: kinks can make a step ill-conditioned in any float32.

Norms are L2, relative to the float64 value. Distances of 64 units in the last place are ordinary rounding and pass,
however lucky PyTorch was; a constant that is wrong in its fourth digit, or TF32, is off by ten times that and more. Of
the update the thousandth part of the scalars that stray furthest is left out, for both: where g ≈ 0 chance decides, and
one scalar can outweigh all others. The memory, which holds the gradients, is judged whole. Once PyTorch float32 has
strayed 1e-4 itself, a kink or a sign has parted the trajectories, when and how far is chance, and ten times is allowed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mgg_edge.errors import ParityError
from mgg_edge.export.half_precision import HalfGraph
from mgg_edge.export.trace import TracedGraph
from mgg_edge.learn.backbone import NORM_STATISTICS
from mgg_edge.learn.step import AdaptStep
from mgg_edge.manifest import ParityInfo, ParityRow
from mgg_edge.runtime.engines.engine import Engine

__all__ = ["REPORTED_STEPS", "Parity", "check_parity", "measure_parity"]

logger = logging.getLogger(__name__)

REPORTED_STEPS = (1, 5, 20, 50)
MAX_RATIO = 2.0
MAX_LOGIT_DIFFERENCE = 1e-3
ORDINARY_ROUNDING = 2.0**-17
LEFT_OUT_OF_UPDATE = 1e-3
PARTED, MAX_RATIO_PARTED = 1e-4, 10.0

Array = npt.NDArray[np.floating]


class Parity(NamedTuple):
    """What was measured.

    Attributes:
        info: of the engine, for the manifest.
        torch_logits_max: largest logit difference of PyTorch float32 from float64.
        half: of the graph in half precision, PyTorch computing its operators; None without one.
    """

    info: ParityInfo
    torch_logits_max: float
    half: ParityInfo | None = None


@dataclass(frozen=True)
class _Snapshot:
    """What one implementation says after a step; all float64 and flat."""

    logits: Array
    update: Array
    memory: Array


def measure_parity(
    step: AdaptStep,
    engine: Engine,
    batches: Iterable[Tensor],
    infer_batch: int,
    progress: Callable[[int], None] = lambda _step: None,
    half: HalfGraph | None = None,
) -> Parity:
    """Run the three implementations, and the graph in half precision, over the same batches.

    Args:
        step: the step in PyTorch.
        engine: holds the exported step in its initial state; its state is changed.
        batches: u8[B, H, W, 3] each; one adaptation step is made on each.
        infer_batch: frames per inference call of the engine, at most B.
        progress: called with the number of steps made.
        half: the adapt graph in half precision, or None.

    Raises:
        ParityError: a value of the graph in half precision is not finite: it would never adapt.
    """
    reference, single = _TorchRunner(step, torch.float64), _TorchRunner(step, torch.float32)
    halved = None if half is None else _TracedRunner(step, half.traced)
    source = step.backbone.theta().double().numpy()
    rows: list[ParityRow] = []
    half_rows: list[ParityRow] = []
    worst, worst_single, worst_half, count = 0.0, 0.0, 0.0, 0
    for count, frames in enumerate(batches, start=1):
        exact, float32, exported = reference(frames), single(frames), _run_engine(engine, frames, source)
        worst = max(worst, _inference_difference(step, engine, frames[:infer_batch])) if count == 1 else worst
        worst = max(worst, _largest_difference(exported, exact))
        worst_single = max(worst_single, _largest_difference(float32, exact))
        if count in REPORTED_STEPS:
            rows += _rows(count, exact, float32, exported)
        if half is not None and halved is not None:
            found = halved(frames)
            _require_finite(found, half.precision, count)
            worst_half = max(worst_half, _largest_difference(found, exact))
            half_rows += _rows(count, exact, float32, found) if count in REPORTED_STEPS else []
        progress(count)
    info = ParityInfo(engine.name, count, worst, tuple(rows))
    if half is None:
        return Parity(info, worst_single)
    name = f"{half.precision} products, PyTorch {torch.__version__.partition('+')[0]}"
    return Parity(info, worst_single, ParityInfo(name, count, worst_half, tuple(half_rows)))


def check_parity(parity: Parity) -> None:
    """Refuse an export that strays.

    Raises:
        ParityError: the first row or logit out of bounds, with the figures.
    """
    info, limit = parity.info, max(MAX_LOGIT_DIFFERENCE, MAX_RATIO * parity.torch_logits_max)
    if not info.logits_max <= limit:
        raise ParityError(
            f"parity: a logit of {info.engine} is {info.logits_max:.2e} from float64, "
            f"expected at most {limit:.2e} (PyTorch float32: {parity.torch_logits_max:.2e})"
        )
    if info.logits_max > MAX_LOGIT_DIFFERENCE:
        logger.warning(
            "the step is ill-conditioned: its logits stray %.1e from float64, PyTorch float32's %.1e as well; "
            "with batch normalisation try --norm-statistics source",
            info.logits_max,
            parity.torch_logits_max,
        )
    for row in info.rows:
        ratio = MAX_RATIO_PARTED if row.torch_float32 > PARTED else MAX_RATIO
        allowed = max(ratio * row.torch_float32, ORDINARY_ROUNDING)
        if not row.engine <= allowed:
            raise ParityError(
                f"parity: after {row.step} steps the {row.quantity} of {info.engine} is {row.engine:.2e} from float64, "
                f"expected at most {allowed:.2e} (PyTorch float32: {row.torch_float32:.2e})"
            )


class _TracedRunner:
    """A traced adapt graph, along its own trajectory."""

    def __init__(self, step: AdaptStep, traced: TracedGraph) -> None:
        self._traced, self._constants = traced, step.constants()
        self._state = step.initial_state()
        self._source = step.backbone.theta().double()

    def __call__(self, frames: Tensor) -> _Snapshot:
        values = {"frames": frames, **self._state, **self._constants}
        with torch.no_grad():
            results = self._traced.module(*(values[name] for name in self._traced.inputs))
        found = dict(zip(self._traced.outputs, results, strict=True))
        self._state = {name: found[f"{name}_out"] for name in self._state}
        arrays = {name: value.double().numpy() for name, value in self._state.items()}
        update = arrays["theta"] - self._source.numpy()
        return _Snapshot(found["logits"].double().numpy(), update, _memory(arrays))


class _TorchRunner:
    """The step in PyTorch, in one dtype, along its own trajectory."""

    def __init__(self, step: AdaptStep, dtype: torch.dtype) -> None:
        self._step = step
        self._constants = step.constants(dtype)
        self._state = step.initial_state(dtype)
        self._source = self._state["theta"]

    def __call__(self, frames: Tensor) -> _Snapshot:
        output = self._step.adapt(frames, self._state, self._constants)
        self._state = output.state
        arrays = {name: value.double().numpy() for name, value in output.state.items()}
        update = (output.state["theta"].double() - self._source.double()).numpy()
        return _Snapshot(output.logits.double().numpy(), update, _memory(arrays))


def _run_engine(engine: Engine, frames: Tensor, source: Array) -> _Snapshot:
    logits, _ = engine.adapt(frames.numpy())
    logits = logits.astype(np.float64)
    engine.commit()
    arrays = {name: np.asarray(value, np.float64) for name, value in engine.state().items()}
    return _Snapshot(logits, arrays["theta"] - source, _memory(arrays))


def _largest_difference(found: _Snapshot, exact: _Snapshot) -> float:
    """Of the logits."""
    return float(np.abs(found.logits - exact.logits).max())


def _require_finite(found: _Snapshot, precision: str, steps: int) -> None:
    if not all(np.isfinite(part).all() for part in (found.logits, found.update, found.memory)):
        raise ParityError(
            f"precision: the step in {precision} is not finite after {steps} steps; use float32 or bfloat16"
        )


def _memory(state: Mapping[str, Array]) -> Array:
    """The gradient memory, or for rules without one everything the rule remembers."""
    names = [name for name in state if name.startswith("memory")] or [
        name for name in state if name not in ("theta", "step", NORM_STATISTICS)
    ]
    return np.concatenate([np.zeros(0), *(state[name].ravel() for name in names)])


def _inference_difference(step: AdaptStep, engine: Engine, frames: Tensor) -> float:
    """Largest logit difference of the infer graph from float64, in the engine's committed state."""
    state = {name: torch.from_numpy(np.array(value, np.float64)) for name, value in engine.state().items()}
    with torch.no_grad():
        expected, _ = step.infer(frames, state, step.constants(torch.float64))
    logits, _ = engine.infer(frames.numpy())
    return float(np.abs(logits - expected.numpy()).max())


def _rows(count: int, exact: _Snapshot, float32: _Snapshot, exported: _Snapshot) -> list[ParityRow]:
    rows = []
    for quantity in ("logits", "update", "memory"):
        reference = getattr(exact, quantity)
        if reference.size:
            left_out = math.ceil(LEFT_OUT_OF_UPDATE * reference.size) if quantity == "update" else 0
            distances = [_relative(getattr(other, quantity), reference, left_out) for other in (float32, exported)]
            rows.append(ParityRow(count, quantity, *distances))
    return rows


def _relative(value: Array, reference: Array, left_out: int) -> float:
    """‖value − reference‖ / ‖reference‖ without the differences that are largest; NaN if any is."""
    norm = float(np.linalg.norm(reference))
    differences = np.abs(value - reference).ravel()
    if not np.isfinite(differences).all():
        return math.nan
    kept = np.sort(differences)[: differences.size - left_out]
    return float(np.linalg.norm(kept)) / (norm if norm > 0 else 1.0)
