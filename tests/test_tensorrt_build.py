"""TensorRT parses and builds the TensorRT lowering. No GPU is needed: the target's compute capability is named."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")
tensorrt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed", exc_type=ImportError)

from mgg_edge.export import Origins, export_bundle  # noqa: E402
from mgg_edge.learn import MGG, AdaptStep, Backbone, Objective, measure_statistics  # noqa: E402
from mgg_edge.learn.images import synthetic_frames  # noqa: E402
from mgg_edge.learn.rules.files import RULES  # noqa: E402
from mgg_edge.runtime.bundle.bundle import Bundle  # noqa: E402
from mgg_edge.runtime.bundle.graphs import embed_weights, read_graph  # noqa: E402
from vit import small_step  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.tensorrt]


def full_graph(bundle, name):
    data = bundle.graphs[name]
    return embed_weights(data, bundle.weights, read_graph(data, name).free_names)


def parse(graph):
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    parsed = parser.parse(graph)
    errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    return builder, network, parsed, errors


def build(graph):
    builder, network, parsed, errors = parse(graph)
    assert parsed, errors
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(tensorrt.ComputeCapability.SM86, 0)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return network, engine.nbytes


def export(path, step, classes):
    labels = [f"class {index}" for index in range(classes)]
    export_bundle(step, path, adapt_batch=4, labels=labels, origins=Origins("r", "u", "s"), parity_steps=1)
    return Bundle.load(path)


@pytest.mark.parametrize("rule", RULES)
def test_small_transformer_builds(tmp_path, rule):
    bundle = export(tmp_path / "x.mgg", small_step(rule), 10)
    for name in ("infer.tensorrt.onnx", "adapt.tensorrt.onnx"):
        network, size_bytes = build(full_graph(bundle, name))
        assert size_bytes > 0
        if name.startswith("adapt"):
            inputs = [network.get_input(index).name for index in range(network.num_inputs)]
            assert inputs == ["frames", *(spec.name for spec in bundle.manifest.state)]


def test_vit_tiny_builds(tmp_path):
    backbone = Backbone.create("vit_tiny_patch16_224")
    statistics = measure_statistics(backbone, synthetic_frames(32, 224, 224, 0).split(8))
    bundle = export(tmp_path / "x.mgg", AdaptStep(backbone, Objective(), MGG(), statistics, 1e-3), 1000)
    for name in ("infer.tensorrt.onnx", "adapt.tensorrt.onnx"):
        assert build(full_graph(bundle, name))[1] > 0


def test_the_onnxruntime_lowering_does_not_parse(tmp_path):
    bundle = export(tmp_path / "x.mgg", small_step(), 10)
    _, _, parsed, errors = parse(full_graph(bundle, "adapt.onnxruntime.onnx"))
    assert not parsed
    assert any("LayerNormalization" in error for error in errors)
