"""Inference lowers into what ONNX Runtime fuses: its optimised graph is counted, operator by operator."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import numpy_helper  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from mgg_edge.export.lower import lower  # noqa: E402
from mgg_edge.export.trace import trace  # noqa: E402

pytestmark = pytest.mark.torch


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lowered(function, x, *weights):
    """A function of one input and constants, as a whole model."""
    constants = {f"w{index}": weight for index, weight in enumerate(weights)}
    traced = trace(lambda named: {"y": function(*named.values())}, {"x": x, **constants})
    model = lower(traced, "test", "onnxruntime", weights=set(constants))
    model.graph.initializer.extend(numpy_helper.from_array(weight.numpy(), name) for name, weight in constants.items())
    return model


def optimised(model, folder):
    """How often each operator stands in the graph that ONNX Runtime makes of a model for the processor."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3  # it warns that the file fits this processor only
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def test_gelu_is_one_operator(tmp_path):
    assert optimised(lowered(F.gelu, values(3, 40)), tmp_path) == {"Gelu": 1}


def test_gelu_stays_one_operator_beside_its_gradient(tmp_path):
    """What the two would share has to be kept in memory from one to the other."""

    def function(x):
        y, backward = torch.func.vjp(F.gelu, x)
        return y + backward(x)[0]

    operators = optimised(lowered(function, values(3, 40)), tmp_path)
    assert (operators["Gelu"], operators["Erf"]) == (1, 1)
    assert sum(operators.values()) == 11  # with the sum of both


def attention(tokens):
    """As timm's vision transformers spell it: queries scaled, heads side by side."""
    query, key, value = tokens.reshape(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (query * 8**-0.5) @ key.transpose(-2, -1)
    return (scores.softmax(-1) @ value).transpose(1, 2).reshape(2, 5, 32)


def test_attention_is_two_products_and_a_softmax(tmp_path):
    operators = optimised(lowered(attention, values(2, 5, 96)), tmp_path)
    assert (operators["FusedMatMul"], operators["MatMul"], operators["Softmax"]) == (1, 1, 1)
    assert not operators["Mul"]  # the scale is in the product
    assert not operators["Slice"]  # queries, keys and values are split once
    assert operators["Split"] == 1


def test_hardswish_is_two_operators_in_the_layout_of_convolutions(tmp_path):
    def function(x, weight):
        return F.hardswish(F.conv2d(x, weight, padding=1))

    operators = optimised(lowered(function, values(1, 16, 8, 8), values(16, 16, 3, 3)), tmp_path)
    assert operators == {"ReorderInput": 1, "Conv": 1, "HardSigmoid": 1, "Mul": 1, "ReorderOutput": 1}


def test_pooling_stays_in_the_layout_of_convolutions(tmp_path):
    def function(x, first, second):
        return F.conv2d(F.max_pool2d(F.conv2d(x, first), 2), second).mean((2, 3))

    weights = [values(16, 16, 3, 3, seed=seed) for seed in (0, 1)]
    operators = optimised(lowered(function, values(1, 16, 12, 12), *weights), tmp_path)
    assert operators["ReorderOutput"] == 1
    assert operators["GlobalAveragePool"] == 1


def test_statistics_for_the_backward_are_dropped_where_nothing_reads_them():
    def function(x, weight, bias):
        return F.layer_norm(x, (8,), weight, bias)

    def gradient(x, *weights):
        return torch.func.grad(lambda y: function(y, *weights).square().sum())(x)

    def outputs(of):
        model = lowered(of, values(3, 8), values(8), values(8))
        return [len(node.output) for node in model.graph.node if node.op_type == "LayerNormalization"]

    assert outputs(function) == [1]
    assert outputs(gradient) == [3]


def test_a_mean_over_the_picture_is_pooled_and_keeps_its_axes():
    x = values(2, 6, 4, 4)
    for keepdim, after in ((True, {}), (False, {"Reshape": 1})):
        model = lowered(lambda x, keepdim=keepdim: x.mean((2, 3), keepdim=keepdim), x)
        counted = Counter(node.op_type for node in model.graph.node if node.op_type != "Identity")
        assert counted == {"GlobalAveragePool": 1, **after}


@pytest.mark.parametrize("channels", [(1, -1, 1, 1), (-1, 1, 1)], ids=str)
def test_scale_and_shift_of_channels_are_one_pass(channels):
    def function(x, scale, shift):
        return F.relu(x * scale.reshape(channels) + shift.reshape(channels))

    inputs = values(2, 6, 4, 4), values(6, seed=1), values(6, seed=2)
    model = lowered(function, *inputs)
    assert Counter(node.op_type for node in model.graph.node) == {"BatchNormalization": 1, "Relu": 1, "Identity": 1}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"x": inputs[0].numpy()})[0], function(*inputs).numpy())
    # What is read elsewhere as well, and what is no number of a channel, stays as it is.
    kept = lowered(lambda x, s, t: (x * s.reshape(1, -1, 1, 1)) * 2 + x * s.reshape(1, -1, 1, 1) + t.sum(), *inputs)
    assert "BatchNormalization" not in [node.op_type for node in kept.graph.node]


def test_a_gradient_through_activations_chooses_nothing():
    def gradient(x, *weights):
        return torch.func.grad(lambda y: (F.relu(y) + F.relu6(y) + F.hardswish(y) + F.hardsigmoid(y)).sum())(x)

    assert "Where" not in [node.op_type for node in lowered(gradient, values(3, 40)).graph.node]


@pytest.mark.parametrize(
    "function",
    [
        attention,
        lambda x: x.reshape(2, 5, 8, 12).permute(0, 2, 1, 3).permute(3, 1, 0, 2),
        lambda x: torch.bmm(x.reshape(10, 8, 12), x.reshape(10, 12, 8)),
        lambda x: torch.bmm(x.reshape(2, 5, 8, 12).reshape(10, 8, 12), x.reshape(5, 2, 12, 8).reshape(10, 12, 8)),
    ],
    ids=["attention", "permuted-twice", "no-heads", "other-heads"],
)
def test_simplifying_changes_no_number(function):
    x = values(2, 5, 96)
    module = trace(lambda named: {"y": function(named["x"])}, {"x": x}).module
    assert torch.equal(module(x)[0], function(x))
