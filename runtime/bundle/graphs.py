"""Reads what an ONNX file promises, refuses what a bundle must not hold, and splices weights in.

The graphs of a bundle hold no weights: nodes refer to tensors of `weights.safetensors` by name. Because the
concatenation of two encoded messages is their merge,

    graph file ‖ ModelProto{graph: {initializer: […]}}

is the same model with those initialisers. ONNX Runtime gets initialisers that only declare name, type and
shape (the data is handed over in memory); TensorRT gets them whole.

External data lets a model read any file of the device. It is refused wherever a tensor may stand:
initialisers, sparse initialisers, attributes and subgraphs. Functions and training information, which hold
graphs of their own, are refused whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import BundleError
from mgg_edge.runtime.bundle.wire import BYTES, VARINT, Field, Fields, encode_bytes, encode_field, encode_integer
from mgg_edge.state import TensorSpec

__all__ = [
    "GraphSummary",
    "bind_inputs",
    "declare_weights",
    "embed_weights",
    "part_transposed",
    "read_by",
    "read_graph",
]

MAX_DEPTH = 24  # messages within messages: eight levels of subgraph
NODE_DEPTH = 2  # of a node of the main graph
MAX_RANK = 32
ELEMENT_TYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
ELEMENT_CODES = {name: code for code, name in ELEMENT_TYPES.items()}
EXTERNAL = 1

# Field numbers of onnx.proto: kind of message -> field -> kind of the embedded message.
_EMBEDDED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 20: "training information", 25: "a function"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 15: "sparse_tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse_tensor", 23: "sparse_tensor"},
    "tensor": {13: "external_data"},
    "sparse_tensor": {1: "tensor", 2: "tensor"},
}
_REFUSED = ("training information", "a function")
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR = 1, 2, 4
_GRAPH_NODE = 1
_GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE_INITIALIZER = 5, 11, 12, 15
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_TENSOR_EXTERNAL_DATA, _TENSOR_LOCATION = 13, 14
_VALUE_NAME = 1
_MODEL_GRAPH = 7


@dataclass(frozen=True)
class GraphSummary:
    """What an ONNX file promises.

    Attributes:
        inputs, outputs: of the main graph, in order.
        opset: version of the standard operator set.
        free_names: values that nodes read and nothing in the file defines: weights to be spliced in.
        defined_names: inputs, initialisers and node outputs, in the main graph and all subgraphs.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    free_names: frozenset[str]
    defined_names: frozenset[str]


def read_graph(data: bytes, where: str) -> GraphSummary:
    """Read an encoded ONNX model.

    Args:
        data: the file's bytes.
        where: its name, for messages.

    Raises:
        BundleError: not an encoded model, external data, training information, or inputs and outputs that are
            not tensors of fixed shape.
    """
    reader = _Reader(Fields(where))
    reader.visit("model", memoryview(data), depth=0)
    standard = {version for domain, version in reader.opsets if domain in ("", "ai.onnx")}
    if len(standard) != 1:
        raise BundleError(f"{where}: expected one version of the standard operator set, found {sorted(standard)}")
    return GraphSummary(
        inputs=tuple(reader.inputs),
        outputs=tuple(reader.outputs),
        opset=standard.pop(),
        free_names=frozenset(reader.used - reader.defined),
        defined_names=frozenset(reader.defined),
    )


def declare_weights(graph: bytes, weights: Mapping[str, npt.NDArray[np.generic]], names: Iterable[str]) -> bytes:
    """The graph with initialisers that have name, type and shape; their data must be handed over in memory."""
    location = encode_bytes(_TENSOR_EXTERNAL_DATA, encode_bytes(1, b"location"), encode_bytes(2, b"in-memory"))
    marker = location + encode_integer(_TENSOR_LOCATION, EXTERNAL)
    return _splice(graph, (_tensor_header(name, weights[name]) + marker for name in names))


def embed_weights(graph: bytes, weights: Mapping[str, npt.NDArray[np.generic]], names: Iterable[str]) -> bytes:
    """The graph with complete initialisers."""
    return _splice(
        graph,
        (_tensor_header(name, weights[name]) + encode_bytes(_TENSOR_RAW, weights[name].tobytes()) for name in names),
    )


def bind_inputs(
    graph: bytes, values: Mapping[str, npt.NDArray[np.generic]], where: str, *, without: Collection[str] = ()
) -> bytes:
    """The graph with some of its inputs fixed, and without some of its outputs.

    Inputs become initialisers and cease to be inputs: what is both could still be overridden, and no engine folds it
    into what reads it.

    Args:
        graph: an encoded model that `read_graph` has accepted.
        values: by name of the input.
        where: the graph's name, for messages.
        without: names of outputs; nodes that only they read go with them, as ONNX Runtime runs what nobody reads.
    """
    fields = Fields(where)
    parts = []
    for entry in fields.read(memoryview(graph)):
        number, _, value = entry
        if number == _MODEL_GRAPH and isinstance(value, memoryview):
            gone = {_GRAPH_INPUT: values, _GRAPH_OUTPUT: without}
            kept = [part for part in fields.read(value) if _declared(fields, part) not in gone.get(part[0], ())]
            parts.append(encode_bytes(number, *map(encode_field, _reached(fields, kept) if without else kept)))
        else:
            parts.append(encode_field(entry))
    return embed_weights(b"".join(parts), values, values)


def part_transposed(graph: bytes, names: Collection[str], where: str) -> tuple[bytes, dict[str, str]]:
    """The graph with those weights under two names that are read transposed here and as they are there.

    One that is transposed twice is read as it is.

    Args:
        graph: an encoded model that `read_graph` has accepted.
        names: of its weights of two axes.
        where: the graph's name, for messages.

    Returns:
        The graph, and which weight each new name stands for.
    """
    fields = Fields(where)
    models = list(fields.read(memoryview(graph)))
    parts = _graph_parts(fields, models)
    nodes = {id(part): _Node.read(fields, part) for part in parts if part[0] == _GRAPH_NODE}
    turned = {node.output: node.inputs[0] for node in nodes.values() if node.transposes and node.inputs[0] in names}
    back = {
        node.output: turned[node.inputs[0]] for node in nodes.values() if node.transposes and node.inputs[0] in turned
    }
    plain = {name for node in nodes.values() if not node.transposes for name in node.inputs} | set(back.values())
    new = {name: f"{name}.transposed" for name in set(turned.values()) & plain}

    def rewritten(part: Field) -> bytes:
        node = nodes.get(id(part))
        if node is None or not node.transposes:
            return encode_field(part)
        if node.output in back:
            words = ((_NODE_INPUT, back[node.output]), (_NODE_OUTPUT, node.output), (_NODE_OPERATOR, "Identity"))
            return encode_bytes(_GRAPH_NODE, *(encode_bytes(key, word.encode()) for key, word in words))
        source = encode_bytes(_NODE_INPUT, new.get(node.inputs[0], node.inputs[0]).encode())
        others = (encode_field(entry) for entry in fields.read(_message(part)) if entry[0] != _NODE_INPUT)
        return encode_bytes(_GRAPH_NODE, source, *others)

    encoded = [
        encode_bytes(_MODEL_GRAPH, *map(rewritten, parts)) if entry[0] == _MODEL_GRAPH else encode_field(entry)
        for entry in models
    ]
    return b"".join(encoded), {alias: name for name, alias in new.items()}


def _reached(fields: Fields, parts: Sequence[Field]) -> list[Field]:
    """The parts of a graph, in which a node stands before those that read it, but for nodes that no output needs."""
    outputs = (_declared(fields, part) for part in parts if part[0] == _GRAPH_OUTPUT)
    needed, kept = set(filter(None, outputs)), []
    for part in reversed(parts):
        if part[0] == _GRAPH_NODE:
            node = _Reader(fields)
            node.visit("node", _message(part), NODE_DEPTH)
            if needed.isdisjoint(node.defined):
                continue
            needed |= node.used
        kept.append(part)
    return kept[::-1]


def read_by(graph: bytes, where: str) -> dict[str, set[str]]:
    """Operators of the main graph that read a value, by its name.

    Args:
        graph: an encoded model that `read_graph` has accepted.
        where: the graph's name, for messages.
    """
    fields, found = Fields(where), defaultdict[str, set[str]](set)
    for part in _graph_parts(fields, fields.read(memoryview(graph))):
        if part[0] == _GRAPH_NODE:
            node = _Node.read(fields, part)
            for name in node.inputs:
                found[name].add(node.operator)
    return dict(found)


def _graph_parts(fields: Fields, model: Iterable[Field]) -> list[Field]:
    return [part for entry in model if entry[0] == _MODEL_GRAPH for part in fields.read(_message(entry))]


class _Node(NamedTuple):
    """Of a node: what it reads, its first output, and its operator."""

    inputs: tuple[str, ...]
    output: str
    operator: str

    @property
    def transposes(self) -> bool:
        """Whether it does nothing but permute axes."""
        return self.operator == "Transpose"

    @classmethod
    def read(cls, fields: Fields, entry: Field) -> _Node:
        texts = [
            (key, str(value, "utf-8")) for key, _, value in fields.read(_message(entry))
            if key in (_NODE_INPUT, _NODE_OUTPUT, _NODE_OPERATOR) and isinstance(value, memoryview)
        ]  # fmt: skip
        outputs = [text for key, text in texts if key == _NODE_OUTPUT]
        inputs = tuple(text for key, text in texts if key == _NODE_INPUT)
        operators = [text for key, text in texts if key == _NODE_OPERATOR]
        return cls(inputs, outputs[0] if outputs else "", operators[0] if operators else "")


def _message(entry: Field) -> memoryview:
    return entry[2] if isinstance(entry[2], memoryview) else memoryview(b"")


def _declared(fields: Fields, entry: Field) -> str | None:
    """Name of the input or output that a field of a graph declares; None for other fields."""
    number, _, value = entry
    if number not in (_GRAPH_INPUT, _GRAPH_OUTPUT) or not isinstance(value, memoryview):
        return None
    names = [name for key, _, name in fields.read(value) if key == _VALUE_NAME]
    return str(names[0], "utf-8") if names and isinstance(names[0], memoryview) else None


def _splice(graph: bytes, tensors: Iterable[bytes]) -> bytes:
    initialisers = [encode_bytes(_GRAPH_INITIALIZER, tensor) for tensor in tensors]
    return b"".join((graph, encode_bytes(_MODEL_GRAPH, *initialisers)))


def _tensor_header(name: str, array: npt.NDArray[np.generic]) -> bytes:
    shape = b"".join(encode_integer(_TENSOR_DIMS, extent) for extent in array.shape)
    element_type = encode_integer(_TENSOR_TYPE, ELEMENT_CODES[str(array.dtype)])
    return shape + element_type + encode_bytes(_TENSOR_NAME, name.encode())


@dataclass
class _Reader:
    """Walks every message that can hold a tensor and notes names on the way."""

    fields: Fields
    inputs: list[TensorSpec] = field(default_factory=list)
    outputs: list[TensorSpec] = field(default_factory=list)
    opsets: set[tuple[str, int]] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    defined: set[str] = field(default_factory=set)

    def visit(self, kind: str, data: memoryview, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self.fields.error(f"expected messages at most {MAX_DEPTH} deep, found deeper ones")
        if kind == "opset":
            self._note_opset(data)
            return
        embedded = _EMBEDDED[kind]
        for entry in self.fields.read(data):
            number = entry[0]
            if kind == "tensor":
                self._refuse_external_data(entry)
            elif kind == "node" and number in (_NODE_INPUT, _NODE_OUTPUT):
                self._note_name(self.used if number == _NODE_INPUT else self.defined, entry)
            if number in embedded and kind != "tensor":
                self._enter(kind, embedded[number], entry, depth)

    def _enter(self, parent: str, kind: str, entry: Field, depth: int) -> None:
        number, _, _ = entry
        message = self._bytes(entry)
        if kind in _REFUSED:
            raise self.fields.error(f"expected one graph with everything inlined, found {kind}")
        if kind == "value":
            self._note_value(number, message, is_main=depth == 1)
            return
        if parent == "graph" and number in (_GRAPH_INITIALIZER, _GRAPH_SPARSE_INITIALIZER):
            self._note_initialiser(kind, message)
        self.visit(kind, message, depth + 1)

    def _refuse_external_data(self, entry: Field) -> None:
        number, _, value = entry
        if number == _TENSOR_EXTERNAL_DATA or (number == _TENSOR_LOCATION and value != 0):
            raise BundleError(f"{self.fields.where}: expected tensors within the file, found external data; refused")

    def _note_initialiser(self, kind: str, message: memoryview) -> None:
        for entry in self.fields.read(message):
            if kind == "tensor" and entry[0] == _TENSOR_NAME:
                self._note_name(self.defined, entry)
            elif kind == "sparse_tensor" and entry[0] == 1:
                self._note_initialiser("tensor", self._bytes(entry))

    def _note_opset(self, message: memoryview) -> None:
        domain, version = "", 0
        for entry in self.fields.read(message):
            if entry[0] == _OPSET_DOMAIN:
                domain = self._text(entry)
            elif entry[0] == _OPSET_VERSION:
                version = self._integer(entry)
        self.opsets.add((domain, version))

    def _note_value(self, number: int, message: memoryview, is_main: bool) -> None:
        for entry in self.fields.read(message):
            if entry[0] == _VALUE_NAME:
                self._note_name(self.defined if number == _GRAPH_INPUT else self.used, entry)
        if is_main:
            specs = self.inputs if number == _GRAPH_INPUT else self.outputs
            specs.append(self._tensor_spec(message))

    def _tensor_spec(self, message: memoryview) -> TensorSpec:
        """ValueInfoProto{name = 1, type = 2 {tensor_type = 1 {elem_type = 1, shape = 2 {dim = 1 {dim_value = 1}}}}}."""
        name, element_type, shape = "", 0, []
        for entry in self.fields.read(message):
            if entry[0] == 1:
                name = self._text(entry)
            for tensor_type in self._within(entry, 2):
                for part in self._within(tensor_type, 1):
                    if part[0] == 1:
                        element_type = self._integer(part)
                    shape += [self._extent(dimension) for dimension in self._within(part, 2) if dimension[0] == 1]
        if element_type not in ELEMENT_TYPES or any(extent < 1 for extent in shape) or len(shape) > MAX_RANK:
            raise self.fields.error(
                f"'{name}' expected a tensor of fixed shape, found element type {element_type} and shape {shape}"
            )
        return TensorSpec(name, ELEMENT_TYPES[element_type], tuple(shape))

    def _extent(self, entry: Field) -> int:
        """Dimension{dim_value = 1, dim_param = 2}; 0 for a named or absent extent."""
        fields = {part[0]: part for part in self.fields.read(self._bytes(entry))}
        return self._integer(fields[1]) if 1 in fields and 2 not in fields else 0

    def _within(self, entry: Field, number: int) -> list[Field]:
        return list(self.fields.read(self._bytes(entry))) if entry[0] == number else []

    def _note_name(self, names: set[str], entry: Field) -> None:
        if name := self._text(entry):  # an empty name is an optional input or output left out
            names.add(name)

    def _bytes(self, entry: Field) -> memoryview:
        number, wire_type, value = entry
        if wire_type != BYTES or not isinstance(value, memoryview):
            raise self.fields.error(f"expected protobuf field {number} to hold bytes, found wire type {wire_type}")
        return value

    def _integer(self, entry: Field) -> int:
        number, wire_type, value = entry
        if wire_type != VARINT or not isinstance(value, int):
            raise self.fields.error(f"expected protobuf field {number} to hold a number, found wire type {wire_type}")
        return value

    def _text(self, entry: Field) -> str:
        try:
            return str(self._bytes(entry), "utf-8")
        except UnicodeDecodeError as error:
            raise self.fields.error("expected names in UTF-8, found other bytes") from error
