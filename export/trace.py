"""Differentiate and flatten a pure PyTorch function into one graph of ATen operators.

`make_fx` runs the function once on fake tensors, through `torch.func.grad`, and records every operator, so the
gradient is in the graph as ordinary forward mathematics and nothing needs autograd any more. Operators are
decomposed to the core set, except where a whole operator lowers better than its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["TracedGraph", "trace"]

aten = torch.ops.aten

# Each is one padding in ONNX; decomposed, it would be a comparison and a select over a filled tensor.
KEPT_WHOLE = (aten.select_backward.default, aten.slice_backward.default)
INVERSE_SQRT_2, INVERSE_SQRT_2_PI = 0.7071067811865476, 0.3989422804014327
SQRT_2_OVER_PI, TANH_CUBIC = 0.7978845608028654, 0.044715


@dataclass(frozen=True)
class TracedGraph:
    """A traced function.

    Attributes:
        module: graph of core ATen operators; every node carries its fake tensor under `meta["val"]`.
        inputs: names of the placeholders, in order.
        outputs: names of the results, in order.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def trace(
    function: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], inputs: Mapping[str, Tensor]
) -> TracedGraph:
    """Trace a pure function of named tensors.

    Args:
        function: takes the inputs by name and returns the outputs by name. Python numbers and shapes are baked in.
        inputs: example tensors; only shapes and dtypes matter.
    """
    names = tuple(inputs)
    outputs: list[str] = []

    def positional(*values: Tensor) -> tuple[Tensor, ...]:
        results = function(dict(zip(names, values, strict=True)))
        outputs[:] = results
        return tuple(results.values())

    recorded = make_fx(positional, decomposition_table=_decompositions(), tracing_mode="fake")(*inputs.values())
    # A second pass, because some decompositions work in place, which a graph of values cannot say.
    pure = torch.func.functionalize(recorded, remove="mutations")
    module = make_fx(pure, tracing_mode="fake")(*inputs.values())
    module.graph.eliminate_dead_code()
    return TracedGraph(module, names, tuple(outputs))


def _decompositions() -> dict[Any, Any]:
    table = dict(core_aten_decompositions())
    for operator in KEPT_WHOLE:
        table.pop(operator, None)
    table[aten.gelu.default] = _gelu
    table[aten.gelu_backward.default] = _gelu_backward
    table[aten.var.correction] = _var
    table[aten.native_batch_norm.default] = _native_batch_norm
    return table


def _normal_distribution(x: Tensor) -> Tensor:
    return 0.5 + 0.5 * torch.erf(x * INVERSE_SQRT_2)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x·Φ(x), or with the tanh approximation x·(1 + t)/2: written so that forward and backward share nodes."""
    return x * (_normal_distribution(x) if approximate == "none" else 0.5 + 0.5 * _tanh_argument(x).tanh())


def _gelu_backward(gradient: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """g·(Φ(x) + x·φ(x)), or g·((1 + t)/2 + x·(1 − t²)/2·a′) with t = tanh a."""
    if approximate == "none":
        density = torch.exp(-0.5 * (x * x)) * INVERSE_SQRT_2_PI
        return gradient * (_normal_distribution(x) + x * density)
    tanh = _tanh_argument(x).tanh()
    slope = SQRT_2_OVER_PI * (1 + 3 * TANH_CUBIC * (x * x))
    return gradient * (0.5 + 0.5 * tanh + 0.5 * x * (1 - tanh * tanh) * slope)


def _tanh_argument(x: Tensor) -> Tensor:
    """a = √(2/π)·(x + 0.044715 x³)."""
    return SQRT_2_OVER_PI * x * (1 + TANH_CUBIC * (x * x))


def _native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,  # noqa: ARG001 - running statistics do not move here
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """γ·(x − μ)/√(σ² + ε) + β with the batch's own statistics.

    Spelled out because the operator as a whole is easily taken for its inference form, which is another function.
    """
    if not training or running_mean is not None or running_var is not None:
        return NotImplemented
    axes = [0, *range(2, x.ndim)]
    mean = x.mean(axes, keepdim=True)
    inverse = torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + epsilon)
    channels = [1, -1] + [1] * (x.ndim - 2)
    y = (x - mean) * inverse
    y = y if weight is None else y * weight.reshape(channels)
    y = y if bias is None else y + bias.reshape(channels)
    return y, mean.flatten(), inverse.flatten()


def _var(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    """Σ(x − μ)² / (n − correction) over `dim`."""
    axes = list(range(x.ndim)) if dim is None else dim
    mean = x.mean(axes, keepdim=True)
    count = x.numel() // mean.numel()
    divisor = count - (1.0 if correction is None else correction)
    return (x - mean).square().sum(axes, keepdim=keepdim) / divisor
