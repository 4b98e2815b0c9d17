"""The live page and what programs ask: on the loopback interface unless told otherwise.

    /                page for people
    /status          the same as JSON;  ?compare=NAME  ask the frozen model about that camera now
    /history/NAME    the last day of a camera, a point a minute (`http_history`)
    /picture/NAME    the latest picture of a camera, its index as X-Frame;  ?width=W  at least W pixels wide, if it has
                     so many;  &after=INDEX  once there is another than that one, within a second
    /stream/NAME     its pictures as MJPEG
    /metrics         Prometheus
    /healthz         200 while the run lives, else 503: what a supervisor restarts by
    /readyz          200 while every camera gives predictions, else 503 with the reason

    POST /control/NAME/ACTION    tell a camera something, where that is allowed (`http_control`)

There is no password for looking: whoever reaches the port sees the pictures. Bound to loopback, requests by another
host's name are refused, so that a web page elsewhere cannot read them through the visitor's browser; a proxy that
passes its own name on is allowed by that name.

Connections have an end: at the last free one, the oldest that is no stream gives way. So health is answered however
many clients idle or read slowly.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import re
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mgg_edge.compat import Self
from mgg_edge.errors import SinkError, UsageError
from mgg_edge.runtime.outputs.http_control import ACTIONS, Control, Refusal
from mgg_edge.runtime.outputs.http_page import CONTENT_SECURITY_POLICY, PAGE
from mgg_edge.runtime.outputs.http_view import MAX_WIDTH, CameraView
from mgg_edge.runtime.outputs.metrics import CONTENT_TYPE, render

__all__ = ["LiveServer", "parse_listen"]

LOOPBACK = "127.0.0.1"
MAX_CONNECTIONS, MAX_STREAMS = 32, 24
SOCKET_TIMEOUT_S = 10.0  # for a client that does not read or write
WAIT_S = 1.0  # for another picture
STREAM_RATE = 15.0  # pictures a second at most, for each viewer
SAMPLE_S, SAVE_S = 2.0, 300.0  # between looks at the cameras, and between histories on the disk
HUNG_S = 30.0  # silence of a run after which it counts as hung
_LOOPBACK_NAMES = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
_HOST_NAME = re.compile(r"[\w.-]+", re.ASCII)
_logger = logging.getLogger(__name__)


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port of `[HOST:]PORT`; the host is loopback unless named, port 0 takes a free one.

    Raises:
        UsageError: not of that form.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or LOOPBACK
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535 and re.fullmatch(r"[\w.:-]+", host, re.ASCII)):
        raise UsageError(f"serve: expected [HOST:]PORT such as 8080 or 0.0.0.0:8080, found '{text}'")
    return host, int(port)


@dataclass(frozen=True)
class _Answer:
    status: int
    kind: str
    body: bytes
    frame: int | None = None


class LiveServer:
    """Serves views of cameras on threads of its own, from construction to `close`.

    Args:
        listen: host and port.
        info: what runs here: `version`, `engine`, `bundle`, `bundle_id`.
        ready_s: how old the latest prediction of each camera may be.
        control: who may tell cameras something; nobody if None.
        allowed_hosts: names by which a proxy asks for a page on the loopback interface.

    Attributes:
        cameras: views; set when the cameras are open.
        address: where to look.

    Raises:
        SinkError: the address cannot be used.
        UsageError: an allowed host is no name.
    """

    def __init__(
        self,
        listen: tuple[str, int],
        info: Mapping[str, str],
        *,
        ready_s: float = 15.0,
        control: Control | None = None,
        allowed_hosts: Sequence[str] = (),
    ) -> None:
        self.cameras: Sequence[CameraView] = ()
        self.info, self._ready_s, self._control = dict(info), ready_s, control
        if wrong := next((name for name in allowed_hosts if not _HOST_NAME.fullmatch(name)), None):
            raise UsageError(f"allow-host: expected a name such as cams.example.org, found '{wrong}'")
        self._allowed_hosts = frozenset(name.lower() for name in allowed_hosts)
        self.closing = threading.Event()
        try:
            self._server = _Server(listen, self)
        except (OSError, OverflowError) as error:
            where = f"{listen[0]}:{listen[1]}"
            raise SinkError(f"serve: cannot listen on {where}: {getattr(error, 'strerror', None) or error}") from error
        host, self.port = self._server.server_address[:2]
        name = host.decode() if isinstance(host, bytes | bytearray) else host
        # All interfaces have no address of their own: the machine's name is one.
        shown = socket.gethostname() if name in ("0.0.0.0", "::") else f"[{name}]" if ":" in name else name  # noqa: S104
        self.address = f"http://{shown}:{self.port}/"
        self.loopback = bool(_LOOPBACK_NAMES.fullmatch(f"[{name}]" if ":" in name else name))
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        self._sampler = threading.Thread(target=self._sample, name="history", daemon=True)
        self._thread.start()
        self._sampler.start()
        if not self.loopback:
            _logger.warning("serving on %s: everybody who reaches it sees the pictures", self.address)

    def health(self) -> str | None:
        """Why the run counts as hung, or None."""
        for camera in self.cameras:
            if not camera.silence_s <= HUNG_S:
                return f"camera {camera.name}: the run has not moved for {camera.silence_s:.0f} s"
        return None

    def readiness(self) -> str | None:
        """Why there are no current predictions, or None."""
        if not self.cameras:
            return "starting"
        for camera in self.cameras:
            age_s = camera.prediction_age_s
            if camera.ended:
                return f"camera {camera.name}: ended"
            if age_s is None:
                return f"camera {camera.name}: no prediction yet"
            if not age_s <= self._ready_s:
                return f"camera {camera.name}: no prediction for {age_s:.0f} s"
        return self.health()

    def camera(self, name: str) -> CameraView | None:
        """The view of a camera."""
        return next((camera for camera in self.cameras if camera.name == name), None)

    def allows(self, host: str) -> bool:
        """Whether a request by this `Host` is answered."""
        return (
            not self.loopback
            or _LOOPBACK_NAMES.fullmatch(host) is not None
            or re.sub(r":\d+$", "", host).lower() in self._allowed_hosts
        )

    def answer(self, path: str, query: str = "") -> _Answer:
        """What is said on one path, streams apart."""
        if path == "/":
            return _Answer(200, "text/html; charset=utf-8", PAGE.encode())
        if path == "/status":
            reason = self.readiness()
            asked = urllib.parse.parse_qs(query).get("compare", [])
            cameras = [camera.status(compare=camera.name in asked) for camera in self.cameras]
            about = {"info": self.info, "time": round(time.time(), 3), "ready": reason is None, "reason": reason}
            about["actions"] = [] if self._control is None else list(ACTIONS)
            return _json(200, {**about, "cameras": cameras})
        if path == "/metrics":
            return _Answer(200, CONTENT_TYPE, render(self.cameras, self.info).encode())
        if path in ("/healthz", "/readyz"):
            reason = self.health() if path == "/healthz" else self.readiness()
            good = {"status": "ok"} if reason is None else {"status": "unavailable", "reason": reason}
            return _json(200 if reason is None else 503, good)
        if path.startswith("/picture/"):
            camera = self.camera(urllib.parse.unquote(path.removeprefix("/picture/")))
            after = _number(query, "after", -1)
            found = None if camera is None else camera.jpeg_after(after, WAIT_S, _number(query, "width", MAX_WIDTH))
            if found is not None:
                return _Answer(200, "image/jpeg", found[1], found[0])
        if path.startswith("/history/"):
            camera = self.camera(urllib.parse.unquote(path.removeprefix("/history/")))
            if camera is not None:
                return _json(200, {"points": [asdict(point) for point in camera.history.points()]})
        return _json(404, {"status": "not found"})

    def perform(self, path: str, query: str, authorization: str) -> _Answer:
        """What is said to a request that something be done."""
        found = re.fullmatch(r"/control/([^/]+)/([^/]+)", path)
        if found is None:
            return _json(404, {"status": "not found"})
        if self._control is None:
            reason = "this run takes no orders: it was started without --control"
            return _json(403, {"status": "forbidden", "reason": reason})
        try:
            minutes = _decimal(query, "minutes")
            camera, action = map(urllib.parse.unquote, found.groups())
            return _json(200, {"status": "ok", **self._control.perform(camera, action, authorization, minutes)})
        except Refusal as refusal:
            return _json(refusal.status, {"status": "refused", "reason": str(refusal)})

    def _sample(self) -> None:
        """Look at every camera now and then; ask the frozen model about one at a time, however many there are."""
        saved_s = time.monotonic()
        for number in itertools.count():
            if self.closing.wait(SAMPLE_S):
                break
            cameras = self.cameras
            for index, camera in enumerate(cameras):
                camera.sample(time.time(), compare=index == number % len(cameras))
            if time.monotonic() - saved_s >= SAVE_S:
                saved_s = time.monotonic()
                self._save()
        self._save()

    def _save(self) -> None:
        for camera in self.cameras:
            camera.history.save()

    def close(self) -> None:
        """Answer no more and free the port; safe to call twice."""
        if not self.closing.is_set():
            self.closing.set()
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._sampler.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 16

    def __init__(self, listen: tuple[str, int], live: LiveServer) -> None:
        self.address_family = socket.AF_INET6 if ":" in listen[0] else socket.AF_INET
        self.live = live
        self._lock = threading.Lock()
        self._open: dict[socket.socket, bool] = {}  # by age; True for a stream
        super().__init__(listen, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:  # a thread for each: their number must have an end
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = next(known for known, streams in self._open.items() if not streams)
                del self._open[oldest]
                _end(oldest)
            self._open[request] = False
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.pop(request, None)

    def begin_stream(self, request: Any) -> bool:
        """Whether one more connection may stay; it then gives way to none."""
        with self._lock:
            if request not in self._open or sum(self._open.values()) >= MAX_STREAMS:
                return False
            self._open[request] = True
            return True

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the base class's signature
        error = sys.exc_info()[1]
        level = logging.DEBUG if isinstance(error, OSError) else logging.WARNING  # clients go away all the time
        _logger.log(level, "http: an answer was not completed: %s: %s", type(error).__name__, error)


class _Handler(BaseHTTPRequestHandler):
    # One request a connection: no thread waits for another, and nothing is answered after `close`.
    protocol_version = "HTTP/1.0"
    server_version, sys_version = "mgg-edge", ""
    timeout = SOCKET_TIMEOUT_S

    def do_GET(self) -> None:
        live, asked = self._server.live, urllib.parse.urlsplit(self.path)
        if not live.allows(self.headers.get("Host", "")):
            self._send(FORBIDDEN)
        elif asked.path.startswith("/stream/"):
            self._stream(urllib.parse.unquote(asked.path.removeprefix("/stream/")))
        else:
            self._send(live.answer(asked.path, asked.query))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        live = self._server.live
        if not live.allows(self.headers.get("Host", "")):
            self._send(FORBIDDEN)
        else:
            asked = urllib.parse.urlsplit(self.path)
            self._send(live.perform(asked.path, asked.query, self.headers.get("Authorization", "")))

    @property
    def _server(self) -> _Server:
        if not isinstance(self.server, _Server):
            raise TypeError("this handler belongs to another server")
        return self.server

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        self._headers(answer.kind)
        if answer.frame is not None:
            self.send_header("X-Frame", str(answer.frame))
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _stream(self, name: str) -> None:
        live = self._server.live
        camera = live.camera(name)
        if camera is None:
            self._send(_json(404, {"status": "not found", "reason": "no such camera"}))
            return
        if not self._server.begin_stream(self.connection):
            self._send(_json(503, {"status": "unavailable", "reason": f"{MAX_STREAMS} streams run already"}))
            return
        self.close_connection = True
        self.send_response(200)
        self._headers("multipart/x-mixed-replace; boundary=picture")
        self.end_headers()
        index = -1
        while self.command != "HEAD" and not live.closing.is_set():
            start_s = time.monotonic()
            found = camera.jpeg_after(index, WAIT_S)
            if found is not None:
                index, data = found
                head = f"--picture\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                self.wfile.write(head.encode() + data + b"\r\n")
            elif camera.ended:
                return
            live.closing.wait(max(0.0, start_s + 1 / STREAM_RATE - time.monotonic()))

    def _headers(self, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        _logger.debug("http: %s", format % args)


def _number(query: str, name: str, default: int) -> int:
    """A number ≥ 0 of a query; the default for anything else."""
    asked = urllib.parse.parse_qs(query).get(name, [""])[-1]
    return int(asked) if asked.isascii() and asked.isdecimal() and len(asked) < 16 else default


def _decimal(query: str, name: str) -> float | None:
    """A number of a query; NaN for what is none, None where it is not there."""
    asked = urllib.parse.parse_qs(query).get(name)
    try:
        return None if asked is None else float(asked[-1])
    except ValueError:
        return math.nan


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may have gone by itself
        connection.shutdown(socket.SHUT_RDWR)


def _json(status: int, value: Mapping[str, Any]) -> _Answer:
    return _Answer(status, "application/json", json.dumps(value).encode())


FORBIDDEN = _json(
    403, {"status": "forbidden", "reason": "ask by the name localhost, or allow the proxy's name with --allow-host"}
)
