"""`scripts/gpu_check`'s figures, on the processor: what a machine with a GPU will be asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu

ROOT = Path(__file__).parent.parent


def run(folder, monkeypatch, *words):
    """Exit code and report of benchmarks/gpu.py."""
    out = folder / "gpu.json"
    small = ["--engines", "cpu", "--bundles", folder, "--steps", 2, "--repeats", 3, "--soak", 64, "--out", out]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, [*small, *words])])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return ended.value.code, json.loads(out.read_text())


@pytest.fixture
def bundles(tmp_path, toy_bundle):
    (tmp_path / "toy.mgg").write_bytes(toy_bundle.read_bytes())
    return tmp_path


def test_every_part_of_a_ready_made_bundle(bundles, monkeypatch, capsys):
    code, report = run(bundles, monkeypatch)
    (row,) = report["rows"]
    assert code == 0
    assert row["parity"] == {"logits": 0.0, "moved": 0.0}
    assert set(row) >= {"open_s", "self_test", "step_over_forward", "infer_p99_adapting_ms", "soak_steps", "finite"}
    assert "| toy | onnxruntime-cpu" in capsys.readouterr().out


def test_a_run_cut_off_still_tells(bundles, monkeypatch):
    """The file is written after every part, not at the end."""
    monkeypatch.setattr(gpu, "times", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(bundles, monkeypatch)
    (row,) = json.loads((bundles / "gpu.json").read_text())["rows"]
    assert "parity" in row
    assert "forward_ms" not in row


def test_when_time_is_over_the_rest_is_named(bundles, monkeypatch):
    code, report = run(bundles, monkeypatch, "--minutes", 0)
    assert code == 0
    assert report["rows"][0]["no time for"] == ["self-test", "parity", "times", "beside", "soak"]


def test_wrong_numbers_are_exit_code_4(bundles, monkeypatch):
    monkeypatch.setattr(gpu, "relative", lambda *_: 1.0)
    code, report = run(bundles, monkeypatch)
    assert (code, report["rows"][0]["outside"]) == (4, "parity")


def test_an_engine_that_is_not_here_is_a_row(bundles, monkeypatch):
    code, report = run(bundles, monkeypatch, "--engines", "npu,cpu")
    absent, present = report["rows"]
    assert code == 0
    assert absent["error"].startswith("engine: expected one of")
    assert "parity" in present


@pytest.mark.parametrize(
    "words", [["gpu_wheels"], ["gpu_wheels", "--out", "x", "--split", "many"], ["gpu_check", "--wheels", "/nowhere"]]
)
def test_words_that_cannot_be_used(words, tmp_path):
    done = subprocess.run(
        [ROOT / "scripts" / words[0], *words[1:]], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")


def test_what_a_machine_with_pytorch_lacks_is_without_pytorch():
    script = [sys.executable, ROOT / "scripts" / "gpu_packages.py"]
    lists = [
        subprocess.run([*script, *more], capture_output=True, text=True, check=True).stdout.split()
        for more in ([], ["--with-torch"])
    ]
    assert not any(line.startswith("torch") for line in lists[0])
    assert any(line.startswith("onnxruntime-gpu") for line in lists[0])
    assert any(line.startswith("torch>=") for line in lists[1])
