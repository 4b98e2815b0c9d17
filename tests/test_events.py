"""Events: which there are, and that no target, however slow or absent, delays a frame or loses order."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mgg_edge.cli.main import main
from mgg_edge.errors import MissingDependencyError, SinkError, UsageError
from mgg_edge.runtime import Adapter
from mgg_edge.runtime.adaptation.adapter import Prediction
from mgg_edge.runtime.adaptation.adapter_settings import Counters
from mgg_edge.runtime.adaptation.guard import BreachCode
from mgg_edge.runtime.outputs import events_out
from mgg_edge.runtime.outputs.events import UNKNOWN, EventSettings, EventSink, Smoothed
from mgg_edge.runtime.outputs.events_out import EventTarget, open_target
from mgg_edge.runtime.sources.source import Frame
from streams import free_port

LABELS = ("bus", "tram", "lorry")
CONNECTED = {"connected": True, "disconnects": 0, "downtime_s": 0.5}


def seen(*probabilities: float) -> Prediction:
    return Prediction.of(np.log(np.array(probabilities, np.float32)), LABELS, adapted=False, step=0)


BUS, TRAM = seen(0.9, 0.05, 0.05), seen(0.05, 0.9, 0.05)


class Watched:
    """An event sink on an adapter that is played."""

    def __init__(self, settings: EventSettings | None = None) -> None:
        self.events: list[Mapping[str, Any]] = []
        self.adapter = SimpleNamespace(counters=Counters(), last_rejection="too far")
        self.connection: dict[str, Any] = dict(CONNECTED)
        self.sink = EventSink(
            "door", self.adapter, lambda: self.connection, settings or EventSettings(), self.events.append
        )

    def said(self) -> list[dict[str, Any]]:
        found = [{name: value for name, value in event.items() if name != "time"} for event in self.events]
        self.events.clear()
        return found


def test_a_label_is_told_when_it_stays() -> None:
    watched = Watched(EventSettings(threshold=0.6, frames=3))
    for number in range(5):
        watched.sink.write(Frame(number, 0.0, np.zeros((1, 1, 3), np.uint8)), BUS)
    (event,) = watched.said()
    assert event == {
        "camera": "door", "event": "label", "label": "bus", "before": UNKNOWN, "probability": 0.9, "frame": 0
    }  # fmt: skip
    watched.sink.write(Frame(5, 0.0, np.zeros((1, 1, 3), np.uint8)), TRAM)  # one frame is no change: 0.66 is bus
    assert watched.said() == []
    for number in range(6, 12):
        watched.sink.write(Frame(number, 0.0, np.zeros((1, 1, 3), np.uint8)), TRAM)
    first, second = watched.said()
    assert (first["label"], first["before"]) == (UNKNOWN, "bus")
    assert (second["label"], second["before"]) == ("tram", UNKNOWN)
    assert second["probability"] >= 0.6


def test_smoothing_is_the_equation() -> None:
    settings = EventSettings(frames=4)
    first = Smoothed().after(BUS, settings)
    second = first.after(TRAM, settings)
    kept = np.exp(-1 / 4)
    assert second.probabilities == pytest.approx(
        kept * np.array([0.9, 0.05, 0.05]) + (1 - kept) * np.array([0.05, 0.9, 0.05])
    )
    assert Smoothed().after(BUS, EventSettings(frames=0)).after(TRAM, EventSettings(frames=0)).label == "tram"
    assert Smoothed().after(seen(0.4, 0.3, 0.3), EventSettings(threshold=0.5)).label == UNKNOWN
    assert Smoothed().after(seen(0.4, 0.3, 0.3), EventSettings(threshold=0.0)).label == "bus"


@pytest.mark.parametrize("words", [{"threshold": -0.1}, {"threshold": 1.1}, {"threshold": np.nan}, {"frames": -1}])
def test_settings_have_ranges(words: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="event-"):
        EventSettings(**words)


def test_adaptation_is_told_and_being_calm_is_not() -> None:
    watched = Watched()
    counters = watched.adapter.counters
    for change in (
        {"adapt_steps": 1},
        {"adapt_rejected": 1, "rejected": {BreachCode.CALM: 1}},
        {"adapt_rejected": 2, "rejected": {BreachCode.CALM: 1, BreachCode.CANARY: 1}, "rollbacks": {"source": 1}},
        {"adapt_rejected": 9, "rejected": {BreachCode.CALM: 1, BreachCode.CANARY: 8}},  # within the same second
    ):
        counters = watched.adapter.counters = replace(counters, **change)
        watched.sink.beat()
    assert [(event["event"], event.get("step"), event.get("to"), event.get("reason")) for event in watched.said()] == [
        ("adapted", 1, None, None),
        ("rolled-back", None, "source", None),
        ("refused", None, None, "too far"),
    ]


def test_a_camera_lost_and_back_is_told_without_a_frame() -> None:
    watched = Watched()
    watched.connection = {"connected": False, "disconnects": 0, "downtime_s": 0.2}
    watched.sink.beat()
    assert watched.said() == []  # it has never been there: nothing was lost
    for facts in (CONNECTED, {"connected": False, "disconnects": 1, "downtime_s": 0.6}):
        watched.connection = facts
        watched.sink.beat()
        watched.sink.beat()
    assert watched.said() == [{"camera": "door", "event": "lost"}]
    watched.connection = {"connected": True, "disconnects": 1, "downtime_s": 7.6}
    watched.sink.beat()
    watched.sink.close()
    assert watched.said() == [
        {"camera": "door", "event": "back", "down_s": 7.0}, {"camera": "door", "event": "ended"}
    ]  # fmt: skip


# --- targets


def event(number: int) -> dict[str, Any]:
    return {"time": "…", "camera": "door", "event": "label", "number": number}


def wait(true: Callable[[], bool], limit_s: float = 30.0) -> None:
    end_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_a_file_gets_every_event_in_order(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("{}\n")
    with open_target(str(path)) as target:
        for number in range(300):
            target.emit(event(number))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{}, *map(event, range(300))]  # appended
    assert (target.delivered, target.lost) == (300, 0)


class Stuck(EventTarget):
    """A target that takes nothing until it is let."""

    def __init__(self) -> None:
        super().__init__("stuck")
        self.free, self.got = threading.Event(), list[int]()

    def deliver(self, found: Mapping[str, Any]) -> None:
        self.free.wait(60)
        self.got.append(found["number"])

    def release(self) -> None:
        """Nothing."""


def test_a_stuck_target_delays_nobody_and_loses_the_oldest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events_out, "QUEUE", 100)
    with Stuck() as target:
        target.emit(event(-1))
        wait(lambda: not target._waiting)  # it is in hand
        start_s = time.monotonic()
        for number in range(5000):
            target.emit(event(number))
        assert time.monotonic() - start_s < 20  # the target hangs for a minute
        assert (target.lost, len(target._waiting)) == (4900, 100)
        target.free.set()
    assert target.got == [-1, *range(4900, 5000)]
    assert "events: stuck: 4900 of 5001 were lost" in caplog.text


def test_the_end_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_out, "DRAIN_S", 0.3)
    monkeypatch.setattr(events_out, "TIMEOUT_S", 0.3)
    start_s = time.monotonic()
    with Stuck() as target:
        for number in range(10):
            target.emit(event(number))
    assert time.monotonic() - start_s < 5
    assert target.lost == 9  # one is in hand
    target.free.set()


class Hook:
    """A web server that takes events, or not."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if outer.status == 200:
                    outer.got.append({**json.loads(body), "path": self.path, "type": self.headers["Content-Type"]})
                self.send_response(outer.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hook() -> Iterator[Hook]:
    found = Hook()
    yield found
    found.close()


def test_a_webhook_that_refuses_for_a_while_gets_all_of_them_in_order(
    hook: Hook, caplog: pytest.LogCaptureFixture
) -> None:
    hook.status = 503
    caplog.set_level("INFO")
    with open_target(f"http://user:secret@127.0.0.1:{hook.server.server_port}/hook/token?x=1") as target:
        for number in range(5):
            target.emit(event(number))
        wait(lambda: "does not take them" in caplog.text)
        hook.status = 200
        wait(lambda: len(hook.got) == 5)
    assert [found["number"] for found in hook.got] == list(range(5))
    assert hook.got[0]["path"] == "/hook/token?x=1"
    assert hook.got[0]["type"] == "application/json"
    assert "takes them again" in caplog.text
    assert "secret" not in caplog.text
    assert "token" not in caplog.text


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[int, list[str]]]:
    """A mosquitto with a password, and what it was told."""
    programs = [
        shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin") for name in ("mosquitto", "mosquitto_passwd")
    ]
    if None in programs:
        pytest.skip("mosquitto is not installed (apt install mosquitto)")
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion

    port, passwords = free_port(), tmp_path / "passwords"
    subprocess.run([programs[1], "-b", "-c", str(passwords), "user", "p@ss"], check=True, capture_output=True)
    passwords.chmod(0o644)
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\npassword_file {passwords}\nuser root\n")
    process = subprocess.Popen([programs[0], "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    told: list[str] = []
    listener = Client(CallbackAPIVersion.VERSION2)
    listener.username_pw_set("user", "p@ss")
    listener.on_connect = lambda client, *_: client.subscribe("site/#", qos=1)
    ready = threading.Event()
    listener.on_subscribe = lambda *_: ready.set()
    listener.on_message = lambda _client, _data, message: told.append(f"{message.topic} {message.payload.decode()}")
    deadline_s = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError):
            listener.connect("127.0.0.1", port)
            break
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    listener.loop_start()
    assert ready.wait(20)
    yield port, told
    listener.disconnect()
    listener.loop_stop()
    process.kill()
    process.wait()


def test_events_reach_a_broker_by_camera_and_kind(broker: tuple[int, list[str]]) -> None:
    port, told = broker
    with open_target(f"mqtt://user:p%40ss@127.0.0.1:{port}/site/north") as target:
        for number in range(20):
            target.emit(event(number))
        wait(lambda: len(told) == 20)
    assert [json.loads(line.partition(" ")[2])["number"] for line in told] == list(range(20))
    assert told[0].startswith("site/north/door/label {")


def test_a_broker_that_is_not_there_delays_nobody(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    monkeypatch.setattr(events_out, "DRAIN_S", 0.5)
    with open_target(f"mqtt://user:secret@127.0.0.1:{free_port()}/site") as target:
        start_s = time.monotonic()
        target.emit(event(0))
        assert time.monotonic() - start_s < 3
        wait(lambda: "does not take them" in caplog.text)
    assert target.lost == 1
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://host/x", "expected a file, http"),
        ("http://", "found no host"),
        ("mqtt://host", "expected mqtt://"),
        ("mqtt://host/a/#", "without # and \\+"),
        ("mqtt://host:port/a", "expected mqtt://"),
    ],
)
def test_what_is_no_target(text: str, said: str) -> None:
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    with pytest.raises(UsageError, match=said):
        open_target(text)


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found a directory"):
        open_target(str(tmp_path))
    with pytest.raises(SinkError, match="cannot write here"):
        open_target(str(tmp_path / "no" / "events.jsonl"))


def test_without_the_package_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "paho.mqtt.client", None)
    with pytest.raises(MissingDependencyError, match=r"mgg-edge\[mqtt\]"):
        open_target("mqtt://host/a")


def test_a_run_tells_its_events(toy_bundle: Path, tmp_path: Path, hook: Hook) -> None:
    words = ["run", "--bundle", toy_bundle, "--source", "door=synthetic:frames=40", "--adapt", "always"]
    targets = ["--events", tmp_path / "events.jsonl", "--events", f"http://127.0.0.1:{hook.server.server_port}/"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*words, *targets, "--event-threshold", "0.2", "--event-frames", "0"]])
    assert ended.value.code == 0
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {line["camera"] for line in lines} == {"door"}
    kinds = [line["event"] for line in lines]
    assert {"label", "adapted"} <= set(kinds)
    assert kinds[-1] == "ended"
    assert len(hook.got) == len(lines)
    with Adapter.open(toy_bundle, adapt="off", threads=1) as adapter:
        assert {line["label"] for line in lines if line["event"] == "label"} <= {*adapter.manifest.labels, UNKNOWN}
