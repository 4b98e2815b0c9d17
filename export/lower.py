"""Turn a traced graph into an ONNX model for one engine."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import onnx
from torch import Tensor, fx

from mgg_edge.errors import UnsupportedError
from mgg_edge.export.graph_builder import GraphBuilder
from mgg_edge.export.operators import RULES, Value, numpy_dtype
from mgg_edge.export.trace import TracedGraph
from mgg_edge.state import TensorSpec

__all__ = ["lower"]


def lower(traced: TracedGraph, name: str, lowering: str, weights: Collection[str]) -> onnx.ModelProto:
    """Lower a traced graph.

    Args:
        traced: the graph.
        name: what to call it.
        lowering: `onnxruntime` or `tensorrt`.
        weights: inputs that are weights: referred to by name, not declared.

    Raises:
        UnsupportedError: operators without a rule, by name.
    """
    _refuse_unknown(traced)
    builder = GraphBuilder(lowering, weights)
    values: dict[fx.Node, Any] = {}
    inputs, outputs = [], {}
    names = iter(traced.inputs)
    for node in traced.module.graph.nodes:
        if node.op == "placeholder":
            label = next(names)
            values[node] = _value(label, node.meta["val"])
            if label not in weights:
                inputs.append(_spec(values[node]))
        elif node.op == "get_attr":
            tensor = getattr(traced.module, node.target)
            values[node] = _value(builder.constant(tensor.numpy(), numpy_dtype(tensor.dtype)), tensor)
        elif node.op == "call_function":
            values[node] = _apply(builder, node, values)
        else:
            results = [values[result] for result in node.args[0]]
            outputs = {label: (value.name, _spec(value)) for label, value in zip(traced.outputs, results, strict=True)}
    return builder.build(name, inputs, outputs)


def _refuse_unknown(traced: TracedGraph) -> None:
    targets = {
        str(node.target): node
        for node in traced.module.graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem
    }
    if unknown := sorted(set(targets) - set(RULES)):
        shape = tuple(getattr(targets[unknown[0]].meta.get("val"), "shape", ()))
        raise UnsupportedError(f"no ONNX lowering for {', '.join(unknown)} (first result: shape {shape})")


def _apply(builder: GraphBuilder, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    arguments: Any = fx.map_arg(node.args, values.__getitem__)
    if node.target is operator.getitem:
        return arguments[0][arguments[1]]
    result = RULES[str(node.target)](
        builder, node.meta["val"], *arguments, **fx.map_arg(node.kwargs, values.__getitem__)
    )
    if isinstance(result, tuple):
        pairs = zip(result, node.meta["val"], strict=True)
        return tuple(None if name is None else _value(name, tensor) for name, tensor in pairs)
    return _value(result, node.meta["val"])


def _value(name: str, tensor: Tensor) -> Value:
    return Value(name, tensor.dtype, tuple(tensor.shape))


def _spec(value: Value) -> TensorSpec:
    return TensorSpec(value.name, str(numpy_dtype(value.dtype)), value.shape)
