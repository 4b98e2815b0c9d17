"""The wire reader agrees with the onnx package, refuses external data everywhere, and survives any bytes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import toy
from mgg_edge.errors import BundleError
from mgg_edge.runtime.bundle import wire
from mgg_edge.runtime.bundle.graphs import declare_weights, embed_weights, part_transposed, read_graph
from mgg_edge.runtime.bundle.wire import Fields, encode_bytes, encode_integer
from mgg_edge.state import TensorSpec


def external(name: str = "payload") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def listed_only() -> TensorProto:
    """External by its list of files alone, without the location flag."""
    tensor = external()
    tensor.ClearField("data_location")
    return tensor


def flagged_only() -> TensorProto:
    """External by its flag alone."""
    tensor = external()
    del tensor.external_data[:]
    return tensor


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=values, indices=indices, dims=[8])


def plain(name: str = "plain") -> TensorProto:
    return numpy_helper.from_array(np.zeros(4, np.float32), name)


def subgraph(**parts: Any) -> onnx.GraphProto:
    return onnx.GraphProto(name="inner", **parts)


def add_attribute(model: onnx.ModelProto, **fields: Any) -> None:
    model.graph.node[0].attribute.append(onnx.AttributeProto(name="hidden", **fields))


PLACES: dict[str, Callable[[onnx.ModelProto], Any]] = {
    "initialiser": lambda m: m.graph.initializer.append(external()),
    "initialiser-list-only": lambda m: m.graph.initializer.append(listed_only()),
    "initialiser-flag-only": lambda m: m.graph.initializer.append(flagged_only()),
    "sparse-values": lambda m: m.graph.sparse_initializer.append(sparse(external(), plain())),
    "sparse-indices": lambda m: m.graph.sparse_initializer.append(sparse(plain(), external())),
    "attribute": lambda m: add_attribute(m, t=external()),
    "attribute-list": lambda m: add_attribute(m, tensors=[plain(), external()]),
    "attribute-sparse": lambda m: add_attribute(m, sparse_tensor=sparse(external(), plain())),
    "attribute-sparse-list": lambda m: add_attribute(m, sparse_tensors=[sparse(plain(), external())]),
    "subgraph": lambda m: add_attribute(m, g=subgraph(initializer=[external()])),
    "subgraph-list": lambda m: add_attribute(m, graphs=[subgraph(), subgraph(initializer=[external()])]),
    "subgraph-constant": lambda m: add_attribute(
        m, g=subgraph(node=[helper.make_node("Constant", [], ["x"], value=external())])
    ),
    "subgraph-of-subgraph": lambda m: add_attribute(
        m,
        g=subgraph(
            node=[
                onnx.NodeProto(
                    op_type="If", attribute=[onnx.AttributeProto(name="a", g=subgraph(initializer=[external()]))]
                )
            ]
        ),
    ),
    "constant-node": lambda m: m.graph.node.append(helper.make_node("Constant", [], ["x"], value=external())),
}


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_refused(place: str):
    model = toy.infer_model()
    PLACES[place](model)
    with pytest.raises(BundleError, match=r"^toy: expected tensors within the file, found external data; refused$"):
        read_graph(model.SerializeToString(), "toy")


def test_external_data_in_an_appended_copy_of_a_message_is_refused():
    """Merging makes a tensor external whose first half looks harmless."""
    data = toy.infer_model().SerializeToString()
    extra = encode_bytes(7, encode_bytes(5, external().SerializeToString()))
    with pytest.raises(BundleError, match="external data"):
        read_graph(data + extra, "toy")


def test_functions_and_training_are_refused():
    model = toy.infer_model()
    model.functions.append(
        helper.make_function("local", "f", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], model.opset_import)
    )
    with pytest.raises(BundleError, match="found a function"):
        read_graph(model.SerializeToString(), "toy")
    model = toy.infer_model()
    model.training_info.add().initialization.initializer.append(external())
    with pytest.raises(BundleError, match="found training information"):
        read_graph(model.SerializeToString(), "toy")


@pytest.mark.parametrize("graph", ["infer", "adapt"])
def test_the_summary_agrees_with_onnx(graph: str):
    model = toy.infer_model(3) if graph == "infer" else toy.adapt_model()
    summary = read_graph(model.SerializeToString(), "toy")

    def specs(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                value.name,
                str(np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))),
                tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    assert summary.inputs == specs(model.graph.input)
    assert summary.outputs == specs(model.graph.output)
    assert summary.opset == toy.OPSET
    used = {name for node in model.graph.node for name in node.input}
    assert summary.free_names == used & set(toy.weights())
    assert {"frames", "theta", "logits", "constant_0"} <= summary.defined_names


def test_names_in_subgraphs_count_as_used():
    model = toy.infer_model()
    inner = subgraph(node=[helper.make_node("Identity", ["backbone.secret"], ["y"])])
    add_attribute(model, g=inner)
    assert "backbone.secret" in read_graph(model.SerializeToString(), "toy").free_names


def test_a_subgraph_output_without_a_node_counts_as_used():
    model = toy.infer_model()
    value = helper.make_tensor_value_info("backbone.secret", TensorProto.FLOAT, [1])
    add_attribute(model, g=subgraph(output=[value]))
    assert "backbone.secret" in read_graph(model.SerializeToString(), "toy").free_names


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.type.tensor_type.shape.dim[0].__setattr__("dim_param", "batch"),
        lambda v: v.type.tensor_type.shape.dim[0].ClearField("dim_value"),
        lambda v: v.type.tensor_type.shape.dim[0].__setattr__("dim_value", 0),
        lambda v: v.type.tensor_type.__setattr__("elem_type", 0),
        lambda v: v.type.tensor_type.__setattr__("elem_type", TensorProto.STRING),
        lambda v: v.ClearField("type"),
        lambda v: v.type.CopyFrom(helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [1]))),
    ],
    ids=["named", "absent", "zero", "no-type", "string", "untyped", "sequence"],
)
def test_inputs_are_tensors_of_fixed_shape(change: Callable[[Any], Any]):
    model = toy.infer_model()
    change(model.graph.input[0])
    with pytest.raises(BundleError, match=r"'frames' expected a tensor of fixed shape"):
        read_graph(model.SerializeToString(), "toy")


def test_a_dimension_with_both_an_extent_and_a_name_is_not_fixed():
    """Readers differ on which of the two counts."""
    dimension = encode_integer(1, 8) + encode_bytes(2, b"batch")
    tensor_type = encode_integer(1, TensorProto.FLOAT) + encode_bytes(2, encode_bytes(1, dimension))
    value = encode_bytes(1, b"x") + encode_bytes(2, encode_bytes(1, tensor_type))
    with pytest.raises(
        BundleError, match=r"'x' expected a tensor of fixed shape, found element type 1 and shape \[0\]"
    ):
        read_graph(encode_bytes(7, encode_bytes(11, value)), "toy")


@pytest.mark.parametrize(
    "versions", [[], [("com.microsoft", 1)], [("", 17), ("ai.onnx", 18)]], ids=["none", "foreign", "two"]
)
def test_one_operator_set(versions: list[tuple[str, int]]):
    model = toy.infer_model()
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*version) for version in versions)
    with pytest.raises(BundleError, match="expected one version of the standard operator set"):
        read_graph(model.SerializeToString(), "toy")


class TestSplicing:
    def test_embedding_gives_a_complete_model(self):
        weights = toy.weights()
        data = embed_weights(toy.adapt_model().SerializeToString(), weights, sorted(weights))
        model = onnx.ModelProto.FromString(data)
        found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for name, array in weights.items():
            np.testing.assert_array_equal(found[name], array)
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        onnx.checker.check_model(model, full_check=True)

    def test_nothing_else_changes(self):
        model = toy.adapt_model()
        spliced = onnx.ModelProto.FromString(embed_weights(model.SerializeToString(), toy.weights(), ["rule.decay"]))
        assert spliced.graph.initializer.pop().name == "rule.decay"
        assert spliced == model

    def test_declaring_holds_no_data(self):
        weights = {"big": np.zeros((1000, 1000), np.float32)}
        extra = declare_weights(b"", weights, ["big"])
        (tensor,) = onnx.ModelProto.FromString(extra).graph.initializer
        assert (tensor.name, list(tensor.dims), tensor.data_type) == ("big", [1000, 1000], TensorProto.FLOAT)
        assert tensor.data_location == TensorProto.EXTERNAL
        assert len(extra) < 100

    @pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "uint8", "bool"])
    def test_types(self, dtype: str):
        array = np.array([[0, 1], [1, 0]], dtype)
        (tensor,) = onnx.ModelProto.FromString(embed_weights(b"", {"x": array}, ["x"])).graph.initializer
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), array)

    def test_a_spliced_graph_is_not_accepted_from_a_bundle(self):
        data = declare_weights(toy.infer_model().SerializeToString(), toy.weights(), ["backbone.head"])
        with pytest.raises(BundleError, match="external data"):
            read_graph(data, "toy")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x3a\xff", "truncated or too long"),
        (b"\x3a" + b"\xff" * 11, "truncated or too long"),
        (b"\x3a\x05abc", "claims 5 bytes where 3 are left"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01abc", "bytes where 3 are left"),
        (b"\x0d\x01\x02", "claims 4 bytes where 2 are left"),
        (b"\x09\x01\x02", "claims 8 bytes where 2 are left"),
        (b"\x3b\x3c", "wire type 0, 1, 2 or 5, found 3"),
        (b"\x3c", "wire type 0, 1, 2 or 5, found 4"),
        (b"\x3f", "wire type 0, 1, 2 or 5, found 7"),
        (b"\x00\x00", "expected a protobuf field number, found 0"),
        (b"\xf8\xff\xff\xff\xff\x01\x00", "expected a protobuf field number"),
        (b"\x38\x01", "field 7 to hold bytes, found wire type 0"),
        (b"\x3a\x04\x0a\x02\x08\x01", "field 1 to hold bytes, found wire type 0"),
        (b"\x42\x02\x12\x00", "field 2 to hold a number, found wire type 2"),
        (b"\x42\x03\x0a\x01\xff", "expected names in UTF-8"),
    ],
    ids=[
        "cut-varint", "long-varint", "cut-field", "absurd-length", "cut-fixed32", "cut-fixed64", "group", "group-end",
        "type-7", "field-0", "huge-field", "graph-as-number", "name-as-number", "version-as-bytes", "not-utf8",
    ],
)  # fmt: skip
def test_malformed_wire(data: bytes, message: str):
    with pytest.raises(BundleError, match=message):
        read_graph(data, "toy")


def test_nesting_is_bounded():
    """Built by hand: the onnx package refuses to write it."""
    data = b""
    for _ in range(5000):
        data = encode_bytes(1, encode_bytes(5, encode_bytes(6, data)))
    with pytest.raises(BundleError, match="expected messages at most 24 deep"):
        read_graph(encode_bytes(7, data), "toy")


def test_the_number_of_fields_is_bounded():
    start = time.process_time()  # work, not waiting for a busy machine
    with pytest.raises(BundleError, match="expected at most 300000 protobuf fields"):
        read_graph(b"\x08\x01" * (wire.MAX_FIELDS + 1), "toy")
    with pytest.raises(BundleError, match="expected at most 300000 protobuf fields"):
        read_graph(encode_bytes(7, b"\x0a\x00" * (wire.MAX_FIELDS + 1)), "toy")
    assert time.process_time() - start < 4


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**32, 2**63 - 1, 2**64 - 1])
def test_integers_round_trip(value: int):
    ((number, wire_type, found),) = Fields("x").read(memoryview(encode_integer(5, value)))
    assert (number, wire_type, found) == (5, 0, value)


def test_every_truncation_is_refused_or_incomplete():
    """A cut between two top-level fields is valid protobuf; it must not read as the whole graph."""
    data = toy.adapt_model().SerializeToString()
    whole = read_graph(data, "toy")
    for length in range(len(data)):
        try:
            assert read_graph(data[:length], "toy") != whole
        except BundleError:
            continue


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_summary_or_a_bundle_error(data: bytes):
    with contextlib.suppress(BundleError):
        read_graph(data, "toy")


def test_any_flipped_bit_gives_a_summary_or_a_bundle_error():
    data, random = toy.adapt_model().SerializeToString(), np.random.default_rng(0)
    for position in random.integers(0, len(data) * 8, 1500):
        altered = bytearray(data)
        altered[position // 8] ^= 1 << (position % 8)
        try:
            read_graph(bytes(altered), "toy")
        except BundleError:
            continue


def test_a_weight_that_is_read_both_ways_gets_two_names():
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(4, 4)).astype(np.float32) for name in ("both", "turned", "plain", "twice")}
    transposed = (("both", "t1"), ("turned", "t2"), ("twice", "t3"), ("t3", "t4"), ("x", "tx"))
    products = (("tx", "t1", "a"), ("a", "both", "b"), ("b", "t2", "c"), ("c", "plain", "d"), ("d", "t3", "e"))
    nodes = [helper.make_node("Transpose", [name], [out], perm=[1, 0]) for name, out in transposed]
    nodes += [helper.make_node("MatMul", [left, right], [out]) for left, right, out in (*products, ("e", "t4", "y"))]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4])] for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", *ends), opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    graph = model.SerializeToString()
    parted, aliases = part_transposed(graph, list(weights), "here")
    assert aliases == {"both.transposed": "both", "twice.transposed": "twice"}
    read = [(node.op_type, list(node.input)) for node in onnx.load_from_string(parted).graph.node]
    assert read[:5] == [
        ("Transpose", ["both.transposed"]),
        ("Transpose", ["turned"]),
        ("Transpose", ["twice.transposed"]),
        ("Identity", ["twice"]),
        ("Transpose", ["x"]),
    ]
    assert read[5:] == [(node.op_type, list(node.input)) for node in nodes[5:]]
    whole = {**weights, **{alias: weights[name] for alias, name in aliases.items()}}
    x = rng.normal(size=(4, 4)).astype(np.float32)
    answers = [
        ort.InferenceSession(embed_weights(data, whole, names), providers=["CPUExecutionProvider"]).run(None, {"x": x})[
            0
        ]
        for data, names in ((graph, weights), (parted, whole))
    ]
    np.testing.assert_array_equal(*answers)
