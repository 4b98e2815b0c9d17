"""Rewrites of a traced graph that change no number: what was spelled out for the tracer becomes one operator again.

    view(view(x))                  → view(x), or x where the shape is x's
    permute(permute(x))            → permute(x)
    bmm(view(a), view(b))          → view(matmul(a, b)) of a f[…, M, K] and b f[…, K, N] with the same axes before
    x · view(s) + view(t)          → scale_and_shift(x, s, t) of s and t f[C], numbers of a channel

Engines see attention as two batched products over [B, heads, …] then, without reshapes between, which they fuse with
the scale and the transposition of the keys; and batch normalisation as one pass over its picture instead of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

__all__ = ["SCALE_AND_SHIFT", "simplify"]


@torch.library.custom_op("mgg_edge::scale_and_shift", mutates_args=())
def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x · s + t for x f[B, C, …] and s, t f[C]."""
    channels = [1, -1] + [1] * (x.ndim - 2)
    return x * scale.reshape(channels) + shift.reshape(channels)


@scale_and_shift.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # noqa: ARG001 - the operator's own arguments
    return torch.empty_like(x)


SCALE_AND_SHIFT = torch.ops.mgg_edge.scale_and_shift.default
aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)  # noqa: SLF001 - an operator's name
SAME = (aten.expand.default, aten.clone.default, aten.alias.default, aten.detach.default)


def simplify(module: fx.GraphModule) -> None:
    """Rewrite a traced graph in place; every node keeps its fake tensor under `meta["val"]`."""
    for node in list(module.graph.nodes):
        rewrite = _REWRITES.get(node.target)
        replacement = None if rewrite is None else rewrite(module.graph, node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
    module.graph.eliminate_dead_code()
    module.recompile()


def _view(graph: fx.Graph, node: Any) -> fx.Node | None:
    source = _viewed(node)
    if _shape(source) == _shape(node):
        return source
    return None if source is node.args[0] else _insert(graph, node, aten.reshape.default, source, list(_shape(node)))


def _permute(graph: fx.Graph, node: Any) -> fx.Node | None:
    inner, outer = node.args
    if inner.target is not aten.permute.default:
        return None
    order = [inner.args[1][axis] for axis in outer]
    return _insert(graph, node, aten.permute.default, inner.args[0], order)


def _product(graph: fx.Graph, node: Any) -> fx.Node | None:
    left, right = (_viewed(argument) for argument in node.args)
    rows, columns = _shape(left), _shape(right)
    if len(rows) < 4 or len(rows) != len(columns) or rows[:-2] != columns[:-2]:
        return None
    if [_shape(argument)[1:] for argument in node.args] != [rows[-2:], columns[-2:]]:
        return None
    product = _insert(graph, node, aten.matmul.default, left, right)
    return _insert(graph, node, aten.reshape.default, product, list(_shape(node)))


def _affine(graph: fx.Graph, node: Any) -> fx.Node | None:
    product, shift = node.args
    if node.kwargs or not _is_of_channels(shift, node) or getattr(product, "target", None) is not aten.mul.Tensor:
        return None
    x, scale = product.args
    if len(product.users) > 1 or not _is_of_channels(scale, node) or _shape(x) != _shape(node):
        return None
    channels = _shape(node)[1:2]
    viewed = [_viewed(one) for one in (scale, shift)]
    vectors = [
        one if _shape(one) == channels else _insert(graph, node, aten.reshape.default, one, list(channels))
        for one in viewed
    ]
    return _insert(graph, node, SCALE_AND_SHIFT, x, *vectors)


def _is_of_channels(value: Any, like: fx.Node) -> bool:
    """Whether a value has one number for each channel of a batch of maps f[B, C, …]."""
    shape = _shape(like)
    channels = (1, shape[1], *[1] * (len(shape) - 2)) if len(shape) > 2 else ()
    return isinstance(value, fx.Node) and bool(channels) and _shape(value) in (channels, channels[1:])


_REWRITES: dict[Any, Callable[[fx.Graph, fx.Node], fx.Node | None]] = {
    **dict.fromkeys(VIEWS, _view),
    aten.permute.default: _permute,
    aten.bmm.default: _product,
    aten.add.Tensor: _affine,
}


def _viewed(node: Any) -> fx.Node:
    """What a node shows in its own shape or another: the same numbers in the same order."""
    while node.target in VIEWS or (node.target in SAME and _shape(node) == _shape(node.args[0])):
        node = node.args[0]
    return cast("fx.Node", node)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _insert(graph: fx.Graph, before: fx.Node, target: Any, *arguments: Any) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(target, arguments)
    values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in arguments]
    node.meta["val"] = target(*values)
    return node
