"""What a person may tell a camera over HTTP: with the token, and only where the run allows it."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from browser import Browser
from mgg_edge.cli import run as run_command
from mgg_edge.cli.main import main
from mgg_edge.cli.run_calibration import Tap
from mgg_edge.errors import SinkError, UsageError
from mgg_edge.runtime import Adapter
from mgg_edge.runtime.adaptation import calibration
from mgg_edge.runtime.outputs import http_control
from mgg_edge.runtime.outputs.http_control import ACTIONS, Control, read_token
from mgg_edge.runtime.outputs.http_server import LiveServer
from mgg_edge.runtime.sources.source import Frame
from mgg_edge.runtime.store.record_file import Record
from mgg_edge.runtime.store.state_file import StateStore, cameras_in

TOKEN = "0123456789abcdef-secret"  # noqa: S105 (of this test's servers)


class Cameras:
    """A commander with one camera."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []

    def command(self, camera: str, action: str, minutes: float | None = None) -> str:
        if camera != "door":
            raise KeyError(camera)
        if action == "snapshot":
            raise SinkError("the disk is full")
        self.done.append((camera, action))
        return f"{action}: done"


@pytest.fixture
def cameras(monkeypatch) -> Cameras:
    monkeypatch.setattr(http_control, "WRONG_TOKEN_S", 0.0)
    return Cameras()


@pytest.fixture
def server(cameras):
    with LiveServer(("127.0.0.1", 0), {}, control=Control(TOKEN, cameras)) as live:
        yield live


def tell(server: LiveServer, path: str, token: str | None = TOKEN, method: str = "POST", **headers: str):
    """Status and answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    shown = {} if token is None else {"Authorization": f"Bearer {token}"}
    connection.request(method, path, headers=shown | headers)
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return answer.status, body


def test_with_the_token_it_is_done_and_logged(server, cameras, caplog):
    caplog.set_level(logging.INFO)
    for action in ("pause", "freeze", "resume", "reset"):
        status, body = tell(server, f"/control/door/{action}")
        assert (status, body["done"]) == (200, f"{action}: done")
    assert [action for _, action in cameras.done] == ["pause", "freeze", "resume", "reset"]
    assert next(message for message in caplog.messages if "door" in message) == "control: camera door: pause: done"


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x", "ü"])
def test_without_it_nothing_is_done(server, cameras, token, caplog):
    shown = {} if token is None else {"Authorization": f"Bearer {token}".encode("latin-1").decode("latin-1")}
    status, body = tell(server, "/control/door/reset", None, **shown)
    assert (status, cameras.done) == (401, [])
    assert "Authorization: Bearer TOKEN" in body["reason"]
    assert TOKEN not in caplog.text + json.dumps(body)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/control/nobody/pause", 404),
        ("/control/door/explode", 404),
        ("/control/door", 404),
        ("/control/door/pause/now", 404),
        ("/elsewhere", 404),
        ("/control/door/snapshot", 409),
    ],
)
def test_what_cannot_be_done(server, cameras, path, status):
    found, body = tell(server, path)
    assert (found, cameras.done) == (status, [])
    assert "disk is full" in body["reason"] if status == 409 else True


def test_looking_does_nothing(server, cameras):
    """GET never changes anything, whatever it is asked with."""
    assert tell(server, "/control/door/pause", method="GET")[0] == 404
    assert cameras.done == []


def test_a_page_elsewhere_is_refused_by_its_host(server, cameras):
    assert tell(server, "/control/door/pause", Host="evil.example")[0] == 403
    assert cameras.done == []


def test_a_run_without_it_takes_no_orders(cameras):
    with LiveServer(("127.0.0.1", 0), {}) as live:
        status, body = tell(live, "/control/door/pause")
        actions = tell(live, "/status", method="GET")[1]["actions"]
    assert (status, actions) == (403, [])
    assert "--control" in body["reason"]


def test_the_page_is_told_what_may_be_asked(server):
    assert tell(server, "/status", method="GET")[1]["actions"] == list(ACTIONS)


def test_before_the_cameras_are_open(monkeypatch):
    monkeypatch.setattr(http_control, "WRONG_TOKEN_S", 0.0)
    with LiveServer(("127.0.0.1", 0), {}, control=Control(TOKEN)) as live:
        assert tell(live, "/control/door/pause")[0] == 503


class TestToken:
    def test_it_is_made_for_its_owner_alone(self, tmp_path: Path):
        token = read_token(tmp_path / "token")
        assert len(token) >= 32
        assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
        assert read_token(tmp_path / "token") == token

    @pytest.mark.parametrize("text", ["", "short", "with a space in between it", "ünicode-ünicode-ünicode"])
    def test_those_that_are_none(self, tmp_path: Path, text):
        (tmp_path / "token").write_text(text)
        (tmp_path / "token").chmod(0o600)
        with pytest.raises(UsageError, match="token"):
            read_token(tmp_path / "token")

    def test_one_that_everybody_reads(self, tmp_path: Path):
        (tmp_path / "token").write_text(TOKEN)
        (tmp_path / "token").chmod(0o644)
        with pytest.raises(UsageError, match="chmod 600"):
            read_token(tmp_path / "token")


class Run:
    """`mgg-edge run` with two cameras on a thread, and its page."""

    def __init__(self) -> None:
        self.server: LiveServer
        self.stop = False

    def camera(self, name: str) -> dict:
        cameras = tell(self.server, "/status", method="GET")[1]["cameras"]
        return next((one for one in cameras if one["name"] == name), {"inferred": 0, "adapt_steps": 0})

    def wait_for(self, holds) -> None:
        end_s = time.monotonic() + 300
        while not holds():
            assert time.monotonic() < end_s
            time.sleep(0.05)


@contextlib.contextmanager
def running_cameras(bundle: Path, folder: Path, monkeypatch, *more: str):
    """Door and gate, which take orders and keep states and records in the folder."""
    found, made = Run(), LiveServer.__init__

    def keep(self, *arguments, **options):
        made(self, *arguments, **options)
        found.server = self

    class Stopper:
        def __init__(self, **_options):
            pass

        @property
        def signal(self):
            return signal.SIGTERM if found.stop else None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(LiveServer, "__init__", keep)
    monkeypatch.setattr(run_command, "StopRequest", Stopper)
    source = "synthetic:frames=0,paced=1,rate=60,faults=shape,every=10"
    words = ["--bundle", bundle, "--source", f"door={source}", "--source", f"gate={source}", "--adapt", "always"]
    words += ["--serve", "0", "--control", folder / "token", "--state", folder / "state", "--engine", "cpu"]
    ended: list[int | str | None] = []

    def work() -> None:
        try:
            main(["run", *map(str, [*words, *more])])
        except SystemExit as end:
            ended.append(end.code)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        found.wait_for(lambda: hasattr(found, "server") and len(found.server.cameras) == 2)
        found.wait_for(lambda: all(found.camera(name)["adapt_steps"] > 0 for name in ("door", "gate")))
        yield found
    finally:
        found.stop = True
        thread.join(60)
    assert not thread.is_alive()
    assert ended == [0]


def test_a_run_obeys(toy_bundle: Path, tmp_path: Path, monkeypatch):
    """Two cameras; one is paused, saved and reset while the other goes on; all of it is in the record."""
    record = ("--record", str(tmp_path / "run.mggrun"))
    with running_cameras(toy_bundle, tmp_path, monkeypatch, *record) as run:
        token = read_token(tmp_path / "token")
        assert tell(run.server, "/control/door/pause", token)[1]["done"] == "pause: paused"
        run.wait_for(lambda: run.camera("door")["prediction"]["adapted"] is False)
        assert (run.camera("door")["held"], run.camera("gate")["held"]) == ("paused", None)
        status, body = tell(run.server, "/control/door/snapshot", token)
        assert status == 200
        assert tell(run.server, "/control/door/resume", token)[1]["done"] == "resume: adapts"
        assert tell(run.server, "/control/door/reset", token)[0] == 200
    kept = tmp_path / "state" / body["done"].split()[-1]
    assert kept.is_file()
    assert cameras_in(tmp_path / "state") == ["door", "gate"]
    said = [event.event for event in Record.read(tmp_path / "run-door.mggrun").events]
    assert [event for event in said if event in ("pause", "freeze", "resume", "reset")] == ["pause", "resume", "reset"]
    with pytest.raises(SystemExit) as ended:
        main(["state", "restore", str(tmp_path / "state"), str(kept), "--camera", "door"])
    assert ended.value.code == 0
    with Adapter.open(toy_bundle, engine="cpu") as adapter:
        restored = StateStore(tmp_path / "state", "door", adapter.bundle_id).load()
    assert restored is not None
    assert restored.step > 0


def test_what_is_seen_now_becomes_the_site(toy_bundle: Path, tmp_path: Path, monkeypatch, caplog):
    """A live camera is calibrated on its next pictures, and then runs on that bundle."""

    def said(words: str) -> bool:
        return any(words in text for text in caplog.messages)

    monkeypatch.setattr(calibration, "REPORT_WEATHERS", 2)
    caplog.set_level(logging.INFO)
    with running_cameras(toy_bundle, tmp_path, monkeypatch) as run:
        token, server = read_token(tmp_path / "token"), run.server
        before = server.cameras[0].adapter.bundle_id
        status, body = tell(server, "/control/door/calibrate?minutes=0.05", token)
        assert (status, "from the next 3 s" in body["done"]) == (200, True), body
        assert "already" in tell(server, "/control/door/calibrate", token)[1]["reason"]
        assert "minutes" in tell(server, "/control/gate/calibrate?minutes=many", token)[1]["reason"]
        for minutes in (0.5, 2):  # a machine under load may have gathered too few pictures in three seconds
            run.wait_for(lambda: said("name it as its bundle to keep it") or said("camera door: not calibrated"))
            if said("name it as its bundle to keep it"):
                break
            caplog.clear()
            assert tell(server, f"/control/door/calibrate?minutes={minutes}", token)[0] == 200
        run.wait_for(lambda: said("name it as its bundle to keep it"))
        run.wait_for(lambda: run.camera("door")["inferred"] > 5)
        after = next(view for view in server.cameras if view.name == "door").adapter
        assert after.bundle_id != before
        assert after.manifest.site is not None
        assert run.camera("gate")["inferred"] > run.camera("door")["inferred"]  # which has begun anew
    assert len(list((tmp_path / "state").glob("door.*.mgg"))) == 1
    assert said("camera door: calibrated on")


class TestTap:
    def frame(self, index: int) -> Frame:
        return Frame(index, 100 + index / 10, np.full((4, 4, 3), index % 256, np.uint8))

    def test_nothing_is_kept_unless_somebody_looks(self):
        tap = Tap("door")
        for index in range(100):
            tap.write(self.frame(index), None)
        seen = iter(tap)
        feeder = threading.Timer(0.05, lambda: [tap.write(self.frame(index), None) for index in range(200, 203)])
        feeder.start()
        found = [next(seen) for _ in range(3)]
        assert [round(frame.time_s, 3) for frame in found] == [0.0, 0.1, 0.2]
        assert found[0].index == 200

    def test_a_slow_calibration_holds_up_nothing(self):
        tap = Tap("door")
        seen = iter(tap)
        threading.Timer(0.05, lambda: [tap.write(self.frame(index), None) for index in range(500)]).start()
        assert next(seen).index == 0
        time.sleep(0.2)
        tap.close()
        assert len(list(seen)) <= 8


@pytest.mark.parametrize("words", [["--control", "token"]])
def test_control_without_a_page(words, tmp_path, toy_bundle, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--bundle", str(toy_bundle), "--source", "synthetic:frames=4", *words])
    assert ended.value.code == 2
    assert "expected with --serve" in capsys.readouterr().err
    assert not (tmp_path / "token").exists()


def test_the_page_has_buttons_where_there_is_something_to_say(toy_bundle: Path, cameras, tmp_path: Path):
    from mgg_edge.runtime.outputs.http_view import CameraView
    from mgg_edge.runtime.pipeline import Reader
    from mgg_edge.runtime.sources.source_synthetic import SyntheticSource

    with (
        Adapter.open(toy_bundle, threads=1) as adapter,
        Reader(SyntheticSource.parse("synthetic:frames=4")) as reader,
        LiveServer(("127.0.0.1", 0), {"bundle": "x", "bundle_id": "1", "engine": ""}) as without,
        LiveServer(
            ("127.0.0.1", 0), {"bundle": "x", "bundle_id": "1", "engine": ""}, control=Control(TOKEN, cameras)
        ) as server,
        Browser(tmp_path / "profile") as browser,
    ):
        without.cameras = server.cameras = (CameraView("door", adapter, reader),)
        browser.open(without.address)
        browser.wait_for("document.querySelector('article .name').textContent === 'door'")
        assert browser.evaluate("document.getElementById('control').hidden")
        browser.open(server.address)
        buttons = "[...document.querySelectorAll('#actions button')]"
        browser.wait_for(f"{buttons}.length === {len(ACTIONS)}")
        assert browser.evaluate(f"{buttons}.every(button => button.disabled)")  # no token, nothing to press
        field = "document.getElementById('token')"
        browser.evaluate(f"{field}.value = '{TOKEN}'; {field}.dispatchEvent(new Event('input'))")
        browser.evaluate(f"{buttons}.find(button => button.name === 'freeze').click()")
        browser.wait_for("document.querySelector('#control output').textContent === 'door: freeze: done'")
        assert cameras.done == [("door", "freeze")]
        assert browser.evaluate(f"{buttons}.find(button => button.name === 'resume').disabled")
        browser.screenshot(tmp_path / "page.png")
        browser.evaluate(f"{field}.value = 'wrong'; {field}.dispatchEvent(new Event('input'))")
        browser.evaluate(f"{buttons}.find(button => button.name === 'freeze').click()")
        browser.wait_for(
            "document.querySelector('#control output').textContent.startsWith('freeze refused: expected the header')"
        )
        assert len(cameras.done) == 1
