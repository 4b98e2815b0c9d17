"""A state kept while an adapter runs, and the commands around it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.numpy

import toy
from checkpoints import OTHER_BUNDLE, checkpoint
from mgg_edge.errors import SinkError, StateError, UsageError
from mgg_edge.runtime import Adapter, Bundle
from mgg_edge.runtime.store.state_file import StateStore
from mgg_edge.runtime.store.state_file_keeper import StateKeeper
from mgg_edge.runtime.store.state_file_system import RealFiles
from videos import pictures, write_video

COMMAND = [sys.executable, "-c", "from mgg_edge.cli.main import main; main()"]


def keeper(adapter: Adapter, directory: Path, interval_s: float = 60.0, files=None) -> StateKeeper:
    return StateKeeper(adapter, StateStore(directory, "gate", adapter.bundle_id, files), interval_s)


def wait_for_the_last_save(kept: StateKeeper, adapter: Adapter) -> None:
    deadline_s = time.monotonic() + 30
    while kept._saved_version != adapter.version:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def run(adapter: Adapter, count: int, seed: int = 0) -> None:
    for frame in toy.frames(count, seed):
        adapter(frame)


class TestKeeper:
    def test_the_next_run_goes_on(self, toy_bundle: Path, tmp_path: Path):
        with Adapter.open(toy_bundle, threads=1) as first:
            with keeper(first, tmp_path) as kept:
                assert not first.resumed
                run(first, 40)
            assert kept.saves == 1
        with Adapter.open(toy_bundle, threads=1) as second, keeper(second, tmp_path) as kept:
            assert second.resumed
            assert second.state().digest() == first.state().digest()
        assert kept.saves == 0, "nothing changed"

    def test_saves_now_and_then_while_theta_changes(self, toy_bundle: Path, tmp_path: Path):
        with Adapter.open(toy_bundle, threads=1) as adapter, keeper(adapter, tmp_path, interval_s=0.01) as kept:
            deadline_s = time.monotonic() + 20
            seed = 0
            while kept.saves < 3 and time.monotonic() < deadline_s:
                run(adapter, 4, seed := seed + 1)
                time.sleep(0.005)
            assert kept.saves >= 3
            wait_for_the_last_save(kept, adapter)
            before = kept.saves
            time.sleep(0.1)
            assert kept.saves == before

    def test_what_is_learned_first_is_saved_at_once(self, toy_bundle: Path, tmp_path: Path):
        with Adapter.open(toy_bundle, threads=1) as adapter, keeper(adapter, tmp_path, interval_s=3600) as kept:
            run(adapter, 12)
            assert adapter.counters.adapt_steps > 0
            deadline_s = time.monotonic() + 30
            while kept.saves == 0:
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            run(adapter, 12)  # what comes later waits for its time
            time.sleep(2.5)
            assert kept.saves == 1

    def test_a_kill_loses_at_most_an_interval(self, toy_bundle: Path, tmp_path: Path):
        with Adapter.open(toy_bundle, threads=1) as adapter, keeper(adapter, tmp_path, interval_s=0.01) as kept:
            run(adapter, 8)
            wait_for_the_last_save(kept, adapter)
            found = StateStore(tmp_path, "gate", adapter.bundle_id).load()  # as after a kill
            assert found is not None
            assert found.state.digest() == adapter.state().digest()

    def test_a_disk_that_fails_for_a_while(self, toy_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        class Failing(RealFiles):
            broken = True

            def sync(self, handle: int) -> None:
                if self.broken:
                    raise OSError(28, "No space left on device")
                super().sync(handle)

        files = Failing()
        with Adapter.open(toy_bundle, threads=1) as adapter, caplog.at_level(logging.WARNING):
            with keeper(adapter, tmp_path, interval_s=0.01, files=files) as kept:
                run(adapter, 8)
                while not kept.failures:
                    time.sleep(0.005)
                files.broken = False
            assert kept.saves == 1
        assert "No space left on device; trying again" in caplog.text

    def test_the_last_save_raises(self, toy_bundle: Path, tmp_path: Path):
        class Failing(RealFiles):
            def sync(self, handle: int) -> None:
                raise OSError(28, "No space left on device")

        with Adapter.open(toy_bundle, threads=1) as adapter:
            context = keeper(adapter, tmp_path, files=Failing())
            context.__enter__()
            run(adapter, 8)
            with pytest.raises(SinkError, match="No space left"):
                context.__exit__(None, None, None)
            with keeper(adapter, tmp_path):
                pass  # unlocked again

    def test_damaged_files_are_set_aside_and_said_so(
        self, toy_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        (tmp_path / "gate.0.mggstate").write_bytes(b"rubbish")
        with Adapter.open(toy_bundle, threads=1) as adapter, caplog.at_level(logging.WARNING):
            with keeper(adapter, tmp_path) as kept:
                assert not adapter.resumed
                run(adapter, 8)
            assert kept.saves == 1
        assert "the camera begins anew" in caplog.text
        assert (tmp_path / "gate.0.damaged").read_bytes() == b"rubbish"

    def test_a_state_of_another_bundle_and_one_in_use_are_refused(self, toy_bundle: Path, tmp_path: Path):
        StateStore(tmp_path, "gate", OTHER_BUNDLE).save(checkpoint(1, OTHER_BUNDLE))
        with Adapter.open(toy_bundle, threads=1) as adapter:
            with pytest.raises(StateError, match=f"{OTHER_BUNDLE}.*{adapter.bundle_id}"), keeper(adapter, tmp_path):
                pass
            with keeper(adapter, tmp_path / "other"), pytest.raises(StateError, match="in use by another process"):
                keeper(adapter, tmp_path / "other").__enter__()

    def test_the_interval_is_checked(self, toy_bundle: Path, tmp_path: Path):
        with Adapter.open(toy_bundle, threads=1) as adapter, pytest.raises(UsageError, match="interval_s"):
            keeper(adapter, tmp_path, interval_s=0)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "street.mkv", pictures(60), codec="ffv1")


def mgg_edge(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def done(video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, and the state and record of two runs of camera `gate`."""
    folder = tmp_path_factory.mktemp("run")
    toy.write_bundle(folder / "toy.mgg")
    for name in ("one", "two"):
        result = mgg_edge(
            *(
                "run",
                "--bundle",
                folder / "toy.mgg",
                "--source",
                f"gate={video}",
                "--threads",
                1,
                "--json",
                "--limit",
                20,
            ),
            *("--state", folder / "states", "--record", folder / f"{name}.mggrun"),
        )
        assert result.returncode == 0, result.stderr
    return folder


class TestCommands:
    def test_show(self, done: Path):
        facts = json.loads(mgg_edge("state", "show", done / "states", "--json").stdout)["gate"]
        assert facts["bundle"] == Bundle.load(done / "toy.mgg").id
        assert facts["generation"] == 1
        assert facts["step"] > 0
        assert facts["arrays"] == {"theta": [12], "momentum": [12], "step": []}
        text = mgg_edge("state", "show", done / "states").stdout
        assert facts["state"] in text
        assert "gate" in text

    def test_diff(self, done: Path):
        files = sorted((done / "states").glob("*.mggstate"))
        rows = json.loads(mgg_edge("state", "diff", *files, "--json").stdout)["arrays"]
        assert not rows["theta"]["equal"]
        assert rows["theta"]["largest_change"] > 0
        same = json.loads(mgg_edge("state", "diff", files[0], files[0], "--json").stdout)["arrays"]
        assert all(row["equal"] and row["largest_change"] == 0 for row in same.values())
        assert "momentum" in mgg_edge("state", "diff", files[0], done / "toy.mgg").stdout

    def test_diff_of_two_bundles_states(self, done: Path, tmp_path: Path):
        StateStore(tmp_path, "x", OTHER_BUNDLE).save(checkpoint(1, OTHER_BUNDLE))
        result = mgg_edge("state", "diff", tmp_path / "x.0.mggstate", done / "toy.mgg")
        assert result.returncode == 2
        assert OTHER_BUNDLE in result.stderr

    def test_export(self, done: Path, tmp_path: Path):
        out = tmp_path / "gate.safetensors"
        assert mgg_edge("state", "export", done / "states", "--camera", "gate", "--out", out).returncode == 0
        saved = StateStore(done / "states", "gate", Bundle.load(done / "toy.mgg").id).load()
        assert saved is not None
        arrays = safetensors.numpy.load_file(out)
        assert {name: array.tobytes() for name, array in arrays.items()} == {
            name: array.tobytes() for name, array in saved.state.items()
        }

    def test_replay(self, done: Path, video: Path):
        for name in ("one", "two"):
            result = mgg_edge(
                "replay", done / f"{name}.mggrun", "--bundle", done / "toy.mgg", "--source", video, "--json"
            )
            assert result.returncode == 0, result.stderr
            report = json.loads(result.stdout)
            assert (report["frames"], report["difference"], report["complete"]) == (20, None, True)
            assert report["steps"] > 3

    def test_replay_of_another_video(self, done: Path, tmp_path: Path):
        other = write_video(tmp_path / "other.mkv", pictures(60)[::-1], codec="ffv1")
        result = mgg_edge("replay", done / "one.mggrun", "--bundle", done / "toy.mgg", "--source", other)
        assert result.returncode == 4
        assert "first difference: frame" in result.stderr
        assert "Traceback" not in result.stderr

    def test_reset(self, done: Path, tmp_path: Path):
        states = tmp_path / "states"
        states.mkdir()
        for camera in ("a", "b"):
            StateStore(states, camera, OTHER_BUNDLE).save(checkpoint(1, OTHER_BUNDLE))
        assert mgg_edge("state", "reset", states, "--camera", "a").stdout == "a: begins anew\n"
        assert [path.name for path in states.glob("*.mggstate")] == ["b.0.mggstate"]
        assert mgg_edge("state", "reset", states).stdout == "b: begins anew\n"

    @pytest.mark.parametrize("command", ["show", "reset"])
    def test_no_such_directory_or_camera(self, done: Path, tmp_path: Path, command: str):
        result = mgg_edge("state", command, tmp_path / "none")
        assert (result.returncode, "no such directory" in result.stderr) == (2, True)
        result = mgg_edge("state", command, done / "states", "--camera", "other")
        assert (result.returncode, "expected a camera of gate, found 'other'" in result.stderr) == (2, True)

    def test_a_foreign_state_stops_the_run_with_both_ids(self, done: Path, video: Path, tmp_path: Path):
        StateStore(tmp_path, "gate", OTHER_BUNDLE).save(checkpoint(1, OTHER_BUNDLE))
        result = mgg_edge("run", "--bundle", done / "toy.mgg", "--source", f"gate={video}", "--state", tmp_path)
        assert result.returncode == 1
        note, error = result.stderr.splitlines()
        assert "knows no site" in note
        assert OTHER_BUNDLE in error
        assert Bundle.load(done / "toy.mgg").id in error

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
    def test_a_signal_ends_the_run_after_saving(self, done: Path, tmp_path: Path, number: int, code: int):
        long = write_video(tmp_path / "long.mkv", pictures(60) * 200, codec="mpeg4")
        command = ["run", "--bundle", done / "toy.mgg", "--source", f"gate={long}", "--json"]
        command += ["--state", tmp_path / "states", "--record", tmp_path / "r.mggrun"]
        with subprocess.Popen(
            [*COMMAND, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for _ in range(100):
                assert process.stdout.readline()
            os.kill(process.pid, number)
            output, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        summary = json.loads(output.splitlines()[-1])["summary"]
        assert summary["frames_inferred"] < 12_000
        saved = StateStore(tmp_path / "states", "gate", Bundle.load(done / "toy.mgg").id).load()
        assert saved is not None
        end = json.loads((tmp_path / "r.mggrun").read_text().splitlines()[-1])["end"]
        assert end["state"] == saved.state.digest()
        assert saved.counters["adapt_steps"] == summary["adapt_steps"]
