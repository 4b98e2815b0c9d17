"""The plain file is the user's model, and the floor of a step is counted right."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

from mgg_edge.export import ExportRequest, compose, export_bundle  # noqa: E402
from mgg_edge.export.plain import multiply_adds, step_floor, write_plain  # noqa: E402
from mgg_edge.export.trace import trace  # noqa: E402
from mgg_edge.learn.images import synthetic_frames  # noqa: E402
from mgg_edge.runtime import Bundle, open_engine  # noqa: E402
from mgg_edge.runtime.bench import inference_costs  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.fixture(
    scope="module",
    params=[("resnet10t", "source"), ("resnet10t", "mix:0.1"), ("vit_tiny_patch16_224", "source")],
    ids=" ".join,
)
def bundle(request, tmp_path_factory):
    path, (name, statistics) = tmp_path_factory.mktemp("plain") / "x.mgg", request.param
    asked = ExportRequest(name, "random", image_size=64, rule="sgd", norm_statistics=statistics)
    step, labels, origins = compose(asked)
    export_bundle(step, path, adapt_batch=4, labels=labels, origins=origins, parity_steps=5)
    return Bundle.load(path)


def test_the_plain_file_answers_as_the_bundle(bundle, tmp_path):
    write_plain(bundle, tmp_path / "plain.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "plain.onnx"), providers=["CPUExecutionProvider"])
    frames, size = synthetic_frames(1, 64, 64, 3).numpy(), bundle.manifest.preprocess
    images = ((frames / 255 - np.array(size.mean)) / np.array(size.std)).transpose(0, 3, 1, 2).astype(np.float32)
    engine = open_engine(bundle, "cpu", threads=1)
    expected, _ = engine.infer(frames)
    np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, atol=1e-4 * np.abs(expected).max())
    assert "plain" in inference_costs(bundle, engine, 1, rounds=3, plain=tmp_path / "plain.onnx")
    engine.close()


def test_a_gradient_step_is_about_twice_its_forward(bundle):
    # The first convolution or patch embedding needs no gradient, as nothing that adapts stands before it.
    assert 1.5 < step_floor(bundle) < 2.05


def values(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.mm, [(3, 4), (4, 5)], 3 * 4 * 5),
        (torch.matmul, [(2, 3, 4, 5), (2, 3, 5, 6)], 2 * 3 * 4 * 5 * 6),
        (torch.nn.functional.linear, [(2, 3, 4), (5, 4), (5,)], 6 * 4 * 5),
        (torch.nn.functional.conv2d, [(1, 4, 8, 8), (6, 4, 3, 3)], 36 * 6 * 4 * 9),
        (lambda x, w: torch.nn.functional.conv2d(x, w, groups=4), [(1, 4, 8, 8), (8, 1, 3, 3)], 36 * 8 * 9),
        (torch.nn.functional.conv_transpose2d, [(1, 4, 5, 5), (4, 6, 2, 2)], 25 * 4 * 6 * 4),
        (lambda x: x.exp() * 2, [(5, 5)], 0),
    ],
    ids=["mm", "matmul", "linear", "conv", "depthwise", "transposed", "none"],
)
def test_multiply_adds_are_counted(function, shapes, expected):
    inputs = {f"x{index}": values(*shape) for index, shape in enumerate(shapes)}
    assert multiply_adds(trace(lambda named: {"y": function(*named.values())}, inputs)) == expected


def test_the_gradient_of_a_convolution_costs_the_convolution():
    def gradient(named):
        return {"y": torch.func.grad(lambda x: torch.nn.functional.conv2d(x, named["w"]).square().sum())(named["x"])}

    traced = trace(gradient, {"x": values(1, 4, 8, 8), "w": values(6, 4, 3, 3)})
    assert multiply_adds(traced) == 2 * 36 * 6 * 4 * 9
