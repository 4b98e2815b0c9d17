"""The live page and what programs ask: every answer by a real client, the page in a real browser."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from browser import Browser
from mgg_edge.errors import SinkError, UsageError
from mgg_edge.runtime import Adapter, session
from mgg_edge.runtime.outputs import http_server
from mgg_edge.runtime.outputs.http_frozen import FrozenModel
from mgg_edge.runtime.outputs.http_server import MAX_CONNECTIONS, MAX_STREAMS, LiveServer, parse_listen
from mgg_edge.runtime.outputs.http_view import CameraView
from mgg_edge.runtime.pipeline import Reader
from mgg_edge.runtime.sources.source_live import LiveStats
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
            assert kind == "HELP" or rest in ("counter", "gauge", "histogram", "summary")
            declared.add(name)
            continue
        match = re.fullmatch(r'(\w+)(\{(?:\w+="(?:[^"\\\n]|\\["\\n])*",?)*\})? (\S+)', line)
        assert match, line
        assert re.sub("_(bucket|sum|count)$", "", match[1]) in declared or match[1] in declared
        assert match[1] + (match[2] or "") not in found
        found[match[1] + (match[2] or "")] = float(match[3])
    return found


def test_status_holds_what_the_page_shows(running: Running) -> None:
    code, headers, body = ask(running.server, "/status?compare=door")
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
    rejected = sum(value for name, value in found.items() if name.startswith("mgg_edge_adapt_rejected_total"))
    assert rejected + found[f"mgg_edge_adapt_calm_total{camera}"] == counters.adapt_rejected
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
    index = int(headers["X-Frame"])
    asked_s = time.monotonic()
    running.stop()
    last = int(ask(running.server, "/picture/door")[1]["X-Frame"])
    assert last > index
    assert ask(running.server, f"/picture/door?after={last}")[0] == 404  # there is no other any more
    assert time.monotonic() - asked_s < 10


@pytest.mark.parametrize(
    ("query", "width"), [("", 960), ("?width=200", 320), ("?width=321", 960), ("?width=99999", 960), ("?width=-1", 960)]
)
def test_pictures_come_small_or_large(toy_bundle: Path, query: str, width: int) -> None:
    run = Running(toy_bundle, "frames=0,paced=1,rate=30,width=1280,height=720")
    try:
        deadline_s = time.monotonic() + 10
        while run.view.latest is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        body = ask(run.server, f"/picture/door{query}")[2]
        assert Image.open(io.BytesIO(body)).size == (width, width * 9 // 16)
    finally:
        run.close()


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


@pytest.mark.parametrize(("method", "status"), [("POST", 404), ("PUT", 501), ("DELETE", 501)])
def test_nothing_can_be_changed(running: Running, method: str, status: int) -> None:
    assert ask(running.server, "/", method)[0] == status


def test_a_proxy_may_ask_by_an_allowed_name(running: Running) -> None:
    with LiveServer(("127.0.0.1", 0), INFO, allowed_hosts=["Cams.example"]) as server:
        for name in ("cams.example", "CAMS.example:8443", "localhost"):
            assert ask(server, "/status", Host=name)[0] == 200, name
        for name in ("cams.example.org", "x.cams.example", "cams.example:x"):
            assert ask(server, "/status", Host=name)[0] == 403, name
    assert b"--allow-host" in ask(running.server, "/status", Host="cams.example")[2]
    with pytest.raises(UsageError, match="allow-host: expected a name"):
        LiveServer(("127.0.0.1", 0), INFO, allowed_hosts=["https://cams.example/"])


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


@pytest.mark.parametrize("said", [b"", b"GET /metr", b"GET /status HTTP/1.0\r\nHost: localhost\r\nX: "])
def test_health_is_answered_while_fifty_clients_idle(running: Running, said: bytes) -> None:
    idle = [socket.create_connection(("127.0.0.1", running.server.port)) for _ in range(50)]
    for connection in idle:
        with contextlib.suppress(OSError):  # those that gave way
            connection.sendall(said)
    for path in ("/healthz", "/metrics", "/"):
        assert ask(running.server, path)[0] == 200
    deadline_s = time.monotonic() + 10
    threads = [thread.name for thread in threading.enumerate()]
    while sum("process_request_thread" in name for name in threads) > MAX_CONNECTIONS:
        assert time.monotonic() < deadline_s
        threads = [thread.name for thread in threading.enumerate()]
    for connection in idle:
        connection.close()


def test_health_is_answered_beside_as_many_streams_as_there_may_be(running: Running) -> None:
    viewers = []
    for _ in range(40):
        viewer = http.client.HTTPConnection("127.0.0.1", running.server.port, timeout=10)
        viewer.request("GET", "/stream/door")
        viewers.append(viewer.getresponse())
    assert [viewer.status for viewer in viewers] == [200] * MAX_STREAMS + [503] * (40 - MAX_STREAMS)
    assert ask(running.server, "/healthz")[0] == 200
    for viewer in viewers:
        viewer.close()


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
    (camera,) = json.loads(ask(running.server, "/status?compare=door")[2])["cameras"]
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
        assert server.address == f"http://{socket.gethostname()}:{server.port}/"
        assert ask(server, "/healthz", Host="box.example")[0] == 200
    assert "everybody who reaches it sees the pictures" in caplog.text


# --- the page


def test_the_page_of_one_camera_in_a_browser(toy_bundle: Path, tmp_path: Path) -> None:
    run = Running(toy_bundle, name="<b>gate</b>")
    try:
        with Browser(tmp_path / "profile") as browser:
            browser.open(run.server.address)
            browser.wait_for("document.querySelector('article img')?.naturalWidth === 64")
            browser.wait_for("document.querySelector('.now').classList.contains('adapted')")
            browser.wait_for("document.querySelector('.frozen .label').textContent.includes('%')")
            assert browser.evaluate("document.querySelector('article .name').textContent") == "<b>gate</b>"
            assert browser.evaluate("document.querySelectorAll('.title b, .tile b').length") == 0
            assert browser.evaluate("document.getElementById('grid').hidden")
            cells = "[...document.querySelectorAll('dl div')]"
            shown = f"Object.fromEntries({cells}.map(cell => [cell.dataset.figure, cell.children[1].textContent]))"
            first = browser.evaluate(shown)
            assert set(first) >= {"updates", "rejected", "frames", "dropped"}
            assert not {"reconnects", "drift"} & set(first)  # what there is nothing to say of is left out
            browser.wait_for(f"Number(({shown}).frames) > {int(first['frames'])}")
            browser.evaluate(f"{cells}[0].click()")  # what explains itself to a mouse does so to a finger
            assert "learned optimiser" in browser.evaluate("document.getElementById('hint').textContent")
            browser.wait_for("document.getElementById('state').textContent === 'running'")
            image = browser.screenshot(tmp_path / "page.png")
            assert image.stat().st_size > 10_000
            run.stop()
            browser.wait_for("document.getElementById('state').textContent.includes('ended')")
            assert browser.evaluate("document.querySelector('article').classList.contains('gone')")
            run.server.close()
            browser.wait_for("document.getElementById('state').textContent.includes('no answer')")
            assert not [error for error in browser.errors if "Failed to" not in error and "ERR_" not in error]
    finally:
        run.close()


@pytest.fixture
def eight(toy_bundle: Path) -> Iterator[list[Running]]:
    """Cameras that one server shows."""
    runs = [Running(toy_bundle, "frames=0,paced=1,rate=4", name=f"cam {number}") for number in range(8)]
    runs[0].server.cameras = tuple(run.view for run in runs)
    yield runs
    for run in runs:
        run.close()


TILES = "[...document.querySelectorAll('.tile')]"
FRAMES = f"{TILES}.map(tile => tile.querySelector('img').dataset.frame)"


def test_eight_cameras_live_on_one_page_and_a_second_one_beside_it(eight: list[Running], tmp_path: Path) -> None:
    with Browser(tmp_path / "one") as one, Browser(tmp_path / "two", 390, 844) as two:
        for browser in (one, two):
            browser.open(eight[0].server.address)
        for browser in (one, two):
            browser.wait_for(f"{TILES}.length === 8 && {FRAMES}.every(frame => frame)")
            first = browser.evaluate(FRAMES)
            browser.wait_for(f"{FRAMES}.every((frame, at) => frame !== {json.dumps(first)}[at])")
            browser.wait_for(f"{TILES}.every(tile => tile.classList.contains('live'))")
            # All of a tile is on the screen, on a telephone too.
            assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        one.evaluate(f"{TILES}[3].click()")
        one.wait_for("document.querySelector('article img').dataset.frame?.startsWith('cam 3 ')")
        assert one.evaluate("document.querySelector('article .name').textContent") == "cam 3"
        one.evaluate("document.getElementById('all').click()")
        one.wait_for("!document.getElementById('grid').hidden && document.getElementById('detail').hidden")
        assert not one.errors + two.errors


def test_a_lost_camera_is_red_with_since_when_and_a_silent_one_grey(eight: list[Running], tmp_path: Path) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(eight[0].server.address)
        browser.wait_for(f"{TILES}.length === 8 && {TILES}.every(tile => tile.classList.contains('live'))")
        eight[2].reader.source.stats = LiveStats(connected=False, disconnects=1)
        eight[5].reader.source.stats = LiveStats(connected=True)
        for run in (eight[2], eight[5]):
            run.view.write = lambda *_: None  # no more predictions
        eight[1].reader.source.stats = LiveStats(connected=False)
        eight[1].view._latest = None  # it has never been there
        eight[1].view.write = lambda *_: None
        eight[6].stop()
        news = f"{TILES}.map(tile => tile.querySelector('.news').textContent)"
        browser.wait_for(f"/^lost, last picture .+ s ago$/.test({news}[2])")
        browser.wait_for(f"{news}[1] === 'not there yet, tried again'")
        browser.wait_for(f"/^no picture since .+ s ago$/.test({news}[5])")
        browser.wait_for(f"/^ended, last picture/.test({news}[6])")
        kinds = (
            f"{TILES}.map(tile => ['live', 'stale', 'lost', 'gone'].filter(kind => tile.classList.contains(kind))[0])"
        )
        assert browser.evaluate(kinds) == ["live", "lost", "lost", "live", "live", "stale", "gone", "live"]


def test_a_page_without_news_turns_grey_and_says_so(
    running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Browser(tmp_path / "profile") as browser:
        browser.open(running.server.address)
        browser.wait_for("document.getElementById('state').textContent === 'running'")
        release = threading.Event()
        answer = running.server.answer
        monkeypatch.setattr(running.server, "answer", lambda *words: release.wait(60) and answer(*words))
        browser.wait_for("document.body.classList.contains('stale')", 10)
        assert browser.evaluate("document.getElementById('health').className") == "state bad"
        assert re.match(r"no news for \d+ s", browser.evaluate("document.getElementById('state').textContent"))
        release.set()
        browser.wait_for("!document.body.classList.contains('stale')")
        browser.wait_for("document.getElementById('state').textContent === 'running'")


class Prefixed(BaseHTTPRequestHandler):
    """A proxy that serves another server below /cams/ and passes its own name on, as nginx may."""

    def do_GET(self) -> None:
        if not self.path.startswith("/cams/"):
            self.send_error(404)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=10)
        connection.request("GET", self.path.removeprefix("/cams"), headers={"Host": "cams.example"})
        answer = connection.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.read())
        connection.close()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_the_page_works_behind_a_proxy_below_a_path(running: Running, tmp_path: Path) -> None:
    with LiveServer(("127.0.0.1", 0), INFO, allowed_hosts=["cams.example"]) as server:
        server.cameras = running.server.cameras
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), Prefixed)
        proxy.behind = server.port
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        with Browser(tmp_path / "profile") as browser:
            browser.open(f"http://127.0.0.1:{proxy.server_port}/cams/")
            browser.wait_for("document.querySelector('article img')?.naturalWidth === 64")
            browser.wait_for("document.getElementById('state').textContent === 'running'")
            links = browser.evaluate(
                "[...document.querySelectorAll('footer a')].map(link => new URL(link.href).pathname)"
            )
            assert links == ["/cams/metrics", "/cams/healthz", "/cams/readyz", "/cams/status"]
            assert not browser.errors
        proxy.shutdown()
        proxy.server_close()
