"""Lowering of operators that act on each element, and of constants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgg_edge.errors import UnsupportedError
from mgg_edge.export.graph_builder import GraphBuilder
from mgg_edge.export.lowering_rule import Operand, Value, cast, int64, numpy_dtype, rule

__all__: list[str] = []  # the rules register themselves

for _aten, _onnx in {
    "exp.default": "Exp",
    "log.default": "Log",
    "neg.default": "Neg",
    "abs.default": "Abs",
    "erf.default": "Erf",
    "tanh.default": "Tanh",
    "sin.default": "Sin",
    "cos.default": "Cos",
    "sigmoid.default": "Sigmoid",
    "relu.default": "Relu",
    "sqrt.default": "Sqrt",
    "reciprocal.default": "Reciprocal",
    "sign.default": "Sign",
    "logical_not.default": "Not",
    "bitwise_not.default": "Not",
}.items():

    def _unary(g: GraphBuilder, out: Tensor, x: Value, operator: str = _onnx) -> str:
        return g.emit(operator, cast(g, x, out.dtype))

    rule(_aten)(_unary)


for _aten, _onnx in {"bitwise_and": "And", "bitwise_or": "Or", "logical_and": "And", "logical_or": "Or"}.items():

    def _both(g: GraphBuilder, out: Tensor, a: Value, b: Value, operator: str = _onnx) -> str:
        if torch.bool not in (a.dtype, b.dtype):
            raise UnsupportedError(f"bits of {a.dtype} and {b.dtype} have no ONNX lowering; only truth values have")
        return g.emit(operator, a.name, b.name)

    rule(f"{_aten}.Tensor", f"{_aten}.default")(_both)


@rule("rsqrt.default")
def _rsqrt(g: GraphBuilder, out: Tensor, x: Value) -> str:
    return g.emit("Reciprocal", g.emit("Sqrt", x.name))


for _aten, _onnx in {"mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min"}.items():

    def _binary(g: GraphBuilder, out: Tensor, a: Operand, b: Operand, operator: str = _onnx) -> str:
        return g.emit(operator, cast(g, a, out.dtype), cast(g, b, out.dtype))

    rule(f"{_aten}.Tensor", f"{_aten}.Scalar", f"{_aten}.default")(_binary)


@rule("div.Tensor_mode", "div.Scalar_mode")
def _divide_and_round(g: GraphBuilder, out: Tensor, a: Operand, b: Operand, rounding_mode: str | None = None) -> str:
    if rounding_mode != "floor" or not out.dtype.is_floating_point:
        raise UnsupportedError(f"division of {out.dtype} rounded by '{rounding_mode}' has no ONNX lowering")
    return g.emit("Floor", g.emit("Div", cast(g, a, out.dtype), cast(g, b, out.dtype)))


@rule("cumsum.default")
def _running_sum(g: GraphBuilder, out: Tensor, x: Value, axis: int, dtype: torch.dtype | None = None) -> str:
    return g.emit("CumSum", cast(g, x, out.dtype), g.constant(axis % len(out.shape), np.int64))


@rule("add.Tensor", "add.Scalar")
def _add(g: GraphBuilder, out: Tensor, a: Operand, b: Operand, alpha: float = 1) -> str:
    return g.emit("Add", cast(g, a, out.dtype), _scaled(g, b, alpha, out.dtype))


@rule("sub.Tensor", "sub.Scalar")
def _sub(g: GraphBuilder, out: Tensor, a: Operand, b: Operand, alpha: float = 1) -> str:
    return g.emit("Sub", cast(g, a, out.dtype), _scaled(g, b, alpha, out.dtype))


def _scaled(g: GraphBuilder, value: Operand, alpha: float, dtype: torch.dtype) -> str:
    name = cast(g, value, dtype)
    return name if alpha == 1 else g.emit("Mul", name, g.constant(alpha, numpy_dtype(dtype)))


@rule("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def _pow(g: GraphBuilder, out: Tensor, base: Operand, exponent: Operand) -> str:
    name = cast(g, base, out.dtype)
    if exponent == 2:
        return g.emit("Mul", name, name)
    return g.emit("Pow", name, cast(g, exponent, out.dtype))


for _aten, _onnx in {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}.items():

    def _compare(g: GraphBuilder, out: Tensor, a: Value, b: Operand, operator: str = _onnx) -> str:
        dtype = torch.promote_types(a.dtype, b.dtype) if isinstance(b, Value) else a.dtype
        return g.emit(operator, cast(g, a, dtype), cast(g, b, dtype))

    rule(f"{_aten}.Scalar", f"{_aten}.Tensor")(_compare)


@rule("ne.Scalar", "ne.Tensor")
def _not_equal(g: GraphBuilder, out: Tensor, a: Value, b: Operand) -> str:
    dtype = torch.promote_types(a.dtype, b.dtype) if isinstance(b, Value) else a.dtype
    return g.emit("Not", g.emit("Equal", cast(g, a, dtype), cast(g, b, dtype)))


@rule("where.self")
def _where(g: GraphBuilder, out: Tensor, condition: Value, a: Operand, b: Operand) -> str:
    return g.emit("Where", condition.name, cast(g, a, out.dtype), cast(g, b, out.dtype))


@rule("clamp.default")
def _clamp(g: GraphBuilder, out: Tensor, x: Value, low: float | None = None, high: float | None = None) -> str:
    bounds = ["" if bound is None else g.constant(bound, numpy_dtype(out.dtype)) for bound in (low, high)]
    return g.emit("Clip", x.name, *bounds)


@rule("leaky_relu.default")
def _leaky_relu(g: GraphBuilder, out: Tensor, x: Value, slope: float = 0.01) -> str:
    return g.emit("LeakyRelu", x.name, alpha=float(slope))


@rule("log1p.default")
def _log1p(g: GraphBuilder, out: Tensor, x: Value) -> str:
    """x·log(u)/(u − 1) with u = 1 + x as rounded, or x where u = 1: exact where 1 + x loses digits of x."""
    one = g.constant(1, numpy_dtype(out.dtype))
    u = g.emit("Add", x.name, one)
    is_one = g.emit("Equal", u, one)
    divisor = g.emit("Where", is_one, one, g.emit("Sub", u, one))
    return g.emit("Where", is_one, x.name, g.emit("Div", g.emit("Mul", x.name, g.emit("Log", u)), divisor))


@rule("hardtanh.default")
def _hardtanh(g: GraphBuilder, out: Tensor, x: Value, low: float = -1.0, high: float = 1.0) -> str:
    return _clamp(g, out, x, low, high)  # type: ignore[return-value]


@rule("hardsigmoid.default")
def _hard_sigmoid(g: GraphBuilder, out: Tensor, x: Value) -> str:
    return g.emit("HardSigmoid", x.name, alpha=1 / 6, beta=0.5)


@rule("hardswish.default")
def _hard_swish(g: GraphBuilder, out: Tensor, x: Value) -> str:
    if g.lowering == "tensorrt":
        return g.emit("Mul", x.name, _hard_sigmoid(g, out, x))  # type: ignore[arg-type]
    return g.emit("HardSwish", x.name)


# GELU: engines know the order of `_gelu` as one operator as long as nobody else reads what is between. So the
# gradient computes its own, in another order, lest the nodes be shared: kept until then they take three times the
# memory.

SQRT_2, INVERSE_SQRT_PI = 1.4142135623730951, 0.5641895835477563
SQRT_2_OVER_PI, TANH_CUBIC = 0.7978845608028654, 0.044715


@rule("gelu.default")
def _gelu(g: GraphBuilder, out: Tensor, x: Value, approximate: str = "none") -> str:
    """x·(1 + erf(x/√2))/2, or x·(1 + tanh a)/2 with a = √(2/π)·x·(1 + 0.044715 x²)."""
    if approximate == "none":
        inner = g.emit("Erf", _compute(g, out, "Div", x.name, SQRT_2))
    else:
        square = _compute(g, out, "Mul", x.name, x.name)
        rest = _compute(g, out, "Add", _compute(g, out, "Mul", square, TANH_CUBIC), 1.0)
        inner = g.emit("Tanh", _compute(g, out, "Mul", _compute(g, out, "Mul", x.name, SQRT_2_OVER_PI), rest))
    return _compute(g, out, "Mul", _compute(g, out, "Mul", x.name, _compute(g, out, "Add", inner, 1.0)), 0.5)


@rule("gelu_backward.default")
def _gelu_backward(g: GraphBuilder, out: Tensor, gradient: Value, x: Value, approximate: str = "none") -> str:
    """g·(Φ + x·φ), with u = x/√2: Φ = (1 + erf u)/2 and x·φ = u·exp(−log √π − u²). HardSigmoid is one pass.

    Or g·((1 + t)/2 + x·(1 − t²)/2·a′) with t = tanh a.
    """
    if approximate == "none":
        u = _compute(g, out, "Mul", x.name, 1 / SQRT_2)
        inner = g.emit("Erf", u)
        falling = _compute(g, out, "Sub", math.log(INVERSE_SQRT_PI), _compute(g, out, "Mul", u, u))
        bend = _compute(g, out, "Mul", u, g.emit("Exp", falling))
    else:
        square = _compute(g, out, "Mul", _compute(g, out, "Mul", x.name, SQRT_2_OVER_PI * TANH_CUBIC), x.name)
        inner = g.emit("Tanh", _compute(g, out, "Mul", _compute(g, out, "Add", square, SQRT_2_OVER_PI), x.name))
        slope = _compute(g, out, "Add", _compute(g, out, "Mul", square, 1.5), SQRT_2_OVER_PI / 2)
        falling = _compute(g, out, "Sub", 1.0, _compute(g, out, "Mul", inner, inner))
        bend = _compute(g, out, "Mul", _compute(g, out, "Mul", x.name, falling), slope)
    below = g.emit("HardSigmoid", inner, alpha=0.5, beta=0.5)
    return _compute(g, out, "Mul", gradient.name, _compute(g, out, "Add", below, bend))


def _compute(g: GraphBuilder, out: Tensor, operator: str, a: str | float, b: str | float) -> str:
    """An operator of two named values or numbers, which become constants of the result's type."""
    dtype = numpy_dtype(out.dtype)
    return g.emit(operator, *(one if isinstance(one, str) else g.constant(one, dtype) for one in (a, b)))


@rule("_to_copy.default")
def _to_copy(g: GraphBuilder, out: Tensor, x: Value, **_: Any) -> str:
    return cast(g, x, out.dtype)


@rule("clone.default", "detach.default", "alias.default", "lift_fresh_copy.default")
def _same(g: GraphBuilder, out: Tensor, x: Value, **_: Any) -> str:
    return x.name


@rule("copy.default")
def _copy(g: GraphBuilder, out: Tensor, target: Value, source: Value, *_: Any) -> str:
    name = cast(g, source, out.dtype)
    return name if source.shape == target.shape else g.emit("Expand", name, int64(g, *out.shape))


# Constants --------------------------------------------------------------------------------------------------


@rule("full.default", "full_like.default", "scalar_tensor.default")
def _full(g: GraphBuilder, out: Tensor, *arguments: Any, **_: Any) -> str:
    scalar = g.constant(arguments[-1], numpy_dtype(out.dtype))
    return g.emit("Expand", scalar, int64(g, *out.shape)) if out.ndim else scalar


@rule("zeros.default", "zeros_like.default", "new_zeros.default", "empty_like.default", "empty.memory_format")
@rule("empty_permuted.default")
def _zeros(g: GraphBuilder, out: Tensor, *_: Any, **__: Any) -> str:
    return _full(g, out, 0)  # type: ignore[return-value]


@rule("ones.default", "ones_like.default")
def _ones(g: GraphBuilder, out: Tensor, *_: Any, **__: Any) -> str:
    return _full(g, out, 1)  # type: ignore[return-value]


@rule("arange.start_step")
def _arange(g: GraphBuilder, out: Tensor, start: int, stop: int, step: int = 1, **_: Any) -> str:
    return g.constant(np.arange(start, stop, step), numpy_dtype(out.dtype))
