"""What a bundle is measured against: the user's own model in a plain ONNX file, and arithmetic no step can avoid."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from torch import Tensor, fx

from mgg_edge.export.graphs import trace_adapt, trace_infer
from mgg_edge.export.restore import restore_plain, restore_step
from mgg_edge.export.trace import TracedGraph
from mgg_edge.runtime.bundle.bundle import Bundle

__all__ = ["multiply_adds", "step_floor", "write_plain"]

OPSET = 17
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.bmm.default, _aten.matmul.default, _aten.addmm.default}


def write_plain(bundle: Bundle, path: Path) -> None:
    """Write the classifier of a bundle as PyTorch exports it: `images` f32[b,3,H,W], scaled, to `logits`.

    Raises:
        MggEdgeError: see `restore_backbone`.
    """
    size = bundle.manifest.preprocess
    example = torch.zeros(bundle.manifest.infer_batch, 3, size.height, size.width)
    model = restore_plain(bundle)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, which takes Python's decisions for constants, as they are here
        torch.onnx.export(
            model, (example,), str(path), dynamo=False, opset_version=OPSET, input_names=["images"],
            output_names=["logits"],
        )  # fmt: skip


def step_floor(bundle: Bundle) -> float:
    """Multiply-adds of an adaptation step over those of a plain forward pass of its batch: what no engine goes below.

    Raises:
        MggEdgeError: see `restore_step`.
    """
    manifest = bundle.manifest
    step = restore_step(bundle, any_movement=True)
    forward = multiply_adds(trace_infer(step, 1)) * manifest.adapt_batch
    return multiply_adds(trace_adapt(step, manifest.adapt_batch)) / forward


def multiply_adds(traced: TracedGraph) -> int:
    """Multiply-adds of the matrix products and convolutions of a graph."""
    return sum(_of_node(node) for node in traced.module.graph.nodes if node.op == "call_function")


def _of_node(node: fx.Node) -> int:
    """Multiply-adds of one operator; 0 for all that are no product."""
    tensors = [argument.meta["val"] for argument in node.args if isinstance(argument, fx.Node)]
    if node.target is _aten.addmm.default:
        tensors = tensors[1:]
    if node.target in _PRODUCTS:
        rows, columns = tensors[0], tensors[1]
        return math.prod(rows.shape) * math.prod(columns.shape[-1:])
    if node.target is _aten.convolution.default:
        return _of_convolution(tensors[1], node.meta["val"], transposed=bool(node.args[6]), x=tensors[0])
    if node.target is _aten.convolution_backward.default:
        gradient, x, weight = tensors[:3]
        return _of_convolution(weight, gradient, transposed=bool(node.args[7]), x=x)
    return 0


def _of_convolution(weight: Tensor, y: Tensor, *, transposed: bool, x: Tensor) -> int:
    """Each element of the output, or of the input of a transposed one, meets its own part of the kernel once."""
    return math.prod((x if transposed else y).shape) * math.prod(weight.shape[1:])
