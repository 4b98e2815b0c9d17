"""Batch normalisation folds into the convolutions of an exported net, whatever its θ and statistics are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

pytest.importorskip("torch", reason="the export half needs the export extra")

from mgg_edge.export import ExportRequest, compose, export_bundle
from mgg_edge.learn.images import synthetic_frames
from mgg_edge.runtime import Bundle, open_engine
from mgg_edge.runtime.bundle.graphs import bind_inputs, embed_weights
from mgg_edge.runtime.engines import onnxruntime_engine
from mgg_edge.state import AdaptState

pytestmark = pytest.mark.torch
MEMBER = "infer.onnxruntime.onnx"


@pytest.fixture(scope="module", params=["source", "mix:0.1"])
def bundle(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("folded") / "x.mgg"
    asked = ExportRequest("resnet10t", "random", image_size=64, rule="sgd", norm_statistics=request.param)
    step, labels, origins = compose(asked)
    export_bundle(step, path, adapt_batch=4, labels=labels, origins=origins, parity_steps=5)
    return Bundle.load(path)


def moved(bundle):
    """A state whose θ and statistics are other than the source's by a tenth."""
    rng = np.random.default_rng(0)
    state, read = bundle.initial_state, bundle.manifest.infer_state
    factors = {name: rng.uniform(0.9, 1.1, state[name].shape).astype(np.float32) for name in read}
    return AdaptState({**state, **{name: state[name] * factor for name, factor in factors.items()}})


def test_the_answers_are_those_of_the_unfolded_graph(bundle):
    engine, frames = open_engine(bundle, "cpu", threads=1), synthetic_frames(1, 64, 64, 1).numpy()
    for state in (bundle.initial_state, moved(bundle)):
        (logits, features), (expected, those) = engine.settle(state)(frames), engine.infer(frames, state)
        np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
        np.testing.assert_allclose(features, those, atol=2e-5 * np.abs(those).max())
    assert np.abs(engine.infer(frames, moved(bundle))[0] - engine.infer(frames, bundle.initial_state)[0]).max() > 1e-4
    engine.close()


def test_no_scale_and_no_shift_is_left(bundle, tmp_path):
    read = {name: moved(bundle)[name] for name in bundle.manifest.infer_state}
    graph = embed_weights(bind_inputs(bundle.graphs[MEMBER], read, MEMBER), bundle.weights, bundle.references[MEMBER])
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimised.onnx"), 3
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    counted = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert counted["BatchNormalization"] == 1  # the pixels'
    assert not {"Mul", "Add", "Relu", "Split", "Sub", "Reciprocal", "Sqrt"} & set(counted)


def operators_of_the_step(rule, folder, monkeypatch):
    """How often each operator stands in the adapt graph that the engine's session runs."""
    asked = ExportRequest("resnet10t", "random", image_size=64, rule=rule, norm_statistics="source")
    step, labels, origins = compose(asked)
    export_bundle(step, folder / "x.mgg", adapt_batch=4, labels=labels, origins=origins, parity_steps=5)
    usual = onnxruntime_engine.quiet_options

    def noting(ort):
        options = usual(ort)
        options.optimized_model_filepath = str(folder / "last.onnx")  # `infer` is opened first
        return options

    monkeypatch.setattr(onnxruntime_engine, "quiet_options", noting)
    open_engine(Bundle.load(folder / "x.mgg"), "cpu", threads=1).close()
    return Counter(node.op_type for node in onnx.load(folder / "last.onnx", load_external_data=False).graph.node)


@pytest.mark.parametrize(("rule", "left"), [("forward", 1), ("sgd", 15)])
def test_a_step_under_the_source_folds_as_well(rule, left, tmp_path, monkeypatch):
    """A rule without a gradient leaves nothing to scale behind convolutions; one that differentiates runs under θ."""
    counted = operators_of_the_step(rule, tmp_path, monkeypatch)
    assert counted["BatchNormalization"] == left  # the pixels' among them
