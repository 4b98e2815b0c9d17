"""The two graphs of a bundle: `infer` and `adapt`, each lowered for each engine.

infer   frames u8[b,H,W,3], infer state by name → logits f32[b,C], features f32[b,D]
adapt   frames u8[B,H,W,3], state by name     → logits, entropy, discrepancy, loss, gradient_norm, update_norm,
                                                 `<name>_out` for every state tensor
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch
from torch import Tensor

from mgg_edge.container import LOWERINGS, graph_name
from mgg_edge.export.lower import lower
from mgg_edge.export.trace import TracedGraph, trace
from mgg_edge.learn.step import AdaptStep

__all__ = ["build_graphs", "trace_adapt", "trace_infer"]


def build_graphs(step: AdaptStep, infer_batch: int, adapt_batch: int) -> dict[str, onnx.ModelProto]:
    """Both graphs in all lowerings, by member name.

    Raises:
        UnsupportedError: an operator cannot be lowered.
    """
    constants = set(step.constants())
    traced = {"infer": trace_infer(step, infer_batch), "adapt": trace_adapt(step, adapt_batch)}
    return {
        graph_name(name, lowering): lower(graph, name, lowering, constants)
        for lowering in LOWERINGS
        for name, graph in traced.items()
    }


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
