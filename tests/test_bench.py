"""`mgg-edge bench`: every figure is there, and nothing is fast because it is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import toy
from mgg_edge.cli import main as cli
from mgg_edge.errors import ParityError, UsageError
from mgg_edge.runtime import Bundle, open_engine
from mgg_edge.runtime import bench as costs
from mgg_edge.runtime.engines import settling
from mgg_edge.runtime.sources.source_synthetic import SyntheticOptions

KEYS = {
    "forward_ms", "settled_forward_ms", "plain_forward_ms", "step_ms", "step_over_forward", "floor", "verification_ms",
    "peak_rss_mb", "engine", "batch", "threads", "frames_per_s", "p50_ms", "p95_ms", "p99_ms", "cold_start_ms",
    "open_ms", "swap_p99_ratio",
}  # fmt: skip


def write_plain(path: Path, head: float = 1.0, pixels: str = "images") -> Path:
    """The toy as its user had it, without mgg-edge; `head` scales the logits."""
    weights = {name.removeprefix("backbone."): array for name, array in toy.weights().items()}
    constants = {
        "projection": weights["projection"],
        "projection_bias": weights["projection_bias"],
        "head": weights["head"] * np.float32(head),
        "head_bias": weights["head_bias"] * np.float32(head),
        "gamma": np.ones(toy.FEATURES, np.float32),
        "beta": np.zeros(toy.FEATURES, np.float32),
        "shape": np.array([1, toy.EDGE * toy.EDGE * 3]),
    }
    nodes = [
        helper.make_node("Transpose", [pixels], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["last", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "projection"], ["product"]),
        helper.make_node("Add", ["product", "projection_bias"], ["hidden"]),
        helper.make_node("LayerNormalization", ["hidden", "gamma", "beta"], ["features"], epsilon=toy.EPSILON),
        helper.make_node("MatMul", ["features", "head"], ["scores"]),
        helper.make_node("Add", ["scores", "head_bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "plain",
        [helper.make_tensor_value_info(pixels, TensorProto.FLOAT, [1, 3, toy.EDGE, toy.EDGE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, toy.CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def run(capfd, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--rounds", "3", "--threads", "1", "--source", "synthetic:frames=40", *map(str, words)])
    out, err = capfd.readouterr()
    return ended.value.code or 0, out, err


def test_every_figure_is_there(capfd, toy_bundle: Path, tmp_path: Path):
    plain = write_plain(tmp_path / "plain.onnx")
    code, out, _ = run(capfd, "--bundle", toy_bundle, "--against", plain, "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found) >= KEYS
    for key in ("forward_ms", "settled_forward_ms", "plain_forward_ms", "step_ms", "frames_per_s", "p50_ms"):
        assert found[key] > 0
    assert found["forward_ms"] >= found["forward_ms_min"]
    assert 0 < found["open_ms"] < found["cold_start_ms"]
    assert 20 < found["peak_rss_mb"] < 400  # Python with numpy and ONNX Runtime; this process is larger
    assert (found["batch"], found["adapt_batch"], found["threads"], found["rule"]) == (1, toy.BATCH, 1, "sgd")
    assert (found["floor"], found["swap_p99_ratio"]) == (None, None)  # no such model to build; nothing to fold


def test_a_person_gets_a_table_with_ratios(capfd, toy_bundle: Path, tmp_path: Path):
    code, out, _ = run(capfd, "--bundle", toy_bundle, "--against", write_plain(tmp_path / "plain.onnx"))
    assert code == 0
    for words in ("model in plain ONNX Runtime", "× plain", "frames/s", "first prediction after", "MB at most"):
        assert words in out


def test_without_a_plain_file_there_is_nothing_to_compare(capfd, toy_bundle: Path):
    code, out, _ = run(capfd, "--bundle", toy_bundle)
    assert code == 0
    assert "plain" not in out


def test_a_plain_file_of_another_model_is_no_comparison(capfd, toy_bundle: Path, tmp_path: Path):
    code, _, err = run(capfd, "--bundle", toy_bundle, "--against", write_plain(tmp_path / "plain.onnx", head=1.01))
    assert code == ParityError.exit_code
    assert "logits of 'plain' are" in err


@pytest.mark.parametrize("case", ["missing", "not-onnx", "bytes"])
def test_a_plain_file_that_is_none_is_refused_in_one_line(capfd, toy_bundle: Path, tmp_path: Path, case: str):
    path = tmp_path / "plain.onnx"
    if case == "not-onnx":
        path.write_bytes(b"no model")
    elif case == "bytes":
        path.write_bytes(toy.infer_model().SerializeToString())
    code, _, err = run(capfd, "--bundle", toy_bundle, "--against", path)
    assert code == (UsageError.exit_code if case == "missing" else code)
    assert code != 0
    assert err.splitlines()[-1].startswith(f"error: {path}: ")


def test_what_is_folded_is_measured_and_compared(loaded_toy: Bundle, monkeypatch):
    monkeypatch.setattr(settling, "has_batch_norm", lambda _bundle: True)
    engine = open_engine(loaded_toy, "cpu", threads=1)
    found = costs.inference_costs(loaded_toy, engine, 1, rounds=3)
    assert set(found) == {"forward", "settled", "settled_features"}
    alone, beside = costs.swap_cost(loaded_toy, engine, 20)
    assert alone > 0 < beside
    real = settling.SettledInference.__call__
    wrong = lambda self, frames: tuple(1.01 * part for part in real(self, frames))  # noqa: E731
    monkeypatch.setattr(settling.SettledInference, "__call__", wrong)
    with pytest.raises(ParityError, match="logits of 'settled'"):
        costs.inference_costs(loaded_toy, engine, 1, rounds=3)
    engine.close()


def test_a_film_that_fails_ends_the_bench(loaded_toy: Bundle):
    engine = open_engine(loaded_toy, "cpu", threads=1)
    assert SyntheticOptions().frames == 0  # without a limit it would never end
    with pytest.raises(UsageError, match="no such"):
        costs.film_cost(loaded_toy, engine, "nowhere.mp4", 10)
