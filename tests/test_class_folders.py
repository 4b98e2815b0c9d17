"""Folders are classes by their names: mapping, masks, what is no data, and the evaluation that rests on it."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from mgg_edge.cli.main import main  # noqa: E402
from mgg_edge.errors import UsageError  # noqa: E402
from mgg_edge.learn.class_folders import ClassOrder, Naming, match_classes, open_class_folders  # noqa: E402
from mgg_edge.learn.imagenet import imagenet_labels  # noqa: E402
from mgg_edge.runtime.sources.source_demo import packaged_faces  # noqa: E402
from mgg_edge.scenes.glyphs import CHARACTERS  # noqa: E402
from mgg_edge.scenes.sources import GlyphSource  # noqa: E402

pytestmark = pytest.mark.torch

COLOURS = ("red", "blue", "dark green")


def match(folders, labels=COLOURS, **settings):
    return match_classes(folders, Naming(tuple(labels), **settings), "data")


class TestMatching:
    def test_the_place_of_a_folder_says_nothing(self):
        assert match(["blue", "red", "dark green"]) == {"blue": 1, "dark green": 2, "red": 0}
        assert match(["blue"]) == {"blue": 1}

    def test_case_spaces_hyphens_and_underscores_do_not_matter(self):
        assert match(["Dark_Green", "RED", "dark-green"]) == {"Dark_Green": 2, "RED": 0, "dark-green": 2}

    def test_but_a_name_written_exactly_so_comes_first(self):
        assert match(["a", "A"], ["A", "a"]) == {"A": 0, "a": 1}
        with pytest.raises(UsageError, match="'a-B' may be any of the classes 0, 1"):
            match(["a-B"], ["a b", "A B"])

    def test_imagenet_by_wordnet_id_and_by_any_synonym(self):
        found = match(["n02124075", "tiger cat", "Egyptian_cat", "hen", "n02124075"], imagenet_labels())
        assert found == {"n02124075": 285, "tiger cat": 282, "Egyptian_cat": 285, "hen": 8}
        assert match(["English springer spaniel"], imagenet_labels()) == {"English springer spaniel": 217}
        with pytest.raises(UsageError, match="'crane' may be any of the classes 134, 517"):
            match(["crane"], imagenet_labels())

    def test_synonyms_are_imagenets_alone(self):
        with pytest.raises(UsageError, match="no class of the model: 'n02124075'"):
            match(["n02124075"], [f"class {index}" for index in range(1000)])

    def test_what_is_no_class_is_named_with_what_is_near(self):
        with pytest.raises(UsageError, match="no class of the model: 'rad'; near are 'red'; --classes-file"):
            match(["red", "rad"])
        with pytest.raises(UsageError, match="'fog', 'snow'; its classes are called 'red', 'blue', 'dark green'"):
            match(["fog", "snow"])
        with pytest.raises(UsageError, match="is not known, say it with --labels"):
            match(["cat"], ["class 0", "class 1"])

    def test_sorted_order_on_request_and_only_for_all_classes(self):
        assert match(["c", "a", "b"], order=ClassOrder.SORTED) == {"a": 0, "b": 1, "c": 2}
        with pytest.raises(UsageError, match="expected 3 folders to take as classes in their sorted order, found 2"):
            match(["a", "b"], order=ClassOrder.SORTED)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("names.txt", "rouge, rot\nbleu\nvert\n"),
            ("names.json", '{"rouge": 0, "bleu": "blue", "vert": 2}'),
            ("index.json", '{"0": ["rot", "rouge"], "1": "bleu", "2": ["vert"]}'),
        ],
    )
    def test_a_classes_file(self, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        found = match(["vert", "rouge", "bleu", "red"], classes_file=tmp_path / name)
        assert found == {"vert": 2, "rouge": 0, "bleu": 1, "red": 0}

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("names.txt", "rouge\nbleu\n", "expected 3 classes, one a line, found 2"),
            ("names.json", "[1, 2]", "expected a JSON object"),
            ("names.json", "{", "cannot read the classes"),
            ("names.json", '{"rouge": 3}', "expected classes 0 to 2 or their labels, found 'rouge': 3"),
            ("names.json", '{"rouge": "pink"}', "found 'rouge': pink"),
        ],
    )
    def test_a_classes_file_of_other_classes(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=message):
            match(["red"], classes_file=tmp_path / name)


def test_what_systems_leave_in_folders_is_no_data(tmp_path):
    picture = Image.new("RGB", (8, 8))
    clutter = (
        ".ipynb_checkpoints/0.png", "__MACOSX/red/0.png", "@eaDir/0.png", "red/@eaDir/0.png", "red/._0.png",
        "blue/.thumbs/0.png", "Thumbs.db/0.png", "lost+found/0.png",
    )  # fmt: skip
    for name in ("red/0.png", "blue/0.png", "blue/deep/1.png", *clutter):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)
    found = open_class_folders(tmp_path, Naming(COLOURS))
    assert {label: [path.name for path in paths] for label, paths in found.paths.items()} == {
        0: ["0.png"],
        1: ["0.png", "1.png"],
    }
    assert found.absent == 1
    assert found.facts == {"blue": "1 blue", "red": "0 red"}
    with pytest.raises(UsageError, match="expected one folder of images a class, found images alone"):
        open_class_folders(tmp_path / "red", Naming(COLOURS))


def evaluate(capsys, out, *words):
    """`mgg-edge eval` of the packaged reader, frozen, on clean pictures of a folder."""
    command = ["eval", "--bundle", "default", "--methods", "none", "--streams", "clean", "--jobs", "1", "--batch", "16"]
    sizes = ["--frames", "160", "--held-out", "40", "--source-images", "32", "--engine", "onnxruntime", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *sizes, "--out", str(out), *map(str, words)])
    captured = capsys.readouterr()
    if ended.value.code:
        return ended.value.code, captured.err
    return 0, json.loads(captured.out.splitlines()[-1])["summary"][0]["mean"]["accuracy"]


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """Folders named as the classes of the packaged reader, which are not in the order of its labels."""
    root, rng = tmp_path_factory.mktemp("characters"), np.random.default_rng(5)
    frames = GlyphSource(packaged_faces()).draw(np.repeat(np.arange(36), 10), rng)
    for index, frame in enumerate(frames):
        folder = root / CHARACTERS[index // 10]
        folder.mkdir(exist_ok=True)
        Image.fromarray(frame).save(folder / f"{index % 10}.png")
    return root


class TestEvaluation:
    def test_folders_named_as_the_classes(self, characters, tmp_path, capsys):
        code, accuracy = evaluate(capsys, tmp_path / "out", "--data", characters)
        assert (code, accuracy >= 0.9) == (0, True), accuracy
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["classes"]["0"] == "26 0"
        assert "bundle id" in summary["facts"]
        assert "no method is better online than none" in summary["verdicts"][0]
        kept = np.load(tmp_path / "out" / "predictions.npz")  # noqa: TID251 (written here; never unpickles)
        right = kept["clean|none|0|labels"] == kept["clean|none|0|predicted"]
        assert right.mean() == pytest.approx(accuracy)
        again = evaluate(capsys, tmp_path / "out", "--data", characters)
        assert again == (code, accuracy)

    def test_a_subset_and_clutter_beside_it(self, characters, tmp_path, capsys):
        chosen = tmp_path / "chosen"
        for name in "XYZ":
            (chosen / name).mkdir(parents=True)
            for path in (characters / name).iterdir():
                (chosen / name / path.name).write_bytes(path.read_bytes())
        code, accuracy = evaluate(capsys, tmp_path / "out", "--data", chosen)
        assert (code, accuracy >= 0.9) == (0, True), accuracy
        assert "3 of 36 have pictures" in (tmp_path / "out" / "report.html").read_text()
        (chosen / ".ipynb_checkpoints").mkdir()
        (chosen / ".ipynb_checkpoints" / "0.png").write_bytes((chosen / "X" / "0.png").read_bytes())
        assert evaluate(capsys, tmp_path / "hidden", "--data", chosen) == (0, accuracy)
        assert evaluate(capsys, tmp_path / "all", "--data", chosen, "--no-mask")[1] <= accuracy

    def test_new_contents_of_the_same_size_are_evaluated_anew(self, characters, tmp_path, capsys):
        data, out = tmp_path / "data", tmp_path / "out"
        for name in "AB":
            (data / name).mkdir(parents=True)
            for path in (characters / name).iterdir():
                with Image.open(path) as picture:
                    picture.save(data / name / f"{path.stem}.bmp")  # all of one size
        _, before = evaluate(capsys, out, "--data", data)
        for one, other in ((data / "A", tmp_path / "x"), (data / "B", data / "A"), (tmp_path / "x", data / "B")):
            one.rename(other)
        _, after = evaluate(capsys, out, "--data", data)
        assert (before > 0.9, after < 0.1) == (True, True)

    def test_folders_of_other_things_are_refused(self, characters, tmp_path, capsys):
        root = tmp_path / "weathers" / "fog"
        root.mkdir(parents=True)
        (root / "0.png").write_bytes((characters / "A" / "0.png").read_bytes())
        code, error = evaluate(capsys, tmp_path / "out", "--data", root.parent)
        assert code == 2
        assert "folders that are no class of the model: 'fog'" in " ".join(error.split())
