"""A camera or a network stream: decoded in a process that is replaced when it hangs, breaks or dies.

    connected ── nothing for `stall_timeout_s` ──▶ process killed ──▶ wait (back-off with jitter) ──▶ new process
        └─────── error, end, crash ──────────────────────────────────▶ wait ...

The first connection must succeed, so that a wrong address is told at once, unless there are other cameras that should
not wait for this one (`must_connect`). Later ones are tried for ever, or as often as `max_reconnects` allows without
one picture between. The picture size may differ after a reconnection.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from mgg_edge.errors import MggEdgeError, MissingDependencyError, SourceError, UsageError
from mgg_edge.runtime.sources.decoder import Decoder, EndedError, Opened, Picture, StalledError
from mgg_edge.runtime.sources.source import ClosingSource, Frame
from mgg_edge.runtime.sources.source_backoff import Backoff

__all__ = ["LiveOptions", "LiveSource", "LiveStats"]

MAX_LIVE_TIMEOUT_S = 3600.0
# Of a camera that has not been there yet.
UNKNOWN_WIDTH, UNKNOWN_HEIGHT, UNKNOWN_RATE = 1280, 720, Fraction(30)
MIN_LIFETIME_S = 0.5  # of a connection; one that breaks at once is not remade in a busy loop
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LiveOptions:
    """How patient to be.

    Attributes:
        open_timeout_s: for a connection and its first picture.
        stall_timeout_s: without a picture, before the decoding process is killed.
        max_reconnects: attempts in a row without one picture; None tries for ever.
        backoff: waiting times between attempts.
        must_connect: whether the first connection must succeed; otherwise it is tried as all later ones are.
    """

    open_timeout_s: float = 15.0
    stall_timeout_s: float = 5.0
    max_reconnects: int | None = None
    backoff: Backoff = field(default_factory=Backoff)
    must_connect: bool = True

    def __post_init__(self) -> None:
        for name in ("open_timeout_s", "stall_timeout_s"):
            if not 0 < getattr(self, name) <= MAX_LIVE_TIMEOUT_S:
                raise UsageError(
                    f"{name}: expected more than 0 and at most {MAX_LIVE_TIMEOUT_S:.0f} seconds, "
                    f"found {getattr(self, name)}"
                )
        if self.max_reconnects is not None and not self.max_reconnects >= 0:
            raise UsageError(f"max_reconnects: expected a number of at least 0, found {self.max_reconnects}")


@dataclass(frozen=True)
class LiveStats:
    """What became of a connection.

    Attributes:
        connected: a decoding process runs and has given a picture.
        disconnects: connections lost, for any reason.
        kills: decoding processes killed because nothing came.
        reconnects: connections made anew.
        down_s: seconds without a connection that have ended.
        lost_s: time (`time.monotonic`) since when there is none; None while there is one.
    """

    connected: bool = False
    disconnects: int = 0
    kills: int = 0
    reconnects: int = 0
    down_s: float = 0.0
    lost_s: float | None = None

    @property
    def downtime_s(self) -> float:
        """Seconds without a connection, until now."""
        return self.down_s + (0.0 if self.lost_s is None else time.monotonic() - self.lost_s)


class LiveSource(ClosingSource):
    """Pictures of a camera or stream; opens at once and waits for the first picture, for `open_timeout_s` at most.

    Args:
        request: what the decoding process is to open (see `decoder_read`).
        name: for messages; redacted.
        options: patience.

    Attributes:
        stats: connections so far; may be read by any thread.
        failure: why the first connection has not come about yet, or None.

    Raises:
        SourceError: it must connect and cannot be opened, or gives nothing in time.
        MissingDependencyError: it needs a package that is absent.
    """

    def __init__(self, request: Mapping[str, Any], name: str, options: LiveOptions | None = None) -> None:
        self.name, self.live = name, True
        self.frames_expected: int | None = None
        self._options = options or LiveOptions()
        self._backoff = replace(self._options.backoff)
        self._request = {
            **request,
            "open_timeout_s": self._options.open_timeout_s,
            "stall_timeout_s": self._options.stall_timeout_s,
        }
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards `_decoder` against an interruption while it is replaced
        self._decoder: Decoder | None = None
        self._connected_s = 0.0
        self.stats = LiveStats(lost_s=time.monotonic())
        self.failure: MggEdgeError | None = None
        self._first: Picture | None = None
        self._finite = False
        self.width, self.height, self.rate = UNKNOWN_WIDTH, UNKNOWN_HEIGHT, UNKNOWN_RATE
        try:
            self._begin(*self._connect())
        except MggEdgeError as error:
            if self._options.must_connect or isinstance(error, MissingDependencyError):
                self.close()
                raise type(error)(f"{name}: {error}") from error
            self._drop_decoder()
            self.failure = type(error)(f"{name}: {error}")

    @property
    def process_id(self) -> int | None:
        """Of the decoding process, while there is one."""
        decoder = self._decoder
        return None if decoder is None else decoder.process_id

    def __iter__(self) -> Iterator[Frame]:
        """Yield pictures until the source is interrupted, ends (a recording) or is lost for good.

        Raises:
            SourceError: a recording broke off, or too many reconnections failed.
        """
        picture = self._reconnect() if self._first is None else self._first
        start_s, index, last_s = 0.0 if picture is None else picture.captured_s, 0, 0.0
        while picture is not None:
            # Streams restart their clocks; the arrival is what a reader can rely on. A recording has its own.
            time_s = self._recorded_s(picture, last_s) if self._finite else picture.captured_s - start_s
            yield Frame(index, time_s, picture.image, picture.captured_s)
            index, last_s = index + 1, time_s
            picture = self._next()

    def _recorded_s(self, picture: Picture, last_s: float) -> float:
        """Seconds since the first picture by the recording's clock, which never runs backwards here."""
        begin_s = None if self._first is None else self._first.time_s
        if picture is self._first:
            return 0.0
        if picture.time_s is None or begin_s is None:
            return last_s + float(1 / self.rate)
        return max(last_s, picture.time_s - begin_s)

    def interrupt(self) -> None:
        """End the iteration now; from any thread."""
        self._closing.set()
        with self._lock:
            if self._decoder is not None:
                self._decoder.kill()

    def close(self) -> None:
        """End the decoding process; safe to call twice."""
        self._closing.set()
        self._drop_decoder()

    def _next(self) -> Picture | None:
        try:
            if self._decoder is None:
                raise SourceError("not connected")
            return self._decoder.picture(self._options.stall_timeout_s)
        except (SourceError, OSError) as error:
            if self._closing.is_set():
                return None
            if self._finite:
                self.close()
                if isinstance(error, EndedError):
                    return None
                raise SourceError(f"{self.name}: {error}") from error
            self._lost(error)
            if self._options.max_reconnects == 0:
                raise SourceError(f"{self.name}: connection lost: {error}") from error
        return self._reconnect()

    def _reconnect(self) -> Picture | None:
        failures, words = 0, ("connect", "reconnect")
        self._backoff.reset()
        again = self._first is not None
        wait_s = max(0.0, MIN_LIFETIME_S - (time.monotonic() - self._connected_s)) if again else self._backoff.next_s()
        while not self._closing.wait(wait_s):
            try:
                opened, picture = self._connect()
            except MissingDependencyError:
                raise
            except (MggEdgeError, OSError) as error:
                self._drop_decoder()
                if self._closing.is_set():
                    return None
                failures, wait_s = failures + 1, self._backoff.next_s()
                limit = self._options.max_reconnects
                if limit is not None and not failures < limit:
                    raise SourceError(f"{self.name}: lost after {failures} attempts to reconnect: {error}") from error
                _logger.info("%s: attempt %d to %s failed: %s", self.name, failures, words[again], error)
                continue
            if again:
                self._count(connected=True, reconnects=self.stats.reconnects + 1)
            else:
                self._begin(opened, picture)
            _logger.info("%s: connected%s", self.name, " again" if again else "")
            return picture
        return None

    def _begin(self, opened: Opened, first: Picture) -> None:
        """Take note of what the first connection says."""
        self._first, self._finite, self.failure = first, opened.finite, None
        self.live = not opened.finite  # a recording waits for its reader, wherever it lies
        self.rate = opened.rate
        self.height, self.width = first.image.shape[:2]

    def _connect(self) -> tuple[Opened, Picture]:
        decoder = Decoder(self._request)
        with self._lock:
            self._decoder = decoder
            if self._closing.is_set():
                decoder.kill()
        try:
            decoder.started()
            deadline_s = time.monotonic() + self._options.open_timeout_s
            opened = decoder.opened(self._options.open_timeout_s)
            picture = decoder.picture(deadline_s - time.monotonic())
        except StalledError as error:
            raise StalledError(f"no picture within {self._options.open_timeout_s:g} s") from error
        except EndedError as error:
            raise SourceError("the stream ended without a picture") from error
        self._connected_s = time.monotonic()
        self._count(connected=True, down_s=self.stats.downtime_s, lost_s=None)
        return opened, picture

    def _lost(self, error: Exception) -> None:
        stalled = isinstance(error, StalledError)
        reason = f"no picture for {self._options.stall_timeout_s:g} s" if stalled else str(error)
        _logger.warning("%s: connection lost: %s", self.name, reason)
        self._drop_decoder()
        disconnects, kills = self.stats.disconnects + 1, self.stats.kills + int(stalled)
        self._count(connected=False, disconnects=disconnects, kills=kills, lost_s=time.monotonic())

    def _drop_decoder(self) -> None:
        with self._lock:
            decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.close()

    def _count(self, **changes: Any) -> None:
        self.stats = LiveStats(**{**vars(self.stats), **changes})
