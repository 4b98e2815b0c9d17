"""Lowering of reductions, products, softmax and layer normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgg_edge.export.graph_builder import GraphBuilder
from mgg_edge.export.lowering_rule import Value, cast, int64, numpy_dtype, reduction_axes, reshape, rule

__all__: list[str] = []  # the rules register themselves


@rule("sum.dim_IntList", "sum.default")
def _sum(g: GraphBuilder, out: Tensor, x: Value, axes: Any = None, keepdim: bool = False, **_: Any) -> str:
    name, reduced = cast(g, x, out.dtype), reduction_axes(axes, len(x.shape))
    return g.emit("ReduceSum", name, int64(g, *reduced), keepdims=int(keepdim)) if reduced else name


@rule("mean.dim", "mean.default")
def _mean(g: GraphBuilder, out: Tensor, x: Value, axes: Any = None, keepdim: bool = False, **_: Any) -> str:
    name, reduced = cast(g, x, out.dtype), reduction_axes(axes, len(x.shape))
    if len(x.shape) == 4 and reduced == [2, 3]:  # engines pool in the layout of their convolutions
        pooled = g.emit("GlobalAveragePool", name)
        return pooled if keepdim else reshape(g, pooled, out.shape)
    return g.emit("ReduceMean", name, axes=reduced, keepdims=int(keepdim)) if reduced else name


@rule("amax.default")
def _amax(g: GraphBuilder, out: Tensor, x: Value, axes: Any = None, keepdim: bool = False) -> str:
    return g.emit("ReduceMax", x.name, axes=reduction_axes(axes, len(x.shape)), keepdims=int(keepdim))


@rule("max.dim")
def _max(g: GraphBuilder, out: Sequence[Tensor], x: Value, axis: int, keepdim: bool = False) -> tuple[str, str]:
    axis = axis % len(x.shape)
    values = g.emit("ReduceMax", x.name, axes=[axis], keepdims=int(keepdim))
    return values, g.emit("ArgMax", x.name, axis=axis, keepdims=int(keepdim))


@rule("any.dim", "any.dims", "any.default")
def _any(g: GraphBuilder, out: Tensor, x: Value, axes: Any = None, keepdim: bool = False) -> str:
    return _truth(g, x, "ReduceMax", axes, keepdim)


@rule("all.dim", "all.dims", "all.default")
def _all(g: GraphBuilder, out: Tensor, x: Value, axes: Any = None, keepdim: bool = False) -> str:
    return _truth(g, x, "ReduceMin", axes, keepdim)


def _truth(g: GraphBuilder, x: Value, operator: str, axes: Any, keepdim: bool) -> str:
    """Some or all truth values along axes, by their largest or least as numbers: engines reduce no truth values."""
    numbers = cast(g, x if x.dtype == torch.bool else _is_true(g, x), torch.float32)
    reduced = reduction_axes(axes, len(x.shape))
    found = g.emit(operator, numbers, axes=reduced, keepdims=int(keepdim)) if reduced else numbers
    return g.emit("Greater", found, g.constant(0.5, np.float32))


def _is_true(g: GraphBuilder, x: Value) -> Value:
    equal = g.emit("Equal", x.name, g.constant(0, numpy_dtype(x.dtype)))
    return Value(g.emit("Not", equal), torch.bool, x.shape)


@rule("mm.default", "bmm.default", "mv.default", "dot.default", "matmul.default")
def _matmul(g: GraphBuilder, out: Tensor, a: Value, b: Value) -> str:
    return g.emit("MatMul", a.name, b.name)


@rule("addmm.default")
def _addmm(g: GraphBuilder, out: Tensor, bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> str:
    return g.emit("Gemm", a.name, b.name, bias.name, alpha=float(alpha), beta=float(beta))


@rule("_softmax.default")
def _softmax(g: GraphBuilder, out: Tensor, x: Value, axis: int, half_to_float: bool) -> str:
    return g.emit("Softmax", x.name, axis=axis % len(x.shape))


@rule("_log_softmax.default")
def _log_softmax(g: GraphBuilder, out: Tensor, x: Value, axis: int, half_to_float: bool) -> str:
    return g.emit("LogSoftmax", x.name, axis=axis % len(x.shape))


@rule("native_layer_norm.default")
def _layer_norm(
    g: GraphBuilder,
    out: Sequence[Tensor],
    x: Value,
    shape: Sequence[int],
    weight: Value | None,
    bias: Value | None,
    epsilon: float,
) -> tuple[str, str, str]:
    """Normalised x with mean and 1/σ for the backward.

    ONNX Runtime's kernel returns all three at no cost. TensorRT takes the operator with one output only, so there the
    two statistics, if anything needs them, are computed beside it.
    """
    dtype = numpy_dtype(x.dtype)
    rank, axis = len(x.shape), len(x.shape) - len(shape)
    scale = weight.name if weight else g.constant(np.ones(shape), dtype)
    inputs = [x.name, scale] + ([bias.name] if bias else [])
    if g.lowering == "onnxruntime":
        normalised, mean, inverse = g.emit_many("LayerNormalization", inputs, 3, axis=axis, epsilon=epsilon)
        return normalised, mean, inverse
    axes = list(range(axis, rank))
    mean = g.emit("ReduceMean", x.name, axes=axes, keepdims=1)
    centred = g.emit("Sub", x.name, mean)
    variance = g.emit("ReduceMean", g.emit("Mul", centred, centred), axes=axes, keepdims=1)
    inverse = g.emit("Reciprocal", g.emit("Sqrt", g.emit("Add", variance, g.constant(epsilon, dtype))))
    return g.emit("LayerNormalization", *inputs, axis=axis, epsilon=epsilon), mean, inverse


@rule("mgg_edge.scale_and_shift.default")
def _scale_and_shift(g: GraphBuilder, out: Tensor, x: Value, scale: Value, shift: Value) -> str:
    """ONNX Runtime's batch normalisation of mean 0 and variance 1; TensorRT wants constants there."""
    count, dtype = scale.shape[0], numpy_dtype(out.dtype)
    if g.lowering == "onnxruntime" and out.dtype == torch.float32:
        mean, variance = (g.constant(np.full(count, number), dtype) for number in (0, 1))
        return g.emit("BatchNormalization", x.name, scale.name, shift.name, mean, variance, epsilon=0.0)
    channels = [1, count, *[1] * (len(x.shape) - 2)]
    product = g.emit("Mul", x.name, reshape(g, scale.name, channels))
    return g.emit("Add", product, reshape(g, shift.name, channels))
