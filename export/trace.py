"""Differentiate and flatten a pure PyTorch function into one graph of ATen operators.

`make_fx` runs the function once on fake tensors, through `torch.func.grad`, and records every operator, so the
gradient is in the graph as ordinary forward mathematics and nothing needs autograd any more. Operators are
decomposed to the core set, except where a whole operator lowers better than its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.autograd.grad_mode import _force_original_view_tracking
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgg_edge.export.decompositions import decompositions
from mgg_edge.export.simplify import simplify

__all__ = ["TracedGraph", "trace"]


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

    # A fused kernel's backward is an operator of its own; and views stay views where they are written to, not strides.
    with sdpa_kernel(SDPBackend.MATH), _force_original_view_tracking(True):
        recorded = make_fx(positional, decomposition_table=decompositions(), tracing_mode="fake")(*inputs.values())
    # A second pass, because some decompositions work in place, which a graph of values cannot say.
    pure = torch.func.functionalize(recorded, remove="mutations")
    module = make_fx(pure, tracing_mode="fake")(*inputs.values())
    simplify(module)
    return TracedGraph(module, names, tuple(outputs))
