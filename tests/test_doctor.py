"""Facts about the machine, and a bundle's self-test."""

from __future__ import annotations

import importlib.metadata
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import toy
from mgg_edge.cli import main as cli
from mgg_edge.manifest import ParityInfo, ParityRow
from mgg_edge.runtime import Bundle, Engine, doctor
from mgg_edge.runtime.engines import self_test as self_tests
from mgg_edge.runtime.engines.self_test import SelfTest


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str], toy_bundle: Path) -> None:
    assert call("doctor", "--bundle", toy_bundle, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == []
    assert facts["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert "CPUExecutionProvider" in facts["providers"]
    assert facts["import_ms"] > 0
    assert facts["self_test"]["passed"] is True
    assert facts["self_test"]["update"] < 1e-4
    assert call("doctor", "--bundle", toy_bundle) == 0
    table = capsys.readouterr().out
    assert "the run time works here" in table
    assert "first update, relative L2" in table


def test_a_missing_engine_is_named_with_the_line_that_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert call("doctor", "--json") == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["providers"] == []
    assert err.startswith("error: onnxruntime cannot be imported")
    assert "pip install 'mgg-edge[cpu]'" in err


def test_a_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {**doctor.package_versions(), "av": None}
    monkeypatch.setattr(doctor, "package_versions", lambda: versions)
    assert "av is not installed: pip install av" in doctor.environment().problems


@pytest.mark.parametrize("name", ["infer.logits", "adapt.logits", "adapt.theta"])
def test_a_bundle_that_computes_something_else_here_fails(
    toy_parts: toy.Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def change(arrays: toy.Arrays) -> None:
        arrays[name] = arrays[name] + 0.01

    path = tmp_path / "other.mgg"
    path.write_bytes(toy.pack(toy_parts.with_tensors("selftest.safetensors", change)))
    assert call("doctor", "--bundle", path) == 4
    out, err = capsys.readouterr()
    assert "FAILED" in out
    assert err.startswith("error: ")


def test_every_limit_counts_and_nan_is_not_within_it() -> None:
    good = SelfTest("engine", 0.0, 0.0, 0.0, 0.0)
    assert good.passed
    for name in ("infer_logits", "settled_logits", "adapt_logits", "update"):
        for value in (1.0, math.inf, math.nan):
            assert not replace(good, **{name: value}).passed, (name, value)


def test_limits_are_wider_in_half_precision_where_the_engine_computes_so(loaded_toy: Bundle) -> None:
    rows = (ParityRow(1, "logits", 1e-7, 2e-3), ParityRow(1, "update", 1e-5, 0.05))
    half = loaded_toy.manifest.replace(precision="float16", half_parity=ParityInfo("float16", 1, 3e-3, rows))
    assert self_tests.half_limits(half, "tensorrt 10.3") == {"logits_limit": 4 * 3e-3, "update_limit": 0.2}
    assert (
        self_tests.half_limits(half, "onnxruntime-cpu 1.32")
        == self_tests.half_limits(loaded_toy.manifest, "tensorrt 10.3")
        == {}
    )
    strayed = SelfTest("engine", 0.01, None, 0.01, 0.1)
    assert not strayed.passed
    assert replace(strayed, logits_limit=0.012, update_limit=0.2).passed


def test_the_self_test_commits_nothing(loaded_toy: Bundle, toy_engine: Engine) -> None:
    before = toy_engine.state().digest()
    assert self_tests.self_test(loaded_toy, toy_engine).passed
    assert toy_engine.state().digest() == before


def test_versions_come_from_metadata_alone() -> None:
    code = (
        "import sys; from mgg_edge.runtime import doctor; doctor.package_versions();"
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnxruntime', 'timm')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

    def lookup(name: str) -> str:
        if name == "numpy":
            return "9.9"
        raise importlib.metadata.PackageNotFoundError(name)

    versions = doctor.package_versions(lookup)
    assert versions["numpy"] == "9.9"
    assert versions["torch"] is None


def test_a_jetson_is_recognised_by_its_release_file(tmp_path: Path) -> None:
    path = tmp_path / "nv_tegra_release"
    assert doctor.jetson_release(path) is None
    path.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\nmore\n")
    assert doctor.jetson_release(path) == "R36.4.3"
    path.write_text("something new\nmore\n")
    assert doctor.jetson_release(path) == "something new"


def test_two_packages_of_onnxruntime_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {**doctor.package_versions(), "onnxruntime": "1.23.0", "onnxruntime-gpu": "1.23.0"}
    monkeypatch.setattr(doctor, "package_versions", lambda: versions)
    (problem,) = doctor.environment().problems
    assert problem.startswith("onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in problem
    assert doctor.package_conflicts({**versions, "onnxruntime": None}) == []


CPU, CUDA = ("CPUExecutionProvider",), ("CUDAExecutionProvider", "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("packages", "providers", "jetson", "said"),
    [
        ({"tensorrt": "10.3", "cuda-bindings": "12.6"}, CPU, "R36.4.3", []),
        ({"tensorrt-rtx-cu13-bindings": "1.7", "cuda-bindings": "13"}, CPU, None, []),
        ({}, CPU, "R36.4.3", ["python3-libnvinfer", "cuda-python==12.6.*"]),
        ({}, CPU, "R38.2.0", ["--system-site-packages", "cuda-python==13.*"]),
        ({}, CPU, None, ["mgg-edge[tensorrt-rtx]", "'cuda-python'", "mgg-edge[gpu]"]),
        ({"cuda-bindings": "13"}, CUDA, None, ["no TensorRT"]),
    ],
)
def test_what_a_gpu_lacks_is_said_with_the_line_that_installs_it(packages, providers, jetson, said) -> None:
    advice = doctor.gpu_advice(packages, providers, jetson)
    assert len(advice) == len(said)
    assert all(word in line for word, line in zip(said, advice, strict=True))


def test_advice_is_only_for_machines_with_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    assert doctor.environment().advice == ()
    monkeypatch.setattr(doctor, "has_gpu", lambda: True)
    monkeypatch.setattr(doctor, "gpu_advice", lambda *_: ["install this"])
    assert call("doctor") == 0
    assert "to use the GPU: install this" in capsys.readouterr().out


def test_what_chance_decides_of_an_update_is_no_difference_and_a_wrong_layer_is():
    rng = np.random.default_rng(0)
    expected = np.sign(rng.normal(size=40_000)) * 1e-3  # Adam's first update
    flipped = expected.copy()
    flipped[rng.choice(len(expected), 40, replace=False)] *= -1
    assert np.linalg.norm(flipped - expected) / np.linalg.norm(expected) > 5 * self_tests.UPDATE_LIMIT
    assert self_tests.update_distance(flipped, expected) <= self_tests.UPDATE_LIMIT
    wrong = expected.copy()
    wrong[:64] = 0.0  # a small layer without a gradient
    assert self_tests.update_distance(wrong, expected) > self_tests.UPDATE_LIMIT
    for number in (math.nan, math.inf):
        broken = np.where(np.arange(len(expected)) == 7, number, expected)
        assert math.isnan(self_tests.update_distance(broken, expected))


def test_a_rule_that_moves_no_theta_passes():
    """`statistics` moves those of the norms alone: its update is nothing, and nothing is not far from it."""
    nothing = np.zeros(5000)
    assert self_tests.update_distance(nothing, nothing) == 0.0
    assert self_tests.update_distance(nothing + 1e-2, nothing) > self_tests.UPDATE_LIMIT
