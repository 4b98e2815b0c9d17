"""What became of a camera over the last day, a point a minute: entropy, drift, agreement with the frozen model, events.

    [ {time, frames, entropy, drift, agreement, updates, refused, rollbacks, disconnects}, … ]    oldest first

`time` is the minute's beginning in seconds since 1970; `entropy` (nats) and `drift` are means, `agreement` the share of
compared pictures that both models name alike, each null where nothing was measured; the rest counts events within the
minute. A day is 1,440 points, kept in one file beside the camera's state where there is one.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mgg_edge.errors import MggEdgeError
from mgg_edge.files import write_whole

__all__ = ["History", "Point", "Sample"]

PERIOD_S = 60
LENGTH = 24 * 60
SUFFIX = ".history.json"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """A look at a camera. Counters count from its beginning; means are since the look before, None if nothing came.

    Attributes:
        frames, updates, refused, rollbacks, disconnects: counters.
        entropy: mean entropy in nats.
        drift: distance of the features from the source's.
        agreed: whether the frozen model names the latest picture alike; None if it was not asked.
    """

    frames: int
    updates: int
    refused: int
    rollbacks: int
    disconnects: int
    entropy: float | None = None
    drift: float | None = None
    agreed: bool | None = None


@dataclass(frozen=True)
class Point:
    """A minute; see above."""

    time: int
    frames: int = 0
    entropy: float | None = None
    drift: float | None = None
    agreement: float | None = None
    updates: int = 0
    refused: int = 0
    rollbacks: int = 0
    disconnects: int = 0


_EVENTS = ("frames", "updates", "refused", "rollbacks", "disconnects")
_MEANS = {"entropy": "entropy", "drift": "drift", "agreement": "agreed"}


class History:
    """Points of a camera, the current minute last; may be used from any thread.

    Args:
        directory: where the file is kept; None keeps it in memory.
        name: of the file, without its suffix.
        length: points kept at most.
    """

    def __init__(self, directory: Path | None = None, name: str = "", length: int = LENGTH) -> None:
        self._path = None if directory is None else directory / f"{name}{SUFFIX}"
        self._lock = threading.Lock()
        self._points: deque[Point] = deque(self._read(), maxlen=length)
        self._before: Sample | None = None
        self._minute, self._samples = 0, list[tuple[Sample, Sample]]()

    def add(self, now_s: float, sample: Sample) -> None:
        """Take note of a look at the camera, at a time in seconds since 1970."""
        with self._lock:
            minute = int(now_s // PERIOD_S) * PERIOD_S
            if minute != self._minute:
                self._finish()
                self._minute = minute
            self._samples.append((self._before or sample, sample))
            self._before = sample

    def points(self) -> list[Point]:
        """All there are, oldest first."""
        with self._lock:
            return [*self._points, *self._current()]

    def save(self) -> None:
        """Write the file, where there is one; a disk that refuses is logged, and nothing else is lost."""
        if self._path is None:
            return
        try:
            write_whole(self._path, json.dumps([asdict(point) for point in self.points()]).encode(), "the history")
        except MggEdgeError as error:
            _logger.warning("%s", error)

    def _finish(self) -> None:
        self._points.extend(self._current())
        self._samples.clear()

    def _current(self) -> list[Point]:
        if not self._samples:
            return []
        first, last = self._samples[0][0], self._samples[-1][1]
        values: dict[str, Any] = {name: max(0, getattr(last, name) - getattr(first, name)) for name in _EVENTS}
        for name, source in _MEANS.items():
            known = [value for _, sample in self._samples if (value := getattr(sample, source)) is not None]
            values[name] = round(sum(known) / len(known), 4) if known else None
        return [Point(self._minute, **values)]

    def _read(self) -> list[Point]:
        if self._path is None or not self._path.exists():
            return []
        try:
            found = json.loads(self._path.read_bytes())
            if not isinstance(found, list):
                raise ValueError("expected a list of points")
            return [_point(values) for values in found]
        except (OSError, ValueError, TypeError, RecursionError) as error:
            _logger.warning("%s: not a history, begun anew: %s", self._path, error)
            return []


def _point(values: object) -> Point:
    if not (isinstance(values, dict) and values.keys() == {field.name for field in fields(Point)}):
        raise ValueError("expected points of a history")
    numbers = {name: value for name, value in values.items() if value is not None or name not in _MEANS}
    if not all(isinstance(value, int | float) and abs(value) < 1 << 53 for value in numbers.values()):
        raise ValueError("expected numbers")
    return Point(**values)
