"""Names every construct in a graph that TensorRT's parser refuses, before TensorRT is asked.

TensorRT's own messages name neither the layer's origin nor the remedy, and it is rarely installed where
models are exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx
from onnx import TensorProto, helper

__all__ = ["lint_tensorrt"]

REFUSED_OPERATORS = {
    "Col2Im": "has no TensorRT layer",
    "MaxUnpool": "has no TensorRT layer",
    "SoftmaxCrossEntropyLoss": "has no TensorRT layer",
    "NegativeLogLikelihoodLoss": "has no TensorRT layer",
}


def lint_tensorrt(model: onnx.ModelProto) -> list[str]:
    """One line for each construct TensorRT cannot take, naming node and reason; empty if there is none.

    Args:
        model: a graph, with or without its weights.
    """
    problems = [problem for node in model.graph.node for check in _CHECKS for problem in check(node, model)]
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    doubles = [value.name for value in values if value.type.tensor_type.elem_type == TensorProto.DOUBLE]
    doubles += [tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.DOUBLE]
    return problems + [f"value '{name}': float64 is not supported" for name in doubles]


def _where(node: onnx.NodeProto) -> str:
    return f"{node.op_type} producing '{node.output[0]}'"


def _operator(node: onnx.NodeProto, _model: onnx.ModelProto) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"{_where(node)}: operator domain '{node.domain}' is not standard ONNX"
    if node.op_type in REFUSED_OPERATORS:
        yield f"{_where(node)}: {REFUSED_OPERATORS[node.op_type]}"


def _extra_outputs(node: onnx.NodeProto, _model: onnx.ModelProto) -> Iterator[str]:
    if node.op_type in ("LayerNormalization", "MaxPool", "Dropout") and sum(map(bool, node.output)) > 1:
        yield f"{_where(node)}: more than one output is not supported"


def _training(node: onnx.NodeProto, _model: onnx.ModelProto) -> Iterator[str]:
    if node.op_type == "BatchNormalization" and _attribute(node, "training_mode", 0):
        yield f"{_where(node)}: training mode is not supported"


def _scatter(node: onnx.NodeProto, _model: onnx.ModelProto) -> Iterator[str]:
    if node.op_type in ("ScatterND", "ScatterElements") and _attribute(node, "reduction", b"none") != b"none":
        yield f"{_where(node)}: a reduction is not supported"


def _reduce_axes(node: onnx.NodeProto, model: onnx.ModelProto) -> Iterator[str]:
    initialisers = {tensor.name for tensor in model.graph.initializer}
    if node.op_type.startswith("Reduce") and len(node.input) > 1 and node.input[1] not in initialisers:
        yield f"{_where(node)}: the axes must be an initialiser, found the computed value '{node.input[1]}'"


def _double_cast(node: onnx.NodeProto, _model: onnx.ModelProto) -> Iterator[str]:
    if node.op_type == "Cast" and _attribute(node, "to", 0) == TensorProto.DOUBLE:
        yield f"{_where(node)}: float64 is not supported"


def _attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


_CHECKS: tuple[Callable[[onnx.NodeProto, onnx.ModelProto], Iterator[str]], ...] = (
    _operator,
    _extra_outputs,
    _training,
    _scatter,
    _reduce_axes,
    _double_cast,
)
