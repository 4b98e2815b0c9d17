"""Every lowering rule against PyTorch: a function is traced, lowered for both engines, and run by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from mgg_edge.container import LOWERINGS  # noqa: E402
from mgg_edge.errors import UnsupportedError  # noqa: E402
from mgg_edge.export.lower import lower  # noqa: E402
from mgg_edge.export.tensorrt_lint import lint_tensorrt  # noqa: E402
from mgg_edge.export.trace import trace  # noqa: E402

pytestmark = pytest.mark.torch

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}  # float32, sums of at most a few hundred terms in another order


def values(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_lowered(function, inputs, lowering):
    traced = trace(lambda named: {"y": function(*named.values())}, {f"x{i}": x for i, x in enumerate(inputs)})
    model = lower(traced, "test", lowering, weights=())
    onnx.checker.check_model(model, full_check=True)
    if lowering == "tensorrt":
        assert lint_tensorrt(model) == []
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {name: x.numpy() for name, x in zip(traced.inputs, inputs, strict=True)})
    return torch.from_numpy(np.array(result))


def gradient_of(function):
    """The input gradient of a function under a fixed random cotangent: its backward, as the step traces it."""

    def backward(x, *rest):
        def scalar(value):
            y = function(value, *rest)
            weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=y.dtype).reshape(y.shape)
            return (y * weights).sum()

        return torch.func.grad(scalar)(x)

    return backward


FORWARD = {
    "exp": (torch.exp, [(3, 4)]),
    "log": (lambda x: torch.log(x.abs() + 1), [(3, 4)]),
    "neg": (torch.neg, [(3, 4)]),
    "abs": (torch.abs, [(3, 4)]),
    "erf": (torch.erf, [(3, 4)]),
    "tanh": (torch.tanh, [(3, 4)]),
    "sigmoid": (torch.sigmoid, [(3, 4)]),
    "relu": (torch.relu, [(3, 4)]),
    "sqrt": (lambda x: torch.sqrt(x.abs()), [(5,)]),
    "rsqrt": (lambda x: torch.rsqrt(x.abs() + 0.1), [(5,)]),
    "reciprocal": (lambda x: torch.reciprocal(x + 10), [(5,)]),
    "sign": (torch.sign, [(5,)]),
    "add-broadcast": (torch.add, [(3, 4), (4,)]),
    "add-alpha": (lambda a, b: torch.add(a, b, alpha=0.5), [(3, 4), (3, 4)]),
    "add-number": (lambda a: a + 2, [(3, 4)]),
    "sub-alpha": (lambda a, b: torch.sub(a, b, alpha=3), [(3, 4), (3, 4)]),
    "number-minus": (lambda a: 1 - a, [(3, 4)]),
    "mul": (torch.mul, [(3, 4), (3, 1)]),
    "div": (lambda a, b: a / (b.abs() + 1), [(3, 4), (3, 4)]),
    "square": (torch.square, [(3, 4)]),
    "pow-number": (lambda a: (a.abs() + 0.1) ** 1.5, [(3, 4)]),
    "number-pow": (lambda a: 0.9**a, [()]),
    "maximum": (torch.maximum, [(3, 4), (3, 4)]),
    "minimum": (torch.minimum, [(3, 4), (3, 4)]),
    "clamp-both": (lambda a: a.clamp(-0.5, 0.5), [(3, 4)]),
    "clamp-low": (lambda a: a.clamp(min=0.1), [(3, 4)]),
    "where": (lambda a, b: torch.where(a > b, a, b * 2), [(3, 4), (3, 4)]),
    "compare-number": (lambda a: torch.where(a <= 0.2, 1.0, -1.0), [(3, 4)]),
    "full-like": (lambda a: a + torch.full_like(a, 3.0), [(3, 4)]),
    "zeros-ones": (lambda a: a * torch.ones(4) + torch.zeros(3, 1), [(3, 4)]),
    "arange": (lambda a: a * torch.arange(4), [(3, 4)]),
    "view": (lambda a: a.reshape(2, 6).reshape(4, 3), [(3, 4)]),
    "squeeze": (lambda a: a.squeeze(1).unsqueeze(0), [(3, 1, 4)]),
    "expand": (lambda a: a.expand(5, 3, 4), [(3, 1)]),
    "permute": (lambda a: a.permute(2, 0, -2), [(2, 3, 4)]),
    "transpose": (lambda a: a.transpose(-1, 0), [(2, 3, 4)]),
    "t": (lambda a: a.t(), [(2, 3)]),
    "cat": (lambda a, b: torch.cat([a, b], dim=-1), [(2, 3), (2, 2)]),
    "cat-one": (lambda a: torch.cat([a, a[:, :0]], dim=1), [(2, 3)]),
    "stack": (lambda a, b: torch.stack([a, b]), [(4,), (4,)]),
    "split": (lambda a: a.split([1, 2], dim=1)[1], [(2, 3)]),
    "slice": (lambda a: a[:, 1:-1], [(2, 5)]),
    "slice-step": (lambda a: a[:, ::2], [(2, 5)]),
    "select": (lambda a: a[:, -1], [(2, 5)]),
    "select-vector": (lambda a: a[2], [(5,)]),
    "sum-all": (torch.sum, [(2, 5)]),
    "sum-keep": (lambda a: a.sum((0, -1), keepdim=True), [(2, 3, 4)]),
    "mean-all": (torch.mean, [(2, 5)]),
    "mean": (lambda a: a.mean(1), [(2, 5)]),
    "amax": (lambda a: a.amax(-1, keepdim=True), [(2, 5)]),
    "mm": (torch.mm, [(3, 4), (4, 5)]),
    "bmm": (torch.bmm, [(2, 3, 4), (2, 4, 5)]),
    "mv": (torch.mv, [(3, 4), (4,)]),
    "matmul-4d": (torch.matmul, [(2, 3, 4, 5), (2, 3, 5, 4)]),
    "linear": (F.linear, [(2, 3, 4), (5, 4), (5,)]),
    "addmm-scaled": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2.0), [(5,), (3, 4), (4, 5)]),
    "conv": (F.conv2d, [(2, 3, 8, 8), (4, 3, 3, 3), (4,)]),
    "conv-patches": (lambda x, w: F.conv2d(x, w, stride=4), [(2, 3, 8, 8), (4, 3, 4, 4)]),
    "conv-grouped": (lambda x, w: F.conv2d(x, w, padding=2, dilation=2, groups=4), [(2, 4, 8, 8), (8, 1, 3, 3)]),
    "softmax": (lambda a: a.softmax(-1), [(2, 3, 5)]),
    "softmax-middle": (lambda a: a.softmax(1), [(2, 3, 5)]),
    "log-softmax": (lambda a: a.log_softmax(1), [(2, 5)]),
    "gelu": (F.gelu, [(3, 4)]),
    "gelu-tanh": (lambda a: F.gelu(a, approximate="tanh"), [(3, 4)]),
    "layer-norm": (lambda a, w, b: F.layer_norm(a, (5,), w, b), [(2, 3, 5), (5,), (5,)]),
    "layer-norm-two-axes": (lambda a: F.layer_norm(a, (3, 5), eps=1e-6), [(2, 3, 5)]),
    "std": (lambda a: torch.std(a, dim=0), [(6, 5)]),
}
NOT_DIFFERENTIABLE = {
    "neg",
    "abs",
    "erf",
    "reciprocal",
    "sign",
    "add-broadcast",
    "add-alpha",
    "add-number",
    "sub-alpha",
    "number-minus",
    "number-pow",
    "minimum",
    "clamp-both",
    "clamp-low",
    "compare-number",
    "full-like",
    "zeros-ones",
    "arange",
    "squeeze",
    "transpose",
    "t",
    "cat-one",
    "slice-step",
    "sum-all",
    "mean-all",
    "amax",
    "mv",
    "addmm-scaled",
    "conv",
    "conv-patches",
    "conv-grouped",
}
DIFFERENTIABLE = [name for name in FORWARD if name not in NOT_DIFFERENTIABLE]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("case", FORWARD)
def test_forward(case, lowering):
    function, shapes = FORWARD[case]
    inputs = [values(*shape, seed=index) for index, shape in enumerate(shapes)]
    torch.testing.assert_close(run_lowered(function, inputs, lowering), function(*inputs), **TOLERANCE)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("case", DIFFERENTIABLE)
def test_gradient(case, lowering):
    function, shapes = FORWARD[case]
    backward = gradient_of(function)
    inputs = [values(*shape, seed=index) for index, shape in enumerate(shapes)]
    torch.testing.assert_close(run_lowered(backward, inputs, lowering), backward(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_bytes_become_numbers(lowering):
    frames = torch.arange(24, dtype=torch.uint8).reshape(2, 2, 2, 3)

    def scale(x):
        return x.to(torch.float32) / 255

    torch.testing.assert_close(run_lowered(scale, [frames], lowering), scale(frames))


def test_equal_work_is_done_once():
    traced = trace(lambda named: {"y": named["x"].exp() + named["x"].exp()}, {"x": values(3)})
    model = lower(traced, "test", "onnxruntime", weights=())
    assert [node.op_type for node in model.graph.node].count("Exp") == 1


def test_unused_work_is_left_out():
    def function(named):
        named["x"].exp()
        return {"y": named["x"] * 2}

    model = lower(trace(function, {"x": values(3)}), "test", "onnxruntime", weights=())
    assert "Exp" not in [node.op_type for node in model.graph.node]


def test_weights_are_referred_to_and_not_declared():
    traced = trace(lambda named: {"y": named["x"] @ named["w"]}, {"x": values(3, 4), "w": values(4, 2)})
    model = lower(traced, "test", "onnxruntime", weights={"w"})
    assert [value.name for value in model.graph.input] == ["x"]
    assert not any(tensor.name == "w" for tensor in model.graph.initializer)
    assert any("w" in node.input for node in model.graph.node)


def test_operators_without_a_rule_are_named():
    traced = trace(lambda named: {"y": torch.fft.fft(named["x"]).real}, {"x": values(8)})
    with pytest.raises(UnsupportedError, match=r"no ONNX lowering for aten\._fft"):
        lower(traced, "test", "onnxruntime", weights=())


def test_training_batch_norm_is_never_exported_as_inference():
    """The stock exporter turns it into inference mode without a word; here its decomposition is what is lowered."""
    inputs = [values(6, 4) * 3 + 1, values(4, seed=1), values(4, seed=2)]

    def function(batch, weight, bias):
        return F.batch_norm(batch, None, None, weight, bias, training=True)

    torch.testing.assert_close(run_lowered(function, inputs, "onnxruntime"), function(*inputs), **TOLERANCE)
