"""Half precision: which products, how far they stray, and that nothing else is touched."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

from gpu_standin import FakeCuda, GpuOnnxRuntime  # noqa: E402
from mgg_edge.container import graph_name  # noqa: E402
from mgg_edge.errors import ManifestError, ParityError, UsageError  # noqa: E402
from mgg_edge.export import Origins, export_bundle  # noqa: E402
from mgg_edge.export.graphs import trace_adapt, trace_infer  # noqa: E402
from mgg_edge.export.half_precision import HALF_TYPES, choose_loss_scale, halve, products  # noqa: E402
from mgg_edge.learn import Backbone, Objective  # noqa: E402
from mgg_edge.learn.rules.files import RULES  # noqa: E402
from mgg_edge.manifest import Manifest  # noqa: E402
from mgg_edge.runtime.bundle.bundle import Bundle  # noqa: E402
from mgg_edge.runtime.bundle.graphs import embed_weights  # noqa: E402
from mgg_edge.runtime.engines import openvino_engine, settling  # noqa: E402
from mgg_edge.runtime.engines.cuda import Cuda  # noqa: E402
from mgg_edge.runtime.engines.engine import open_engine  # noqa: E402
from mgg_edge.runtime.engines.onnxruntime_cuda import open_onnxruntime_cuda  # noqa: E402
from mgg_edge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine  # noqa: E402
from mgg_edge.runtime.engines.self_test import half_limits, self_test  # noqa: E402
from vit import frames, small_step  # noqa: E402

pytestmark = pytest.mark.torch
FLOAT = onnx.TensorProto.FLOAT
HALF_ELEMENTS = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
# Relative, of logits and of the gradient: half the unit in the last place is 5e-4 and 4e-3.
STRAY = {"float16": 1e-2, "bfloat16": 1e-1}


def values(step, traced, batch):
    found = {"frames": batch, **step.initial_state(), **step.constants()}
    return [found[name] for name in traced.inputs]


def run(traced, inputs):
    with torch.no_grad():
        return dict(zip(traced.outputs, traced.module(*inputs), strict=True))


def distance(found, exact):
    return float((found - exact).norm() / exact.norm())


def export(path, rule="adam", **options):
    labels = [f"class {index}" for index in range(10)]
    settings = {"adapt_batch": 4, "labels": labels, "origins": Origins("r", "u", "s"), "parity_steps": 5, **options}
    return export_bundle(small_step(rule), path, **settings)


@pytest.mark.parametrize("precision", HALF_TYPES)
def test_products_stray_a_little_and_the_graph_given_stays_as_it_is(precision):
    step = small_step("sgd0")
    traced = trace_adapt(step, 4)
    inputs, before = values(step, traced, frames(4)), str(traced.module.graph)
    exact = run(traced, inputs)
    found = run(halve(traced, HALF_TYPES[precision]), inputs)
    assert str(traced.module.graph) == before
    assert {value.dtype for value in found.values()} == {torch.float32}
    for name in ("logits", "gradient_norm"):
        assert 1e-6 < distance(found[name], exact[name]) < STRAY[precision], name
    moved = [one["theta_out"] - step.backbone.theta() for one in (found, exact)]
    assert 1e-5 < distance(*moved) < STRAY[precision]


def test_both_directions_are_halved_and_the_rule_is_not():
    for rule in RULES:
        step = small_step(rule)
        traced = trace_adapt(step, 4)
        chosen = set(products(traced))
        forward = products(trace_infer(step, 4))
        assert len(chosen) >= len(forward) * (2 if step.rule.needs_gradient else 1)
        learned = {f"rule.{name}" for name, _ in step.rule.named_parameters()}
        placeholders = [node for node in traced.module.graph.nodes if node.op == "placeholder"]
        own = {node for name, node in zip(traced.inputs, placeholders, strict=True) if name in learned}
        reached = set()
        for node in traced.module.graph.nodes:
            if own.intersection(node.all_input_nodes) or reached.intersection(node.all_input_nodes):
                reached.add(node)
        assert not reached & chosen, rule
        assert bool(reached) == bool(learned)


def convolutional_step():
    backbone = Backbone.create("resnet18", seed=0, img_size=32, num_classes=10, norm_statistics="source")
    step = small_step("sgd0")
    statistics = dataclasses.replace(
        step.statistics, mean=torch.zeros(backbone.features), std=torch.ones(backbone.features)
    )
    return dataclasses.replace(step, backbone=backbone, statistics=statistics)


def test_convolutions_and_their_input_gradients():
    step = convolutional_step()
    traced = trace_adapt(step, 2)
    inputs = values(step, traced, frames(2))
    found, exact = run(halve(traced, torch.bfloat16), inputs), run(traced, inputs)
    for name in ("logits", "gradient_norm"):
        assert 1e-6 < distance(found[name], exact[name]) < STRAY["bfloat16"], name


def test_small_gradients_vanish_in_float16_unless_the_loss_is_scaled():
    tiny = dataclasses.replace(small_step("sgd0"), objective=Objective(1e-6, 1e-6))
    traced = trace_adapt(tiny, 4)
    inputs = values(tiny, traced, frames(4))
    scale = choose_loss_scale(traced, inputs)
    assert scale > 2**10
    assert np.log2(scale) == int(np.log2(scale))
    exact = run(traced, inputs)["gradient_norm"]
    scaled = run(halve(trace_adapt(dataclasses.replace(tiny, loss_scale=scale), 4), torch.float16), inputs)
    assert distance(scaled["gradient_norm"], exact) < STRAY["float16"]
    assert distance(run(halve(traced, torch.float16), inputs)["gradient_norm"], exact) > 10 * STRAY["float16"]


def test_the_scale_leaves_the_step_as_it_is_in_float32():
    step = small_step("adam")
    scaled = dataclasses.replace(step, loss_scale=2.0**12)
    outputs = [one.adapt(frames(4), one.initial_state(), one.constants()) for one in (step, scaled)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    torch.testing.assert_close(outputs[0].gradient_norm, outputs[1].gradient_norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(outputs[0].state["m"], outputs[1].state["m"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("rule", ["adam", "forward"])
def test_a_rule_without_a_gradient_has_nothing_to_scale(rule):
    step = small_step(rule)
    traced = trace_adapt(step, 4)
    assert (choose_loss_scale(traced, values(step, traced, frames(4))) == 1.0) == (rule == "forward")


@pytest.mark.parametrize("precision", HALF_TYPES)
def test_a_bundle_has_half_products_for_gpus_and_single_ones_for_the_processor(tmp_path, precision):
    manifest = export(tmp_path / "x.mgg", precision=precision)
    bundle = Bundle.load(tmp_path / "x.mgg")
    assert (bundle.manifest.precision, manifest.precision) == (precision, precision)
    assert {row.quantity for row in manifest.half_parity.rows} == {"logits", "update", "memory"}
    assert all(row.engine < 3 * STRAY[precision] for row in manifest.half_parity.rows if row.quantity == "logits")
    for graph in ("infer", "adapt"):
        assert multiplied(bundle, graph, "onnxruntime") == {FLOAT}
        assert HALF_ELEMENTS[precision] in multiplied(bundle, graph, "tensorrt")
    plain = export(tmp_path / "plain.mgg")
    assert (plain.precision, plain.half_parity) == ("float32", None)
    assert multiplied(Bundle.load(tmp_path / "plain.mgg"), "adapt", "tensorrt") == {FLOAT}


def test_openvino_multiplies_in_bfloat16_where_bundle_and_processor_say_so(tmp_path, monkeypatch):
    openvino = pytest.importorskip("openvino", reason="the engine needs the extra openvino")
    export(tmp_path / "x.mgg", "mgg", precision="bfloat16")
    export(tmp_path / "plain.mgg", "mgg")
    bundle, plain = (Bundle.load(tmp_path / name) for name in ("x.mgg", "plain.mgg"))
    assert open_engine(plain, "openvino", threads=1).name.startswith("openvino-cpu")
    assert half_limits(bundle.manifest, "openvino-cpu 2026.4.1") == {}
    with monkeypatch.context() as patch:
        patch.setattr(openvino_engine, "BF16", "no such capability")
        engine = open_engine(bundle, "openvino", threads=1)
        assert "bfloat16" not in engine.name
        assert self_test(bundle, engine).infer_logits < 1e-5
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no products in bfloat16")
    monkeypatch.setattr(settling, "has_batch_norm", lambda _bundle: True)
    half = open_engine(bundle, "openvino", threads=1)
    assert half.name.endswith(" bfloat16")
    found = self_test(bundle, half)
    assert found.passed
    limits = half_limits(bundle.manifest, half.name)
    assert (found.logits_limit, found.update_limit) == (limits["logits_limit"], limits["update_limit"])
    assert 1e-5 < found.infer_logits < limits["logits_limit"]  # products alone: most of the rounding
    assert 1e-5 < found.settled_logits < limits["logits_limit"]
    assert 1e-5 < found.update < limits["update_limit"]
    half.load_state(bundle.initial_state)
    half.adapt(frames(4, seed=1).numpy())
    moved = np.abs(half.candidate["theta"] - bundle.initial_state["theta"])
    assert 5e-4 < moved.max() < 2e-3  # θ itself is float32: near 1 bfloat16 knows no step below 4e-3


def multiplied(bundle, graph, lowering):
    """Element types of what matrix products and convolutions of a graph give."""
    member = graph_name(graph, lowering)
    data = embed_weights(bundle.graphs[member], bundle.weights, bundle.references[member])
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    kinds = ("MatMul", "Gemm", "Conv", "ConvTranspose")
    return {types[node.output[0]] for node in model.graph.node if node.op_type in kinds if node.output[0] in types}


def test_a_step_that_overflows_is_refused(tmp_path, monkeypatch):
    step = dataclasses.replace(small_step("sgd0"), objective=Objective(1e6, 1e6))
    monkeypatch.setattr("test_half_precision.small_step", lambda rule: step)
    with pytest.raises(ParityError, match="the step in float16 is not finite after 1 steps; use float32"):
        export(tmp_path / "x.mgg", precision="float16")
    assert list(tmp_path.iterdir()) == []
    export(tmp_path / "x.mgg", precision="bfloat16")


def test_other_precisions_are_refused(tmp_path):
    with pytest.raises(UsageError, match="precision: expected one of float32, float16, bfloat16, found 'int8'"):
        export(tmp_path / "x.mgg", precision="int8")
    manifest = export(tmp_path / "x.mgg")
    assert b'"precision"' not in manifest.to_json()  # as bundles that were written before it
    wrong = manifest.replace(precision="float16").to_json().replace(b'"float16"', b'"int8"')
    with pytest.raises(ManifestError, match="precision: expected one of float32, float16, bfloat16"):
        Manifest.from_json(wrong)


def test_onnx_runtime_on_a_gpu_takes_the_graph_in_half_precision(tmp_path):
    export(tmp_path / "x.mgg", "sgd", precision="float16")
    bundle = Bundle.load(tmp_path / "x.mgg")
    runtime = FakeCuda()
    gpu = open_onnxruntime_cuda(bundle, ort=GpuOnnxRuntime(runtime), cuda=Cuda(runtime, tmp_path))
    processor = OnnxRuntimeEngine(bundle)
    batch = frames(4).numpy()
    found, exact = (engine.adapt(batch)[0] for engine in (gpu, processor))
    assert 1e-6 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < STRAY["float16"]
    gpu.close()
    processor.close()
