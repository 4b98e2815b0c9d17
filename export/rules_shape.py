"""Lowering of operators that move elements without changing them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgg_edge.errors import UnsupportedError
from mgg_edge.export.graph_builder import GraphBuilder
from mgg_edge.export.lowering_rule import Value, cast, int64, numpy_dtype, pad_axis, reshape, rule

__all__: list[str] = []  # the rules register themselves

INT64_MAX = np.iinfo(np.int64).max


@rule("view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default")
@rule("squeeze.dim", "squeeze.dims", "squeeze.default")
def _view(g: GraphBuilder, out: Tensor, x: Value, *_: Any) -> str:
    return x.name if tuple(out.shape) == x.shape else reshape(g, x.name, out.shape)


@rule("expand.default")
def _expand(g: GraphBuilder, out: Tensor, x: Value, *_: Any, **__: Any) -> str:
    return x.name if tuple(out.shape) == x.shape else g.emit("Expand", x.name, int64(g, *out.shape))


@rule("repeat.default")
def _repeat(g: GraphBuilder, out: Tensor, x: Value, times: Sequence[int]) -> str:
    shape = [1] * (len(times) - len(x.shape)) + list(x.shape)
    return g.emit("Tile", reshape(g, x.name, shape), int64(g, *times))


@rule("permute.default")
def _permute(g: GraphBuilder, out: Tensor, x: Value, order: Sequence[int]) -> str:
    positive = [axis % len(x.shape) for axis in order]
    return x.name if positive == sorted(positive) else g.emit("Transpose", x.name, perm=positive)


@rule("t.default")
def _t(g: GraphBuilder, out: Tensor, x: Value) -> str:
    return x.name if len(x.shape) < 2 else g.emit("Transpose", x.name, perm=[1, 0])


@rule("transpose.int")
def _transpose(g: GraphBuilder, out: Tensor, x: Value, first: int, second: int) -> str:
    order = list(range(len(x.shape)))
    order[first], order[second] = order[second], order[first]
    return _permute(g, out, x, order)  # type: ignore[return-value]


@rule("cat.default")
def _cat(g: GraphBuilder, out: Tensor, parts: Sequence[Value], axis: int = 0) -> str:
    names = [cast(g, part, out.dtype) for part in parts if math.prod(part.shape)]
    return names[0] if len(names) == 1 else g.emit("Concat", *names, axis=axis % out.ndim)


@rule("split_with_sizes.default")
def _split(g: GraphBuilder, out: Sequence[Tensor], x: Value, sizes: Sequence[int], axis: int = 0) -> tuple[str, ...]:
    return g.emit_many("Split", [x.name, int64(g, *sizes)], len(sizes), axis=axis % len(x.shape))


@rule("slice.Tensor")
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
    stop = INT64_MAX if end is None else min(end, INT64_MAX)
    bounds = (int64(g, start or 0), int64(g, stop), int64(g, axis % len(x.shape)), int64(g, step))
    return g.emit("Slice", x.name, *bounds)


@rule("slice_scatter.default")
def _slice_scatter(
    g: GraphBuilder,
    out: Tensor,
    x: Value,
    part: Value,
    axis: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> str:
    """What comes before the slice, the slice, what comes after."""
    axis, extent = axis % len(x.shape), x.shape[axis]
    if step != 1:
        raise UnsupportedError(f"slice_scatter in steps of {step} has no ONNX lowering; only neighbours have")
    first, last, _ = slice(start, None if end is None else min(end, extent)).indices(extent)
    pieces = [part.name]
    if first > 0:
        pieces.insert(0, g.emit("Slice", x.name, int64(g, 0), int64(g, first), int64(g, axis)))
    if last < extent:
        pieces.append(g.emit("Slice", x.name, int64(g, last), int64(g, extent), int64(g, axis)))
    return pieces[0] if len(pieces) == 1 else g.emit("Concat", *pieces, axis=axis)


@rule("select.int")
def _select(g: GraphBuilder, out: Tensor, x: Value, axis: int, index: int) -> str:
    return g.emit("Gather", x.name, g.constant(index % x.shape[axis], np.int64), axis=axis % len(x.shape))


@rule("constant_pad_nd.default")
def _constant_pad(g: GraphBuilder, out: Tensor, x: Value, padding: Sequence[int], number: float = 0.0) -> str:
    """Counts stand from the last axis backwards, before and after; negative ones cut off."""
    rank = len(x.shape)
    before, after = [0] * rank, [0] * rank
    for place, (first, last) in enumerate(zip(padding[::2], padding[1::2], strict=True), start=1):
        before[-place], after[-place] = first, last
    if not any((*before, *after)):
        return x.name
    return g.emit("Pad", x.name, int64(g, *before, *after), g.constant(number, numpy_dtype(out.dtype)), mode="constant")


@rule("roll.default")
def _roll(g: GraphBuilder, out: Tensor, x: Value, shifts: Sequence[int], axes: Sequence[int] = ()) -> str:
    """Two slices in the other order: engines have no kernel of their own."""
    if not axes:
        raise UnsupportedError("a roll over all axes at once has no ONNX lowering")
    name = x.name
    for shift, axis in zip(shifts, axes, strict=True):
        if cut := -shift % x.shape[axis]:
            place = int64(g, axis % len(x.shape))
            last = g.emit("Slice", name, int64(g, cut), int64(g, INT64_MAX), place)
            first = g.emit("Slice", name, int64(g, 0), int64(g, cut), place)
            name = g.emit("Concat", last, first, axis=axis % len(x.shape))
    return name


@rule("index_select.default")
def _index_select(g: GraphBuilder, out: Tensor, x: Value, axis: int, index: Value) -> str:
    return g.emit("Gather", x.name, index.name, axis=axis % len(x.shape))


@rule("index.Tensor")
def _index(g: GraphBuilder, out: Tensor, x: Value, indices: Sequence[Value | None]) -> str:
    """Rows of one axis, such as a table of relative positions."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].dtype == torch.bool:
        raise UnsupportedError(f"indexing with {len(given)} tensors or a mask has no ONNX lowering")
    axis, index = given[0]
    return g.emit("Gather", x.name, index.name, axis=axis)


@rule("scatter.src")
def _scatter(g: GraphBuilder, out: Tensor, x: Value, axis: int, index: Value, source: Value) -> str:
    return g.emit("ScatterElements", x.name, index.name, source.name, axis=axis % len(x.shape))


@rule("as_strided.default")
def _as_strided(
    g: GraphBuilder, out: Tensor, x: Value, shape: Sequence[int], strides: Sequence[int], offset: int | None = None
) -> str:
    """Global pooling leaves one of these; over elements that lie side by side it is a reshape."""
    _require_contiguous(shape, strides, offset, math.prod(x.shape))
    return x.name if tuple(shape) == x.shape else reshape(g, x.name, shape)


@rule("as_strided_scatter.default")
def _as_strided_scatter(
    g: GraphBuilder,
    out: Tensor,
    x: Value,
    source: Value,
    shape: Sequence[int],
    strides: Sequence[int],
    offset: int | None = None,
) -> str:
    _require_contiguous(shape, strides, offset, math.prod(x.shape))
    return source.name if source.shape == x.shape else reshape(g, source.name, x.shape)


def _require_contiguous(shape: Sequence[int], strides: Sequence[int], offset: int | None, size: int) -> None:
    expected, step = [], 1
    for extent in reversed(shape):
        expected.append(step)
        step *= extent
    matches = all(
        extent == 1 or found == wanted for extent, found, wanted in zip(shape, strides, expected[::-1], strict=True)
    )
    if not matches or offset or step != size:
        raise UnsupportedError(f"a view of {size} elements as {list(shape)} with strides {list(strides)}")


@rule("select_backward.default")
def _select_backward(g: GraphBuilder, out: Tensor, gradient: Value, shape: Sequence[int], axis: int, index: int) -> str:
    axis, extent = axis % len(shape), shape[axis]
    kept = list(shape)
    kept[axis] = 1
    before = index % extent
    return pad_axis(g, reshape(g, gradient.name, kept), len(shape), axis, before, extent - before - 1, out.dtype)


@rule("slice_backward.default")
def _slice_backward(
    g: GraphBuilder, out: Tensor, gradient: Value, shape: Sequence[int], axis: int, start: int, end: int, step: int
) -> str:
    """Where the slice steps over elements, every one of its own is followed by step − 1 zeros, cut off at the end."""
    axis, extent = axis % len(shape), shape[axis]
    before, count, name = start % extent if start < 0 else start, gradient.shape[axis], gradient.name
    if step != 1:
        outer, inner = gradient.shape[:axis], gradient.shape[axis + 1 :]
        column = reshape(g, name, [*outer, count, 1, *inner])
        spread = pad_axis(g, column, len(shape) + 1, axis + 1, 0, step - 1, out.dtype)
        name = reshape(g, spread, [*outer, count * step, *inner])
        if before + count * step > extent:
            count = extent - before
            name = g.emit("Slice", name, int64(g, 0), int64(g, count), int64(g, axis))
        else:
            count *= step
    return pad_axis(g, name, len(shape), axis, before, extent - before - count, out.dtype)
