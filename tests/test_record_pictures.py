"""Pictures kept beside a record: a run is replayed from them alone, however little room there is."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import toy
from mgg_edge.cli.main import main
from mgg_edge.errors import SinkError, SourceError, StateError, UsageError
from mgg_edge.runtime import Adapter, Bundle, open_engine
from mgg_edge.runtime.store import record_pictures
from mgg_edge.runtime.store.record import RunRecorder
from mgg_edge.runtime.store.record_file import Record
from mgg_edge.runtime.store.record_pictures import KeptPictures, PictureKeeper
from mgg_edge.runtime.store.record_replay import Replay

FRAMES = toy.frames(400)
PLENTY = 100_000_000


@pytest.fixture
def write(toy_bundle: Path, tmp_path: Path):
    """Runs and records with pictures; the record, the directory and the hash of the last state."""

    def run(most_bytes=PLENTY, frames=FRAMES, during=None, wait=True, **options):
        keeper = PictureKeeper(tmp_path / "pictures", most_bytes, wait=wait)
        recorder = RunRecorder(tmp_path / "run.mggrun", keeper)
        with Adapter.open(toy_bundle, threads=1, journal=recorder, **options) as adapter:
            recorder.begin(adapter, {"threads": 1})
            for number, frame in enumerate(frames):
                adapter(frame, number / 25)
                if number % 40 == 39:
                    adapter.drain()  # however slow the worker is, some steps are made
                if during is not None:
                    during(adapter, number)
            adapter.drain()
            recorder.close()
            return Record.read(recorder.path), tmp_path / "pictures", adapter.state().digest()

    return run


@pytest.fixture
def replay(loaded_toy: Bundle):
    engine = open_engine(loaded_toy, threads=1)
    yield lambda record, folder: Replay(record, loaded_toy, engine, KeptPictures.read(folder)).run()
    engine.close()


def ended(*words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    return int(exit_.value.code or 0)


def parts(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("adapt", ["always", "burst"])
def test_a_run_is_replayed_from_what_was_kept(write, replay, adapt, background):
    record, folder, last = write(adapt=adapt, background=background)
    report = replay(record, folder)
    assert report.difference is None
    assert report.states + report.not_replayed >= len(record.events)
    assert report.steps >= 3
    assert report.not_replayed == 0
    assert record.events[-1].state == last
    assert report.frames + report.not_kept == len(record.frames)
    assert report.frames >= len({index for line in record.events for index in line.frames})


def test_pictures_around_a_change_are_kept(write, toy_bundle):
    with Adapter.open(toy_bundle, adapt="off", threads=1) as adapter:
        found = [adapter(frame).index for frame in FRAMES[:20]]
    other = next(place for place in range(20) if found[place] != found[0])
    frames = np.repeat(FRAMES[[0, other, 0]], [50, 50, 50], axis=0)
    record, folder, _ = write(adapt="off", frames=frames)
    assert set(KeptPictures.read(folder).files) == {*range(46, 54), *range(96, 104)}
    assert record.events == ()


def test_little_room_keeps_the_end(write, replay):
    record, folder, _ = write(60_000, adapt="always")
    assert size(folder) < 2 * 60_000
    assert len(parts(folder)) >= 2
    assert KeptPictures.read(folder).version > 0
    report = replay(record, folder)
    assert report.difference is None
    assert 0 < report.steps < len(record.events)
    assert report.not_replayed > 0
    assert report.states + report.not_replayed == len(record.events)


def test_a_pause_and_a_reset_are_replayed(write, replay):
    def during(adapter, number):
        for at, action in ((150, adapter.pause), (200, adapter.go_on), (300, adapter.reset)):
            if number == at:
                action()

    record, folder, _ = write(30_000, adapt="always", during=during)
    assert {"pause", "resume", "reset"} <= {line.event for line in record.events}
    assert replay(record, folder).difference is None


class TestDifferences:
    def test_a_picture_that_is_missing(self, write, replay):
        record, folder, _ = write(adapt="always")
        learned = record.events[0].frames[0]
        KeptPictures.read(folder).files[learned].unlink()
        assert f"learned from frame {learned}, which is not kept" in replay(record, folder).difference

    def test_another_picture(self, write, replay):
        record, folder, _ = write(adapt="always")
        learned = record.events[0].frames[0]
        file = KeptPictures.read(folder).files[learned]
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
        assert f"frame {learned}: the kept picture has the hash" in replay(record, folder).difference

    def test_a_damaged_picture(self, write, replay):
        record, folder, _ = write(adapt="always")
        file = KeptPictures.read(folder).files[record.events[0].frames[0]]
        file.write_bytes(file.read_bytes()[:40])
        with pytest.raises(SourceError, match=f"{file.name}: cannot read the picture"):
            replay(record, folder)

    def test_a_damaged_state(self, write, replay):
        record, folder, _ = write(adapt="always")
        state = parts(folder)[0] / record_pictures.STATE
        state.write_bytes(state.read_bytes()[:-1])
        with pytest.raises(StateError, match="damaged"):
            replay(record, folder)

    def test_a_directory_without_any(self, tmp_path):
        with pytest.raises(UsageError, match=r"expected pictures that 'run --record-frames' kept, found none"):
            KeptPictures.read(tmp_path)
        with pytest.raises(UsageError, match="cannot read: No such file"):
            KeptPictures.read(tmp_path / "nowhere")


class TestKeeper:
    def test_only_its_own_parts_are_removed(self, tmp_path):
        (tmp_path / "000000-v0").mkdir()
        PictureKeeper(tmp_path, PLENTY)
        assert parts(tmp_path) == []
        (tmp_path / "holiday.jpg").touch()
        with pytest.raises(UsageError, match=r"expected a directory for pictures alone, found 'holiday\.jpg'"):
            PictureKeeper(tmp_path, PLENTY)
        assert parts(tmp_path) == [tmp_path / "holiday.jpg"]
        with pytest.raises(SinkError, match="cannot keep pictures there: File exists"):
            PictureKeeper(tmp_path / "holiday.jpg", PLENTY)

    def test_a_full_disk_ends_keeping_and_nothing_else(self, write, monkeypatch, caplog):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", full)
        with caplog.at_level(logging.ERROR):
            record, _, _ = write(adapt="always")
        assert [line.levelname for line in caplog.records].count("ERROR") == 1
        assert "keeping pictures ended: No space left on device; the run goes on" in caplog.text
        assert record.complete
        assert len(record.frames) == len(FRAMES)

    def test_no_frame_waits_for_a_slow_disk(self, write, monkeypatch, caplog):
        slow, plain = threading.Event(), Image.Image.save

        def save(image, *words, **options):
            slow.wait(20)
            plain(image, *words, **options)

        monkeypatch.setattr(Image.Image, "save", save)
        monkeypatch.setattr(record_pictures, "WAITING", 8)
        record, _, _ = write(adapt="always", wait=False, during=lambda _, number: slow.set() if number == 399 else None)
        assert "pictures were left out: writing could not keep up" in caplog.text
        assert len(record.frames) == len(FRAMES)


class TestCommands:
    def run(self, toy_bundle, tmp_path, *words):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        (tmp_path / "in").mkdir()
        for number, frame in enumerate(FRAMES[:120]):
            Image.fromarray(frame).save(tmp_path / "in" / f"{number:03}.png")
        return ended("run", "--bundle", str(toy_bundle), "--source", str(tmp_path / "in"), "--adapt", "always", *words)

    def test_run_and_replay(self, toy_bundle, tmp_path, capsys):
        record, folder = tmp_path / "run.mggrun", tmp_path / "kept"
        assert self.run(toy_bundle, tmp_path, "--record", str(record), "--record-frames", str(folder)) == 0
        shutil.rmtree(tmp_path / "in")
        capsys.readouterr()
        assert ended("replay", str(record), "--bundle", str(toy_bundle), "--frames", str(folder)) == 0
        assert "not kept" in capsys.readouterr().out

    def test_every_camera_has_its_own(self, toy_bundle, tmp_path, capsys):
        record, folder = tmp_path / "run.mggrun", tmp_path / "kept"
        second = ("--source", f"other={tmp_path / 'in'}")
        assert self.run(toy_bundle, tmp_path, *second, "--record", str(record), "--record-frames", str(folder)) == 0
        for name in (found := [part.name for part in parts(folder)]):
            own = tmp_path / f"run-{name}.mggrun"
            assert ended("replay", str(own), "--bundle", str(toy_bundle), "--frames", str(folder / name)) == 0
        assert found == ["in", "other"]

    def test_what_cannot_be(self, toy_bundle, tmp_path, capsys):
        assert self.run(toy_bundle, tmp_path, "--record-frames", str(tmp_path / "kept")) == 2
        assert "record-frames: expected with --record FILE" in capsys.readouterr().err
        record = str(tmp_path / "run.mggrun")
        for words in ((), ("--source", "x", "--frames", "y")):
            assert ended("replay", record, *words) == 2
            assert "replay: expected either --source or --frames" in capsys.readouterr().err
