"""Records and their replay: every hash comes out the same, and the first that does not is explained."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import toy
from mgg_edge.cli.main import main
from mgg_edge.errors import SinkError, SourceError, StateError, UsageError
from mgg_edge.runtime import Adapter, Bundle, open_engine
from mgg_edge.runtime.store.record import RunRecorder
from mgg_edge.runtime.store.record_file import Record
from mgg_edge.runtime.store.record_replay import Replay, ReplayReport
from mgg_edge.state import AdaptState

FRAMES = toy.frames(400)


@pytest.fixture
def write(toy_bundle: Path, tmp_path: Path) -> Callable[..., tuple[Record, str]]:
    """Runs and records; the record and the hash of the last state."""

    def run(frames=FRAMES, during: Callable[[Adapter, int], None] | None = None, start=None, **options):
        recorder = RunRecorder(tmp_path / "run.mggrun")
        with Adapter.open(toy_bundle, threads=1, journal=recorder, **options) as adapter:
            if start is not None:
                adapter.resume(start)
            recorder.begin(adapter, {"threads": 1, "av": "1.0"})
            for number, frame in enumerate(frames):
                adapter(frame, number / 25)
                if number % 40 == 39:
                    adapter.drain()  # however slow the worker is, some steps are made
                if during is not None:
                    during(adapter, number)
            adapter.drain()
            last = adapter.state().digest()
        recorder.close()
        return Record.read(recorder.path), last

    return run


@pytest.fixture
def replay(loaded_toy: Bundle) -> Iterator[Callable[..., ReplayReport]]:
    engine = open_engine(loaded_toy, threads=1)
    yield lambda record, frames=FRAMES: Replay(record, loaded_toy, engine).run(frames)
    engine.close()


def altered(record: Record, place: int, **changes) -> Record:
    events = list(record.events)
    events[place] = dataclasses.replace(events[place], **changes)
    return dataclasses.replace(record, events=tuple(events))


class TestReplay:
    @pytest.mark.parametrize("background", [False, True])
    @pytest.mark.parametrize("adapt", ["always", "burst", "off"])
    def test_every_hash_is_reproduced(self, write, replay, adapt: str, background: bool):
        record, last = write(adapt=adapt, background=background)
        report = replay(record)
        assert report.difference is None
        assert report.frames == len(record.frames) == 400
        assert report.states == len(record.events)
        assert record.complete
        if adapt != "off":
            assert record.events[-1].state == last
            assert report.steps >= 3
            kinds = {event.event for event in record.events}
            assert "commit" in kinds
        else:
            assert record.events == ()

    def test_rollbacks_and_refusals_are_in_it(self, write, replay):
        record, _ = write()
        assert {"commit", "refuse", "rollback"} == {event.event for event in record.events}
        assert replay(record).difference is None

    def test_a_run_that_went_on_from_an_earlier_one(self, write, replay, toy_bundle: Path):
        with Adapter.open(toy_bundle, threads=1) as adapter:
            for frame in FRAMES[:80]:
                adapter(frame)
            checkpoint = adapter.checkpoint()
        record, _ = write(FRAMES[80:], start=checkpoint)
        assert record.start is not None
        assert record.start.state.digest() == checkpoint.state.digest() == record.header["state"]
        assert replay(record, FRAMES[80:]).difference is None

    def test_pictures_that_were_dropped_when_it_was_made_are_passed_over(self, write, replay):
        record, _ = write(FRAMES[::3])
        report = replay(record)
        assert (report.difference, report.frames) == (None, 134)
        assert report.skipped == 133 * 2

    def test_a_run_that_was_killed(self, write, replay):
        record, _ = write()
        data = record.path.read_bytes()
        record.path.write_bytes(data[: len(data) // 2])
        cut = Record.read(record.path)
        assert not cut.complete
        report = replay(cut)
        assert report.difference is None
        assert 100 < report.frames < 400

    def test_back_to_the_source_from_logits_that_are_not_finite(self, write, replay):
        def spoil(adapter: Adapter, number: int) -> None:
            if number == 50:
                huge = np.full(toy.THETA, 3e38, np.float32)
                adapter.load_state(AdaptState({**adapter.state(), "theta": huge}))

        record, _ = write(during=spoil)
        assert [event.event for event in record.events].count("load") == 2
        assert "set from outside the run" in (replay(record).difference or "")


class TestDifferences:
    def test_another_video(self, write, replay):
        record, _ = write()
        report = replay(record, toy.frames(400, seed=1))
        assert report.frames == 0
        assert "frame 0: no picture of the source has the hash" in (report.difference or "")
        assert "recorded 1.0" in (report.difference or "")

    def test_one_altered_pixel(self, write, replay):
        record, _ = write()
        pictures = FRAMES.copy()
        pictures[123, 0, 0, 0] ^= 1
        report = replay(record, pictures)
        assert report.frames == 123
        assert "frame 123" in (report.difference or "")

    def test_a_source_that_ends_early(self, write, replay):
        record, _ = write()
        assert "frame 200: the source has no more pictures" in (replay(record, FRAMES[:200]).difference or "")

    def test_other_arithmetic_in_the_step(self, write, replay):
        record, _ = write()
        candidate = hashlib.sha256(b"other").hexdigest()
        diagnostics = {**(record.events[2].diagnostics or {}), "loss": 0.125}
        report = replay(altered(record, 2, candidate=candidate, diagnostics=diagnostics))
        assert report.steps == 2
        difference = report.difference or ""
        assert f"instead of {candidate[:16]}" in difference
        assert "loss" in difference
        assert "instead of 0.125" in difference
        assert "entropy" not in difference, "only what differs is named"
        assert "recorded with onnxruntime-cpu" in difference

    def test_other_arithmetic_in_inference(self, write, replay):
        record, _ = write()
        frames = list(record.frames)
        frames[7] = dataclasses.replace(frames[7], logits="0" * 16)
        report = replay(dataclasses.replace(record, frames=tuple(frames)))
        assert "frame 7: same picture and same θ (version 1), but logits" in (report.difference or "")

    def test_another_state_after_the_same_step(self, write, replay):
        record, _ = write()
        report = replay(altered(record, 3, state="e" * 64))
        assert "instead of eeeeeeeeeeeeeeee (commit)" in (report.difference or "")

    def test_a_step_on_a_frame_that_is_not_recorded(self, write, replay):
        record, _ = write()
        report = replay(altered(record, len(record.events) - 1, frames=(0, 1, 2, 9999)))
        assert "frame 9999, which is not recorded" in (report.difference or "")

    def test_another_bundle(self, write, loaded_toy: Bundle):
        record, _ = write(FRAMES[:8])
        other = dataclasses.replace(loaded_toy, id="c" * 64)
        with pytest.raises(StateError, match=f"{loaded_toy.id}.*{'c' * 64}"):
            Replay(record, other, None)


class TestFile:
    def test_lines(self, write):
        record, last = write(FRAMES[:9])
        lines = [json.loads(line) for line in record.path.read_text().splitlines()]
        assert list(lines[0])[:3] == ["mggrun", "bundle", "engine"]
        assert lines[0]["settings"]["ladder"]["verify_every"] == 8
        assert lines[0]["facts"] == {"threads": 1, "av": "1.0"}
        assert list(lines[1]) == ["frame", "time_s", "sha", "version", "settled", "refused", "logits"]
        assert [line["event"] for line in lines if "event" in line] == ["commit", "commit"]
        assert lines[-1]["end"] == {"lines": len(lines) - 1, "state": last}

    @pytest.mark.parametrize("place", [0.001, 0.1, 0.5, 0.9, 0.975, 0.98, 0.985, 0.99, 0.995])
    def test_an_altered_byte_is_noticed(self, write, place: float):
        record, _ = write(FRAMES[:40])
        data = bytearray(record.path.read_bytes())
        data[int(place * len(data))] ^= 1
        record.path.write_bytes(data)
        with pytest.raises(SourceError):
            Record.read(record.path)

    @pytest.mark.parametrize(
        "content",
        [b"", b"text", b"{}\n", b'{"mggrun": 2}\n', b'{"mggrun": 1}\n{"frame": 1}\n', b'{"mggrun": 1}\n[1]\n'],
    )
    def test_something_else(self, tmp_path: Path, content: bytes):
        path = tmp_path / "x.mggrun"
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"x\.mggrun"):
            Record.read(path)

    def test_no_such_file(self, tmp_path: Path):
        with pytest.raises(UsageError, match="no such record"):
            Record.read(tmp_path / "none")

    def test_a_damaged_start(self, write):
        record, _ = write(FRAMES[:4])
        with pytest.raises(SourceError, match="the state it starts from is damaged"):
            _ = dataclasses.replace(record, header={**record.header, "start": "AAAA"}).start

    def test_a_file_that_cannot_be_made(self, tmp_path: Path):
        with pytest.raises(SinkError, match="cannot write here"):
            RunRecorder(tmp_path / "none" / "run.mggrun")

    def test_a_full_disk_ends_the_record_and_not_the_run(
        self, toy_bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("mgg_edge.runtime.store.record.output_target", Path)  # it would refuse the device
        recorder = RunRecorder("/dev/full")
        with caplog.at_level(logging.ERROR), Adapter.open(toy_bundle, threads=1, journal=recorder) as adapter:
            recorder.begin(adapter)
            for frame in FRAMES:
                adapter(frame)
            assert adapter.counters.frames_inferred == 400
        recorder.close()
        recorder.close()
        assert recorder.failure is not None
        assert caplog.text.count("recording ended") == 1

    def test_a_command_whose_record_is_incomplete_says_so_at_the_end(
        self, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ):
        frame = RunRecorder.frame

        def full(recorder, seen, *words):
            if seen.index == 5:
                recorder._give_up(OSError(errno.ENOSPC, "No space left on device"))
            frame(recorder, seen, *words)

        monkeypatch.setattr(RunRecorder, "frame", full)
        words = ["run", "--bundle", toy_bundle, "--source", "synthetic:frames=20", "--record", tmp_path / "a.mggrun"]
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in [*words, "--json"]])
        said = capfd.readouterr()
        assert ended.value.code == 1
        assert len(said.out.splitlines()) == 21  # the run itself went on to its end
        assert "a.mggrun: the record is incomplete: No space left on device" in said.err
