"""Streams served on this machine for the tests: MPEG-TS and MJPEG over HTTP, MPEG-TS over UDP, and RTSP.

Every server can be cut (connections closed, new ones refused or hanging) and restored.
"""

from __future__ import annotations

import contextlib
import io
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import av
import numpy as np
from PIL import Image

from mgg_edge.compat import Self
from videos import pictures

RATE = 25
Mood = Literal["serve", "refuse", "hang"]


def transport_stream(count: int = 150, height: int = 48, width: int = 64) -> list[bytes]:
    """One piece of MPEG-TS for each picture, every tenth with everything a decoder needs to begin."""
    buffer, pieces = io.BytesIO(), []
    with av.open(buffer, "w", format="mpegts", options={"mpegts_flags": "pat_pmt_at_frames"}) as out:
        stream = out.add_stream("mpeg2video", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 10
        stream.codec_context.max_b_frames = 0
        for index, image in enumerate(pictures(10, height, width) * (count // 10)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            out.mux(stream.encode(frame))
            pieces.append(buffer.getvalue())
            buffer.seek(0)
            buffer.truncate()
    return [piece for piece in pieces if piece]


def jpegs(count: int = 20, height: int = 48, width: int = 64) -> list[bytes]:
    """JPEG pictures."""
    found = []
    for image in pictures(count, height, width):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


class HttpStream:
    """An endless stream at `/live` (`mpegts` or `mjpeg`); keeps the paths and headers it was asked with.

    Attributes:
        mood: what becomes of connections: served, refused (closed at once), or accepted and left without an answer.
    """

    def __init__(self, kind: Literal["mpegts", "mjpeg"] = "mpegts", port: int = 0) -> None:
        self.kind, self.mood, self.asked = kind, "serve", []
        self.size = (48, 64)
        self._ended, self._generation = threading.Event(), 0
        stream = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stream.asked.append((self.path, dict(self.headers)))
                with contextlib.suppress(OSError):
                    stream._serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Of the stream."""
        return f"http://127.0.0.1:{self.port}/live"

    def cut(self, mood: Mood = "refuse") -> None:
        """Break all connections; later ones are refused or hang."""
        self.mood = mood
        self._generation += 1

    def restore(self) -> None:
        """Serve again."""
        self.mood = "serve"

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        generation = self._generation
        if self.mood == "refuse":
            return
        while self.mood == "hang":
            if self._ended.wait(0.05):
                return
        handler.send_response(200)
        kinds = {"mpegts": "video/mp2t", "mjpeg": "multipart/x-mixed-replace; boundary=part"}
        handler.send_header("Content-Type", kinds[self.kind])
        handler.end_headers()
        start_s = time.monotonic()
        for index, piece in enumerate(self._pieces()):
            if self._ended.wait(max(0.0, start_s + index / RATE - time.monotonic())) or generation != self._generation:
                # In mood `hang` the connection stays and nothing comes.
                while self.mood == "hang" and not self._ended.wait(0.05):
                    pass
                return
            handler.wfile.write(piece)

    def _pieces(self) -> Iterator[bytes]:
        if self.kind == "mpegts":
            yield from transport_stream(1500, *self.size)
            return
        images = jpegs(20, *self.size)
        while True:
            for image in images:
                yield b"--part\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n" % (len(image), image)


class UdpStream:
    """MPEG-TS datagrams to a port of this machine."""

    def __init__(self, port: int) -> None:
        self.paused = False
        self._port, self._ended = port, threading.Event()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _send(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for piece in transport_stream(1500):
                if self._ended.wait(1 / RATE):
                    return
                for start in range(0, 0 if self.paused else len(piece), 1316):
                    sender.sendto(piece[start : start + 1316], ("127.0.0.1", self._port))


class RtspStream:
    """MPEG-TS in RTP, interleaved in one RTSP connection, or by datagrams alone; may ask for basic credentials."""

    def __init__(self, port: int = 0, authorization: str | None = None, *, datagrams: bool = False) -> None:
        self.asked: list[str] = []
        self._authorization, self._datagrams, self._client_port = authorization, datagrams, 0
        self._socket = socket.create_server(("127.0.0.1", port))
        self.port = self._socket.getsockname()[1]
        self._clients: list[socket.socket] = []
        self._ended = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"rtsp://127.0.0.1:{self.port}/live"

    def cut(self) -> None:
        """Break all connections."""
        for client in self._clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        self._clients.clear()

    def close(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.cut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self._clients.append(client)
            threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: socket.socket) -> None:
        lock = threading.Lock()
        with contextlib.suppress(OSError), client, client.makefile("rb") as lines:
            while request := self._request(lines):
                method, headers = request
                self.asked.append(method)
                answer = self._answer(method, headers)
                with lock:
                    client.sendall(answer.encode())
                if method == "PLAY" and " 200 " in answer:
                    threading.Thread(target=self._play, args=(client, lock), daemon=True).start()

    def _request(self, lines: Any) -> tuple[str, dict[str, str]] | None:
        line = lines.readline()
        while line[:1] == b"$":  # a report of the receiver's, between the requests
            line = lines.readline()
        if not line:
            return None
        headers = {}
        while header := lines.readline().decode("latin-1").strip():
            name, _, value = header.partition(":")
            headers[name.lower()] = value.strip()
        return line.decode("latin-1").split(" ")[0], headers

    def _answer(self, method: str, headers: dict[str, str]) -> str:
        common = f"CSeq: {headers.get('cseq', '0')}\r\nSession: 1\r\n"
        if self._authorization is not None and headers.get("authorization") != self._authorization:
            return f'RTSP/1.0 401 Unauthorized\r\n{common}WWW-Authenticate: Basic realm="camera"\r\n\r\n'
        if method == "OPTIONS":
            return f"RTSP/1.0 200 OK\r\n{common}Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n\r\n"
        if method == "DESCRIBE":
            body = "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=live\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:track\r\n"
            return (
                f"RTSP/1.0 200 OK\r\n{common}Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            )
        if method == "SETUP" and self._datagrams:
            if "/TCP" in headers["transport"]:
                return f"RTSP/1.0 461 Unsupported Transport\r\n{common}\r\n"
            ports = headers["transport"].rpartition("client_port=")[2]
            self._client_port = int(ports.partition("-")[0])
            both = f"client_port={ports};server_port=6970-6971"
            return f"RTSP/1.0 200 OK\r\n{common}Transport: RTP/AVP;unicast;{both}\r\n\r\n"
        if method == "SETUP":
            return f"RTSP/1.0 200 OK\r\n{common}Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n\r\n"
        return f"RTSP/1.0 200 OK\r\n{common}\r\n"

    def _play(self, client: socket.socket, lock: threading.Lock) -> None:
        number = 0
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for index, piece in enumerate(transport_stream(1500)):
                if self._ended.wait(1 / RATE):
                    return
                for start in range(0, len(piece), 1316):
                    payload = piece[start : start + 1316]
                    head = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, index * (90000 // RATE), 7)
                    if self._datagrams:
                        sender.sendto(head + payload, ("127.0.0.1", self._client_port))
                    else:
                        with lock:
                            client.sendall(struct.pack(">cBH", b"$", 0, len(head) + len(payload)) + head + payload)
                    number += 1


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port nobody uses now."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    """In grey levels."""
    return float(np.abs(first.astype(int) - second.astype(int)).mean())
