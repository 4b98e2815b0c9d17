"""`eval` on trees as ImageNet-C, -R, -A and -Sketch come: one pass over each, answers among the classes there are."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

from PIL import Image  # noqa: E402

from mgg_edge.cli.main import main  # noqa: E402
from mgg_edge.learn.imagenet import imagenet_names  # noqa: E402

pytestmark = pytest.mark.torch
BACKBONE = ["--backbone", "resnet10t", "--weights", "random", "--labels", "imagenet"]
PICTURES = 3


def class_folders(count):
    """Some of ImageNet's classes by their WordNet ids."""
    every = sorted(wordnet for wordnet, *_ in imagenet_names())
    return every[:: len(every) // count][:count]


def paint(folder, names, seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(PICTURES):
            Image.fromarray(rng.integers(0, 256, (72, 64, 3), np.uint8)).save(folder / name / f"{number}.png")


@pytest.fixture
def corrupted(tmp_path):
    """A tree KIND/SEVERITY/CLASS of two kinds, one of them no weather of this package's own drawing."""
    for seed, kind in enumerate(("gaussian_noise", "fog")):
        for severity in (3, 5):
            paint(tmp_path / "c" / kind / str(severity), class_folders(4), seed + severity)
    return tmp_path / "c"


def evaluate(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["eval", *map(str, [*BACKBONE, "--jobs", 1, "--json", *words])])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def parts(out):
    return [json.loads(path.read_text()) for path in sorted((out / "parts").glob("*.jsonl"))]


def test_imagenet_c_is_one_pass_over_each_kind_there_is(corrupted, tmp_path, capsys):
    words = ["--imagenet-c", corrupted, "--methods", "none,bn", "--batch", 4, "--out", tmp_path / "out"]
    code, out, err = evaluate(capsys, *words)
    assert code == 0, err
    found = json.loads(out)
    streams = [(entry["stream"], entry["method"]) for entry in found["summary"]]
    assert set(streams) == {(f"folder:{kind}/5", name) for kind in ("gaussian_noise", "fog") for name in ("none", "bn")}
    assert set(found["means"]) == {"none", "bn"}
    accuracies = [entry["mean"]["accuracy"] for entry in found["summary"] if entry["method"] == "bn"]
    assert found["means"]["bn"] == pytest.approx(np.mean(accuracies))
    for part in parts(tmp_path / "out"):
        assert part["result"]["frames"] == 4 * PICTURES  # every picture once
        labels = set(part["result"]["answers"]["labels"])
        assert len(labels) == 4
        (domain,) = part["result"]["domains"]
        assert f"folder:{domain}" == part["job"]["stream"]
        assert set(part["result"]["answers"]["predicted"]) <= labels  # among the classes there are
    report = (tmp_path / "out" / "report.html").read_text()
    assert "4 of 1000 have pictures" in report
    # Other pictures of one kind: only its jobs are run again.
    before = {path.name for path in (tmp_path / "out" / "parts").glob("*.jsonl")}
    next((corrupted / "fog" / "5").rglob("*.png")).write_bytes(
        next((corrupted / "fog" / "3").rglob("*.png")).read_bytes()
    )
    code, _, _ = evaluate(capsys, *words)
    assert code == 0
    assert len({path.name for path in (tmp_path / "out" / "parts").glob("*.jsonl")} - before) == 2


def test_another_severity(corrupted, tmp_path, capsys):
    words = ["--imagenet-c", corrupted, "--severity", 3, "--methods", "none", "--out", tmp_path / "out"]
    code, out, _ = evaluate(capsys, *words)
    assert code == 0
    assert [entry["stream"] for entry in json.loads(out)["summary"]] == ["folder:gaussian_noise/3", "folder:fog/3"]


@pytest.mark.parametrize("name", ["r", "a", "sketch"])
def test_subsets_are_one_pass_in_one_word(tmp_path, capsys, name):
    paint(tmp_path / name, class_folders(5))
    words = [f"--imagenet-{name}", tmp_path / name, "--methods", "none", "--out", tmp_path / "out"]
    code, out, err = evaluate(capsys, *words)
    assert code == 0, err
    assert [entry["stream"] for entry in json.loads(out)["summary"]] == ["one-pass"]
    (part,) = parts(tmp_path / "out")
    assert part["result"]["frames"] == 5 * PICTURES
    assert part["job"]["setting"]["held_out"] == 0


def test_the_published_protocol_sets_what_the_authors_set(corrupted, tmp_path, capsys):
    methods = "none,tent,sar,lame"
    words = ["--imagenet-c", corrupted, "--protocol", "published", "--methods", methods, "--out", tmp_path / "out"]
    code, _, err = evaluate(capsys, *words)
    assert code == 0, err
    settings = parts(tmp_path / "out")[0]["job"]["setting"]
    chosen = {name: settings[name] for name in ("batch", "norm_statistics", "held_out", "source_images", "protocol")}
    assert chosen == {
        "batch": 64, "norm_statistics": "batch", "held_out": 0, "source_images": 2000, "protocol": "published",
    }  # fmt: skip
    assert "published" in (tmp_path / "out" / "report.html").read_text()
    # Nesterov's momentum is in Tent's settings there: the answers differ from those without it.
    shown = ["--imagenet-c", corrupted, "--protocol", "published", "--batch", 4, "--out", tmp_path / "more"]
    code, _, _ = evaluate(capsys, *shown, "--methods", "tent:learning_rate=1,tent:learning_rate=1:nesterov=false")
    assert code == 0
    confidence = {part["job"]["method"]: part["result"]["answers"]["confidence"] for part in parts(tmp_path / "more")}
    one, other = confidence.values()
    assert one != other


def test_corrupted_pictures_never_stand_for_the_source(corrupted, tmp_path, capsys):
    words = ["--imagenet-c", corrupted, "--protocol", "published", "--methods", "eata", "--out", tmp_path / "out"]
    code, _, err = evaluate(capsys, *words)
    assert code == 2
    assert "name some with --source-data" in err
    paint(tmp_path / "clean", class_folders(4), seed=9)
    code, _, err = evaluate(capsys, *words, "--source-data", tmp_path / "clean")
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--imagenet-c", "{}/c", "--data", "{}/c"], "expected one of --data and the --imagenet options"),
        (["--imagenet-c", "{}/c", "--imagenet-r", "{}/c"], "found --imagenet-c, --imagenet-r"),
        (["--imagenet-c", "{}/c/fog"], "expected folders such as gaussian_noise/5"),
        (["--imagenet-c", "{}/c", "--severity", "4"], "expected folders such as gaussian_noise/4"),
        (["--imagenet-r", "{}/c"], "'fog'"),
        (["--data", "{}/c", "--streams", "folder:haze/5"], "haze/5"),
    ],
)
def test_what_is_no_such_tree_is_said(corrupted, tmp_path, capsys, words, message):
    words = [word.format(tmp_path) for word in words]
    code, _, err = evaluate(capsys, *words, "--methods", "none", "--out", tmp_path / "out")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out" / "parts").exists() or not parts(tmp_path / "out")
