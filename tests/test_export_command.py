"""`mgg-edge export` as people and scripts use it, and the exported transformer on a real video."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

import av  # noqa: E402
import numpy as np  # noqa: E402
import timm  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from mgg_edge.cli.main import main  # noqa: E402
from mgg_edge.learn import MGG  # noqa: E402
from mgg_edge.learn.images import synthetic_frames  # noqa: E402
from mgg_edge.runtime import Bundle  # noqa: E402
from videos import sample_video  # noqa: E402

pytestmark = pytest.mark.torch

SMALL = ["--backbone", "vit_tiny_patch16_224", "--image-size", "32", "--batch", "4", "--parity-steps", "5"]


def mgg_edge(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def weights():
    """A state dict with seven classes at 32 pixels."""
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7).state_dict()


def test_random_weights_with_json(tmp_path, capsys):
    out = tmp_path / "x.mgg"
    code, stdout, stderr = mgg_edge(
        capsys, "export", *SMALL, "--weights", "random", "--seed", 0, "--out", out, "--json"
    )
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["bundle"] == str(out)
    assert report["size_bytes"] == out.stat().st_size
    assert {row["step"] for row in report["parity"]["rows"]} == {1, 5}
    assert "synthetic" in stderr
    assert "untrained" in stderr
    code, stdout, _ = mgg_edge(capsys, "inspect", out, "--json")
    facts = json.loads(stdout)
    assert (code, facts["backbone"]["weights"], facts["rule"]["origin"]) == (0, "random:0", "untrained:0")


def test_everything_from_files(tmp_path, capsys, weights):
    save_file(weights, tmp_path / "model.safetensors")
    MGG(4).save(tmp_path / "mgg.safetensors")
    (tmp_path / "labels.txt").write_text("\n".join("abcdefg"))
    source = tmp_path / "source"
    for index, frame in enumerate(synthetic_frames(33, 40, 48, 0)):
        folder = source / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame.numpy()).save(folder / f"{index}.png")
    out = tmp_path / "x.mgg"
    code, stdout, stderr = mgg_edge(
        capsys, "export", *SMALL, "--weights", tmp_path / "model.safetensors", "--mgg", tmp_path / "mgg.safetensors",
        "--labels", tmp_path / "labels.txt", "--source-data", source, "--out", out,
    )  # fmt: skip
    assert code == 0, stderr
    assert "ratio" in stdout
    facts = json.loads(mgg_edge(capsys, "inspect", out, "--json")[1])
    assert facts["backbone"] == {
        "name": "vit_tiny_patch16_224",
        "weights": "model.safetensors",
        "classes": 7,
        "features": 2304,
    }
    assert facts["labels"]["first"] == list("abcde")
    assert facts["statistics"] == {"source": "source", "images": 33}
    assert facts["rule"]["origin"] == "mgg.safetensors"


def test_released_checkpoint_as_rule(tmp_path, capsys):
    from mgg_edge.learn.rules.mgg import RELEASED_NAMES, SHAPES

    released = {f"seq_modeling_block.{key}": 0.1 * torch.randn(SHAPES[name]) for key, name in RELEASED_NAMES.items()}
    torch.save({"model_state_dict": released}, tmp_path / "mgg_ckpt.pth")
    out = tmp_path / "x.mgg"
    code, _, stderr = mgg_edge(
        capsys, "export", *SMALL, "--weights", "random", "--mgg", tmp_path / "mgg_ckpt.pth", "--out", out
    )
    assert code == 0, stderr
    facts = json.loads(mgg_edge(capsys, "inspect", out, "--json")[1])
    assert facts["rule"]["options"] == {"bias_correction": "released"}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--backbone", "vit_tiny_patch16_225"], 2, "did you mean vit_tiny_patch16_224"),
        (["--image-size", "8"], 2, "cannot take images of 8x8"),
        (["--weights", "none.pth"], 2, "none.pth: no such weights file"),
        (["--weights", "pyproject.toml"], 2, "expected a .safetensors"),
        (["--rule", "lion"], 2, "expected one of mgg, mgg+, adam+, forward, forward+, adam, sgd"),
        (["--rule", "adam", "--mgg", "x.safetensors"], 2, "takes no file of learned numbers"),
        (["--mgg", "none.safetensors"], 2, "no such file of a learned rule"),
        (["--mgg", "package"], 2, "with --weights package alone, found vit_tiny_patch16_224 with --weights random"),
        (["--source-data", "none"], 2, "expected a directory of images"),
        (["--labels", "none.txt"], 2, "cannot read the class names"),
        (["--labels", "two.csv", "--classes", "2"], 2, "found a table whose first line is 'id,name'"),
        (["--learning-rate", "nan"], 2, "learning rate: 'mgg' expected a number"),
        (["--batch", "1"], 2, "Invalid value for '--batch'"),
        (["--out", "none/x.mgg"], 1, "cannot write here: No such file or directory"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_line_and_a_code(tmp_path, capsys, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("text")
    (tmp_path / "two.csv").write_text("id,name\n0,bus\n")
    base = [
        "export",
        "--backbone",
        "vit_tiny_patch16_224",
        "--weights",
        "random",
        "--image-size",
        "32",
        "--out",
        "x.mgg",
    ]
    found, stdout, stderr = mgg_edge(capsys, *base, *words)
    assert found == code
    assert stdout == ""
    assert message in " ".join(stderr.split())
    assert "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pyproject.toml", "two.csv"]


def test_weights_with_nan_are_refused(tmp_path, capsys, weights):
    broken = {**weights, "norm.bias": torch.full_like(weights["norm.bias"], float("nan"))}
    save_file(broken, tmp_path / "model.safetensors")
    code, _, stderr = mgg_edge(
        capsys, "export", *SMALL, "--weights", tmp_path / "model.safetensors", "--out", tmp_path / "x.mgg"
    )
    assert code == 1
    assert "'norm.bias' holds NaN or Inf" in stderr


def test_vision_transformer_adapts_on_a_real_video(tmp_path, capsys):
    """The whole way: export ViT-Tiny, play every frame of a street scene, adapt, write the annotated video."""
    video, out, saved = sample_video("bikes.mp4"), tmp_path / "x.mgg", tmp_path / "out.mp4"
    code, _, stderr = mgg_edge(
        capsys, "export", "--backbone", "vit_tiny_patch16_224", "--weights", "random", "--seed", 0, "--batch", 4,
        "--parity-steps", 5, "--out", out,
    )  # fmt: skip
    assert code == 0, stderr
    code, stdout, stderr = mgg_edge(capsys, "run", "--bundle", out, "--source", video, "--save", saved, "--json")
    assert code == 0, stderr
    lines = [json.loads(line) for line in stdout.splitlines()]
    frames, summary = lines[:-1], lines[-1]["summary"]
    assert [line["frame"] for line in frames] == list(range(250))
    assert summary["frames_read"] == summary["frames_inferred"] == 250
    assert summary["adapt_steps"] >= 10
    assert summary["adapt_rejected"] == 0
    assert all(np.isfinite([line["probability"], line["entropy"]]).all() for line in frames)
    assert frames[-1]["adapted"] is True
    assert 1 <= frames[-1]["step"] <= summary["adapt_steps"]  # a new burst begins at the source
    with av.open(str(saved)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 250


def test_a_byte_order_mark_is_no_part_of_a_class_name(tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_bytes(b"\xef\xbb\xbf" + "\n".join(f"name {index}" for index in range(7)).encode())
    out = tmp_path / "x.mgg"
    small = ["--weights", "random", "--classes", "7", "--labels", names, "--out", out]
    code, _, stderr = mgg_edge(capsys, "export", *SMALL, *small)
    assert code == 0, stderr
    assert Bundle.load(out).manifest.labels[0] == "name 0"
