"""A whole run: source, adapter, sinks, summary; on the toy bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mgg_edge.errors import EngineError, SinkError, SourceError
from mgg_edge.runtime import Adapter, session
from mgg_edge.runtime.adaptation.adapter import AdapterSettings, Prediction
from mgg_edge.runtime.adaptation.guard import StepLimits
from mgg_edge.runtime.outputs.sinks import AnnotatedVideo
from mgg_edge.runtime.session import Percentiles
from mgg_edge.runtime.sources.video import Frame, VideoSource
from videos import pictures, read_pictures, sample_video, write_video

SUMMARY_FIELDS = [
    "frames_read",
    "frames_inferred",
    "frames_dropped",
    "frames_lost",
    "adapt_steps",
    "adapt_rejected",
    "infer_ms",
    "adapt_ms",
    "wall_s",
    "engine",
    "drops",
    "frame_age_ms",
    "reconnects",
    "schedule",
    "resumed",
    "snapshots_restored",
    "guard_breaches",
]


class Recorder:
    """A sink that remembers, and fails when told to."""

    def __init__(self, error: BaseException | None = None, at: int = 0) -> None:
        self.error, self.at = error, at
        self.seen: list[int] = []
        self.ended: list[str] = []

    def write(self, frame: Frame, prediction: Prediction) -> None:
        if self.error is not None and frame.index == self.at:
            raise self.error
        self.seen.append(frame.index)

    def close(self) -> None:
        self.ended.append("close")

    def abort(self) -> None:
        self.ended.append("abort")


@pytest.fixture
def adapter(toy_bundle: Path) -> Iterator[Adapter]:
    with Adapter.open(toy_bundle, threads=1) as opened:
        yield opened


def source(count: int = 12, error: Exception | None = None) -> Iterator[Frame]:
    for index, image in enumerate(pictures(count)):
        yield Frame(index, index / 25, image)
    if error is not None:
        raise error


def test_the_street_video_end_to_end(toy_bundle: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    with VideoSource(sample_video("bikes.mp4")) as video, Adapter.open(toy_bundle, threads=1) as adapter:
        before = adapter.state().digest()
        sink = AnnotatedVideo(target, video.width, video.height, video.rate)
        summary = session.run(video, adapter, [sink])
        after = adapter.state()
    assert summary.failure is None
    assert summary.ending == "exhausted"
    assert (summary.frames_read, summary.frames_inferred, summary.frames_dropped) == (250, 250, 0)
    assert summary.adapt_steps > 10
    assert after.digest() != before
    assert after.non_finite() is None
    images = read_pictures(target)
    assert len(images) == 250
    assert images[0].shape == (272, 640, 3)


def test_the_summary_has_the_agreed_fields_as_plain_json(adapter: Adapter) -> None:
    summary = session.run(source(), adapter)
    values = json.loads(json.dumps(summary.to_dict(), allow_nan=False))
    assert list(values) == SUMMARY_FIELDS
    assert list(values["infer_ms"]) == list(values["adapt_ms"]) == ["p50", "p95", "p99"]
    assert 0 < values["infer_ms"]["p50"] <= values["infer_ms"]["p99"]
    assert values["adapt_ms"]["p50"] > 0
    assert values["adapt_steps"] == 3
    assert values["wall_s"] > 0
    assert values["engine"].startswith("onnxruntime-cpu ")
    assert (values["schedule"], values["resumed"], values["snapshots_restored"]) == (adapter.schedule_name, False, 0)
    assert values["guard_breaches"] == values["drops"] == {}


def test_refusals_are_counted_by_reason_and_a_resumed_run_says_so(toy_bundle: Path) -> None:
    with Adapter.open(toy_bundle, threads=1, adapt="always", settings=AdapterSettings(limits=StepLimits(0.0))) as one:
        summary = session.run(source(), one)
        assert summary.guard_breaches == {"update": summary.adapt_rejected}
        assert summary.adapt_rejected == 3
        assert session.run([], one).guard_breaches == {}  # its own, not those before
        kept = one.checkpoint()
    with Adapter.open(toy_bundle, threads=1) as other:
        other.resume(kept)
        summary = session.run(source(), other)
        assert (summary.resumed, summary.schedule) == (True, other.schedule_name)


def test_every_sink_and_the_progress_see_every_frame_in_order(adapter: Adapter) -> None:
    sinks, told = [Recorder(), Recorder()], []
    session.run(source(5), adapter, sinks, lambda frame, _: told.append(frame.index))
    assert told == sinks[0].seen == sinks[1].seen == [0, 1, 2, 3, 4]
    assert [sink.ended for sink in sinks] == [["close"], ["close"]]


def test_a_second_run_counts_its_own_frames(adapter: Adapter) -> None:
    session.run(source(5), adapter)
    summary = session.run(source(3), adapter)
    assert (summary.frames_read, summary.frames_inferred, summary.frames_dropped) == (3, 3, 0)


def test_a_source_that_breaks_keeps_what_was_read(adapter: Adapter, tmp_path: Path) -> None:
    broken = SourceError("cut short")
    video = AnnotatedVideo(tmp_path / "out.mp4", 48, 32, Fraction(25))
    summary = session.run(source(6, broken), adapter, [video])
    assert (summary.ending, summary.failure) == ("failed", broken)
    assert summary.frames_read == summary.frames_inferred == 6
    assert len(read_pictures(tmp_path / "out.mp4")) == 6


def test_a_failing_sink_ends_the_run_and_the_others_are_completed(adapter: Adapter) -> None:
    failing, other = Recorder(SinkError("disk full"), at=2), Recorder()
    summary = session.run(source(), adapter, [other, failing])
    assert summary.failure is failing.error
    assert other.seen == [0, 1, 2]
    assert other.ended == ["close"]


def test_the_first_failure_is_the_one_reported(adapter: Adapter) -> None:
    class Stubborn(Recorder):
        def close(self) -> None:
            raise SinkError("also cannot close")

    other = Recorder()
    summary = session.run(source(3, SourceError("first")), adapter, [Stubborn(), other])
    assert str(summary.failure) == "first"
    assert other.ended == ["close"]
    assert str(session.run(source(3), adapter, [Stubborn()]).failure) == "also cannot close"


def test_a_failing_engine_is_reported_and_its_frame_counts_as_dropped(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise EngineError("lost the device")

    monkeypatch.setattr(adapter._engine, "infer", fail)
    summary = session.run(source(), adapter)
    assert str(summary.failure) == "lost the device"
    assert (summary.frames_read, summary.frames_inferred, summary.frames_dropped) == (1, 0, 1)
    assert summary.infer_ms == Percentiles(None, None, None)


def test_a_reader_that_went_away_ends_the_run_without_failure(adapter: Adapter) -> None:
    summary = session.run(source(), adapter, [Recorder(BrokenPipeError(), at=4), other := Recorder()])
    assert (summary.ending, summary.failure) == ("reader-gone", None)
    assert other.ended == ["close"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_the_unforeseen_aborts_every_sink_and_is_not_swallowed(adapter: Adapter, error: BaseException) -> None:
    sinks = [Recorder(), Recorder(error, at=3)]
    with pytest.raises(type(error)):
        session.run(source(), adapter, sinks)
    assert [sink.ended for sink in sinks] == [["abort"], ["abort"]]


def test_limit_and_stop_end_before_the_next_frame_is_read(adapter: Adapter) -> None:
    frames = source(10)
    summary = session.run(frames, adapter, limit=4)
    assert (summary.ending, summary.frames_read) == ("limit", 4)
    assert next(frames).index == 4
    seen: list[int] = []
    summary = session.run(
        source(10), adapter, [], lambda frame, _: seen.append(frame.index), stop=lambda: len(seen) >= 3
    )
    assert (summary.ending, summary.frames_read, summary.failure) == ("stopped", 3, None)


def test_adapt_off_never_adapts(toy_bundle: Path) -> None:
    with Adapter.open(toy_bundle, adapt="off", threads=1) as adapter:
        summary = session.run(source(), adapter)
    assert summary.adapt_steps == 0
    assert summary.adapt_ms == Percentiles(None, None, None)


def test_percentiles_are_those_of_numpy() -> None:
    times = list(np.random.default_rng(0).random(101))
    found = Percentiles.of(times)
    assert (found.p50, found.p95, found.p99) == pytest.approx(np.percentile(times, (50, 95, 99)), abs=1e-4)


def test_a_truncated_file_runs_to_its_last_good_frame(adapter: Adapter, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", pictures(60), codec="mpeg4", movflags="faststart")
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with VideoSource(tmp_path / "cut.mp4") as video:
        summary = session.run(video, adapter)
    assert isinstance(summary.failure, SourceError)
    assert 0 < summary.frames_inferred < 60
