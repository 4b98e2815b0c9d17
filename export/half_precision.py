"""Half precision where it pays: the large products, and nothing else.

    x · y   →   float32( half(x) · half(y) )        for matrix products and convolutions that lead to the logits, the
                                                    features or the gradient

Norms and their parameters, softmax, loss, gradient statistics and the update rule stay in float32, and so does every
tensor of the state. Tensor cores sum in float32 whatever the operands are.

float16 has too small a range for gradients, which are averages over pictures and places: the loss is multiplied by a
power of two before it is differentiated and the gradient divided by it afterwards, exact but for what it saves from
vanishing. `choose_loss_scale` measures which. bfloat16 has the range of float32 and needs none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mgg_edge.export.trace import TracedGraph

__all__ = ["HALF_TYPES", "HalfGraph", "choose_loss_scale", "halve", "products"]

HALF_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LED_TO = ("logits", "features", "gradient_norm")
LARGEST_OPERAND = 2.0**11  # a thirty-second of what float16 can hold: other batches have larger gradients
MAX_LOSS_SCALE = 2.0**24

_aten = torch.ops.aten
_TO = getattr(_aten, "_to_copy").default  # noqa: B009 - an operator whose public name has an underscore
_PRODUCTS = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten.matmul.default,
    _aten.addmm.default,
    _aten.convolution.default,
    _aten.convolution_backward.default,
}


class HalfGraph(NamedTuple):
    """The adapt graph with products in half precision. Attributes: precision: such as `float16`; traced: the graph."""

    precision: str
    traced: TracedGraph


def products(traced: TracedGraph, led_to: Collection[str] = LED_TO) -> list[fx.Node]:
    """Matrix products and convolutions that some of the named outputs depend on, in order."""
    (results,) = (node.args[0] for node in traced.module.graph.nodes if node.op == "output")
    waiting = [node for name, node in zip(traced.outputs, results, strict=True) if name in led_to]
    reached: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, fx.Node) and node not in reached:
            reached.add(node)
            waiting += node.all_input_nodes
    return [node for node in traced.module.graph.nodes if node in reached and node.target in _PRODUCTS]


def halve(traced: TracedGraph, dtype: torch.dtype) -> TracedGraph:
    """The graph with its large products in `dtype`; the graph given is left as it is."""
    chosen = set(products(traced))
    graph, copies = fx.Graph(), {}  # type: tuple[fx.Graph, dict[fx.Node, fx.Node]]
    for node in traced.module.graph.nodes:
        if node not in chosen:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        operands = fx.map_arg(node.args, lambda operand: _cast(graph, copies[operand], dtype))
        product = graph.call_function(node.target, operands, dict(node.kwargs))
        with _fake_mode(node):
            product.meta["val"] = node.target(*fx.map_arg(operands, lambda operand: operand.meta["val"]), **node.kwargs)
        copies[node] = product if isinstance(product.meta["val"], tuple) else _cast(graph, product, torch.float32)
    _cast_parts(graph)
    graph.lint()
    return TracedGraph(fx.GraphModule(traced.module, graph), traced.inputs, traced.outputs)


def choose_loss_scale(traced: TracedGraph, inputs: Sequence[Tensor]) -> float:
    """A power of two that puts the operands of the backward pass into the range of float16.

    Args:
        traced: the adapt graph in float32, its loss not scaled.
        inputs: example values, in the graph's order.

    Returns:
        From 1 to 2²⁴; 1 for a graph without a backward pass.
    """
    forward = set(products(traced, ("logits", "features")))
    watched = {node for node in products(traced) if node not in forward}
    largest = 0.0

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            nonlocal largest
            if n in watched:
                operands = pytree.tree_leaves(self.map_nodes_to_values(n.args, n))
                largest = max(largest, *(float(one.abs().max()) for one in operands if isinstance(one, Tensor)))
            return super().run_node(n)

    if not watched:
        return 1.0
    with torch.no_grad():
        Watch(traced.module).run(*inputs)
    if not 0 < largest < math.inf:
        return 1.0
    return float(2.0 ** min(max(math.floor(math.log2(LARGEST_OPERAND / largest)), 0), math.log2(MAX_LOSS_SCALE)))


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    value = node.meta["val"]
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
        return node
    cast = graph.call_function(_TO, (node,), {"dtype": dtype})
    cast.meta["val"] = value.to(dtype)
    return cast


def _cast_parts(graph: fx.Graph) -> None:
    """Back to float32 what is taken out of the tuple of a half-precision operator."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target.__name__ != "getitem":
            continue
        value = node.args[0].meta["val"][node.args[1]]
        if not isinstance(value, Tensor) or value.dtype == node.meta["val"].dtype:
            continue
        users = list(node.users)
        node.meta = {**node.meta, "val": value}
        with graph.inserting_after(node):
            cast = graph.call_function(_TO, (node,), {"dtype": torch.float32})
        cast.meta["val"] = value.to(torch.float32)
        for user in users:
            user.replace_input_with(node, cast)


def _fake_mode(node: fx.Node) -> Any:
    value = node.meta["val"]
    first: Any = value if isinstance(value, Tensor) else next(part for part in value if part is not None)
    return first.fake_mode
