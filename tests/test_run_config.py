"""A file of cameras: what it may say, and how a run takes up a changed one without touching the cameras that stay."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mgg_edge.cli.main import main
from mgg_edge.cli.run_words import CameraWords, named, read_cameras
from mgg_edge.errors import UsageError
from streams import free_port

COMMON = CameraWords("", "", Path("common.mgg"), adapt="window", stall_timeout=7.0)
LIVE = "synthetic:live=1,paced=1,frames=0,rate=30"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cameras.toml"


def test_a_camera_s_words_come_before_the_file_s_and_these_before_the_command_line_s(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOOR", "rtsp://user:secret@10.0.0.8/a")
    file.write_text(
        """
        adapt = "burst"
        max-reconnects = 9
        [camera.door]
        source = "$DOOR"
        bundle = "door.mgg"
        adapt = "off"
        latest = false
        [camera.gate]
        source = "0"
        adapt-budget-ms = 50
        strict = true
        stall-timeout = 1.5
        """
    )
    door, gate = read_cameras(file, COMMON)
    assert door == CameraWords(
        "door", os.environ["DOOR"], Path("door.mgg"), "off", None, False, stall_timeout=7.0, max_reconnects=9
    )
    assert gate == CameraWords("gate", "0", Path("common.mgg"), "burst", 50, None, True, 1.5, 9)
    assert (door.policy, gate.policy) == ("every-frame", None)
    assert (gate.live_options.stall_timeout_s, gate.live_options.max_reconnects) == (1.5, 9)
    assert "secret" not in repr(door)


def test_a_byte_order_mark_is_no_word(file: Path) -> None:
    file.write_bytes(b'\xef\xbb\xbf[camera.a]\nsource = "0"\n')
    assert [camera.name for camera in read_cameras(file, COMMON)] == ["a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected at least one table [camera.NAME], found none"),
        ("camera = 3", "expected at least one table [camera.NAME]"),
        ("[camera.a]", "camera.a: expected a source, found none"),
        ("[camera]\na = 1", "camera.a: expected a table, found a number"),
        ('[camera."a b"]\nsource = "0"', "camera.a b: expected a name of a letter and up to 31"),
        ('[camera.a]\nsource = ""', "camera.a.source: expected text: a file"),
        ("[camera.a]\nsource = 0", "camera.a.source: expected text: a file, camera, address, or $NAME"),
        ('[camera.a]\nsource = "$NO_SUCH_THING"', "camera.a.source: the environment has no NO_SUCH_THING"),
        ('[camera.a]\nsurce = "0"', "camera.a: expected 'source', found 'surce'"),
        ('[camera.a]\nsource = "0"\nserve = "80"', "expected one of source, bundle, adapt"),
        ('source = "0"\n[camera.a]\nsource = "0"', "found 'source'"),
        ('[camera.a]\nsource = "0"\nadapt = "sometimes"', "expected one of auto, window, burst, always, off"),
        ('[camera.a]\nsource = "0"\nadapt-budget-ms = 0', "expected a number of at least 1, found a number 0"),
        ('[camera.a]\nsource = "0"\nadapt-budget-ms = true', "found a truth value True"),
        ('[camera.a]\nsource = "0"\nadapt-budget-ms = nan', "expected a number of at least 1, found a number nan"),
        ('[camera.a]\nsource = "0"\nstall-timeout = 1e9', "expected seconds from 0.1 to 3600"),
        ('[camera.a]\nsource = "0"\nmax-reconnects = 1.5', "expected a whole number of at least 0"),
        ('[camera.a]\nsource = "0"\nlatest = 1', "expected true or false, found a number 1"),
        ('[camera.a]\nsource = "0"\nbundle = 2026-01-01', "expected the path of a bundle, found a date or time"),
        ('[camera.a]\nsource = "0"\n[camera.a]\nsource = "1"', "not TOML"),
        ('[camera.a]\nsource = "rtsp://u:secret@h/', "not TOML"),
        ("x" * (1 << 20) + "y", "expected at most 1048576 bytes"),
        ("[" * 3000, "not TOML"),
    ],
)
def test_what_a_file_may_not_say_is_one_line(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        read_cameras(file, COMMON)
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_files_that_cannot_be_read(file: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the cameras: No such file"):
        read_cameras(file, COMMON)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not TOML"):
        read_cameras(file, COMMON)
    with pytest.raises(UsageError, match="Is a directory"):
        read_cameras(file.parent, COMMON)


def test_names_of_a_command_line() -> None:
    names = [camera.name for camera in named(["0", "door=1", "rtsp://10.0.0.7/a", "rtsp://10.0.0.7/b"], COMMON)]
    assert names == ["camera0", "door", "10.0.0.7", "10.0.0.7-2"]
    with pytest.raises(UsageError, match="different names, found 'door' twice"):
        named(["door=0", "door=1"], COMMON)


@pytest.mark.parametrize(("words", "found"), [([], "neither"), (["--source", "0", "--config", "x.toml"], "both")])
def test_either_sources_or_a_file(words: list[str], found: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", *words])
    assert ended.value.code == 2
    assert f"expected either --source or --config, found {found}" in capfd.readouterr().err


# --- a run


class Run:
    """`mgg-edge run --config` in a process of its own, with its page."""

    def __init__(self, file: Path, *words: str) -> None:
        self.port = free_port()
        program = shutil.which("mgg-edge", path=str(Path(sys.executable).parent))
        command = [program, "run", "--config", str(file), "--serve", str(self.port), *words]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "300"}
        )
        self.said: list[str] = []
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()

    def cameras(self) -> dict[str, Any]:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            connection.request("GET", "/status")
            return {camera["name"]: camera for camera in json.loads(connection.getresponse().read())["cameras"]}
        except OSError:
            return {}

    def wait(self, true: Callable[[], bool]) -> None:
        end_s = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end_s, "".join(self.said)
            assert self.process.poll() is None, "".join(self.said)
            time.sleep(0.05)

    def reload(self) -> None:
        before = "".join(self.said).count("read anew")
        self.process.send_signal(signal.SIGHUP)
        self.wait(lambda: "".join(self.said).count("read anew") > before)

    def end(self) -> dict[str, Any]:
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, "".join(self.said)
        return json.loads(out.splitlines()[-1])["summary"]


@pytest.fixture
def begun(file: Path, toy_bundle: Path, tmp_path: Path) -> Iterator[Callable[[dict[str, str]], Run]]:
    runs: list[Run] = []

    def write(cameras: dict[str, str]) -> None:
        tables = (f'[camera.{name}]\nsource = "{source}"\n' for name, source in cameras.items())
        file.write_text(f'bundle = "{toy_bundle}"\n' + "".join(tables))

    def begin(cameras: dict[str, str]) -> Run:
        write(cameras)
        runs.append(Run(file, "--state", str(tmp_path / "state"), "--json", "--threads", "1"))
        runs[-1].write = write
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()
        run.process.wait()


def test_a_run_takes_up_a_changed_file_and_leaves_alone_what_stays(begun: Callable[[dict[str, str]], Run]) -> None:
    run = begun({"stays": LIVE, "goes": LIVE, "changes": f"{LIVE},width=64"})
    run.wait(lambda: all(camera["inferred"] > 5 for camera in run.cameras().values()) and len(run.cameras()) == 3)
    run.wait(lambda: run.cameras()["changes"]["adapt_steps"] > 0)
    run.write({"stays": LIVE, "changes": f"{LIVE},width=128", "comes": LIVE})
    run.reload()
    assert "cameras read anew: 1 go on, 2 ended, 2 begun" in "".join(run.said)
    assert list(run.cameras()) == ["stays", "changes", "comes"]
    run.wait(lambda: all(camera["inferred"] > 5 for camera in run.cameras().values()))
    seen = run.cameras()
    assert seen["changes"]["size"][0] == 128
    assert seen["changes"]["captured"] < seen["stays"]["captured"]
    assert "camera 'changes': going on from step" in "".join(run.said)  # its state was saved and found again
    summary = run.end()
    assert list(summary["sources"]) == ["stays", "goes", "changes", "changes 2", "comes"]
    assert summary["frames_inferred"] == sum(part["frames_inferred"] for part in summary["sources"].values())
    assert summary["reconnects"] == 0  # nobody lost a camera by the opening of another


def test_a_file_that_cannot_be_read_changes_nothing(begun: Callable[[dict[str, str]], Run], file: Path) -> None:
    run = begun({"one": LIVE, "two": LIVE})
    run.wait(lambda: len(run.cameras()) == 2 and all(camera["inferred"] for camera in run.cameras().values()))
    file.write_text("[camera.one]\nsource = 3\n")
    run.reload()
    assert "error: cameras not read anew, all go on as they are: " in "".join(run.said)
    before = run.cameras()
    run.wait(lambda: all(run.cameras()[name]["inferred"] > before[name]["inferred"] for name in before))
    assert list(run.end()["sources"]) == ["one", "two"]


def test_a_camera_that_cannot_begin_leaves_the_others(begun: Callable[[dict[str, str]], Run], file: Path) -> None:
    run = begun({"one": LIVE})
    run.wait(lambda: run.cameras().get("one", {}).get("inferred", 0) > 0)
    run.write({"one": LIVE, "film": "no/such/film.mp4", "late": "http://127.0.0.1:9/live"})
    run.reload()
    said = "".join(run.said)
    assert "error: camera film: cannot begin: " in said
    assert "camera late is not there yet" in said
    assert "1 go on, 0 ended, 1 begun" in said
    assert list(run.cameras()) == ["one", "late"]
    run.write({"one": LIVE})
    run.reload()
    assert list(run.cameras()) == ["one"]
    assert run.end()["sources"]["late"]["frames_inferred"] == 0


def test_a_camera_put_in_another_s_place_is_waited_for(begun: Callable[[dict[str, str]], Run]) -> None:
    run = begun({"one": LIVE})
    run.wait(lambda: run.cameras().get("one", {}).get("inferred", 0) > 0)
    run.write({"late": "http://127.0.0.1:9/live"})
    run.reload()
    time.sleep(1)  # some looks at who still runs
    assert run.process.poll() is None
    assert list(run.cameras()) == ["late"]
    run.write({"two": LIVE})
    run.reload()
    run.wait(lambda: run.cameras().get("two", {}).get("inferred", 0) > 0)
    assert list(run.end()["sources"]) == ["one", "late", "two"]


def test_twenty_cameras_on_the_default_reader(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tables = (f'[camera.c{number}]\nsource = "synthetic:frames=24,seed={number}"\n' for number in range(20))
    file.write_text('adapt = "always"\n' + "".join(tables))
    main_words = ["run", "--config", str(file), "--state", str(tmp_path / "state"), "--threads", "1", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(main_words)
    assert ended.value.code == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    summary = lines[-1]["summary"]
    assert len(lines) == 20 * 24 + 1
    assert list(summary["sources"]) == [f"c{number}" for number in range(20)]
    assert {part["frames_inferred"] for part in summary["sources"].values()} == {24}
    # Each has a θ of its own, learned from its own pictures.
    states = [path.read_bytes() for path in sorted((tmp_path / "state").glob("*.0.mggstate"))]
    assert len(states) == 20 == len(set(states))
    assert all(part["adapt_steps"] >= 1 for part in summary["sources"].values())


def test_a_source_of_the_environment_is_named(capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Nobody sees it on the command line."""
    monkeypatch.setenv("MGG_EDGE_SOURCE", "rtsp://user:secret@camera/1")
    with pytest.raises(SystemExit):
        main(["run", "--config", "x.toml"])
    said = capfd.readouterr().err
    assert "found both (MGG_EDGE_SOURCE is set)" in said
    assert "secret" not in said
