"""The demonstration with the bundles the package ships: what it promises, in JSON, in the terminal, as a video."""

import json

import av
import numpy as np
import pytest

from mgg_edge.cli.main import main
from mgg_edge.runtime import Adapter, demo
from mgg_edge.runtime.demo import Scores
from mgg_edge.runtime.demo_picture import CARD, COLUMN_WIDTH, COLUMNS, HELD, SHOWN, DemoVideo
from mgg_edge.runtime.prediction import Prediction
from mgg_edge.runtime.sources import source_demo
from mgg_edge.runtime.sources.source_open import open_source
from mgg_edge.scenes.glyphs import CHARACTERS


def command(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def reading(label):
    return Prediction(label, 0, 0.9, 0.1, np.zeros(36, np.float32), adapted=True, step=1)


@pytest.fixture(scope="module")
def glyphs():
    with demo.open_readers() as (_, faces):
        return faces


def test_the_adapted_reader_is_ahead_and_never_behind(capsys):
    code, out, err = command(capsys, "demo", "--json")
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    summary = lines[-1]["summary"]
    assert len(lines) - 1 == summary["frames"] == 1800
    assert summary["accuracy_adapted"] >= summary["accuracy_frozen"] + 0.05
    assert summary["worst_lead_in_500_frames"] >= -0.01
    right = np.mean([line["adapted"] == line["label"] for line in lines[:-1]])
    assert right == pytest.approx(summary["accuracy_adapted"])
    assert [entry["weather"] for entry in summary["stretches"]] == [name for name, _ in source_demo.COURSE]
    assert summary["adapt_steps"]["frozen"] == 0
    assert summary["adapt_steps"]["adapted"] > 100


def test_a_table_for_people_and_a_video_to_watch(capsys, tmp_path):
    code, out, _ = command(capsys, "demo", "--frames", 20, "--save", tmp_path / "demo.mp4")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.strip()]
    assert rows[0] == ["weather", "frozen", "mgg", "adapted"]
    assert [row[0] for row in rows[1:7]] == ["clear", "fog", "noise", "blur", "night", "clear"]
    with av.open(str(tmp_path / "demo.mp4")) as video:
        pictures = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    held = len(pictures) - 20 * SHOWN - CARD  # one of six frames; some are shown longer
    assert held % (HELD - SHOWN) == 0 <= held <= 4 * (HELD - SHOWN)
    assert pictures[0].shape == (720, 1280, 3)
    assert np.abs(pictures[10].astype(int) - pictures[38].astype(int)).mean() > 2
    assert (
        np.abs(pictures[-1].astype(int) - pictures[-CARD].astype(int)).mean() < 1
    )  # the card of the totals stands still
    assert np.abs(pictures[-1].astype(int) - pictures[38].astype(int)).mean() > 5


def test_what_only_the_adapted_reader_reads_is_held_and_the_mark_is_not_colour_alone(tmp_path, glyphs):
    video, scores = DemoVideo(tmp_path / "demo.mp4", 60), Scores()
    frame = next(source_demo.demo_frames(glyphs, 1, 0))
    truth, other = (reading(CHARACTERS[(frame.label + shift) % 36]) for shift in (0, 1))
    shown = []
    for index in range(60):
        predictions = {"frozen": other, "mgg": other, "adapted": truth}
        scores.add(frame, predictions)
        shown.append(video._pictures_of(index, scores))
    assert [index for index, count in enumerate(shown) if count == HELD] == [0, 30]
    scores.add(frame, {"frozen": truth, "mgg": other, "adapted": truth})
    assert video._pictures_of(60, scores) == SHOWN
    picture = video._draw(frame, {"frozen": other, "mgg": other, "adapted": truth}, scores)
    marks = [
        picture[180:215, left + COLUMN_WIDTH - 64 : left + COLUMN_WIDTH - 20].max(axis=2) > 120 for left in COLUMNS
    ]
    assert np.array_equal(marks[0], marks[1])
    assert (marks[0] != marks[2]).mean() > 0.1
    video.abort()


def test_a_video_that_cannot_be_written_is_refused_first(capsys, tmp_path):
    code, _, err = command(capsys, "demo", "--save", tmp_path / "none" / "x.mp4")
    assert code == 1
    assert "cannot write here" in err
    code, _, err = command(capsys, "demo", "--save", tmp_path / "x.gif")
    assert code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_stream_follows_its_seed(glyphs):
    first, again, other = (list(source_demo.demo_frames(glyphs, 3, seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(a.image, b.image) and a.label == b.label for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].image, other[0].image)
    assert [frame.index for frame in first] == list(range(18))


def test_the_source_shows_the_same_pictures_enlarged(glyphs):
    with open_source("demo") as source:
        assert (source.width, source.height, source.frames_expected, source.live) == (256, 256, 1800, False)
        frame = next(iter(source))
    expected = next(source_demo.demo_frames(glyphs, 300, 0)).image
    assert frame.image.shape == (256, 256, 3)
    assert np.array_equal(frame.image[4::8, 4::8], expected)


def test_the_default_bundle_says_what_it_reads(capsys):
    code, out, err = command(capsys, "run", "--source", "demo", "--limit", 10, "--json")
    assert code == 0
    assert "reads single characters" in " ".join(err.split())
    assert len(out.splitlines()) == 11


def test_the_default_bundle_adapts_by_its_window():
    with demo.open_readers() as (readers, _):
        assert isinstance(readers[demo.ADAPTED], Adapter)
        assert [readers[name].schedule_name for name in demo.READERS] == ["off", "burst", "window"]
