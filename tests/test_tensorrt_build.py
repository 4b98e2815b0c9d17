"""TensorRT parses and builds the TensorRT lowering. No GPU is needed: the target's compute capability is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")
pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)

from mgg_edge.cli.main import main  # noqa: E402
from mgg_edge.container import graph_name  # noqa: E402
from mgg_edge.errors import EngineError, MissingDependencyError, UsageError  # noqa: E402
from mgg_edge.export import Origins, export_bundle  # noqa: E402
from mgg_edge.learn.rules.files import RULES  # noqa: E402
from mgg_edge.runtime.bundle.bundle import Bundle  # noqa: E402
from mgg_edge.runtime.bundle.graphs import embed_weights  # noqa: E402
from mgg_edge.runtime.engines import cuda, tensorrt_build, tensorrt_plans  # noqa: E402
from mgg_edge.runtime.engines.engine_cache import CACHE_VARIABLE, EngineCache  # noqa: E402
from mgg_edge.runtime.engines.tensorrt_build import BuildOptions, build_plan, parse_graph  # noqa: E402
from mgg_edge.runtime.engines.tensorrt_import import import_tensorrt  # noqa: E402
from mgg_edge.runtime.engines.tensorrt_plans import build_engines, explain, parse_engine, plan_key  # noqa: E402
from vit import small_step  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.tensorrt]
TWO_TARGETS = "tensorrt:sm86,sm120"


def export(path, rule="mgg", seed=0, precision="float32"):
    labels = [f"class {index}" for index in range(10)]
    origins = Origins("r", "u", "s")
    settings = {"adapt_batch": 4, "labels": labels, "origins": origins, "parity_steps": 5, "precision": precision}
    export_bundle(small_step(rule, seed), path, **settings)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return export(tmp_path_factory.mktemp("small") / "x.mgg")


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


def model(bundle, graph, lowering="tensorrt"):
    member = graph_name(graph, lowering)
    return embed_weights(bundle.graphs[member], bundle.weights, bundle.references[member])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_builds_for_two_targets(tmp_path, cache, rule):
    plans = build_engines(export(tmp_path / "x.mgg", rule), parse_engine(TWO_TARGETS), BuildOptions(), cache)
    assert [plan.what.split(",")[0] for plan in plans] == ["infer", "adapt"] * 2
    assert len({plan.path for plan in plans}) == 4
    assert all(plan.built and len(plan.data) > 1000 for plan in plans)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_builds_for_two_targets(tmp_path, cache, precision):
    path = export(tmp_path / "x.mgg", "mgg+", precision=precision)
    assert len(build_engines(path, parse_engine(TWO_TARGETS), BuildOptions(), cache)) == 4
    library, bundle = import_tensorrt(), Bundle.load(path)
    _, network = parse_graph(library, model(bundle, "adapt"), "adapt")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    products = [layer for layer in layers if layer.type == library.module.LayerType.MATRIX_MULTIPLY]
    half = {"float16": library.module.DataType.HALF, "bfloat16": library.module.DataType.BF16}[precision]
    types = [layer.get_output(0).dtype for layer in products]
    assert set(types) == {half, library.module.DataType.FLOAT}
    assert types.count(half) > 2 * types.count(library.module.DataType.FLOAT)  # these are the rule's


def test_the_network_has_the_contracts_inputs_and_outputs(small):
    bundle = Bundle.load(small)
    _, network = parse_graph(import_tensorrt(), model(bundle, "adapt"), "adapt")
    names = [spec.name for spec in bundle.manifest.state]
    assert [network.get_input(index).name for index in range(network.num_inputs)] == ["frames", *names]
    outputs = [network.get_output(index).name for index in range(network.num_outputs)]
    assert outputs[0] == "logits"
    assert outputs[-len(names) :] == [f"{name}_out" for name in names]


def test_a_plan_is_built_once(small, cache):
    stages = []
    aim = parse_engine("tensorrt:sm86")
    first = build_engines(small, aim, BuildOptions(), cache, lambda *stage: stages.append(stage))
    assert [plan.built for plan in first] == [True, True]
    assert {stage.partition(":")[0] for stage, _, _ in stages} == {"infer for sm86", "adapt for sm86"}
    assert any(done == total > 0 for _, done, total in stages)
    again = build_engines(small, aim, BuildOptions(), cache)
    assert [plan.built for plan in again] == [False, False]
    assert [plan.data for plan in again] == [plan.data for plan in first]


def test_equal_graphs_with_other_weights_share_no_engine(small, tmp_path, cache):
    other = export(tmp_path / "other.mgg", seed=1)
    aim = parse_engine("tensorrt:sm86")
    keys = [
        plan_key(Bundle.load(path), "adapt", aim.library, aim.devices[0], BuildOptions()) for path in (small, other)
    ]
    assert keys[0].graph_sha256 == keys[1].graph_sha256
    assert keys[0].weights_sha256 != keys[1].weights_sha256
    build_engines(small, aim, BuildOptions(), cache)
    assert all(plan.built for plan in build_engines(other, aim, BuildOptions(), cache))
    assert len(cache.entries()) == 4


def test_options_are_part_of_the_key_and_reach_the_build(small, cache):
    aim = parse_engine("tensorrt:sm86")
    build_engines(small, aim, BuildOptions(), cache)
    assert all(plan.built for plan in build_engines(small, aim, BuildOptions(workspace_mib=64, level=0), cache))
    for options in ({"workspace_mib": 0}, {"level": 6}, {"level": -1}):
        with pytest.raises(UsageError, match="expected"):
            BuildOptions(**options)


def test_why_names_what_differs(small, cache):
    assert explain(small, "sm86", cache)["adapt"] == "to be built: there is no engine yet"
    build_engines(small, parse_engine("tensorrt:sm86"), BuildOptions(), cache)
    assert explain(small, "sm86", cache)["adapt"].startswith("found, ")
    assert explain(small, "sm89", cache)["adapt"].startswith("to be built: capability: sm86 → sm89 (against ")


@pytest.mark.parametrize("text", ["cuda", "tensorrt:", "tensorrt:86", "tensorrt:sm86,sm86", "tensorrt:sm86;sm89", ""])
def test_other_words_are_refused(text):
    with pytest.raises(UsageError, match=r"expected tensorrt, or compute capabilities as in tensorrt:sm86,sm89"):
        parse_engine(text)


def test_a_target_that_cannot_be_built_for_is_refused_before_the_export(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(
            ["export", "--backbone", "vit_tiny_patch16_224", "--out", str(tmp_path / "x.mgg"), "--engine",
             "tensorrt:sm30"]
        )  # fmt: skip
    assert ended.value.code == 2
    assert "builds ahead of time for sm75, sm80, sm86" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_a_target_must_be_named(monkeypatch):
    def nothing(*_arguments):
        raise MissingDependencyError("engine: expected a CUDA device, found none")

    monkeypatch.setattr(cuda, "Cuda", nothing)
    with pytest.raises(MissingDependencyError, match="found none; name the target's compute capability"):
        parse_engine("tensorrt")


def test_a_graph_that_is_refused_names_the_reason(small):
    library, bundle = import_tensorrt(), Bundle.load(small)
    with pytest.raises(EngineError, match=r"x: tensorrt-rtx .* refuses the graph: .*LayerNormalization"):
        build_plan(library, model(bundle, "adapt", "onnxruntime"), "x", BuildOptions(), target="sm86")


def test_a_build_that_the_memory_cannot_hold_is_refused(small, tmp_path, monkeypatch, cache):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9999999 kB\nMemAvailable:    204800 kB\n")
    with pytest.raises(EngineError, match="expected about 704 MiB of free memory to build, found 200"):
        tensorrt_build.check_memory(1 << 20, "x", meminfo)
    meminfo.write_text("MemAvailable: 2048000 kB\n")
    tensorrt_build.check_memory(1 << 20, "x", meminfo)
    tensorrt_build.check_memory(1 << 20, "x", Path("/nowhere"))

    def refuse(*_arguments):
        raise EngineError("too little")

    monkeypatch.setattr(tensorrt_build, "check_memory", refuse)
    with pytest.raises(EngineError, match="too little"):
        build_engines(small, parse_engine("tensorrt:sm86"), BuildOptions(), cache)
    assert cache.entries() == ()


def test_the_commands(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "engines"))

    def said(*words):
        with pytest.raises(SystemExit) as ended:
            main(["engines", *words])
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    assert json.loads(said("list", "--json"))["engines"] == []
    built = build_engines(small, parse_engine("tensorrt:sm86"), BuildOptions())
    listed = json.loads(said("list", "--json"))["engines"]
    assert {row["engine"] for row in listed} == {str(plan.path) for plan in built}
    assert "2 engines" in said("list")
    assert json.loads(said("why", str(small), "--target", "sm86", "--json"))["infer"].startswith("found")
    moved = built[0].path.rename(tmp_path / "moved.engine")
    assert said("add", str(moved)).strip() == str(built[0].path)
    assert "2 files deleted" in said("clear")
    assert tensorrt_plans.EngineCache(tmp_path / "engines").entries() == ()


def test_export_names_the_engines_it_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "engines"))
    words = ["--weights", "random", "--image-size", "32", "--classes", "4", "--batch", "2", "--parity-steps", "5"]
    for extra in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(
                ["export", "--backbone", "vit_tiny_patch16_224", *words, "--out", str(tmp_path / "x.mgg"), "--engine",
                 "tensorrt:sm86", *extra]
            )  # fmt: skip
        assert ended.value.code in (0, None)
        out = capsys.readouterr().out
        named = json.loads(out)["engines"] if extra else out.splitlines()[-2:]
        paths = [line["engine"] if extra else line.partition(": ")[0] for line in named]
        assert len(paths) == 2
        assert all(Path(path).is_file() for path in paths)
