"""The table of lowering rules, and what rules share.

A rule takes the builder, the result's fake tensor and the operator's own arguments, with tensors replaced by
`Value`s, and returns the name (or names) of what it emitted. Shapes are fixed, so every shape and axis is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mgg_edge.errors import UnsupportedError
from mgg_edge.export.graph_builder import GraphBuilder

__all__ = ["RULES", "Operand", "Value", "cast", "int64", "numpy_dtype", "pad_axis", "reduction_axes", "reshape", "rule"]


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
Rule = Callable[..., str | tuple[str | None, ...]]
RULES: dict[str, Rule] = {}

_ELEMENT_TYPES = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
}


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """The numpy element type of a PyTorch one."""
    return np.dtype(str(dtype).removeprefix("torch."))


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operators: ATen's named as `add.Tensor`, ours with their namespace."""

    def register(function: Rule) -> Rule:
        RULES.update({name if name.startswith("mgg_edge.") else f"aten.{name}": function for name in names})
        return function

    return register


def cast(g: GraphBuilder, value: Operand, dtype: torch.dtype) -> str:
    """The operand as a named value of the given dtype; numbers become constants."""
    if not isinstance(value, Value):
        return g.constant(value, numpy_dtype(dtype))
    if value.dtype == dtype:
        return value.name
    if dtype not in _ELEMENT_TYPES:
        raise UnsupportedError(f"element type {dtype} has no ONNX lowering")
    return g.emit("Cast", value.name, to=_ELEMENT_TYPES[dtype])


def reduction_axes(axes: int | Sequence[int] | None, rank: int) -> list[int]:
    """Sorted non-negative axes; all of them where PyTorch means all."""
    if axes is None or (not isinstance(axes, int) and len(axes) == 0):
        return list(range(rank))
    return sorted(axis % rank for axis in ([axes] if isinstance(axes, int) else axes)) if rank else []


def int64(g: GraphBuilder, *numbers: int) -> str:
    """A constant vector of whole numbers, such as a shape."""
    return g.constant(numbers, np.int64)


def reshape(g: GraphBuilder, name: str, shape: Sequence[int]) -> str:
    """A value in another shape; of reshapes in a row only the last is kept."""
    while (before := g.producer(name, "Reshape")) is not None:
        name = before.input[0]
    return g.emit("Reshape", name, int64(g, *shape))


def pad_axis(g: GraphBuilder, name: str, rank: int, axis: int, before: int, after: int, dtype: torch.dtype) -> str:
    """Zeros before and after a value along one axis."""
    if before == after == 0:
        return name
    pads = [0] * (2 * rank)
    pads[axis], pads[rank + axis] = before, after
    return g.emit("Pad", name, int64(g, *pads), g.constant(0, numpy_dtype(dtype)), mode="constant")
