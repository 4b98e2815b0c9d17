"""The live page and what programs ask: every answer by a real client, the page in a real browser."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser
from mgg_edge.errors import SinkError, UsageError
from mgg_edge.runtime import Adapter, session
from mgg_edge.runtime.outputs import http_server
from mgg_edge.runtime.outputs.http_frozen import FrozenModel
from mgg_edge.runtime.outputs.http_server import MAX_CONNECTIONS, LiveServer, parse_listen
from mgg_edge.runtime.outputs.http_view import CameraView
from mgg_edge.runtime.pipeline import Reader
from mgg_edge.runtime.sources.source_synthetic import SyntheticSource

INFO = {"version": "1", "engine": "an engine", "bundle": 'x".mgg', "bundle_id": "0123456789abcdef"}


class Running:
    """A server with one camera that runs on a thread."""

    def __init__(
        self, bundle: Path, text: str = "frames=0,paced=1,rate=60,faults=shape,every=10", name: str = "door"
    ) -> None:
        self.adapter = Adapter.open(bundle, threads=1)
        self.reader = Reader(SyntheticSource.parse(f"synthetic:{text}"))
        self.frozen = FrozenModel(lambda: Adapter.open(bundle, adapt="off", threads=1))
        self.view = CameraView(name, self.adapter, self.reader, self.frozen)
        self.server = LiveServer(("127.0.0.1", 0), INFO)
        self.server.cameras = (self.view,)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        session.run(self.reader, self.adapter, [self.view], stop=self._stop.is_set, heartbeat=self.view.beat)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def close(self) -> None:
        self.stop()
        self.server.close()
        self.frozen.close()
        self.adapter.close()


@pytest.fixture
def running(toy_bundle: Path) -> Iterator[Running]:
    run = Running(toy_bundle)
    end_s = time.monotonic() + 10
    while run.adapter.counters.adapt_steps < 3:
        assert time.monotonic() < end_s
        time.sleep(0.01)
    yield run
    run.close()


def ask(server: LiveServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def figures(text: str) -> dict[str, float]:
    """Samples of the Prometheus text format, checked line by line."""
    found, declared = {}, set()
    for line in text.splitlines():
        if line.startswith("#"):
            word, kind, name, rest = line.split(" ", 3)
            assert (word, kind in ("HELP", "TYPE")) == ("#", True)
            assert kind == "HELP" or rest in ("counter", "gauge", "histogram")
            declared.add(name)
            continue
        match = re.fullmatch(r'(\w+)(\{(?:\w+="(?:[^"\\\n]|\\["\\n])*",?)*\})? (\S+)', line)
        assert match, line
        assert re.sub("_(bucket|sum|count)$", "", match[1]) in declared or match[1] in declared
        assert match[1] + (match[2] or "") not in found
        found[match[1] + (match[2] or "")] = float(match[3])
    return found


def test_status_holds_what_the_page_shows(running: Running) -> None:
    code, headers, body = ask(running.server, "/status")
    assert (code, headers["Content-Type"], headers["Cache-Control"]) == (200, "application/json", "no-store")
    status = json.loads(body)
    (camera,) = status["cameras"]
    assert status["ready"]
    assert camera["name"] == "door"
    assert camera["prediction"]["label"] in ("tram", "bus", "bicycle", "lorry")
    assert camera["frozen"]["adapted"] is False
    assert 0 <= camera["frozen"]["agreement"] <= 1
    assert camera["adapt_steps"] >= 3
    assert camera["dropped"]["malformed"] >= 1
    assert camera["captured"] >= camera["inferred"]
    assert camera["entropies"]
    assert camera["moved"] > 0


def test_metrics_are_well_formed_and_add_up(running: Running) -> None:
    running.stop()
    code, headers, body = ask(running.server, "/metrics")
    assert code == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = figures(body.decode())
    camera = '{camera="door"}'
    counters = running.adapter.counters
    dropped = sum(value for name, value in found.items() if name.startswith("mgg_edge_frames_dropped_total"))
    assert found[f"mgg_edge_frames_inferred_total{camera}"] == counters.frames_inferred
    assert found[f"mgg_edge_frames_captured_total{camera}"] == counters.frames_inferred + dropped
    assert found[f"mgg_edge_adapt_steps_total{camera}"] == counters.adapt_steps
    assert found[f"mgg_edge_adapt_rejected_total{camera}"] == counters.adapt_rejected
    assert found[f"mgg_edge_frame_age_seconds_count{camera}"] == counters.frames_inferred
    assert found['mgg_edge_frame_age_seconds_bucket{camera="door",le="+Inf"}'] == counters.frames_inferred
    buckets = [value for name, value in found.items() if "_bucket" in name]
    assert buckets == sorted(buckets)
    assert found["mgg_edge_resident_memory_bytes"] > 1e7
    assert found["mgg_edge_open_fds"] > 3
    assert any(name.startswith("mgg_edge_info") and r'bundle="x\".mgg"' in name for name in found)


def test_health_and_readiness(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(running.server, "/healthz")[0] == ask(running.server, "/readyz")[0] == 200
    monkeypatch.setattr(running.server, "_ready_s", -1.0)
    code, _, body = ask(running.server, "/readyz")
    assert (code, json.loads(body)["status"]) == (503, "unavailable")
    assert ask(running.server, "/healthz")[0] == 200
    monkeypatch.setattr(http_server, "HUNG_S", -1.0)
    code, _, body = ask(running.server, "/healthz")
    assert code == 503
    assert "the run has not moved" in json.loads(body)["reason"]
    running.stop()
    assert "ended" in json.loads(ask(running.server, "/readyz")[2])["reason"]
    running.server.cameras = ()
    assert json.loads(ask(running.server, "/readyz")[2])["reason"] == "starting"
    assert ask(running.server, "/healthz")[0] == 200


def test_a_run_that_hangs_in_the_engine_is_found(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HUNG_S", 0.5)
    run, release = Running(toy_bundle), threading.Event()
    assert ask(run.server, "/healthz")[0] == 200
    infer = run.adapter._engine.infer
    monkeypatch.setattr(run.adapter._engine, "infer", lambda *words: release.wait(20) and infer(*words))
    time.sleep(1.0)
    assert ask(run.server, "/healthz")[0] == 503
    release.set()
    time.sleep(0.2)
    assert ask(run.server, "/healthz")[0] == 200
    run.close()


def test_pictures_are_jpegs_that_change(running: Running) -> None:
    code, headers, first = ask(running.server, "/picture/door")
    assert (code, headers["Content-Type"], first[:3]) == (200, "image/jpeg", b"\xff\xd8\xff")
    time.sleep(0.1)
    assert ask(running.server, "/picture/door")[2] != first


def test_the_stream_is_mjpeg_and_ends_with_the_run(running: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=10)
    connection.request("GET", "/stream/door")
    answer = connection.getresponse()
    assert answer.getheader("Content-Type") == "multipart/x-mixed-replace; boundary=picture"
    pictures = set()
    for _ in range(3):
        assert answer.readline() == b"--picture\r\n"
        assert answer.readline() == b"Content-Type: image/jpeg\r\n"
        length = int(answer.readline().split(b": ")[1])
        assert answer.readline() == b"\r\n"
        pictures.add(answer.read(length))
        assert answer.readline() == b"\r\n"
    assert len(pictures) == 3
    running.stop()
    answer.read()  # until the end, which comes
    connection.close()


@pytest.mark.parametrize("path", ["/x", "/stream/none", "/picture/none", "/../etc/passwd", "/stream/", "/%00"])
def test_what_there_is_not(running: Running, path: str) -> None:
    assert ask(running.server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_can_be_changed(running: Running, method: str) -> None:
    assert ask(running.server, "/", method)[0] == 501


def test_another_host_s_name_is_refused_on_loopback(running: Running) -> None:
    for name in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert ask(running.server, "/status", Host=name)[0] == 403, name
    for name in ("localhost", "localhost:8080", "127.0.0.1", "[::1]:99"):
        assert ask(running.server, "/status", Host=name)[0] == 200, name


def test_answers_carry_the_headers_that_keep_the_page_to_itself(running: Running) -> None:
    _, headers, _ = ask(running.server, "/")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Server"].strip() == "mgg-edge"
    code, _, body = ask(running.server, "/", "HEAD")
    assert (code, body) == (200, b"")


def test_too_many_connections_are_turned_away_and_the_others_served(running: Running) -> None:
    idle = [socket.create_connection(("127.0.0.1", running.server.port)) for _ in range(MAX_CONNECTIONS)]
    time.sleep(0.2)
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(running.server, "/healthz")
    for connection in idle:
        connection.close()
    time.sleep(0.3)
    assert ask(running.server, "/healthz")[0] == 200


def test_garbage_is_survived(running: Running) -> None:
    for data in (b"\0\xff" * 100, b"GET " + b"/" * 70000 + b" HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"GET /\r\n"):
        with socket.create_connection(("127.0.0.1", running.server.port)) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            client.settimeout(5)
            try:
                client.recv(1000)
            except ConnectionResetError:
                continue
    assert ask(running.server, "/healthz")[0] == 200


def test_a_source_model_that_cannot_be_opened_only_leaves_out_the_comparison(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Adapter:
        raise UsageError("no such bundle")

    running.view._frozen = FrozenModel(fail)
    time.sleep(0.6)
    (camera,) = json.loads(ask(running.server, "/status")[2])["cameras"]
    assert camera["frozen"] is None
    assert "no comparison with the source model" in caplog.text


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("8080", ("127.0.0.1", 8080)),
        (":8080", ("127.0.0.1", 8080)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),  # noqa: S104 - only parsed
        ("[::1]:0", ("::1", 0)),
        ("camera.local:65535", ("camera.local", 65535)),
    ],
)
def test_addresses_to_listen_on(text: str, listen: tuple[str, int]) -> None:
    assert parse_listen(text) == listen


@pytest.mark.parametrize("text", ["", "x", "65536", "-1", "host:", "a b:80", "80:host", "1.2.3.4:port", "²:80"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected \\[HOST:\\]PORT"):
        parse_listen(text)


def test_a_taken_port_is_one_clear_line() -> None:
    with LiveServer(("127.0.0.1", 0), INFO) as server:
        with pytest.raises(SinkError, match=r"cannot listen on 127\.0\.0\.1"):
            LiveServer(("127.0.0.1", server.port), INFO)
        server.close()


def test_everybody_can_look_only_when_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with LiveServer(("0.0.0.0", 0), INFO) as server:  # noqa: S104 - the point of the test
        assert not server.loopback
        assert ask(server, "/healthz", Host="box.example")[0] == 200
    assert "everybody who reaches it sees the pictures" in caplog.text


# --- the page


def test_the_page_in_a_browser(toy_bundle: Path, tmp_path: Path) -> None:
    run = Running(toy_bundle, name="<b>gate</b>")
    try:
        with Browser(tmp_path / "profile") as browser:
            browser.open(run.server.address)
            browser.wait_for("document.querySelector('article img')?.naturalWidth === 64")
            browser.wait_for("document.querySelector('.now').classList.contains('adapted')")
            browser.wait_for("document.querySelector('.frozen .label').textContent.includes('%')")
            assert browser.evaluate("document.querySelector('.name').textContent") == "<b>gate</b>"
            assert browser.evaluate("document.querySelectorAll('figure b').length") == 0
            cells = "[...document.querySelectorAll('dl div')]"
            shown = f"Object.fromEntries({cells}.map(cell => [cell.dataset.figure, cell.children[1].textContent]))"
            first = browser.evaluate(shown)
            assert set(first) >= {"updates", "rejected", "drift", "frames", "dropped"}
            browser.wait_for(f"Number(({shown}).frames) > {int(first['frames'])}")
            browser.wait_for("document.getElementById('state').textContent === 'running'")
            image = browser.screenshot(tmp_path / "page.png")
            assert image.stat().st_size > 10_000
            run.stop()
            browser.wait_for("document.getElementById('state').textContent.includes('ended')")
            run.server.close()
            browser.wait_for("document.getElementById('state').textContent.includes('no answer')")
            assert not [error for error in browser.errors if "Failed to" not in error and "ERR_" not in error]
    finally:
        run.close()
