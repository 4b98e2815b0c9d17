"""How each core ATen operator is said in ONNX (opset 17).

A rule takes the builder, the result's fake tensor and the operator's own arguments, with tensors replaced by
`Value`s, and returns the name (or names) of what it emitted. Shapes are fixed, so every shape and axis is a constant.
An operator without a rule cannot be exported; nothing is approximated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgg_edge.errors import UnsupportedError
from mgg_edge.export.graph_builder import GraphBuilder

__all__ = ["RULES", "Value", "numpy_dtype"]


@dataclass(frozen=True)
class Value:
    """A tensor in the graph being built.

    Attributes:
        name: its name in the ONNX graph.
        dtype: PyTorch element type.
        shape: fixed shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


Operand = Value | float | int | bool
Rule = Callable[..., str | tuple[str, ...]]
RULES: dict[str, Rule] = {}

_ELEMENT_TYPES = {torch.float32: 1, torch.uint8: 2, torch.int32: 6, torch.int64: 7, torch.bool: 9, torch.float16: 10}
_INT64_MAX = np.iinfo(np.int64).max


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The numpy element type of a PyTorch one."""
    return np.dtype(str(dtype).removeprefix("torch."))


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update({f"aten.{name}": function for name in names})
        return function

    return register


def _cast(g: GraphBuilder, value: Operand, dtype: torch.dtype) -> str:
    """The operand as a named value of the given dtype; numbers become constants."""
    if not isinstance(value, Value):
        return g.constant(value, numpy_dtype(dtype))
    if value.dtype == dtype:
        return value.name
    if dtype not in _ELEMENT_TYPES:
        raise UnsupportedError(f"element type {dtype} has no ONNX lowering")
    return g.emit("Cast", value.name, to=_ELEMENT_TYPES[dtype])


def _axes(axes: int | Sequence[int] | None, rank: int) -> list[int]:
    if axes is None or (not isinstance(axes, int) and len(axes) == 0):
        return list(range(rank))
    return sorted(axis % rank for axis in ([axes] if isinstance(axes, int) else axes)) if rank else []


def _int64(g: GraphBuilder, *numbers: int) -> str:
    return g.constant(numbers, np.int64)


def _reshape(g: GraphBuilder, name: str, shape: Sequence[int]) -> str:
    while (before := g.producer(name, "Reshape")) is not None:
        name = before.input[0]
    return g.emit("Reshape", name, _int64(g, *shape))


# Element-wise operators ------------------------------------------------------------------------------------

for _aten, _onnx in {
    "exp.default": "Exp",
    "log.default": "Log",
    "neg.default": "Neg",
    "abs.default": "Abs",
    "erf.default": "Erf",
    "tanh.default": "Tanh",
    "sigmoid.default": "Sigmoid",
    "relu.default": "Relu",
    "sqrt.default": "Sqrt",
    "reciprocal.default": "Reciprocal",
    "sign.default": "Sign",
    "logical_not.default": "Not",
}.items():

    def _unary(g: GraphBuilder, out: Tensor, x: Value, operator: str = _onnx) -> str:
        return g.emit(operator, _cast(g, x, out.dtype))

    _rule(_aten)(_unary)


@_rule("rsqrt.default")
def _rsqrt(g: GraphBuilder, out: Tensor, x: Value) -> str:
    return g.emit("Reciprocal", g.emit("Sqrt", x.name))


for _aten, _onnx in {"mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min"}.items():

    def _binary(g: GraphBuilder, out: Tensor, a: Operand, b: Operand, operator: str = _onnx) -> str:
        return g.emit(operator, _cast(g, a, out.dtype), _cast(g, b, out.dtype))

    _rule(f"{_aten}.Tensor", f"{_aten}.Scalar", f"{_aten}.default")(_binary)


@_rule("add.Tensor", "add.Scalar")
def _add(g: GraphBuilder, out: Tensor, a: Operand, b: Operand, alpha: float = 1) -> str:
    return g.emit("Add", _cast(g, a, out.dtype), _scaled(g, b, alpha, out.dtype))


@_rule("sub.Tensor", "sub.Scalar")
def _sub(g: GraphBuilder, out: Tensor, a: Operand, b: Operand, alpha: float = 1) -> str:
    return g.emit("Sub", _cast(g, a, out.dtype), _scaled(g, b, alpha, out.dtype))


def _scaled(g: GraphBuilder, value: Operand, alpha: float, dtype: torch.dtype) -> str:
    name = _cast(g, value, dtype)
    return name if alpha == 1 else g.emit("Mul", name, g.constant(alpha, numpy_dtype(dtype)))


@_rule("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def _pow(g: GraphBuilder, out: Tensor, base: Operand, exponent: Operand) -> str:
    name = _cast(g, base, out.dtype)
    if exponent == 2:
        return g.emit("Mul", name, name)
    return g.emit("Pow", name, _cast(g, exponent, out.dtype))


for _aten, _onnx in {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}.items():

    def _compare(g: GraphBuilder, out: Tensor, a: Value, b: Operand, operator: str = _onnx) -> str:
        dtype = torch.promote_types(a.dtype, b.dtype) if isinstance(b, Value) else a.dtype
        return g.emit(operator, _cast(g, a, dtype), _cast(g, b, dtype))

    _rule(f"{_aten}.Scalar", f"{_aten}.Tensor")(_compare)


@_rule("where.self")
def _where(g: GraphBuilder, out: Tensor, condition: Value, a: Operand, b: Operand) -> str:
    return g.emit("Where", condition.name, _cast(g, a, out.dtype), _cast(g, b, out.dtype))


@_rule("clamp.default")
def _clamp(g: GraphBuilder, out: Tensor, x: Value, low: float | None = None, high: float | None = None) -> str:
    bounds = ["" if bound is None else g.constant(bound, numpy_dtype(out.dtype)) for bound in (low, high)]
    return g.emit("Clip", x.name, *bounds)


@_rule("_to_copy.default")
def _to_copy(g: GraphBuilder, out: Tensor, x: Value, **_: Any) -> str:
    return _cast(g, x, out.dtype)


@_rule("clone.default", "detach.default", "alias.default", "lift_fresh_copy.default")
def _same(g: GraphBuilder, out: Tensor, x: Value, **_: Any) -> str:
    return x.name


@_rule("copy.default")
def _copy(g: GraphBuilder, out: Tensor, target: Value, source: Value, *_: Any) -> str:
    name = _cast(g, source, out.dtype)
    return name if source.shape == target.shape else g.emit("Expand", name, _int64(g, *out.shape))


# Constants -------------------------------------------------------------------------------------------------


@_rule("full.default", "full_like.default", "scalar_tensor.default")
def _full(g: GraphBuilder, out: Tensor, *arguments: Any, **_: Any) -> str:
    scalar = g.constant(arguments[-1], numpy_dtype(out.dtype))
    return g.emit("Expand", scalar, _int64(g, *out.shape)) if out.ndim else scalar


@_rule("zeros.default", "zeros_like.default", "new_zeros.default", "empty_like.default", "empty.memory_format")
def _zeros(g: GraphBuilder, out: Tensor, *_: Any, **__: Any) -> str:
    return _full(g, out, 0)  # type: ignore[return-value]


@_rule("ones.default", "ones_like.default")
def _ones(g: GraphBuilder, out: Tensor, *_: Any, **__: Any) -> str:
    return _full(g, out, 1)  # type: ignore[return-value]


@_rule("arange.start_step")
def _arange(g: GraphBuilder, out: Tensor, start: int, stop: int, step: int = 1, **_: Any) -> str:
    return g.constant(np.arange(start, stop, step), numpy_dtype(out.dtype))


# Shapes ----------------------------------------------------------------------------------------------------


@_rule("view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default")
@_rule("squeeze.dim", "squeeze.dims", "squeeze.default")
def _view(g: GraphBuilder, out: Tensor, x: Value, *_: Any) -> str:
    return x.name if tuple(out.shape) == x.shape else _reshape(g, x.name, out.shape)


@_rule("expand.default")
def _expand(g: GraphBuilder, out: Tensor, x: Value, *_: Any, **__: Any) -> str:
    return x.name if tuple(out.shape) == x.shape else g.emit("Expand", x.name, _int64(g, *out.shape))


@_rule("permute.default")
def _permute(g: GraphBuilder, out: Tensor, x: Value, order: Sequence[int]) -> str:
    positive = [axis % len(x.shape) for axis in order]
    return x.name if positive == sorted(positive) else g.emit("Transpose", x.name, perm=positive)


@_rule("t.default")
def _t(g: GraphBuilder, out: Tensor, x: Value) -> str:
    return x.name if len(x.shape) < 2 else g.emit("Transpose", x.name, perm=[1, 0])


@_rule("transpose.int")
def _transpose(g: GraphBuilder, out: Tensor, x: Value, first: int, second: int) -> str:
    order = list(range(len(x.shape)))
    order[first], order[second] = order[second], order[first]
    return _permute(g, out, x, order)  # type: ignore[return-value]


@_rule("cat.default")
def _cat(g: GraphBuilder, out: Tensor, parts: Sequence[Value], axis: int = 0) -> str:
    names = [_cast(g, part, out.dtype) for part in parts if math.prod(part.shape)]
    return names[0] if len(names) == 1 else g.emit("Concat", *names, axis=axis % out.ndim)


@_rule("split_with_sizes.default")
def _split(g: GraphBuilder, out: Sequence[Tensor], x: Value, sizes: Sequence[int], axis: int = 0) -> tuple[str, ...]:
    return g.emit_many("Split", [x.name, _int64(g, *sizes)], len(sizes), axis=axis % len(x.shape))


@_rule("slice.Tensor")
def _slice(
    g: GraphBuilder,
    out: Tensor,
    x: Value,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> str:
    if tuple(out.shape) == x.shape:
        return x.name
    stop = _INT64_MAX if end is None else min(end, _INT64_MAX)
    bounds = (_int64(g, start or 0), _int64(g, stop), _int64(g, axis % len(x.shape)), _int64(g, step))
    return g.emit("Slice", x.name, *bounds)


@_rule("select.int")
def _select(g: GraphBuilder, out: Tensor, x: Value, axis: int, index: int) -> str:
    positive = index % x.shape[axis]
    bounds = (_int64(g, positive), _int64(g, positive + 1), _int64(g, axis % len(x.shape)))
    return _reshape(g, g.emit("Slice", x.name, *bounds), out.shape)


@_rule("select_backward.default")
def _select_backward(g: GraphBuilder, out: Tensor, gradient: Value, shape: Sequence[int], axis: int, index: int) -> str:
    axis, extent = axis % len(shape), shape[axis]
    kept = list(shape)
    kept[axis] = 1
    before = index % extent
    return _pad(g, _reshape(g, gradient.name, kept), len(shape), axis, before, extent - before - 1, out.dtype)


@_rule("slice_backward.default")
def _slice_backward(
    g: GraphBuilder, out: Tensor, gradient: Value, shape: Sequence[int], axis: int, start: int, end: int, step: int
) -> str:
    if step != 1:
        raise UnsupportedError(f"gradient of a slice with step {step} has no ONNX lowering")
    axis, extent = axis % len(shape), shape[axis]
    before = start % extent if start < 0 else start
    return _pad(g, gradient.name, len(shape), axis, before, extent - before - gradient.shape[axis], out.dtype)


def _pad(g: GraphBuilder, name: str, rank: int, axis: int, before: int, after: int, dtype: torch.dtype) -> str:
    if before == after == 0:
        return name
    pads = [0] * (2 * rank)
    pads[axis], pads[rank + axis] = before, after
    return g.emit("Pad", name, _int64(g, *pads), g.constant(0, numpy_dtype(dtype)), mode="constant")


# Reductions ------------------------------------------------------------------------------------------------


@_rule("sum.dim_IntList", "sum.default")
def _sum(g: GraphBuilder, out: Tensor, x: Value, axes: Any = None, keepdim: bool = False, **_: Any) -> str:
    name, reduced = _cast(g, x, out.dtype), _axes(axes, len(x.shape))
    return g.emit("ReduceSum", name, _int64(g, *reduced), keepdims=int(keepdim)) if reduced else name


@_rule("mean.dim", "mean.default")
def _mean(g: GraphBuilder, out: Tensor, x: Value, axes: Any = None, keepdim: bool = False, **_: Any) -> str:
    name, reduced = _cast(g, x, out.dtype), _axes(axes, len(x.shape))
    return g.emit("ReduceMean", name, axes=reduced, keepdims=int(keepdim)) if reduced else name


@_rule("amax.default")
def _amax(g: GraphBuilder, out: Tensor, x: Value, axes: Any = None, keepdim: bool = False) -> str:
    return g.emit("ReduceMax", x.name, axes=_axes(axes, len(x.shape)), keepdims=int(keepdim))


# Products --------------------------------------------------------------------------------------------------


@_rule("mm.default", "bmm.default", "mv.default", "dot.default")
def _matmul(g: GraphBuilder, out: Tensor, a: Value, b: Value) -> str:
    return g.emit("MatMul", a.name, b.name)


@_rule("addmm.default")
def _addmm(g: GraphBuilder, out: Tensor, bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> str:
    return g.emit("Gemm", a.name, b.name, bias.name, alpha=float(alpha), beta=float(beta))


@_rule("convolution.default")
def _convolution(
    g: GraphBuilder,
    out: Tensor,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> str:
    if transposed:
        raise UnsupportedError("transposed convolution has no ONNX lowering yet")
    inputs = [x.name, weight.name] + ([] if bias is None else [bias.name])
    pads = [*padding, *padding]
    return g.emit("Conv", *inputs, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)


# Normalisation and softmax ---------------------------------------------------------------------------------


@_rule("_softmax.default")
def _softmax(g: GraphBuilder, out: Tensor, x: Value, axis: int, half_to_float: bool) -> str:
    return g.emit("Softmax", x.name, axis=axis % len(x.shape))


@_rule("_log_softmax.default")
def _log_softmax(g: GraphBuilder, out: Tensor, x: Value, axis: int, half_to_float: bool) -> str:
    return g.emit("LogSoftmax", x.name, axis=axis % len(x.shape))


@_rule("native_layer_norm.default")
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
