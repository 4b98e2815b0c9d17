"""Video files with odd clocks and damaged places: right times, nothing lost in silence, on to the next good picture."""

from __future__ import annotations

import itertools
import json
import logging
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from mgg_edge.cli.main import main
from mgg_edge.errors import SourceError
from mgg_edge.runtime.outputs.sinks import VideoFile
from mgg_edge.runtime.sources.video import VideoSource
from mgg_edge.runtime.sources.video_clock import VideoClock
from videos import pictures, sample_video

EDGE = (96, 64)


def write_h264(path: Path, count: int = 50, **options: str) -> Path:
    """A video with B-frames and a key frame every ten pictures."""
    images = pictures(count, *EDGE)
    with av.open(str(path), "w") as container:
        settings = {"bf": "2", "g": "10", "x264-params": "scenecut=0"} | options
        stream = container.add_stream("libx264", rate=25, options=settings)
        stream.height, stream.width = EDGE
        stream.pix_fmt = "yuv420p"
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def packets_of(path: Path) -> list[av.Packet]:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def without(source: Path, target: Path, left_out: set[int]) -> Path:
    """The same file without some of its packets."""
    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        stream = after.add_stream_from_template(before.streams.video[0])
        for number, packet in enumerate(before.demux(video=0)):
            if packet.size and number not in left_out:
                packet.stream = stream
                after.mux(packet)
    return target


def overwritten(source: Path, target: Path, numbers: set[int]) -> Path:
    """The same file with rubbish in the place of some packets' data."""
    data = bytearray(source.read_bytes())
    for number, packet in enumerate(packets_of(source)):
        if number in numbers:
            data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    target.write_bytes(data)
    return target


def read(path: Path, **options: bool):
    with VideoSource(path, **options) as video:
        frames = list(video)
        return frames, dict(video.losses()), video


def times(frames) -> list[float]:
    return [round(frame.time_s, 4) for frame in frames]


REGULAR = [round(index / 25, 4) for index in range(50)]


def test_a_whole_file_has_lost_nothing(tmp_path):
    for suffix in ("mp4", "mkv", "ts", "mov"):
        frames, lost, video = read(write_h264(tmp_path / f"x.{suffix}"))
        assert (times(frames), lost, video.rate) == (REGULAR, {}, 25)


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"])
def test_real_files_have_lost_nothing(name):
    assert read(sample_video(name))[1] == {}


def test_stamps_in_the_order_of_decoding_are_not_taken_for_times(tmp_path):
    """AVI with B-frames: FFmpeg gives twice the rate, and times that run backwards."""
    path = write_h264(tmp_path / "x.avi")
    with av.open(str(path)) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert any(later < earlier for earlier, later in itertools.pairwise(stamps)), "the case is gone"
    frames, lost, video = read(path)
    assert (times(frames), lost, video.rate) == (REGULAR, {}, 25)


def test_a_variable_rate_keeps_its_times_and_loses_nothing(tmp_path):
    wanted = [0.0, 0.04, 0.08, 0.3, 0.34, 1.0, 1.01, 2.0]
    video = VideoFile(tmp_path / "x.mp4", EDGE[1], EDGE[0], Fraction(25))
    for time_s, image in zip(wanted, pictures(len(wanted), *EDGE), strict=True):
        video.append(image, time_s)
    video.close()
    frames, lost, _ = read(tmp_path / "x.mp4")
    assert times(frames) == pytest.approx(wanted, abs=1e-3)
    assert lost == {}


def test_a_saved_video_has_the_times_of_its_source(tmp_path, toy_bundle, capsys):
    wanted = [0.0, 0.04, 0.08, 0.3, 0.34, 1.0, 1.01, 2.0]
    video = VideoFile(tmp_path / "x.mp4", EDGE[1], EDGE[0], Fraction(25))
    for time_s, image in zip(wanted, pictures(len(wanted), *EDGE), strict=True):
        video.append(image, time_s)
    video.close()
    for suffix in ("mp4", "mkv", "mov"):
        call(capsys, toy_bundle, tmp_path / "x.mp4", "--save", str(tmp_path / f"out.{suffix}"))
        assert times(read(tmp_path / f"out.{suffix}")[0]) == pytest.approx(wanted, abs=2e-3)


def call(capsys, bundle, source, *words, code=0):
    with pytest.raises(SystemExit) as ended:
        main(["run", "--bundle", str(bundle), "--source", str(source), "--adapt", "off", "--json", *words])
    captured = capsys.readouterr()
    assert (ended.value.code or 0) == code, captured.err
    lines = [json.loads(line) for line in captured.out.splitlines()]
    return lines[:-1], lines[-1]["summary"], captured.err


def test_missing_pictures_are_counted_marked_and_said(tmp_path, toy_bundle, capsys):
    path = without(write_h264(tmp_path / "whole.mkv"), tmp_path / "hole.mkv", set(range(20, 30)))
    lines, summary, said = call(capsys, toy_bundle, path)
    assert (summary["frames_read"], summary["frames_inferred"], summary["frames_lost"]) == (50, 40, 10)
    assert summary["drops"] == {"lost": 10}
    assert sum(line.get("lost_before", 0) for line in lines) == 10
    assert "10 pictures lost between " in said.replace("\n", " ")
    assert all(later["time_s"] > earlier["time_s"] for earlier, later in itertools.pairwise(lines))


def test_undecodable_pictures_within_a_file_are_passed_over(tmp_path, toy_bundle, capsys):
    path = overwritten(write_h264(tmp_path / "whole.mp4"), tmp_path / "hole.mp4", {22, 23})
    lines, summary, _ = call(capsys, toy_bundle, path)
    assert summary["frames_inferred"] + summary["frames_lost"] == 50
    assert 0 < summary["frames_lost"] <= 6
    assert lines[-1]["time_s"] == pytest.approx(49 / 25)


def test_strict_ends_at_the_first_fault(tmp_path, toy_bundle, capsys):
    whole = write_h264(tmp_path / "whole.mkv")
    assert len(read(whole, strict=True)[0]) == 50
    hole = without(whole, tmp_path / "hole.mkv", set(range(20, 30)))
    _, summary, said = call(capsys, toy_bundle, hole, "--strict", code=1)
    assert 15 <= summary["frames_inferred"] <= 20
    assert "damaged or cut short" in said
    rubbish = overwritten(write_h264(tmp_path / "whole.mp4"), tmp_path / "hole.mp4", {22, 23})
    with pytest.raises(SourceError, match="damaged or cut short after"):
        read(rubbish, strict=True)


def test_an_end_without_good_pictures_is_an_error(tmp_path):
    path = overwritten(write_h264(tmp_path / "whole.mp4"), tmp_path / "end.mp4", set(range(30, 50)))
    found = []
    with VideoSource(path) as video, pytest.raises(SourceError, match="damaged or cut short after"):
        found.extend(video)
    assert 25 <= len(found) < 50


def test_pictures_held_back_by_the_decoder_are_not_lost(tmp_path):
    path = overwritten(write_h264(tmp_path / "whole.mp4", bf="3"), tmp_path / "hole.mp4", {44})
    frames, lost, _ = read(path)
    assert len(frames) + sum(lost.values()) == 50
    assert frames[-1].time_s == pytest.approx(49 / 25)


def test_a_clock_that_begins_anew_goes_on_from_where_it_was(tmp_path, caplog):
    first = write_h264(tmp_path / "a.ts", 50)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(first.read_bytes() + first.read_bytes())
    with caplog.at_level(logging.WARNING):
        frames, _, _ = read(joined)
    found = np.array([frame.time_s for frame in frames])
    assert len(frames) == 100
    assert (np.diff(found) >= 0).all()
    assert found[-1] == pytest.approx(99 / 25, abs=0.2)
    assert "its clock falls back by 2.0 s" in caplog.text


def test_a_picture_that_comes_late_is_not_counted_as_lost(tmp_path):
    path = write_h264(tmp_path / "x.mp4")
    with av.open(str(path)) as container:
        clock = VideoClock("x", container.streams.video[0], list(container.decode(video=0))[:6])

    def places(*stamps: int):
        base = clock._base
        clock._base = Fraction(1, 25)
        found = [clock.place(SimpleNamespace(pts=stamp, dts=None)) for stamp in stamps]
        clock._base = base
        return [place.lost for place in found], [round(place.time_s * 25) for place in found]

    assert places(0, 1, 4, 3, 5, 7, 9) == ([0, 0, 2, 0, 0, 0, 1], [0, 1, 4, 4, 5, 7, 9])


def test_a_browsers_recording_whose_rate_is_guessed_from_the_tick_has_no_holes() -> None:
    """Chromium's MediaRecorder: fourteen pictures in 0.96 s, no rate stated, a clock of milliseconds."""
    recording = Path(__file__).parent / "data" / "chrome_mediarecorder.webm"
    with VideoSource(recording, strict=True) as source:
        frames = list(source)
        assert (len(frames), source.losses()) == (14, {})
        assert 5 < source.rate < 60
    assert frames[-1].time_s == pytest.approx(0.96, abs=0.02)
