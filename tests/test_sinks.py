"""Where predictions go: JSON lines and the annotated video."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import stat
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mgg_edge.errors import MissingDependencyError, SinkError, UsageError
from mgg_edge.runtime.adaptation.adapter import Prediction
from mgg_edge.runtime.outputs import sinks
from mgg_edge.runtime.outputs.overlay import MIN_WIDTH, Caption, Overlay
from mgg_edge.runtime.outputs.sinks import AnnotatedVideo, CsvLines, JsonLines
from mgg_edge.runtime.outputs.sinks_lines import COLUMNS
from mgg_edge.runtime.sources.video import Frame
from videos import pictures, read_pictures

RATE = Fraction(25)


def prediction(step: int = 0, label: str = "tram", probability: float = 0.75, entropy: float = 0.5) -> Prediction:
    logits = np.zeros(4, np.float32)
    return Prediction(label, 0, probability, entropy, logits, adapted=step > 0, step=step)


def write_all(sink: AnnotatedVideo, images: list[np.ndarray], step: int = 0) -> None:
    for index, image in enumerate(images):
        sink.write(Frame(index, index / 25, image), prediction(step))


# --- JSON lines


def test_one_object_a_line_with_the_agreed_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    lines = JsonLines(stream, clock=lambda: 20.0414)
    monkeypatch.setattr(time, "time", lambda: 1795824000.0414)
    lines.write(Frame(3, 0.12, pictures(1)[0], captured_s=20.0), prediction(step=2, label="tram\nline"))
    lines.summary({"frames_read": 4})
    first, last = map(json.loads, stream.getvalue().splitlines())
    assert first == {
        "frame": 3,
        "time_s": 0.12,
        "time": "2026-11-28T00:00:00.000Z",
        "label": "tram\nline",
        "index": 0,
        "probability": 0.75,
        "entropy": 0.5,
        "step": 2,
        "adapted": True,
        "age_ms": 41.4,
    }
    assert last == {"summary": {"frames_read": 4}}


def test_numbers_json_cannot_hold_become_null() -> None:
    stream = io.StringIO()
    JsonLines(stream).write(Frame(0, 0.0, pictures(1)[0]), prediction(probability=math.nan, entropy=math.inf))
    line = json.loads(stream.getvalue(), parse_constant=pytest.fail)
    assert line["probability"] is None
    assert line["entropy"] is None


def test_numpy_numbers_are_written_as_numbers() -> None:
    stream = io.StringIO()
    odd = prediction(probability=np.float32(0.5), entropy=np.float64(0.25))
    JsonLines(stream).write(Frame(0, 0.0, pictures(1)[0]), odd)
    assert json.loads(stream.getvalue())["probability"] == 0.5


class FailingStream(io.StringIO):
    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def flush(self) -> None:
        raise self.error


def test_a_full_disk_is_a_sink_error_and_a_lost_reader_is_not() -> None:
    with pytest.raises(SinkError, match="No space left"):
        JsonLines(FailingStream(OSError(28, "No space left on device"))).summary({})
    with pytest.raises(BrokenPipeError):
        JsonLines(FailingStream(BrokenPipeError(32, "Broken pipe"))).summary({})


def test_several_sources_share_a_stream_and_say_which_they_are() -> None:
    stream = io.StringIO()
    lines = JsonLines(stream)
    for name in ("door", "gate"):
        lines.of_source(name).write(Frame(1, 0.04, pictures(1)[0]), prediction())
    lines.summary({})
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.get("source") for line in found] == ["door", "gate", None]
    assert list(found[0]) == ["source", *COLUMNS, "age_ms"]


def test_the_most_probable_labels_where_more_than_one_is_wanted() -> None:
    stream = io.StringIO()
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    seen = Prediction.of(logits, ["a", "b", "c"], adapted=False, step=0)
    JsonLines(stream, top=2).of_source("door").write(Frame(0, 0.0, pictures(1)[0]), seen)
    (first, second) = json.loads(stream.getvalue())["top"]
    assert (first[:2], second[:2]) == (["b", 1], ["c", 2])
    assert (first[2], second[2]) == pytest.approx((0.6, 0.3))
    assert first[2] == seen.probability
    assert len(seen.top(9)) == 3


def test_lines_of_several_threads_never_mix() -> None:
    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            for letter in text:
                super().write(letter)
                if letter == ",":
                    time.sleep(0)
            return len(text)

    stream = Slow()
    lines = JsonLines(stream)

    def work(name: str) -> None:
        sink = lines.of_source(name)
        for index in range(50):
            sink.write(Frame(index, 0.0, pictures(1)[0]), prediction())

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in stream.getvalue().splitlines()]) == 150


# --- tables


def test_a_table_has_a_header_and_a_row_a_frame(tmp_path: Path) -> None:
    sink = CsvLines(tmp_path / "out.csv", "door")
    sink.write(Frame(0, 0.0, pictures(1)[0]), prediction(label='a, "b"\nc', entropy=math.nan))
    sink.write(Frame(1, 0.04, pictures(1)[0], file="x/1.png"), prediction(step=2, label="=cmd()"))
    rows_so_far = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text())))
    sink.close()
    sink.close()
    assert list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text()))) == rows_so_far
    header, first, second = rows_so_far
    assert header == ["source", *COLUMNS, "file"]
    assert COLUMNS == ("frame", "time_s", "time", "label", "index", "probability", "entropy", "step", "adapted")
    assert first == ["door", "0", "0.0", first[3], 'a, "b" c', "0", "0.75", "", "0", "False", ""]
    assert re.fullmatch(r"2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first[3])
    assert second[-1] == "x/1.png"
    assert second[4] == "'=cmd()"  # no formula for a spreadsheet
    with pytest.raises(SinkError, match="given up"):
        sink.write(Frame(2, 0.08, pictures(1)[0]), prediction())


def test_a_table_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found a directory"):
        CsvLines(tmp_path)
    with pytest.raises(SinkError, match="No such file"):
        CsvLines(tmp_path / "absent" / "out.csv")
    sink = CsvLines(tmp_path / "out.csv")
    sink._file.close()
    sink._file = FailingStream(OSError(28, "No space left on device"))
    with pytest.raises(SinkError, match="No space left"):
        sink.write(Frame(0, 0.0, pictures(1)[0]), prediction())
    sink.abort()


# --- annotated video


def test_a_live_source_s_pictures_stand_where_their_times_put_them(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    sink = AnnotatedVideo(target, 320, 240, RATE)
    image = pictures(1, 240, 320)[0]
    for index, time_s in enumerate([0.0, 0.04, 2.0, 1.0, 2.1]):  # a gap, and a clock that goes back
        sink.write(Frame(index, time_s, image), prediction())
    sink.close()
    with av.open(str(target)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([0.0, 0.04, 2.0, 2.04, 2.1])


@pytest.mark.parametrize("suffix", sinks.VIDEO_SUFFIXES)
def test_every_picture_is_in_the_video(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"out{suffix}"
    sink = AnnotatedVideo(target, 320, 240, RATE)
    assert not target.exists()
    write_all(sink, pictures(9, 240, 320))
    assert not target.exists()
    sink.close()
    assert sink.completed
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    images = read_pictures(target)
    assert [image.shape for image in images] == [(240, 320, 3)] * 9
    with av.open(str(target)) as container:
        assert container.streams.video[0].average_rate == RATE


def test_the_picture_above_the_caption_is_the_source_picture(tmp_path: Path) -> None:
    image = np.zeros((240, 320, 3), np.uint8)
    image[:, 160:] = (200, 40, 40)
    sink = AnnotatedVideo(tmp_path / "out.mp4", 320, 240, RATE)
    write_all(sink, [image] * 3)
    sink.close()
    found = read_pictures(tmp_path / "out.mp4")[1].astype(int)
    assert np.abs(found[10:160, 10:150] - image[10:160, 10:150]).max() < 12
    assert np.abs(found[10:160, 170:310] - image[10:160, 170:310]).max() < 12


def test_without_a_good_encoder_the_plain_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks.av, "codecs_available", {"mpeg4"})
    sink = AnnotatedVideo(tmp_path / "out.mp4", 320, 240, RATE)
    assert sink.codec == "mpeg4"
    write_all(sink, pictures(3, 240, 320))
    sink.close()
    assert len(read_pictures(tmp_path / "out.mp4")) == 3
    monkeypatch.setattr(sinks.av, "codecs_available", set())
    with pytest.raises(MissingDependencyError, match="pip install"):
        AnnotatedVideo(tmp_path / "other.mp4", 320, 240, RATE)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("size", [(63, 47), (321, 241), (1, 1), (3, 999), (999, 3)])
def test_odd_sizes_are_padded(tmp_path: Path, size: tuple[int, int]) -> None:
    sink = AnnotatedVideo(tmp_path / "out.mp4", *size, RATE)
    write_all(sink, pictures(2, size[1], size[0]))
    sink.close()
    height, width = read_pictures(tmp_path / "out.mp4")[0].shape[:2]
    assert height % 2 == width % 2 == 0
    assert height >= size[1]
    assert width >= size[0]


def test_pictures_of_another_size_are_fitted(tmp_path: Path) -> None:
    sink = AnnotatedVideo(tmp_path / "out.mp4", 320, 240, RATE)
    write_all(sink, [*pictures(2, 240, 320), *pictures(2, 480, 100), *pictures(1, 7, 3)])
    sink.close()
    assert [image.shape for image in read_pictures(tmp_path / "out.mp4")] == [(240, 320, 3)] * 5


def test_nothing_is_left_of_an_aborted_or_empty_video(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    target.write_bytes(b"what was there before")
    for end in ("abort", "close"):
        sink = AnnotatedVideo(target, 320, 240, RATE)
        if end == "abort":
            write_all(sink, pictures(3, 240, 320))
        getattr(sink, end)()
        sink.close()
        sink.abort()
        assert not sink.completed
        assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
        assert target.read_bytes() == b"what was there before"


def test_a_failing_encoder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = AnnotatedVideo(tmp_path / "out.mp4", 320, 240, RATE)
    write_all(sink, pictures(2, 240, 320))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sinks.os, "fsync", fail)
    with pytest.raises(SinkError, match="No space left on device"):
        sink.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SinkError, match="given up"):
        write_all(sink, pictures(1, 240, 320))


def test_an_unforeseen_error_leaves_nothing_and_is_not_disguised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = AnnotatedVideo(tmp_path / "out.mp4", 320, 240, RATE)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Overlay, "draw", fail)
    with pytest.raises(KeyboardInterrupt):
        write_all(sink, pictures(1, 240, 320))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("out.gif", UsageError, "expected a video file ending in .mp4"),
        ("out", UsageError, "found ''"),
        ("folder.mp4", UsageError, "found a directory"),
        ("absent/out.mp4", SinkError, "No such file or directory"),
        ("file.txt/out.mp4", SinkError, "Not a directory"),
    ],
)
def test_a_target_that_cannot_be_is_refused_at_once(
    tmp_path: Path, name: str, kind: type[Exception], said: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(kind, match=said) as caught:
        AnnotatedVideo(tmp_path / name, 320, 240, RATE)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder.mp4"]


def test_a_device_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "null.mp4").symlink_to("/dev/null")
    with pytest.raises(UsageError, match="device"):
        AnnotatedVideo(tmp_path / "null.mp4", 320, 240, RATE)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.mp4"
    link.symlink_to(tmp_path / "real" / "out.mp4")
    sink = AnnotatedVideo(link, 320, 240, RATE)
    write_all(sink, pictures(2, 240, 320))
    sink.close()
    assert link.is_symlink()
    assert len(read_pictures(tmp_path / "real" / "out.mp4")) == 2


# --- what is drawn


def band(overlay: Overlay, **changes: object) -> np.ndarray:
    caption = {"label": "tram", "probability": 0.5, "entropy": 0.5, "step": 0} | changes
    return overlay.draw(np.zeros((overlay.height, overlay.width, 3), np.uint8), Caption(**caption))


def test_each_part_of_the_caption_shows() -> None:
    plain = band(Overlay(640, 480))
    for change in ({"label": "bus"}, {"probability": 0.9}, {"step": 1}, {"entropy": 1.0}):
        assert (band(Overlay(640, 480), **change) != plain).any(), change
    assert (band(Overlay(640, 480), step=1) != band(Overlay(640, 480), step=2)).any()


def test_the_sparkline_rolls() -> None:
    overlay = Overlay(320, 240)
    drawn = [band(overlay, entropy=value) for value in (0.2, 1.9, 0.2)]
    assert (drawn[0] != drawn[2]).any()


def test_the_source_picture_is_not_written_to() -> None:
    image = pictures(1, 240, 320)[0]
    before = image.copy()
    Overlay(320, 240).draw(image, Caption("tram", 0.5, 0.5, 0))
    np.testing.assert_array_equal(image, before)


def test_small_pictures_are_enlarged_so_that_text_is_legible() -> None:
    overlay = Overlay(64, 48)
    assert overlay.size[0] >= MIN_WIDTH
    image = pictures(1, 48, 64)[0]
    drawn = overlay.draw(image, Caption("tram", 0.5, 0.5, 0))
    factor = overlay.size[0] // 64
    np.testing.assert_array_equal(drawn[: 20 * factor : factor, ::factor], image[:20])


@pytest.mark.parametrize("label", ["", "x" * 500, "two\nlines", "猫 кот 🐈", "\x00\x1b[31m"])
def test_any_label_can_be_drawn(label: str) -> None:
    assert band(Overlay(320, 240), label=label).shape == (240, 320, 3)


def test_any_size_can_be_drawn() -> None:
    random = np.random.default_rng(0)
    for width, height in [(1, 1), (1, 3000), (3000, 1), *random.integers(1, 400, (40, 2))]:
        overlay = Overlay(int(width), int(height))
        drawn = band(overlay, label="a rather long label", step=12345)
        assert drawn.shape == (overlay.size[1], overlay.size[0], 3)
        assert drawn.size <= 3 * max(2048 * 2048, 4 * width * height)


@pytest.mark.parametrize("label", ["W" * 10_000, "i" * 10_000, "a b" * 100_000, "短" * 10_000])
def test_a_label_without_end_costs_no_more_than_what_is_seen_of_it(label):
    """Counted, not timed: how much text is measured for one caption."""
    from mgg_edge.runtime.outputs import overlay

    measured = []

    class Font:
        def getlength(self, text):
            measured.append(len(text))
            return 7.0 * len(text)

    shown = overlay._shorten(label, Font(), 300.0)
    assert shown.endswith("…")
    assert 7.0 * len(shown) <= 300
    assert len(shown) >= 40
    assert sum(measured) < 4_000


def test_a_label_that_fits_is_left_alone():
    from mgg_edge.runtime.outputs import overlay

    class Font:
        def getlength(self, text):
            return 7.0 * len(text)

    assert overlay._shorten("crane \n bird", Font(), 300.0) == "crane bird"
