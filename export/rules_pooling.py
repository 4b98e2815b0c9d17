"""Lowering of maximum pooling.

A maximum sends its gradient to the first largest element of each window. ONNX Runtime's kernel tells where that is, and
the gradient is scattered there. TensorRT takes neither the second output nor the scatter: there the windows are strided
slices, compared one after another, and their gradients go back to their places through one depthwise transposed
convolution whose kernel holds a single one for each place in the window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mgg_edge.export.graph_builder import GraphBuilder
from mgg_edge.export.lowering_rule import Value, int64, numpy_dtype, reshape, rule

__all__: list[str] = []  # the rules register themselves


@dataclass(frozen=True)
class _Windows:
    """Pooling windows of one picture size; each field is [vertical, horizontal].

    Attributes:
        kernel, stride, dilation: of the pooling.
        before, after: rows and columns of padding; those after also fill up windows that reach over the edge.
        count: windows.
    """

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    before: list[int]
    after: list[int]
    count: list[int]

    @classmethod
    def of(
        cls,
        extents: Sequence[int],
        count: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        *_: Any,
    ) -> _Windows:
        """From the extents [H, W] of input and output and the operator's own arguments."""
        size, step, pad, gap = ([numbers[0], numbers[-1]] for numbers in (kernel, stride or kernel, padding, dilation))
        reach = [(count[axis] - 1) * step[axis] + gap[axis] * (size[axis] - 1) + 1 for axis in (0, 1)]
        after = [max(0, reach[axis] - extents[axis] - pad[axis]) for axis in (0, 1)]
        return cls(size, step, gap, pad, after, list(count))

    @property
    def pads(self) -> list[int]:
        return [*self.before, *self.after]


@rule("max_pool2d_with_indices.default")
def _max_pool(g: GraphBuilder, out: Sequence[Tensor], x: Value, *settings: Any) -> tuple[str, str | None]:
    windows = _Windows.of(x.shape[-2:], out[0].shape[-2:], *settings)
    if g.lowering == "tensorrt":
        return _slice_maximum(g, _slices(g, x, windows)), None
    values, places = g.emit_many(
        "MaxPool", [x.name], 2, kernel_shape=windows.kernel, strides=windows.stride, pads=windows.pads,
        dilations=windows.dilation,
    )  # fmt: skip
    return values, places


@rule("max_pool2d_with_indices_backward.default")
def _max_pool_backward(g: GraphBuilder, out: Tensor, gradient: Value, x: Value, *settings: Any) -> str:
    *window, indices = settings
    windows = _Windows.of(x.shape[-2:], gradient.shape[-2:], *window)
    if g.lowering == "tensorrt":
        return _spread(g, gradient, x, windows)
    zeros = g.constant(0, numpy_dtype(out.dtype))
    flat = g.emit("Expand", zeros, int64(g, math.prod(x.shape)))
    places, values = (reshape(g, name, [math.prod(gradient.shape)]) for name in (indices.name, gradient.name))
    # Windows overlap, so that one element may be the largest of several.
    return reshape(g, g.emit("ScatterElements", flat, places, values, axis=0, reduction="add"), x.shape)


def _slices(g: GraphBuilder, x: Value, windows: _Windows) -> list[str]:
    """The element at each place of the window, f[B, C, *count] each, in the order of rows."""
    name = x.name
    if any(windows.pads):
        lowest = g.constant(np.finfo(numpy_dtype(x.dtype)).min, numpy_dtype(x.dtype))
        top, left, bottom, right = windows.pads
        name = g.emit("Pad", name, int64(g, 0, 0, top, left, 0, 0, bottom, right), lowest, mode="constant")
    slices = []
    for place in itertools.product(*map(range, windows.kernel)):
        start = [index * gap for index, gap in zip(place, windows.dilation, strict=True)]
        end = [
            first + (count - 1) * step + 1
            for first, count, step in zip(start, windows.count, windows.stride, strict=True)
        ]
        bounds = [int64(g, *numbers) for numbers in (start, end, (2, 3), windows.stride)]
        slices.append(g.emit("Slice", name, *bounds))
    return slices


def _slice_maximum(g: GraphBuilder, slices: Sequence[str]) -> str:
    largest = slices[0]
    for name in slices[1:]:
        largest = g.emit("Max", largest, name)
    return largest


def _spread(g: GraphBuilder, gradient: Value, x: Value, windows: _Windows) -> str:
    slices = _slices(g, x, windows)
    largest, zero = _slice_maximum(g, slices), g.constant(0, numpy_dtype(gradient.dtype))
    free, parts = "", []
    for name in slices:
        equal = g.emit("Equal", name, largest)
        parts.append(g.emit("Where", g.emit("And", equal, free) if free else equal, gradient.name, zero))
        free = g.emit("And", free, g.emit("Not", equal)) if free else g.emit("Not", equal)
    batch, channels, *count = gradient.shape
    places = len(slices)
    # [B, C·places, h, w] with a channel's places side by side: the order of a transposed convolution's groups.
    stacked = g.emit("Concat", *(reshape(g, part, [batch, channels, 1, *count]) for part in parts), axis=2)
    kernel = np.tile(np.eye(places).reshape(places, 1, *windows.kernel), (channels, 1, 1, 1))
    pads = [*windows.before, *windows.after]
    covered = [
        (count[axis] - 1) * windows.stride[axis] + windows.dilation[axis] * (windows.kernel[axis] - 1) + 1
        for axis in (0, 1)
    ]
    # Rows that no window covers get zeros, rows of padding are cut off.
    missing = [x.shape[2 + axis] - (covered[axis] - pads[axis] - pads[2 + axis]) for axis in (0, 1)]
    return g.emit(
        "ConvTranspose", reshape(g, stacked, [batch, channels * places, *count]), g.constant(kernel, np.float32),
        strides=windows.stride, pads=pads, dilations=windows.dilation, output_padding=missing, group=channels,
    )  # fmt: skip
