"""The two graphs of a bundle: `infer` and `adapt`, each lowered for each engine.

infer   frames u8[b,H,W,3], infer state by name → logits f32[b,C], features f32[b,D]
adapt   frames u8[B,H,W,3], state by name     → logits, entropy, discrepancy, loss, gradient_norm, update_norm,
                                                 `<name>_out` for every state tensor
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import onnx
import torch
from torch import Tensor

from mgg_edge.container import LOWERINGS, graph_name
from mgg_edge.export.half_precision import HALF_TYPES, HalfGraph, choose_loss_scale, halve
from mgg_edge.export.lower import lower
from mgg_edge.export.trace import TracedGraph, trace
from mgg_edge.learn.images import synthetic_frames
from mgg_edge.learn.step import AdaptStep

__all__ = ["Graphs", "build_graphs", "trace_adapt", "trace_infer"]

LOSS_SCALE_SEED = 40_000


class Graphs(NamedTuple):
    """Attributes: models: both graphs in all lowerings, by member; half: the adapt graph in half precision, or None."""

    models: dict[str, onnx.ModelProto]
    half: HalfGraph | None


def build_graphs(step: AdaptStep, infer_batch: int, adapt_batch: int, precision: str = "float32") -> Graphs:
    """Both graphs in all lowerings.

    Args:
        step: what to trace.
        infer_batch: frames of a call of the infer graph.
        adapt_batch: frames of a call of the adapt graph.
        precision: of the large products in the lowering for GPUs, see `half_precision`.

    Raises:
        UnsupportedError: an operator cannot be lowered.
    """
    constants = set(step.constants())
    traced = {"infer": trace_infer(step, infer_batch), "adapt": trace_adapt(step, adapt_batch)}
    by_lowering = dict.fromkeys(LOWERINGS, traced)
    if precision in HALF_TYPES:
        by_lowering["tensorrt"] = _halved(step, traced, adapt_batch, precision)
    models = {
        graph_name(name, lowering): lower(graph, name, lowering, constants)
        for lowering, graphs in by_lowering.items()
        for name, graph in graphs.items()
    }
    half = HalfGraph(precision, by_lowering["tensorrt"]["adapt"]) if precision in HALF_TYPES else None
    return Graphs(models, half)


def _halved(
    step: AdaptStep, traced: Mapping[str, TracedGraph], adapt_batch: int, precision: str
) -> dict[str, TracedGraph]:
    adapt = traced["adapt"]
    if precision == "float16":
        frames = synthetic_frames(
            adapt_batch, step.backbone.preprocess.height, step.backbone.preprocess.width, LOSS_SCALE_SEED
        )
        values = {"frames": frames, **step.initial_state(), **step.constants()}
        scale = choose_loss_scale(adapt, [values[name] for name in adapt.inputs])
        adapt = trace_adapt(dataclasses.replace(step, loss_scale=scale), adapt_batch)
    return {name: halve(graph, HALF_TYPES[precision]) for name, graph in {**traced, "adapt": adapt}.items()}


def trace_infer(step: AdaptStep, batch: int) -> TracedGraph:
    """The forward pass for `batch` frames."""
    constants, state = step.constants(), step.backbone.initial_state()

    def infer(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits, features = step.infer(
            inputs["frames"], {name: inputs[name] for name in state}, {name: inputs[name] for name in constants}
        )
        return {"logits": logits, "features": features}

    return trace(infer, {"frames": _frames(step, batch), **state, **constants})


def trace_adapt(step: AdaptStep, batch: int) -> TracedGraph:
    """The adaptation step for `batch` frames."""
    constants, state = step.constants(), step.initial_state()

    def adapt(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        output = step.adapt(
            inputs["frames"], {name: inputs[name] for name in state}, {name: inputs[name] for name in constants}
        )
        scalars = {name: value for name, value in output._asdict().items() if name != "state"}
        return {**scalars, **{f"{name}_out": value for name, value in output.state.items()}}

    return trace(adapt, {"frames": _frames(step, batch), **state, **constants})


def _frames(step: AdaptStep, batch: int) -> Tensor:
    return torch.zeros(batch, step.backbone.preprocess.height, step.backbone.preprocess.width, 3, dtype=torch.uint8)
