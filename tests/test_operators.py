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


def _added_to_a_part(x, y):
    whole = x * x
    whole[:, 1:4] += y
    return whole.sin()


FORWARD = {
    "any of an axis": (lambda x: (x > 1).any(1).float(), [(5, 4)]),
    "any of numbers, kept": (lambda x: x.clamp(min=0).any(dim=1, keepdim=True).float(), [(5, 2)]),
    "all of two axes": (lambda x: (x > -1).all(dim=(0, 2)).float(), [(2, 5, 3)]),
    "any of everything": (lambda x: (x > 2).any().float(), [(5, 4)]),
    "not equal": (lambda x, y: (x.clamp(min=0) != 0).float() + (x.sign() != y.sign()).float(), [(3, 4), (3, 4)]),
    "slice_scatter inside": (lambda x, y: torch.slice_scatter(x, y, 1, 1, 3), [(2, 5), (2, 2)]),
    "slice_scatter at the end": (lambda x, y: torch.slice_scatter(x, y, 0, -2), [(4, 3), (2, 3)]),
    "slice_scatter of all": (lambda x, y: torch.slice_scatter(x, y, 1), [(2, 3), (2, 3)]),
    "exp": (torch.exp, [(3, 4)]),
    "log": (lambda x: torch.log(x.abs() + 1), [(3, 4)]),
    "neg": (torch.neg, [(3, 4)]),
    "abs": (torch.abs, [(3, 4)]),
    "erf": (torch.erf, [(3, 4)]),
    "sine and cosine": (lambda x: x.sin() + 2 * x.cos(), [(3, 4)]),
    "a running sum of truths": (lambda x: (x > 0).cumsum(1, dtype=torch.float32), [(2, 5, 3)]),
    "a quotient rounded down": (lambda x: torch.div(x, 0.3, rounding_mode="floor"), [(3, 4)]),
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
    "slice-step-whole": (lambda a: a[:, 1::2], [(2, 6)]),
    "slice-step-inner": (lambda a: a[:, 1:6:3], [(2, 9, 3)]),
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
    "fill": (lambda a: a * torch.full_like(a, 0.5), [(3, 4)]),
    "silu": (F.silu, [(3, 40)]),
    "hardswish": (lambda a: F.hardswish(a * 3), [(3, 40)]),
    "hardsigmoid": (lambda a: F.hardsigmoid(a * 3), [(3, 40)]),
    "hardtanh": (F.hardtanh, [(3, 40)]),
    "relu6": (lambda a: F.relu6(a * 5), [(3, 40)]),
    "prelu": (F.prelu, [(2, 5, 3, 3), (5,)]),
    "leaky-relu": (lambda a: F.leaky_relu(a, 0.2), [(3, 40)]),
    "elu": (F.elu, [(3, 40)]),
    "mish": (F.mish, [(3, 40)]),
    "softplus": (F.softplus, [(3, 40)]),
    "log-sigmoid": (F.logsigmoid, [(3, 40)]),
    "max-pool": (lambda x: F.max_pool2d(x, 3, 2, 1), [(2, 3, 8, 9)]),
    "max-pool-ties": (lambda x: F.max_pool2d(x.relu(), 3, 2, 1), [(2, 3, 8, 9)]),
    "max-pool-even": (lambda x: F.max_pool2d(x, 2), [(2, 3, 8, 6)]),
    "max-pool-uncovered": (lambda x: F.max_pool2d(x, 2, 3), [(2, 3, 9, 7)]),
    "max-pool-ceil": (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), [(2, 3, 8, 8)]),
    "max-pool-dilated": (lambda x: F.max_pool2d(x, 2, 1, dilation=2), [(1, 2, 6, 7)]),
    "max-pool-oblong": (lambda x: F.max_pool2d(x, (3, 2), (1, 2), (1, 0)), [(1, 2, 6, 8)]),
    "avg-pool": (lambda x: F.avg_pool2d(x, 2), [(2, 3, 8, 6)]),
    "avg-pool-overlap": (lambda x: F.avg_pool2d(x, 3, 2, 1), [(2, 3, 8, 9)]),
    "avg-pool-valid-count": (lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), [(2, 3, 5, 6)]),
    "avg-pool-ceil": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), [(2, 3, 8, 8)]),
    "avg-pool-ceil-valid-count": (lambda x: F.avg_pool2d(x, 2, 2, 0, True, False), [(2, 3, 7, 7)]),
    "avg-pool-oblong": (lambda x: F.avg_pool2d(x, (3, 2), (1, 2), (1, 0)), [(1, 2, 6, 8)]),
    "global-pool": (lambda x: F.adaptive_avg_pool2d(x, 1), [(2, 3, 5, 7)]),
    "global-max-pool": (lambda x: F.adaptive_max_pool2d(x, 1), [(2, 3, 5, 7)]),
    "adaptive-pool": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), [(2, 3, 7, 5)]),
    "adaptive-pool-up": (lambda x: F.adaptive_avg_pool2d(x, 7), [(2, 3, 3, 3)]),
    "resize-nearest": (lambda x: F.interpolate(x, scale_factor=2), [(2, 3, 4, 5)]),
    "resize-nearest-odd": (lambda x: F.interpolate(x, size=(7, 3)), [(2, 3, 4, 5)]),
    "resize-bilinear": (lambda x: F.interpolate(x, size=(7, 9), mode="bilinear"), [(2, 3, 4, 5)]),
    "resize-bilinear-scale": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), [(1, 2, 5, 5)]),
    "resize-bilinear-corners": (
        lambda x: F.interpolate(x, size=(3, 9), mode="bilinear", align_corners=True),
        [(2, 3, 4, 5)],
    ),
    "resize-bicubic": (lambda x: F.interpolate(x, size=(6, 8), mode="bicubic"), [(1, 2, 4, 5)]),
    "pad-zero": (lambda x: F.pad(x, (0, 1, 2, 1)), [(2, 3, 4, 5)]),
    "pad-number-and-crop": (lambda x: F.pad(x, (-1, 1, 2, -2), value=0.7), [(2, 3, 4, 5)]),
    "pad-reflect": (lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"), [(2, 3, 4, 5)]),
    "pad-replicate": (lambda x: F.pad(x, (1, 2, 3, 0), mode="replicate"), [(2, 3, 4, 5)]),
    "roll": (lambda x: x.roll((-2, 3), (1, 2)), [(2, 5, 6, 3)]),
    "windows": (
        lambda x: (
            x.roll((-1, -1), (1, 2)).view(2, 2, 2, 2, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 3).softmax(1)
        ),
        [(2, 4, 4, 3)],
    ),
    "unfold-overlapping": (lambda x: (x * x).unfold(2, 4, 2).unfold(3, 3, 3).sigmoid(), [(2, 3, 8, 7)]),
    "unfold-one-window": (lambda x: (x * x).unfold(-1, 5, 9), [(2, 6)]),
    "im2col": (lambda x: F.unfold(x * x, (3, 2), padding=(1, 0), stride=(2, 3)), [(2, 3, 7, 8)]),
    "im2col-dilated": (lambda x: F.unfold(x * x, 3, dilation=(2, 1), padding=2), [(2, 3, 5, 4)]),
    "col2im": (lambda x: F.fold(x * x, (7, 8), (3, 2), padding=(1, 0), stride=(2, 3)), [(2, 18, 12)]),
    "col2im-dilated": (lambda x: F.fold(x * x, (5, 4), 3, dilation=(2, 1), padding=2), [(2, 27, 30)]),
    "largest-of-an-axis": (lambda x: (x * x).max(1)[0], [(2, 5, 3)]),
    "largest-of-an-axis-kept": (lambda x: x - (x * x).max(-1, keepdim=True)[0], [(2, 5, 3)]),
    "sum-in-place-on-a-slice": (lambda x, y: (x * 2)[:, :3].add_(y.relu()) * y, [(2, 5, 4), (2, 3, 4)]),
    "sum-in-place-seen-through-the-whole": (_added_to_a_part, [(2, 5, 4), (2, 3, 4)]),
    "split-into-three-hundred": (lambda x: torch.cat((x * x).split(1, 1)[::-1], 1), [(2, 300)]),
    "gather-rows": (lambda t: t[torch.tensor([2, 0, 1, 2])], [(3, 4)]),
    "gather-columns": (lambda t: t[:, torch.tensor([2, 0])], [(3, 4)]),
    "pixel-shuffle": (lambda x: F.pixel_shuffle(x, 2), [(2, 8, 3, 4)]),
    "pixel-unshuffle": (lambda x: F.pixel_unshuffle(x, 2), [(2, 2, 4, 6)]),
    "channel-shuffle": (lambda x: F.channel_shuffle(x, 2), [(2, 6, 3, 4)]),
    "squeeze-excite": (
        lambda x, a, b: x * F.conv2d(F.silu(F.conv2d(x.mean((2, 3), keepdim=True), a)), b).sigmoid(),
        [(2, 6, 4, 4), (3, 6, 1, 1), (6, 3, 1, 1)],
    ),
    "group-norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 6, 4, 3), (6,), (6,)]),
    "group-norm-plain": (lambda x: F.group_norm(x, 3), [(2, 6, 4, 3)]),
    "instance-norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), [(2, 3, 4, 5), (3,), (3,)]),
    "rms-norm": (lambda x, w: F.rms_norm(x, (5,), w, 1e-6), [(2, 3, 5), (5,)]),
    "layer-norm-2d": (
        lambda x, w, b: F.layer_norm(x.permute(0, 2, 3, 1), (3,), w, b).permute(0, 3, 1, 2),
        [(2, 3, 4, 5), (3,), (3,)],
    ),
    "attention": (lambda q, k, v: (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v, [(2, 3, 4, 5)] * 3),
    "linear-attention": (lambda q, k, v: q.relu() @ (k.relu().transpose(-2, -1) @ v), [(2, 3, 4, 5)] * 3),
    "batch-norm-training": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [(4, 3, 2, 2), (3,), (3,)]),
    "vector-norm": (lambda x: F.normalize(x, dim=1), [(2, 5, 3)]),
    "glu": (lambda x: F.glu(x, 1), [(2, 6, 3)]),
    "chunk": (lambda x: x.chunk(3, dim=1)[1], [(2, 6, 3)]),
    "unbind": (lambda x: x.unbind(1)[1] * 2, [(2, 3, 4)]),
    "var-mean": (lambda x: torch.var_mean(x, (2, 3))[0], [(2, 3, 4, 4)]),
    "amax-spatial": (lambda x: x.amax((2, 3)), [(2, 3, 4, 4)]),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.1), [(3, 4), (3, 4)]),
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
    "sum-all",
    "mean-all",
    "amax",
    "mv",
    "addmm-scaled",
}
NOT_DIFFERENTIABLE |= {"fill", "gather-rows", "gather-columns", "amax-spatial"}
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


# kernel, stride, padding, dilation, groups, input channels, output channels, transposed
CONVOLUTIONS = [
    (kernel, stride, padding, dilation, groups, channels, outputs, False)
    for groups, channels, outputs in ((1, 3, 4), (2, 4, 6), (4, 4, 4), (4, 4, 8))
    for kernel, stride, padding, dilation in (
        (1, 1, 0, 1),
        (1, 2, 0, 1),
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (3, 2, 0, 1),
        (3, 1, 2, 2),
        (3, 2, 2, 2),
        (5, 1, 0, 1),
        (2, 2, 0, 1),
        (4, 4, 0, 1),
        (3, 1, 3, 1),
    )
] + [(3, 2, 1, 1, 1, 4, 3, True), (2, 2, 0, 1, 2, 4, 4, True), (3, 1, 2, 2, 1, 4, 3, True)]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: "-".join(str(int(number)) for number in case))
def test_convolution_and_its_input_gradient(case, lowering):
    kernel, stride, padding, dilation, groups, channels, outputs, transposed = case
    x = values(2, channels, 8, 9)
    shape = (channels, outputs // groups) if transposed else (outputs, channels // groups)
    weight, bias = values(*shape, kernel, kernel, seed=1), values(outputs, seed=2)
    convolve = F.conv_transpose2d if transposed else F.conv2d

    def function(x, weight, bias):
        return convolve(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)

    backward = gradient_of(function)
    inputs = [x, weight, bias]

    def both(*inputs):
        return torch.cat([function(*inputs).flatten(), backward(*inputs).flatten()])

    torch.testing.assert_close(run_lowered(both, inputs, lowering), both(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("window", [(3, 2, 1), (3, 1, 1), (2, 2, 0)], ids=str)
def test_of_equal_elements_the_first_takes_the_gradient(window, lowering):
    """After ReLU most windows hold several zeros; which of them the gradient goes to is part of the operator."""
    backward = gradient_of(lambda x: F.max_pool2d(x, *window))
    x = torch.randint(0, 3, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(run_lowered(backward, [x], lowering), backward(x), **TOLERANCE)


def test_weight_gradients_are_refused():
    def function(named):
        return {"y": torch.func.grad(lambda w: F.conv2d(named["x"], w).sum())(named["w"])}

    traced = trace(function, {"x": values(2, 3, 5, 5), "w": values(4, 3, 3, 3)})
    with pytest.raises(UnsupportedError, match="gradient of convolution weights"):
        lower(traced, "test", "onnxruntime", weights=())


def test_depthwise_gradients_read_the_weight_reversed():
    backward = gradient_of(lambda x, w: F.conv2d(x, w, padding=1, groups=4))
    inputs = {"x": values(2, 4, 6, 6), "w": values(4, 1, 3, 3, seed=1)}
    model = lower(trace(lambda named: {"y": backward(*named.values())}, inputs), "test", "onnxruntime", weights={"w"})
    used = {name for node in model.graph.node for name in node.input}
    assert "w.reversed" in used
    assert "ConvTranspose" not in [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("function", "shapes", "message"),
    [
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), [(1, 2, 4, 4)], "with the divisor 3"),
        (lambda x: x.roll(1), [(3, 4)], "roll over all axes"),
        (lambda x: x.as_strided((2, 2), (1, 1)), [(4,)], "view of 4 elements"),
        (lambda x: x[torch.tensor([0, 1]), torch.tensor([0, 1])], [(3, 4)], "indexing with 2 tensors"),
    ],
    ids=["divisor", "roll", "overlapping-view", "two-indices"],
)
def test_what_has_no_exact_lowering_is_refused(function, shapes, message):
    with pytest.raises(UnsupportedError, match=message):
        run_lowered(function, [values(*shape) for shape in shapes], "onnxruntime")


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
