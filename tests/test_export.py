"""From a step to a bundle: graphs, lint, parity and the file itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

import onnx  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

import mgg_edge.export.parity as parity_module  # noqa: E402
from mgg_edge.container import read_container  # noqa: E402
from mgg_edge.errors import ParityError, SinkError, UnsupportedError, UsageError  # noqa: E402
from mgg_edge.export import Origins, export_bundle  # noqa: E402
from mgg_edge.export import bundle as bundle_module  # noqa: E402
from mgg_edge.export.graphs import build_graphs  # noqa: E402
from mgg_edge.export.parity import Parity, check_parity  # noqa: E402
from mgg_edge.export.tensorrt_lint import lint_tensorrt  # noqa: E402
from mgg_edge.manifest import ParityInfo, ParityRow  # noqa: E402
from mgg_edge.runtime.bundle.bundle import Bundle  # noqa: E402
from mgg_edge.runtime.bundle.graphs import embed_weights, read_graph  # noqa: E402
from mgg_edge.runtime.engines.engine import open_engine  # noqa: E402
from vit import frames, small_step  # noqa: E402

pytestmark = pytest.mark.torch

LABELS = tuple(f"class {index}" for index in range(10))
ORIGINS = Origins("random:0", "untrained:0", "synthetic")


def export(path, rule="mgg", **options):
    settings = {"adapt_batch": 4, "labels": LABELS, "origins": ORIGINS, "parity_steps": 20, **options}
    return export_bundle(small_step(rule), path, **settings)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "small.mgg"
    export(path)
    return Bundle.load(path)


# Parity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mgg", "adam", "sgd", "sgd0"])
def test_every_rule_exports_with_parity(tmp_path, rule):
    manifest = export(tmp_path / "x.mgg", rule)
    assert manifest.rule.name == rule.removesuffix("0")
    assert manifest.parity.steps == 20
    assert {row.step for row in manifest.parity.rows} == {1, 5, 20}
    quantities = {row.quantity for row in manifest.parity.rows}
    assert quantities == ({"logits", "update"} if rule == "sgd0" else {"logits", "update", "memory"})
    check_parity(Parity(manifest.parity, 0.0))


def info(engine=1e-5, torch_float32=1e-5, logits_max=1e-5, torch_logits_max=1e-5):
    return Parity(ParityInfo("test", 5, logits_max, (ParityRow(5, "update", torch_float32, engine),)), torch_logits_max)


def test_parity_bounds(caplog):
    check_parity(info(engine=2e-5))
    check_parity(info(engine=7e-6, torch_float32=0.0))  # ordinary rounding
    check_parity(info(engine=1.9e-3, torch_float32=2e-4))  # parted trajectories
    for strayed in (info(engine=2.1e-3, torch_float32=2e-4), info(engine=2.1e-4, torch_float32=1e-4)):
        with pytest.raises(ParityError, match="after 5 steps the update"):
            check_parity(strayed)
    for strayed in (info(engine=2.1e-5), info(engine=float("nan")), info(engine=8e-6, torch_float32=0.0)):
        with pytest.raises(ParityError, match="after 5 steps the update"):
            check_parity(strayed)
    for logits_max in (1.1e-3, float("nan")):
        with pytest.raises(ParityError, match="a logit of test"):
            check_parity(info(logits_max=logits_max))
    check_parity(info(logits_max=5.9e-3, torch_logits_max=3e-3))  # any float32 strays as far: said, not refused
    assert "the step is ill-conditioned: its logits stray 5.9e-03" in caplog.text
    for torch_logits_max in (3e-3, float("nan")):
        with pytest.raises(ParityError, match=r"a logit of test is 6.*PyTorch float32"):
            check_parity(info(logits_max=6.1e-3, torch_logits_max=torch_logits_max))


def parity_rows(update, memory=1e-6):
    """The rows of a step whose update and memory of 2,000 scalars the engine gets wrong by `update` and `memory`."""
    ones = np.ones(2000)
    exact, single = (parity_module._Snapshot(ones, ones * scale, ones * scale) for scale in (1, 1 + 1e-6))
    return parity_module._rows(1, exact, single, parity_module._Snapshot(ones, ones + update, ones + memory))


def test_two_scalars_in_two_thousand_do_not_decide_on_the_update():
    stray = np.full(2000, 1e-6)
    stray[[3, 700]] = 0.5
    check_parity(Parity(ParityInfo("test", 1, 0.0, tuple(parity_rows(stray))), 0.0))
    for wrong in ({"update": np.where(np.arange(2000) < 3, 0.5, 1e-6)}, {"update": 1e-6, "memory": stray}):
        with pytest.raises(ParityError):
            check_parity(Parity(ParityInfo("test", 1, 0.0, tuple(parity_rows(**wrong))), 0.0))
    stray[3] = np.nan
    with pytest.raises(ParityError, match="update of test is nan"):
        check_parity(Parity(ParityInfo("test", 1, 0.0, tuple(parity_rows(stray))), 0.0))


def scale_constant(model, old, new):
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.shape == () and array.dtype == np.float32 and np.isclose(array, old, rtol=1e-6, atol=0):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(new), tensor.name))
            return
    raise AssertionError(f"no constant {old} in the graph")


def drop_rule_term(model):
    (gate,) = [node for node in model.graph.node if node.op_type == "Sigmoid"]
    gate.op_type = "Tanh"


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda graph: scale_constant(graph, 0.9, 0.9001),
        lambda graph: scale_constant(graph, 1e-6, 1e-3),
        drop_rule_term,
    ],
    ids=["moment-decay", "memory-norm-epsilon", "rate-gate"],
)
def test_a_slightly_wrong_step_is_refused_and_nothing_is_written(tmp_path, monkeypatch, corrupt):
    def build(*arguments):
        graphs = build_graphs(*arguments)
        corrupt(graphs.models["adapt.onnxruntime.onnx"])
        return graphs

    monkeypatch.setattr(bundle_module, "build_graphs", build)
    with pytest.raises(ParityError):
        export(tmp_path / "x.mgg")
    assert list(tmp_path.iterdir()) == []


def test_the_float64_reference_is_not_float32_in_disguise():
    step = small_step()
    batch = frames(4)
    exact = parity_module._TorchRunner(step, torch.float64)(batch)
    single = parity_module._TorchRunner(step, torch.float32)(batch)
    assert 1e-9 < np.abs(exact.logits - single.logits).max() < 1e-4


# The file --------------------------------------------------------------------------------------------------


def test_bundle_opens_and_its_self_test_holds(bundle):
    engine = open_engine(bundle, "cpu")
    test = bundle.self_test
    logits, _ = engine.infer(test["frames"][: bundle.manifest.infer_batch])
    np.testing.assert_allclose(logits, test["infer.logits"], rtol=1e-4, atol=1e-5)
    logits, _ = engine.adapt(test["frames"][: bundle.manifest.adapt_batch])
    np.testing.assert_allclose(logits, test["adapt.logits"], rtol=1e-4, atol=1e-5)
    source = bundle.initial_state["theta"]
    expected, update = test["adapt.theta"] - source, engine.candidate["theta"] - source
    assert np.linalg.norm(update - expected) <= 1e-3 * np.linalg.norm(expected)
    engine.close()


def test_graphs_hold_no_weights(bundle):
    for name, data in bundle.graphs.items():
        model = onnx.load_from_string(data)
        assert max((np.prod(tensor.dims) for tensor in model.graph.initializer), default=0) <= 64, name
        assert len(data) < 200_000


@pytest.mark.parametrize("lowering", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("graph", ["infer", "adapt"])
def test_graphs_with_weights_are_valid_onnx(bundle, graph, lowering):
    data = bundle.graphs[f"{graph}.{lowering}.onnx"]
    names = read_graph(data, "graph").free_names
    assert names <= set(bundle.weights)
    onnx.checker.check_model(onnx.load_from_string(embed_weights(data, bundle.weights, names)), full_check=True)


def test_weights_are_stored_once_and_only_those_used_beside_the_statistics(bundle):
    used = set().union(*(read_graph(data, name).free_names for name, data in bundle.graphs.items()))
    # The statistics always: the run time measures drift by them, and calibration replaces them.
    assert set(bundle.weights) == used | {f"statistics.{name}" for name in ("mean", "std", "clean_discrepancy")}


def test_export_is_reproducible(tmp_path):
    for name in ("a.mgg", "b.mgg"):
        export(tmp_path / name, parity_steps=1)
    first, second = (read_container(tmp_path / name)[1] for name in ("a.mgg", "b.mgg"))
    assert first == second


def test_progress_reports_every_stage(tmp_path):
    seen = []
    export(tmp_path / "x.mgg", parity_steps=2, progress=lambda *event: seen.append(event))
    assert ("trace and lower", 1, 1) in seen
    assert ("parity", 2, 2) in seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt_batch": 1}, "adapt batch ≥ 2"),
        ({"infer_batch": 0}, "infer batch ≥ 1"),
        ({"parity_steps": 0}, "parity steps ≥ 1"),
        ({"labels": ("a", "b")}, "expected 10 names, found 2"),
    ],
)
def test_arguments_out_of_range(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        export(tmp_path / "x.mgg", **options)


def test_missing_directory(tmp_path):
    with pytest.raises(SinkError, match="cannot write here: No such file or directory"):
        export(tmp_path / "missing" / "x.mgg")


# Lint ------------------------------------------------------------------------------------------------------


def model_of(node, initialisers=()):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    return helper.make_model(helper.make_graph([node], "g", [x], [], list(initialisers)))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("LayerNormalization", ["x", "w"], ["y", "mean"]), "more than one output"),
        (helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2]), "more than one output"),
        (helper.make_node("BatchNormalization", ["x"] * 5, ["y"], training_mode=1), "training mode"),
        (helper.make_node("ScatterND", ["x", "i", "u"], ["y"], reduction="add"), "a reduction"),
        (helper.make_node("ReduceSum", ["x", "axes"], ["y"]), "axes must be an initialiser.*'axes'"),
        (helper.make_node("Cast", ["x"], ["y"], to=TensorProto.DOUBLE), "float64"),
        (helper.make_node("Col2Im", ["x"], ["y"]), "no TensorRT layer"),
        (helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"), "domain 'com.microsoft'"),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)
def test_lint_names_what_tensorrt_refuses(node, message):
    import re

    problems = lint_tensorrt(model_of(node))
    assert len(problems) == 1
    assert re.search(message, problems[0])
    assert f"{node.op_type} producing 'y'" in problems[0]


def test_lint_passes_what_tensorrt_takes():
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [0])
    assert lint_tensorrt(model_of(helper.make_node("ReduceSum", ["x", "axes"], ["y"]), [axes])) == []
    assert lint_tensorrt(model_of(helper.make_node("LayerNormalization", ["x", "w"], ["y"]))) == []


def test_lint_names_float64_values():
    doubles = helper.make_tensor("c", TensorProto.DOUBLE, [1], [0.5])
    assert lint_tensorrt(model_of(helper.make_node("Relu", ["x"], ["y"]), [doubles])) == [
        "value 'c': float64 is not supported"
    ]


def test_the_onnxruntime_lowering_is_what_tensorrt_would_refuse(bundle):
    problems = lint_tensorrt(onnx.load_from_string(bundle.graphs["adapt.onnxruntime.onnx"]))
    assert problems
    assert "LayerNormalization" in problems[0]
    assert lint_tensorrt(onnx.load_from_string(bundle.graphs["adapt.tensorrt.onnx"])) == []


def test_a_lowering_tensorrt_cannot_take_stops_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "lint_tensorrt", lambda _model: ["Col2Im producing 'v1': has no TensorRT layer"])
    with pytest.raises(UnsupportedError, match="Col2Im producing 'v1'"):
        export(tmp_path / "x.mgg")
    assert list(tmp_path.iterdir()) == []


def test_rule_settings_reach_the_manifest(tmp_path):
    step = dataclasses.replace(small_step("adam"), learning_rate=3e-4)
    manifest = export_bundle(step, tmp_path / "x.mgg", adapt_batch=2, labels=LABELS, origins=ORIGINS, parity_steps=1)
    assert manifest.rule.learning_rate == 3e-4
    assert manifest.rule.options == {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    assert manifest.adapt_batch == 2
