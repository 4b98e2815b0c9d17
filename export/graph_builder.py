"""Builds an ONNX graph node by node.

All operators are pure, so a node that was emitted before is returned instead of emitted again: common
subexpressions of forward and backward are shared. Constants are stored once, and nodes that no output needs
are left out. Names of weights are used without being declared; the bundle keeps weights beside its graphs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from mgg_edge.state import TensorSpec

__all__ = ["IR_VERSION", "OPSET", "REVERSED", "GraphBuilder"]

OPSET = 17
IR_VERSION = 8
# "x.reversed" is the weight "x" reversed in space; whoever stores the weights makes it.
REVERSED = ".reversed"
OPTIONAL_OUTPUTS = ("LayerNormalization", "MaxPool")


class GraphBuilder:
    """Accumulates nodes and constants.

    Attributes:
        lowering: `onnxruntime` or `tensorrt`, for rules that differ.

    Args:
        lowering: see above.
        weights: names of weights.
    """

    def __init__(self, lowering: str, weights: Collection[str] = ()) -> None:
        self.lowering = lowering
        self._weights = frozenset(weights)
        self._nodes: list[onnx.NodeProto] = []
        self._producer: dict[str, onnx.NodeProto] = {}
        self._emitted: dict[bytes, tuple[str, ...]] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initialisers: dict[str, onnx.TensorProto] = {}

    def emit(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Name of the single output of an operator applied to named values."""
        return self.emit_many(operator, inputs, 1, **attributes)[0]

    def emit_many(self, operator: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> tuple[str, ...]:
        """Names of the outputs of an operator applied to named values."""
        node = helper.make_node(operator, list(inputs), [], **attributes)
        key = node.SerializeToString(deterministic=True) + outputs.to_bytes(4)
        if key not in self._emitted:
            names = tuple(f"v{len(self._producer) + index}" for index in range(outputs))
            node.output.extend(names)
            self._nodes.append(node)
            self._producer.update(dict.fromkeys(names, node))
            self._emitted[key] = names
        return self._emitted[key]

    def is_weight(self, name: str) -> bool:
        """Whether a value is a weight, which is stored beside the graph."""
        return name in self._weights

    def reversed_weight(self, name: str) -> str:
        """Name of a weight reversed along all axes but the first two; it is stored beside the graph as well."""
        return f"{name}{REVERSED}"

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """Name of a constant array."""
        array = np.asarray(values, dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"c{len(self._constants)}"
            self._constants[key] = name
            self._initialisers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def producer(self, name: str, operator: str) -> onnx.NodeProto | None:
        """The node that produces a value, if it is the given operator."""
        node = self._producer.get(name)
        return node if node is not None and node.op_type == operator else None

    def build(
        self, name: str, inputs: Sequence[TensorSpec], outputs: Mapping[str, tuple[str, TensorSpec]]
    ) -> onnx.ModelProto:
        """The finished model.

        Args:
            name: of the graph.
            inputs: declared inputs; every other free name is a weight.
            outputs: value name and specification by output name.
        """
        aliases = [helper.make_node("Identity", [value], [output]) for output, (value, _) in outputs.items()]
        nodes = [*_needed(self._nodes, {value for value, _ in outputs.values()}), *aliases]
        used = {value for node in nodes for value in node.input}
        nodes = [_without_unused_statistics(node, used) for node in nodes]
        graph = helper.make_graph(
            nodes,
            name,
            [_value_info(spec) for spec in inputs],
            [_value_info(TensorSpec(output, spec.dtype, spec.shape)) for output, (_, spec) in outputs.items()],
            [tensor for label, tensor in self._initialisers.items() if label in used],
        )
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="mgg-edge")


def _needed(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted = wanted.union(node.input)
    return kept[::-1]


def _without_unused_statistics(node: onnx.NodeProto, used: set[str]) -> onnx.NodeProto:
    """Without outputs for the backward that nothing reads: with them, engines leave the node out of their fusions."""
    if node.op_type not in OPTIONAL_OUTPUTS:
        return node
    trimmed = onnx.NodeProto()
    trimmed.CopyFrom(node)
    while len(trimmed.output) > 1 and trimmed.output[-1] not in used:
        trimmed.output.pop()
    return trimmed


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    if element == TensorProto.DOUBLE:
        raise ValueError(f"graph value '{spec.name}' is float64")
    return helper.make_tensor_value_info(spec.name, element, spec.shape)
