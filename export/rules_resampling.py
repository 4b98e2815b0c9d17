"""Lowering of average pooling, resizing and mirrored padding.

All are linear and separable: along each axis they are one fixed matrix,

    y = R_h · x · R_wᵀ,        ∂L/∂x = R_hᵀ · ∂L/∂y · R_w

so forward and backward are two products with constants, exact for every padding, stride and rounding, and both engines
are fast with them; neither has the gradients. The matrix is read off PyTorch's own operator on vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from mgg_edge.errors import UnsupportedError
from mgg_edge.export.graph_builder import GraphBuilder
from mgg_edge.export.lowering_rule import Value, rule

__all__: list[str] = []  # the rules register themselves

Matrix = npt.NDArray[np.float32]
Along = Callable[[Tensor], Tensor]
"""An operator on vectors f[n, 1, extent], as it acts along one axis of a picture."""
Axes = Callable[[Sequence[int], tuple[Any, ...]], tuple[Along, Along]]
"""From the output's extents [H, W] and the operator's settings to its action along H and along W."""


def _matrix(along: Along, extent: int) -> Matrix:
    """R [output extent, extent], column by column from the unit vectors."""
    with torch.no_grad():
        columns = along(torch.eye(extent, dtype=torch.float64).unsqueeze(1)).squeeze(1)
    return columns.T.float().numpy()


def _product(g: GraphBuilder, x: Value, vertical: Matrix, horizontal: Matrix) -> str:
    """R_h · x · R_wᵀ; a product with the identity is left out."""
    name = x.name
    if not _is_identity(horizontal):
        name = g.emit("MatMul", name, g.constant(np.ascontiguousarray(horizontal.T), np.float32))
    if not _is_identity(vertical):
        name = g.emit("MatMul", g.constant(np.ascontiguousarray(vertical), np.float32), name)
    return name


def _is_identity(matrix: Matrix) -> bool:
    return matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix)))


def _linear(name: str, axes: Axes, *, forward_sizes: int, backward_sizes: int) -> None:
    """Rules of an operator and of its gradient.

    Args:
        name: of the operator.
        axes: its action along each axis.
        forward_sizes: how many of its arguments after the first say no more than the shapes do.
        backward_sizes: the same of its gradient.
    """

    def matrices(before: Sequence[int], after: Sequence[int], settings: tuple[Any, ...]) -> list[Matrix]:
        actions = axes(after[-2:], settings)
        return [_matrix(along, extent) for along, extent in zip(actions, before[-2:], strict=True)]

    def forward(g: GraphBuilder, out: Tensor, x: Value, *arguments: Any) -> str:
        return _product(g, x, *matrices(x.shape, out.shape, arguments[forward_sizes:]))

    def backward(g: GraphBuilder, out: Tensor, gradient: Value, *arguments: Any) -> str:
        vertical, horizontal = matrices(out.shape, gradient.shape, arguments[backward_sizes:])
        return _product(g, gradient, vertical.T, horizontal.T)

    rule(f"{name}.default")(forward)
    rule(f"{name}_backward.default")(backward)


# Average pooling -------------------------------------------------------------------------------------------


def _average_axes(_after: Sequence[int], settings: tuple[Any, ...]) -> tuple[Along, Along]:
    kernel, stride, padding, ceil_mode, count_padding = _pooling_settings(*settings)

    def action(axis: int) -> Along:
        return lambda lines: functional.avg_pool1d(
            lines, kernel[axis], stride[axis], padding[axis], ceil_mode, count_padding
        )

    return action(0), action(1)


def _pooling_settings(
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_padding: bool = True,
    divisor: int | None = None,
) -> tuple[list[int], list[int], list[int], bool, bool]:
    if divisor is not None:
        raise UnsupportedError(f"average pooling with the divisor {divisor} has no ONNX lowering")
    both = [[numbers[0], numbers[-1]] for numbers in (kernel, stride or kernel, padding)]
    return both[0], both[1], both[2], ceil_mode, count_padding


_linear("avg_pool2d", _average_axes, forward_sizes=0, backward_sizes=1)


@rule("avg_pool2d.default")
def _average_pool(g: GraphBuilder, out: Tensor, x: Value, *settings: Any) -> str:
    """The kernel is faster than the products, but engines differ in how they round sizes up."""
    kernel, stride, padding, ceil_mode, count_padding = _pooling_settings(*settings)
    if ceil_mode:
        vertical, horizontal = _average_axes(out.shape, settings)
        return _product(g, x, _matrix(vertical, x.shape[-2]), _matrix(horizontal, x.shape[-1]))
    window = {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *padding]}
    return g.emit("AveragePool", x.name, count_include_pad=int(count_padding), **window)


def _adaptive_axes(after: Sequence[int], _settings: tuple[Any, ...]) -> tuple[Along, Along]:
    def action(size: int) -> Along:
        return lambda lines: functional.adaptive_avg_pool1d(lines, size)

    return action(after[0]), action(after[1])


_linear("_adaptive_avg_pool2d", _adaptive_axes, forward_sizes=1, backward_sizes=1)


# Resizing --------------------------------------------------------------------------------------------------


def _interpolation_axes(operator: Any, has_corners: bool) -> Axes:
    def axes(after: Sequence[int], settings: tuple[Any, ...]) -> tuple[Along, Along]:
        corners = [bool(settings[0])] if has_corners else []
        scales = [*settings[len(corners) :], None, None][:2]

        def action(axis: int) -> Along:
            return lambda lines: operator(lines.unsqueeze(-1), [after[axis], 1], *corners, scales[axis], None).squeeze(
                -1
            )

        return action(0), action(1)

    return axes


for _operator, _has_corners in (
    (torch.ops.aten.upsample_nearest2d, False),
    (torch.ops.aten.upsample_bilinear2d, True),
    (torch.ops.aten.upsample_bicubic2d, True),
):
    _linear(_operator.__name__, _interpolation_axes(_operator.default, _has_corners), forward_sizes=1, backward_sizes=2)


# Mirrored padding ------------------------------------------------------------------------------------------


def _padding_axes(mode: str) -> Axes:
    def axes(_after: Sequence[int], settings: tuple[Any, ...]) -> tuple[Along, Along]:
        left, right, top, bottom = settings[0]
        return (
            lambda lines: functional.pad(lines, (top, bottom), mode),
            lambda lines: functional.pad(lines, (left, right), mode),
        )

    return axes


_linear("reflection_pad2d", _padding_axes("reflect"), forward_sizes=0, backward_sizes=1)
_linear("replication_pad2d", _padding_axes("replicate"), forward_sizes=0, backward_sizes=1)
