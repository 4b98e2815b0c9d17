"""State files: whole whatever happens, bound to their bundle, and bit-exact."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from checkpoints import BUNDLE, OTHER_BUNDLE, checkpoint
from faulty_files import FaultyFiles, PowerCut
from mgg_edge.errors import SinkError, StateError, UsageError
from mgg_edge.runtime.adaptation.adapter_checkpoint import Checkpoint
from mgg_edge.runtime.store.state_file import StateStore, camera_name, cameras_in, file_name, newest_state
from mgg_edge.runtime.store.state_file_format import SavedState, decode_state, encode_state
from mgg_edge.runtime.store.state_file_system import RealFiles

FOLDER = Path(tempfile.gettempdir())  # only has to exist: the files in it are `FaultyFiles`


def same(first: Checkpoint | None, second: Checkpoint | None) -> bool:
    """Equal in every field, arrays bit for bit."""
    if first is None or second is None:
        return first is second
    return encode_state(SavedState(first, "x", 0)) == encode_state(SavedState(second, "x", 0))


class TestFormat:
    def test_round_trip_is_bit_exact(self):
        given = checkpoint(7)
        found = decode_state(encode_state(SavedState(given, "gate", 5)), "here")
        assert (found.camera, found.generation) == ("gate", 5)
        for field in dataclasses.fields(Checkpoint):
            before, after = getattr(given, field.name), getattr(found.checkpoint, field.name)
            if field.name in ("state", "last_good", "older"):
                assert before.digest() == after.digest(), field.name
            elif field.name == "snapshots":
                assert [(s.digest(), fit) for s, fit in before] == [(s.digest(), fit) for s, fit in after]
            elif field.name == "drift_mean":
                assert before.tobytes() == after.tobytes()
            else:
                assert before == after, field.name

    def test_a_state_that_appears_twice_is_stored_once(self):
        given = checkpoint(7)
        twice = dataclasses.replace(given, older=given.state, snapshots=())
        apart = dataclasses.replace(twice, older=checkpoint(8).state)
        assert len(encode_state(SavedState(apart, "x", 0))) - len(encode_state(SavedState(twice, "x", 0))) > 500

    def test_every_flipped_byte_is_noticed(self):
        data = encode_state(SavedState(checkpoint(3), "gate", 0))
        for place in range(0, len(data), 7):
            broken = bytearray(data)
            broken[place] ^= 1
            with pytest.raises(StateError, match=r"here: "):
                decode_state(bytes(broken), "here")

    @pytest.mark.parametrize("length", [0, 1, 8, 11, 12, 40, 100, -1])
    def test_every_truncation_is_noticed(self, length: int):
        with pytest.raises(StateError, match=r"here: "):
            decode_state(encode_state(SavedState(checkpoint(3), "gate", 0))[:length], "here")

    @pytest.mark.parametrize(
        "header",
        [
            b"{}",
            b"[]",
            b"not json",
            b'{"format": 2}',
            b'{"format": 1, "arrays": [["a", "object", [1]]]}',
            b'{"format": 1, "arrays": [["a", "float32", [99]]]}',
            b'{"format": 1, "arrays": [["a", "float32", [-1]]]}',
            b'{"format": 1, "arrays": [["a", "float32", [1e9]]]}',
            b'{"format": 1, "arrays": 3}',
            b"[" * 100_000,
        ],
    )
    def test_a_header_made_to_deceive(self, header: bytes):
        import hashlib

        body = b"MGGSTATE" + len(header).to_bytes(4, "little") + header
        with pytest.raises(StateError, match=r"here: "):
            decode_state(body + hashlib.sha256(body).digest(), "here")

    def test_a_header_longer_than_the_file(self):
        import hashlib

        body = b"MGGSTATE" + (1 << 30).to_bytes(4, "little")
        with pytest.raises(StateError, match="expected a header within the file"):
            decode_state(body + hashlib.sha256(body).digest(), "here")


class TestStore:
    def test_the_newest_of_two_generations(self, tmp_path: Path):
        store = StateStore(tmp_path / "new" / "folder", "gate", BUNDLE)
        assert store.load() is None
        for number in range(5):
            store.save(checkpoint(number))
            assert same(StateStore(store.directory, "gate", BUNDLE).load(), checkpoint(number))
        assert sorted(path.name for path in store.directory.iterdir()) == ["gate.0.mggstate", "gate.1.mggstate"]

    def test_a_damaged_generation_is_reported_and_the_other_one_taken(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        store = StateStore(tmp_path, "gate", BUNDLE)
        for number in range(4):
            store.save(checkpoint(number))
        newest = store.paths()[1]
        newest.write_bytes(newest.read_bytes()[:-1])
        again = StateStore(tmp_path, "gate", BUNDLE)
        with caplog.at_level(logging.WARNING):
            assert same(again.load(), checkpoint(2))
        assert "using the other generation" in caplog.text
        again.save(checkpoint(9))
        assert same(StateStore(tmp_path, "gate", BUNDLE).load(), checkpoint(9))
        assert same(decode_state(store.paths()[0].read_bytes(), "").checkpoint, checkpoint(2)), "the whole one stays"

    def test_two_damaged_ones_are_an_error_until_set_aside(self, tmp_path: Path):
        store = StateStore(tmp_path, "gate", BUNDLE)
        store.save(checkpoint(0))
        store.save(checkpoint(1))
        for path in store.paths():
            path.write_bytes(b"rubbish")
        again = StateStore(tmp_path, "gate", BUNDLE)
        with pytest.raises(StateError, match="mgg-edge state reset"):
            again.load()
        with pytest.raises(StateError):
            again.save(checkpoint(2))
        assert again.is_damaged()
        assert [path.suffix for path in again.set_aside()] == [".damaged", ".damaged"]
        assert again.load() is None

    def test_a_state_of_another_bundle_is_refused_with_both_ids(self, tmp_path: Path):
        StateStore(tmp_path, "gate", OTHER_BUNDLE).save(checkpoint(1, OTHER_BUNDLE))
        store = StateStore(tmp_path, "gate", BUNDLE)
        for attempt in (store.load, lambda: store.save(checkpoint(2))):
            with pytest.raises(StateError, match=f"{OTHER_BUNDLE}.*{BUNDLE}"):
                attempt()
        found = newest_state(tmp_path, "gate")
        assert found is not None
        assert found.checkpoint.step == 1

    def test_cameras_do_not_mix(self, tmp_path: Path):
        for number, camera in enumerate(("a", "b", "b.0", "b-1")):
            StateStore(tmp_path, camera, BUNDLE).save(checkpoint(number))
        assert cameras_in(tmp_path) == ["a", "b", "b-1", "b.0"]
        for number, camera in enumerate(("a", "b", "b.0", "b-1")):
            assert same(StateStore(tmp_path, camera, BUNDLE).load(), checkpoint(number))

    @pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 101, "a b", "ä"])
    def test_names_that_cannot_be_a_file_s(self, tmp_path: Path, name: str):
        with pytest.raises(UsageError, match="camera: expected up to 100 letters"):
            StateStore(tmp_path, name, BUNDLE)
        StateStore(tmp_path, file_name(name), BUNDLE)

    def test_names_for_cameras(self):
        assert file_name("gate-3") == "gate-3"
        assert camera_name("rtsp://10.0.0.3/live") == "rtsp-10-0-0-3-live-" + camera_name("rtsp://10.0.0.3/live")[-8:]
        assert camera_name("a/b") != camera_name("a:b")

    def test_a_directory_that_cannot_be_made(self, tmp_path: Path):
        (tmp_path / "file").write_text("")
        with pytest.raises(SinkError, match="cannot make the state directory"):
            StateStore(tmp_path / "file" / "below", "gate", BUNDLE)

    def test_one_process_at_a_time(self, tmp_path: Path):
        store = StateStore(tmp_path, "gate", BUNDLE)
        with (tmp_path / "gate.lock").open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(StateError, match="in use by another process"), store.locked():
                pass
        with store.locked():
            pass
        with store.locked():
            pass

    def test_no_descriptor_stays_open(self, tmp_path: Path):
        store = StateStore(tmp_path, "gate", BUNDLE)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for number in range(20):
            with store.locked():
                store.save(checkpoint(number))
                store.load()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def prepared(saves: int, **options: int) -> tuple[FaultyFiles, StateStore]:
    files = FaultyFiles(**options)
    store = StateStore(FOLDER, "gate", BUNDLE, files)
    for number in range(saves):
        store.save(checkpoint(number))
    files.operations = 0
    return files, store


def operations_of_a_save(saves: int, **options: int) -> int:
    files, store = prepared(saves, **options)
    store.save(checkpoint(saves))
    return files.operations


@pytest.mark.parametrize("short_writes", [1 << 30, 1000])
@pytest.mark.parametrize("saves", [0, 1, 2, 5])
class TestFailingDisk:
    @pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
    def test_the_k_th_call_fails_for_every_k(self, saves: int, short_writes: int, error: int):
        total = operations_of_a_save(saves, short_writes=short_writes)
        assert total >= 6
        previous = checkpoint(saves - 1) if saves else None
        for k in range(total):
            files, store = prepared(saves, short_writes=short_writes)
            files.fail_at, files.error = k, error
            with pytest.raises(SinkError, match="cannot save the state"):
                store.save(checkpoint(saves))
            found = StateStore(FOLDER, "gate", BUNDLE, files).load()
            assert same(found, previous) or same(found, checkpoint(saves)), k
            assert same(found, previous) or k == total - 1, "only after the last call can it be the new one"
            assert files.open_handles == 0
            files.fail_at = None
            store.save(checkpoint(saves + 1))
            assert same(StateStore(FOLDER, "gate", BUNDLE, files).load(), checkpoint(saves + 1))

    def test_the_power_fails_at_every_k_and_unsynced_writes_are_lost(self, saves: int, short_writes: int):
        total = operations_of_a_save(saves, short_writes=short_writes)
        previous = checkpoint(saves - 1) if saves else None
        for k in range(total):
            files, store = prepared(saves, short_writes=short_writes)
            files.fail_at, files.error = k, None
            with pytest.raises(PowerCut):
                store.save(checkpoint(saves))
            for disk in files.after_power_cut():
                found = StateStore(FOLDER, "gate", BUNDLE, disk).load()
                assert same(found, previous) or same(found, checkpoint(saves)), k

    def test_what_was_saved_survives_a_power_cut(self, saves: int, short_writes: int):
        files, store = prepared(saves, short_writes=short_writes)
        store.save(checkpoint(saves))
        for disk in files.after_power_cut():
            assert same(StateStore(FOLDER, "gate", BUNDLE, disk).load(), checkpoint(saves))


def test_positive_control_a_disk_that_does_not_sync_loses_saves():
    files, store = prepared(0)
    files.syncs = False
    for number in range(3):
        store.save(checkpoint(number))
    found = []
    for disk in files.after_power_cut():
        try:
            found.append(same(StateStore(FOLDER, "gate", BUNDLE, disk).load(), checkpoint(2)))
        except StateError:
            found.append(False)
    assert not all(found)


def kill(directory: Path, kills: int, *options: str) -> dict[str, int]:
    script = Path(__file__).with_name("kill_saver.py")
    command = [sys.executable, str(script), str(directory), str(kills), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kill_at_200_random_points_leaves_no_unreadable_state(tmp_path: Path):
    result = kill(tmp_path, 200)
    assert (result["kills"], result["unreadable"], result["lost"]) == (200, 0, 0)
    assert result["saves"] >= 200, "the kills must fall into saves"


def test_positive_control_files_written_in_place_are_unreadable_after_a_kill(tmp_path: Path):
    assert kill(tmp_path, 20, "--in-place")["unreadable"] > 0


def test_real_files_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fsync of the file before the rename, of the directory after it."""
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        calls.append("directory" if Path(f"/proc/self/fd/{handle}").is_dir() else "file")
        real_sync(handle)

    def note_replace(source: Path, target: Path) -> None:
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    StateStore(tmp_path, "gate", BUNDLE, RealFiles()).save(checkpoint(1))
    assert calls == ["file", "rename", "directory"]


def test_arrays_are_independent_of_the_file(tmp_path: Path):
    store = StateStore(tmp_path, "gate", BUNDLE)
    store.save(checkpoint(4))
    found = store.load()
    assert found is not None
    assert found.state["theta"].dtype == np.float32
    assert not found.state["theta"].flags.writeable


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("mgg_edge.runtime.store.state_file.fcntl.flock", refuse)
    store = StateStore(tmp_path, "camera", BUNDLE)
    with pytest.raises(SinkError, match=r"has no locks .No locks available.*on a local disk"), store.locked():
        pass


def test_a_directory_that_cannot_be_synced_is_no_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.fsync

    def sync(handle: int, error: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(error, os.strerror(error))
        real(handle)

    store = StateStore(tmp_path, "camera", BUNDLE)
    monkeypatch.setattr("os.fsync", lambda handle: sync(handle, errno.EINVAL))
    store.save(checkpoint(1))
    found = store.load()
    assert found is not None
    assert found.step == 1
    monkeypatch.setattr("os.fsync", lambda handle: sync(handle, errno.EIO))
    with pytest.raises((SinkError, OSError)):
        store.save(checkpoint(2))
