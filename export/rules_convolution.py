"""Lowering of convolution and of its input gradient.

    y = conv(x, W)  ⇒  ∂L/∂x = transposed convolution of ∂L/∂y with W, padded at the end to the size of x

A step adapts norms alone, so no gradient of W is ever asked for, and asking for one is refused.

Depthwise convolution with stride 1 is the exception: its gradient is depthwise convolution with W reversed in space.
ONNX Runtime has a fast kernel for that one and none for the transposed: 1.2 against 3.6 ms for 144 channels of 56×56,
kernel 3, and 1.5 against 10 ms for 96 channels, kernel 7 (batch 4, one thread). The kernel wants W as a constant,
so the reversed W is stored beside the graph. For dense convolution ConvTranspose is as fast as Conv.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mgg_edge.errors import UnsupportedError
from mgg_edge.export.graph_builder import GraphBuilder
from mgg_edge.export.lowering_rule import Value, int64, rule

__all__: list[str] = []  # the rules register themselves

_INT64_MIN = -(2**63)


@rule("convolution.default")
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
    inputs = [x.name, weight.name] + ([] if bias is None else [bias.name])
    window = {"strides": list(stride), "pads": [*padding, *padding], "dilations": list(dilation), "group": groups}
    if transposed:
        return g.emit("ConvTranspose", *inputs, output_padding=list(output_padding), **window)
    return g.emit("Conv", *inputs, **window)


@rule("convolution_backward.default")
def _convolution_backward(
    g: GraphBuilder,
    out: Sequence[Tensor | None],
    gradient: Value,
    x: Value,
    weight: Value,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[str | None, None, None]:
    if output_mask[1] or output_mask[2]:
        raise UnsupportedError(f"the gradient of convolution weights {list(weight.shape)} has no ONNX lowering")
    if not output_mask[0]:
        return None, None, None
    window = {"strides": list(stride), "pads": [*padding, *padding], "dilations": list(dilation), "group": groups}
    if transposed:
        return g.emit("Conv", gradient.name, weight.name, **window), None, None
    kernel = weight.shape[2:]
    reach = [step * (extent - 1) for step, extent in zip(dilation, kernel, strict=True)]
    before = [span - pad for span, pad in zip(reach, padding, strict=True)]
    if groups == x.shape[1] == gradient.shape[1] and set(stride) == {1} and min(before) >= 0:
        window |= {"pads": [*before, *before]}
        return g.emit("Conv", gradient.name, _reversed(g, weight), **window), None, None
    missing = [
        size - ((extent - 1) * step - 2 * pad + span + 1)
        for size, extent, step, pad, span in zip(x.shape[2:], gradient.shape[2:], stride, padding, reach, strict=True)
    ]
    return g.emit("ConvTranspose", gradient.name, weight.name, output_padding=missing, **window), None, None


def _reversed(g: GraphBuilder, weight: Value) -> str:
    if g.is_weight(weight.name):
        return g.reversed_weight(weight.name)
    axes = range(2, len(weight.shape))
    bounds = [int64(g, *(number for _ in axes)) for number in (-1, _INT64_MIN)]
    return g.emit("Slice", weight.name, *bounds, int64(g, *axes), int64(g, *(-1 for _ in axes)))
