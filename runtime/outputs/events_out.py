"""Where events go: lines of a file, a web address, an MQTT broker. None of them ever delays a frame.

    events.jsonl                                 one JSON object a line, appended
    https://host/path                            POST of one JSON object each
    mqtt://[user:password@]host[:1883]/topic     published at topic/CAMERA/EVENT; mqtts:// with TLS

Each has a queue of its own with an end and a thread that empties it. What a target does not take is tried again with
growing pauses; meanwhile the oldest event gives way to the newest, and their number is said.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import ssl
import threading
import time
import urllib.parse
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgg_edge.compat import Self
from mgg_edge.errors import MissingDependencyError, SinkError, UsageError
from mgg_edge.files import output_target
from mgg_edge.runtime.sources.source_address import redact
from mgg_edge.runtime.sources.source_backoff import Backoff

__all__ = ["EventTarget", "open_target"]

QUEUE = 1000
TIMEOUT_S = 5.0
DRAIN_S = 5.0  # at the end, for what still waits
_logger = logging.getLogger(__name__)


class EventTarget(ABC):
    """Takes events and delivers them from a thread of its own, in order.

    Args:
        name: for messages, without credentials.

    Attributes:
        delivered, lost: events that arrived, and events that gave way or were left over.
    """

    def __init__(self, name: str) -> None:
        self.name, self.delivered, self.lost = name, 0, 0
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._changed = threading.Condition()
        self._ending_s: float | None = None
        self._backoff = Backoff(first_s=0.5, limit_s=30.0)
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def emit(self, event: Mapping[str, Any]) -> None:
        """Take an event; returns at once."""
        with self._changed:
            if len(self._waiting) >= QUEUE:
                self._waiting.popleft()
                self.lost += 1
            self._waiting.append(event)
            self._changed.notify()

    @abstractmethod
    def deliver(self, event: Mapping[str, Any]) -> None:
        """Bring one event to its target.

        Raises:
            OSError: it did not take it.
        """

    @abstractmethod
    def release(self) -> None:
        """Give up connection or file."""

    def close(self) -> None:
        """Deliver what waits, for five seconds at most; say what was lost."""
        with self._changed:
            self._ending_s = time.monotonic() + DRAIN_S
            self._changed.notify()
        self._thread.join(DRAIN_S + TIMEOUT_S)
        self.lost += len(self._waiting)
        if self.lost:
            _logger.warning("events: %s: %d of %d were lost", self.name, self.lost, self.lost + self.delivered)
        self.release()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        failing = False
        while (event := self._next()) is not None:
            try:
                self.deliver(event)
            except OSError as error:
                if not failing:
                    _logger.warning("events: %s does not take them: %s; tried again", self.name, _reason(error))
                failing = True
                with self._changed:  # back to its place, if there is one: what came later is newer
                    if len(self._waiting) < QUEUE:
                        self._waiting.appendleft(event)
                    else:
                        self.lost += 1
                    if self._ending_s is None:
                        self._changed.wait_for(lambda: self._ending_s is not None, self._backoff.next_s())
                    else:
                        self._changed.wait(0.2)
                continue
            self.delivered += 1
            self._backoff.reset()
            if failing:
                _logger.info("events: %s takes them again", self.name)
            failing = False

    def _next(self) -> Mapping[str, Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending_s is not None)
            over = self._ending_s is not None and time.monotonic() > self._ending_s
            return self._waiting.popleft() if self._waiting and not over else None


class EventFile(EventTarget):
    """Lines of a file.

    Raises:
        UsageError, SinkError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        output_target(path)
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise SinkError(f"{path}: cannot write here: {error.strerror or error}") from error

    def deliver(self, event: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._file.flush()

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class Webhook(EventTarget):
    """A web address that is posted to."""

    def __init__(self, address: str) -> None:
        parts = urllib.parse.urlsplit(address)
        super().__init__(redact(f"{parts.scheme}://{parts.netloc}"))  # a path may be a secret
        self._host, self._secure = parts.netloc.rpartition("@")[2], parts.scheme == "https"
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not parts.hostname:
            raise UsageError(f"events: expected {parts.scheme}://HOST/PATH, found no host")

    def deliver(self, event: Mapping[str, Any]) -> None:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, timeout=TIMEOUT_S)
        try:
            connection.request("POST", self._path, json.dumps(event), {"Content-Type": "application/json"})
            status = connection.getresponse().status
        except http.client.HTTPException as error:
            raise ConnectionError(f"no answer: {type(error).__name__}") from error
        finally:
            connection.close()
        if not 200 <= status < 300:
            raise ConnectionError(f"status {status}")

    def release(self) -> None:
        """Nothing is kept: a connection for each."""


class Mqtt(EventTarget):
    """A topic of an MQTT broker, which is connected to when there is something to say, and kept.

    Quality of service 1: an event whose acknowledgement was lost may arrive twice.

    Raises:
        MissingDependencyError: paho-mqtt is not installed.
    """

    def __init__(self, address: str) -> None:
        try:
            from paho.mqtt.client import Client
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError as error:
            raise MissingDependencyError(
                "events to MQTT need paho-mqtt; install it with: pip install 'mgg-edge[mqtt]'"
            ) from error
        try:
            parts = urllib.parse.urlsplit(address)
            port = parts.port
        except ValueError as error:
            raise UsageError("events: expected mqtt://[user:password@]host[:port]/topic") from error
        topic = urllib.parse.unquote(parts.path.strip("/"))
        if not parts.hostname or not topic or "#" in address or "+" in topic:
            raise UsageError("events: expected mqtt://[user:password@]host[:port]/topic, without # and + in the topic")
        super().__init__(redact(f"{parts.scheme}://{parts.netloc}"))
        self._topic, self._host = topic, parts.hostname
        self._port = port or (8883 if parts.scheme == "mqtts" else 1883)
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=f"mgg-edge-{os.urandom(4).hex()}")
        if parts.username:
            self._client.username_pw_set(
                *(urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
            )
        if parts.scheme == "mqtts":
            self._client.tls_set_context(ssl.create_default_context())
        self._client.connect_timeout = TIMEOUT_S
        self._begun = False

    def deliver(self, event: Mapping[str, Any]) -> None:
        if not self._begun:
            self._client.connect(self._host, self._port, keepalive=30)
            self._client.loop_start()  # keeps the connection, and makes it anew
            self._begun = True
        if not self._client.is_connected():
            time.sleep(0.2)
            if not self._client.is_connected():
                raise ConnectionError("not connected")
        topic = f"{self._topic}/{event['camera']}/{event['event']}"
        sent = self._client.publish(topic, json.dumps(event, ensure_ascii=False), qos=1)
        try:
            sent.wait_for_publish(TIMEOUT_S)
        except (ValueError, RuntimeError) as error:
            raise ConnectionError(str(error)) from error
        if not sent.is_published():
            raise ConnectionError("no acknowledgement")

    def release(self) -> None:
        if self._begun:
            self._client.disconnect()
            self._client.loop_stop()


def open_target(text: str) -> EventTarget:
    """The target that a text names.

    Raises:
        UsageError, SinkError, MissingDependencyError: it cannot be used.
    """
    scheme = text.partition("://")[0].lower() if "://" in text else ""
    if scheme in ("http", "https"):
        return Webhook(text)
    if scheme in ("mqtt", "mqtts"):
        return Mqtt(text)
    if scheme:
        raise UsageError(f"events: expected a file, http(s):// or mqtt(s)://, found {scheme}://")
    return EventFile(Path(text))


def _reason(error: OSError) -> str:
    return redact(str(error.strerror or error))
