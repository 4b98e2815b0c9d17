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
from mgg_edge.export.parity_runs import Said, TorchRun  # noqa: E402
from mgg_edge.export.tensorrt_lint import lint_tensorrt  # noqa: E402
from mgg_edge.manifest import ParityInfo, ParityJudgement  # noqa: E402
from mgg_edge.norms import NormLayout, NormParameter  # noqa: E402
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
    judged = {found.quantity for found in manifest.parity.judged}
    assert judged >= {"logits", "loss", "update", "logits of inference", "features"}
    assert judged >= {"adam": {"m", "v"}, "mgg": {"m", "v", "memory", "memory_bias"}, "sgd": {"momentum"}}.get(
        rule, set()
    )
    check_parity(Parity(manifest.parity))


def judged(engine=1e-5, torch_float32=1e-5, quantity="update"):
    return Parity(ParityInfo("test", 50, 0.0, (), (ParityJudgement(quantity, torch_float32, engine),)))


def test_parity_bounds(caplog):
    check_parity(judged(engine=4e-5))
    check_parity(judged(engine=1.5e-5, torch_float32=0.0))  # ordinary rounding
    for strayed in (judged(engine=4.1e-5), judged(engine=float("nan")), judged(engine=1.6e-5, torch_float32=0.0)):
        with pytest.raises(ParityError, match="the update of test after one step is"):
            check_parity(strayed)
    assert not caplog.text


def test_kinks_at_most_steps_decide_nothing_and_an_error_at_every_step_does():
    kinks = np.where(np.arange(20) % 4 > 0, 1e-3, 1e-5)  # at three of four steps of the engine, at half of PyTorch's
    ours = np.where(np.arange(20) % 2 > 0, 1e-3, 1e-5)
    ours[1] = 1e-5
    (found,) = parity_module._judgements({"m": list(zip(ours, kinks, strict=True))})
    assert found == ParityJudgement("m", 1e-5, 1e-5)
    (found,) = parity_module._judgements({"m": list(zip(ours, kinks + 1e-4, strict=True))})
    with pytest.raises(ParityError, match=r"is 1\.10e-04 from float64, expected at most 4\.00e-05"):
        check_parity(Parity(ParityInfo("test", 20, 0.0, (), (found,))))
    kinks[3] = np.nan
    (found,) = parity_module._judgements({"m": list(zip(ours, kinks, strict=True))})
    assert np.isnan(found.engine)


def test_a_step_that_no_float32_follows_is_said_not_refused(caplog):
    strayed = judged(engine=3e-3, torch_float32=3e-3, quantity="logits")
    check_parity(strayed)
    assert "PyTorch's own logits are 3.0e-03 from float64 after one step" in caplog.text
    assert "try --norm-statistics" not in caplog.text  # nothing moves here
    check_parity(strayed._replace(moves=True))
    assert "after one step; try --norm-statistics source" in caplog.text


def test_a_model_that_gives_no_numbers_is_refused_as_such(tmp_path, monkeypatch):
    computed = TorchRun.step

    def step(run, frames, state):
        said = computed(run, frames, state)
        return dataclasses.replace(said, logits=said.logits * np.nan) if run._dtype == torch.float64 else said

    monkeypatch.setattr(TorchRun, "step", step)
    with pytest.raises(ParityError, match="the step is not finite in PyTorch float64 either, at step 1"):
        export(tmp_path / "x.mgg")


def distances(wrong):
    """Of a step on 2,000 scalars with gradients from 1e-9 to 1, whose update the engine gets wrong by `wrong`."""
    norms = NormLayout((NormParameter("a", (1000,)), NormParameter("b", (1000,))))
    gradient = np.concatenate([np.logspace(-9, 0, 1000), np.full(1000, 1.0)])
    rounding = 1e-6 * np.random.default_rng(0).standard_normal(2000)
    begin = {"theta": np.ones(2000), "m": np.zeros(2000)}

    def said(noise, update):
        return Said(np.ones((1, 3)), 1.0, {"theta": 1 - update, "m": 0.1 * (gradient + noise)})

    exact = said(0, np.sign(gradient))
    single = said(rounding, np.sign(gradient) * (1 + 1e-6))
    found = parity_module._step_distances(begin, exact, single, said(rounding, np.sign(gradient) + wrong), norms)
    return found["update"][1], found["m"]


def test_where_the_gradient_is_rounding_the_update_is_not_looked_at():
    gradient = np.concatenate([np.logspace(-9, 0, 1000), np.full(1000, 1.0)])
    update, moment = distances(np.where(gradient < 1e-5, -2.0, 1e-6))
    assert update < 1e-5  # signs of what is nothing but rounding decide nothing
    assert moment[0] == moment[1] < 1e-5
    update, _ = distances(np.where(gradient > 0.99, 1e-3, 0))
    assert update > 5e-4


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
    runs = [TorchRun(step, dtype) for dtype in (torch.float64, torch.float32)]
    exact, single = (run.step(batch, run.initial()) for run in runs)
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
        export(tmp_path / name, parity_steps=5)
    first, second = (read_container(tmp_path / name)[1] for name in ("a.mgg", "b.mgg"))
    assert first == second


def test_progress_reports_every_stage(tmp_path):
    seen = []
    export(tmp_path / "x.mgg", parity_steps=5, progress=lambda *event: seen.append(event))
    assert ("trace and lower", 1, 1) in seen
    assert ("parity", 5, 5) in seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt_batch": 1}, "adapt batch ≥ 2"),
        ({"infer_batch": 0}, "infer batch ≥ 1"),
        ({"parity_steps": 4}, "parity steps ≥ 5"),
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
    manifest = export_bundle(step, tmp_path / "x.mgg", adapt_batch=2, labels=LABELS, origins=ORIGINS, parity_steps=5)
    assert manifest.rule.learning_rate == 3e-4
    assert manifest.rule.options == {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    assert manifest.adapt_batch == 2
