"""Does the exported step compute what PyTorch computes?

Two correct float32 implementations part company: the normalised gradient g/√v flips sign where g ≈ 0, a pre-activation
falls to the other side of a kink, and errors feed back through θ and the memory. When and how far is chance and says
nothing about an export. So trajectories are not compared. Every step begins, for the exported graph, for PyTorch
float32 and for PyTorch float64, at the same numbers: those of the float64 trajectory, rounded to float32. What one
step then says is measured against float64:

    d(q) = ‖q − q₆₄‖ / ‖q₆₄‖                     for logits, loss, and logits and features of inference
    d(s) = ‖s' − s'₆₄‖ / ‖s'₆₄ − s‖              for every tensor s of the state that the step makes s'

    pass  ⇔  lowest decile over the steps of d(exported) ≤ 4 · median of d(PyTorch float32), for every quantity

A wrong graph is wrong at every step; a kink moves one or the other at some, in small nets with small batches at half of
them, so that of two sound implementations one has most of its steps moved and the other has not. Sums in another order
alone are 3.6 times as far from float64 in a net of 240 layers (Inception-ResNet-v2), hence the factor. Distances of 64
units in the last place are ordinary rounding and pass, however lucky PyTorch was. No quantity is normalised by the
gradient but the update and the memory of a learned optimiser: these are compared for scalars whose gradient is well
above its own rounding, which PyTorch's float32 shows, layer by layer. The gradient itself is in the first moment, where
nothing divides it.

How far free-running trajectories have parted after 1, 5, 20 and 50 steps stays in the table, for people.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mgg_edge.errors import ParityError
from mgg_edge.export.half_precision import HalfGraph
from mgg_edge.export.parity_runs import Array, EngineRun, Said, State, TorchRun, TracedRun, rounded
from mgg_edge.learn.backbone import NORM_STATISTICS
from mgg_edge.learn.step import AdaptStep
from mgg_edge.manifest import ParityInfo, ParityJudgement, ParityRow
from mgg_edge.norms import NormLayout
from mgg_edge.runtime.engines.engine import Engine

__all__ = ["LEAST_STEPS", "REPORTED_STEPS", "Parity", "check_parity", "measure_parity"]

logger = logging.getLogger(__name__)

REPORTED_STEPS = (1, 5, 20, 50)
MAX_RATIO = 4.0
# Fewer are chance themselves: EfficientNet-Lite0's first moment was once 6.2 times PyTorch's distance away after the
# one step that was looked at.
LEAST_STEPS = 5
LOW_SHARE = 0.1  # of the steps that may be as near as they like
ORDINARY_ROUNDING = 2.0**-16
ILL_CONDITIONED = 1e-3
ABOVE_ROUNDING = 100.0  # times the rounding of its layer from which a gradient says which way to go
FIRST_MOMENT, BETA1 = "m", 0.9
# Tensors of the state that hold gradients as they are, whatever their size.
PLAIN = ("m", "v", "momentum")
UPDATE = "update"


class Parity(NamedTuple):
    """What was measured.

    Attributes:
        info: of the engine, for the manifest.
        moves: whether statistics of batch normalisation move in this step.
        half: of the graph in half precision, PyTorch computing its operators; None without one.
    """

    info: ParityInfo
    moves: bool = False
    half: ParityInfo | None = None


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
        engine: holds the exported step; its state is changed.
        batches: u8[B, H, W, 3] each; one adaptation step is made on each.
        infer_batch: frames per inference call of the engine, at most B.
        progress: called with the number of steps made.
        half: the adapt graph in half precision, or None.

    Raises:
        ParityError: a value is not finite, in float64 or in the graph in half precision: it would never adapt.
    """
    exact, single, exported = TorchRun(step, torch.float64), TorchRun(step, torch.float32), EngineRun(engine)
    halved = None if half is None else TracedRun(step, half.traced)
    source = exact.initial()
    free = {"exact": source, "single": source, "exported": source, "halved": source}
    judged: dict[str, list[tuple[float, float]]] = {}
    rows: list[ParityRow] = []
    half_rows: list[ParityRow] = []
    worst, worst_half, count = 0.0, 0.0, 0
    for count, frames in enumerate(batches, start=1):
        begin = rounded(free["exact"])
        true, ours, theirs = exact.step(frames, begin), single.step(frames, begin), exported.step(frames, begin)
        if not _finite(true):
            raise ParityError(
                f"parity: the step is not finite in PyTorch float64 either, at step {count}: "
                "with these weights the model gives no numbers"
            )
        for name, pair in _step_distances(begin, true, ours, theirs, step.backbone.norms).items():
            judged.setdefault(name, []).append(pair)
        worst = max(worst, float(np.abs(theirs.logits - true.logits).max()))
        if count in REPORTED_STEPS:
            _add_inference(judged, [run.infer(frames[:infer_batch], begin) for run in (exact, single, exported)])
        said = {"exact": true, "single": ours, "exported": theirs}  # the first step of a trajectory is such a step
        if count > 1:
            said |= {"single": single.step(frames, free["single"]), "exported": exported.step(frames, free["exported"])}
        if half is not None and halved is not None:
            said["halved"] = halved.step(frames, free["halved"])
            if not _finite(said["halved"]):
                raise ParityError(
                    f"precision: the step in {half.precision} is not finite after {count} steps; "
                    "use float32 or bfloat16"
                )
            worst_half = max(worst_half, float(np.abs(said["halved"].logits - true.logits).max()))
        free = {name: one.state for name, one in said.items()}
        if count in REPORTED_STEPS:
            rows += _rows(count, source, said["exact"], said["single"], said["exported"])
            half_rows += _rows(count, source, said["exact"], said["single"], said["halved"]) if halved else []
        progress(count)
    info = ParityInfo(engine.name, count, worst, tuple(rows), _judgements(judged))
    moves = step.backbone.statistics is not None
    if half is None:
        return Parity(info, moves)
    name = f"{half.precision} products, PyTorch {torch.__version__.partition('+')[0]}"
    return Parity(info, moves, ParityInfo(name, count, worst_half, tuple(half_rows)))


def check_parity(parity: Parity) -> None:
    """Refuse an export that strays; say so where float32 itself does.

    Raises:
        ParityError: the first quantity out of bounds, with the figures.
    """
    info = parity.info
    for found in info.judged:
        allowed = max(MAX_RATIO * found.torch_float32, ORDINARY_ROUNDING)
        if not found.engine <= allowed:
            raise ParityError(
                f"parity: the {found.quantity} of {info.engine} after one step is {found.engine:.2e} from float64, "
                f"expected at most {allowed:.2e} (PyTorch float32: {found.torch_float32:.2e}), at nine of ten of "
                f"{info.steps} steps"
            )
    worst = max((found.torch_float32 for found in info.judged if found.quantity == "logits"), default=0.0)
    if worst > ILL_CONDITIONED:
        logger.warning(
            "the step is ill-conditioned: in float32 PyTorch's own logits are %.1e from float64 after one step%s",
            worst,
            "; try --norm-statistics source" if parity.moves else "",
        )


def _step_distances(
    begin: State, true: Said, ours: Said, theirs: Said, norms: NormLayout
) -> dict[str, tuple[float, float]]:
    """Distances from float64 of PyTorch float32 and of the engine, by quantity."""
    found = {
        "logits": (_relative(ours.logits, true.logits), _relative(theirs.logits, true.logits)),
        "loss": tuple(_relative(np.array([one.loss]), np.array([true.loss])) for one in (ours, theirs)),
    }
    certain = _certain(begin, true, ours, norms)
    for name, before in begin.items():
        if name == "step":
            continue
        kept = certain if before.shape[-1:] == (norms.size,) and name not in PLAIN else slice(None)
        true_change, *changes = (np.atleast_1d(one.state[name] - before)[..., kept] for one in (true, ours, theirs))
        distances = (_relative(change, true_change) for change in changes)
        found[UPDATE if name == "theta" else name] = tuple(distances)
    return found  # type: ignore[return-value]


def _certain(begin: State, true: Said, ours: Said, norms: NormLayout) -> Array | slice:
    """Scalars bool[N] whose gradient is above the rounding of its layer; all where nothing divides by it."""
    if FIRST_MOMENT not in begin:
        return slice(None)
    gradient, noisy = (
        (one.state[FIRST_MOMENT] - BETA1 * begin[FIRST_MOMENT]).reshape(-1, norms.size)[0] for one in (true, ours)
    )
    noise = np.abs(noisy - gradient)
    ends = np.cumsum(norms.sizes)
    level = [
        np.full(size, np.sqrt(np.mean(noise[end - size : end] ** 2)))
        for size, end in zip(norms.sizes, ends, strict=True)
    ]
    found: Array = np.abs(gradient) > ABOVE_ROUNDING * np.concatenate(level)
    return found


def _add_inference(judged: dict[str, list[tuple[float, float]]], said: list[tuple[Array, Array]]) -> None:
    true, ours, theirs = said
    for place, name in enumerate(("logits of inference", "features")):
        pair = (_relative(ours[place], true[place]), _relative(theirs[place], true[place]))
        judged.setdefault(name, []).append(pair)


def _judgements(judged: Mapping[str, list[tuple[float, float]]]) -> tuple[ParityJudgement, ...]:
    found = ((name, *np.array(pairs).T) for name, pairs in judged.items() if pairs)
    return tuple(ParityJudgement(name, float(np.median(ours)), _low(theirs)) for name, ours, theirs in found)


def _low(distances: Array) -> float:
    """The lowest decile, one of the distances themselves; NaN where one is."""
    return float(np.quantile(distances, LOW_SHARE, method="lower"))


def _finite(said: Said) -> bool:
    return all(bool(np.isfinite(part).all()) for part in (said.logits, *said.state.values()))


def _rows(count: int, source: State, exact: Said, single: Said, other: Said) -> list[ParityRow]:
    """How far trajectories have parted: logits, all that θ has moved, and the memory."""
    parts = (
        ("logits", lambda said: said.logits),
        (UPDATE, lambda said: said.state["theta"] - source["theta"]),
        ("memory", lambda said: _memory(said.state)),
    )
    return [
        ParityRow(count, name, _relative(part(single), part(exact)), _relative(part(other), part(exact)))
        for name, part in parts
        if part(exact).size
    ]


def _memory(state: State) -> Array:
    """The gradient memory, or for rules without one everything the rule remembers."""
    names = [name for name in state if name.startswith("memory")] or [
        name for name in state if name not in ("theta", "step", NORM_STATISTICS)
    ]
    return np.concatenate([np.zeros(0), *(state[name].ravel() for name in names)])


def _relative(value: Array, reference: Array) -> float:
    """‖value − reference‖ / ‖reference‖; NaN if anything is not finite."""
    difference, norm = float(np.linalg.norm(value - reference)), float(np.linalg.norm(reference))
    if not math.isfinite(difference):
        return math.nan
    return difference / (norm if norm > 0 else 1.0)
