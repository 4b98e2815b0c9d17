"""What becomes of operators while they are traced: decomposed, decomposed our way, or kept whole.

A decomposition is written here where PyTorch has none, works on other numbers than meant, or costs more nodes than it
must. Forward and backward are written to share their nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

__all__ = ["decompositions"]

aten = torch.ops.aten

# Each is one or two operators in ONNX; decomposed, it would be comparisons, gathers or scatters over index tensors.
KEPT_WHOLE = (
    aten.select_backward.default,
    aten.slice_backward.default,
    aten.roll.default,
    aten._adaptive_avg_pool2d.default,  # noqa: SLF001 - an operator's name
    aten.upsample_nearest2d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.default,
    aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
    aten.reflection_pad2d_backward.default,
    aten.replication_pad2d_backward.default,
    aten.avg_pool2d_backward.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.gelu.default,
    aten.gelu_backward.default,
)


def decompositions() -> dict[Any, Any]:
    """PyTorch's table of core decompositions, without what is kept whole and with what is written here."""
    table = dict(core_aten_decompositions())
    for operator in KEPT_WHOLE:
        table.pop(operator, None)
    table[aten.threshold_backward.default] = _threshold_backward
    table[aten.hardtanh_backward.default] = _hardtanh_backward
    table[aten.hardsigmoid_backward.default] = _hardsigmoid_backward
    table[aten.hardswish_backward.default] = _hardswish_backward
    table[aten.var.correction] = _var
    table[aten.var_mean.correction] = _var_mean
    table[aten.native_group_norm.default] = _native_group_norm
    table[aten.elu.default] = _elu
    table[aten.adaptive_max_pool2d.default] = _adaptive_max_pool
    table[aten.adaptive_max_pool2d_backward.default] = _adaptive_max_pool_backward
    table[aten.native_batch_norm.default] = _native_batch_norm
    table[aten.new_empty_strided.default] = _new_empty_strided
    table[aten.unfold.default] = _unfold
    table[aten.unfold_backward.default] = _unfold_backward
    table[aten.im2col.default] = _im2col
    table[aten.col2im.default] = _col2im
    return table


# The gradient of a piecewise linear function is the gradient after it times a mask: choosing between that and 0 takes
# ONNX Runtime three times as long.


def _threshold_backward(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    return gradient * (x > threshold)


def _hardtanh_backward(gradient: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return gradient * ((x > low) & (x < high))


def _hardsigmoid_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return gradient * ((x > -3.0) & (x < 3.0)) * (1 / 6)


def _hardswish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """g·(x/3 + ½) within −3 to 3, g above."""
    within = ((x >= -3.0) & (x <= 3.0)).to(x.dtype)
    return gradient * ((x / 3 + 0.5) * within + (x > 3.0))


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


def _native_group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: int,
    channels: int,
    space: int,
    groups: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """γ·(x − μ)/√(σ² + ε) + β with the statistics of each image and group; also μ and 1/σ, [B, G]."""
    grouped = x.reshape(batch, groups, channels // groups * space)
    mean = grouped.mean(2, keepdim=True)
    inverse = torch.rsqrt((grouped - mean).square().mean(2, keepdim=True) + epsilon)
    y = ((grouped - mean) * inverse).reshape(x.shape)
    sides = [1, channels] + [1] * (x.ndim - 2)
    y = y if weight is None else y * weight.reshape(sides)
    y = y if bias is None else y + bias.reshape(sides)
    return y, mean.reshape(batch, groups), inverse.reshape(batch, groups)


def _var(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    """Σ(x − μ)² / (n − correction) over `dim`."""
    axes = list(range(x.ndim)) if dim is None else dim
    mean = x.mean(axes, keepdim=True)
    count = x.numel() // mean.numel()
    divisor = count - (1.0 if correction is None else correction)
    return (x - mean).square().sum(axes, keepdim=keepdim) / divisor


def _var_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    axes = list(range(x.ndim)) if dim is None else dim
    return _var(x, dim, correction=correction, keepdim=keepdim), x.mean(axes, keepdim=keepdim)


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """s·x above zero, s·α·(exp(x·i) − 1) below, where the exponent is kept from overflowing."""
    return scale * (x.clamp(min=0.0) + alpha * (torch.exp(x.clamp(max=0.0) * input_scale) - 1.0))


def _adaptive_max_pool(x: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ordinary pooling where the windows are all of one size."""
    if any(extent % count for extent, count in zip(x.shape[-2:], size, strict=True)):
        return NotImplemented
    kernel = [extent // count for extent, count in zip(x.shape[-2:], size, strict=True)]
    return aten.max_pool2d_with_indices(x, kernel)


def _adaptive_max_pool_backward(gradient: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    kernel = [extent // count for extent, count in zip(x.shape[-2:], gradient.shape[-2:], strict=True)]
    return aten.max_pool2d_with_indices_backward(gradient, x, kernel, kernel, [0, 0], [1, 1], False, indices)


def _new_empty_strided(x: Tensor, size: Sequence[int], stride: Sequence[int], **_: Any) -> Tensor:  # noqa: ARG001
    """What a sum in place on a part of a tensor has its gradient copied into: written whole before it is read."""
    return x.new_zeros(size)


def _unfold(x: Tensor, axis: int, size: int, step: int) -> Tensor:
    """Windows [.., n, .., size] along an axis, cut out one by one."""
    axis = axis % x.ndim
    starts = range(0, x.shape[axis] - size + 1, step)
    return torch.stack([x.narrow(axis, start, size).movedim(axis, -1) for start in starts], axis)


def _unfold_backward(gradient: Tensor, shape: Sequence[int], axis: int, size: int, step: int) -> Tensor:
    """Each window's gradient where it was cut out, summed."""
    axis = axis % len(shape)
    behind = [0, 0] * (len(shape) - 1 - axis)
    parts = []
    for number, window in enumerate(gradient.unbind(axis)):
        rest = shape[axis] - number * step - size
        parts.append(aten.constant_pad_nd(window.movedim(-1, axis), [*behind, number * step, rest]))
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _im2col(
    x: Tensor, kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """Windows of a picture f[B, C, H, W] as columns f[B, C·kh·kw, n], cut out place by place."""
    wide = aten.constant_pad_nd(x, [padding[1], padding[1], padding[0], padding[0]])
    rows, columns = _places(wide.shape[2:], kernel, dilation, stride)
    parts = [wide[:, :, row, column] for row in rows for column in columns]
    return torch.stack(parts, 2).reshape(x.shape[0], x.shape[1] * len(parts), -1)


def _col2im(
    x: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """The reverse: columns f[B, C·kh·kw, n] where they were cut out, summed to f[B, C, H, W]."""
    height, width = (extent + 2 * pad for extent, pad in zip(size, padding, strict=True))
    rows, columns = _places((height, width), kernel, dilation, stride)
    batch, count = x.shape[0], len(rows) * len(columns)
    cut = x.reshape(batch, x.shape[1] // count, count, len(range(height)[rows[0]]), len(range(width)[columns[0]]))
    whole: Tensor | None = None
    for number, (row, column) in enumerate((row, column) for row in rows for column in columns):
        part = cut[:, :, number]
        for axis, place, extent in ((3, column, width), (2, row, height)):
            part = _spread(part, axis, place, extent)
        whole = part if whole is None else whole + part
    assert whole is not None  # a kernel has places
    return whole[:, :, padding[0] : height - padding[0], padding[1] : width - padding[1]]


def _places(
    size: Sequence[int], kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]
) -> tuple[list[slice], list[slice]]:
    """For each row and column of a kernel, what it meets of a padded picture."""
    both = []
    for extent, count, apart, step in zip(size, kernel, dilation, stride, strict=True):
        reach = extent - apart * (count - 1)
        both.append([slice(first * apart, first * apart + reach, step) for first in range(count)])
    return both[0], both[1]


def _spread(x: Tensor, axis: int, place: slice, extent: int) -> Tensor:
    """Zeros of a larger extent along an axis, with x in a slice of it."""
    behind, (start, stop, step) = [0, 0] * (x.ndim - 1 - axis), place.indices(extent)
    if step > 1:
        apart = aten.constant_pad_nd(x.unsqueeze(axis + 1), [*behind, 0, step - 1])
        x = apart.flatten(axis, axis + 1)
        x = x.narrow(axis, 0, min(x.shape[axis], stop - start))
    return cast("Tensor", aten.constant_pad_nd(x, [*behind, start, extent - start - x.shape[axis]]))
