"""Predictions as lines of text: JSON for programs, CSV for tables.

A reader that goes away raises `BrokenPipeError`, which `session.run` takes as a request to stop.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from mgg_edge.errors import SinkError
from mgg_edge.files import output_target
from mgg_edge.runtime.adaptation.adapter import Prediction
from mgg_edge.runtime.sources.source import Frame

__all__ = ["COLUMNS", "CsvLines", "JsonLines", "clock_time"]

COLUMNS = ("frame", "time_s", "time", "label", "index", "probability", "entropy", "step", "adapted")
FILE = "file"  # the last column of a table; empty where a source is one file
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a label that starts so would be computed by a spreadsheet


class JsonLines:
    """One JSON object a line: `source, frame, time_s, time, label, index, probability, entropy, step, adapted, age_ms`.

    `source` is there where it was named (`of_source`); `time_s` is the source's own clock, `time` that of the machine
    when the picture was decoded (ISO 8601, UTC); `age_ms` counts from there to this line. `lost_before` is added where
    pictures are missing right before this one, `file` where a source is several files, `top` where more than one label
    is wanted: a list of `[label, index, probability]`.

    Args:
        stream: text stream; each line is flushed, so that a reader sees it at once.
        clock: seconds, that of `Frame.captured_s`.
        top: labels of a line.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic, top: int = 1) -> None:
        self._stream, self._clock, self._top, self._source = stream, clock, top, ""
        self._lock = threading.Lock()

    def of_source(self, name: str) -> JsonLines:
        """A sink for one of several sources on the same stream; each may be written by its own thread."""
        named = JsonLines(self._stream, self._clock, self._top)
        named._source, named._lock = name, self._lock
        return named

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Write one frame's line; numbers that are not finite become null, as JSON has none."""
        age_ms = round((self._clock() - frame.captured_s) * 1e3, 1)
        source = {"source": self._source} if self._source else {}
        lost = {"lost_before": frame.lost} if frame.lost else {}
        file = {"file": frame.file} if frame.file else {}
        top = {"top": prediction.top(self._top)} if self._top > 1 else {}
        values = _values(frame, prediction, self._clock)
        self._line({**source, **values, "age_ms": age_ms, **top, **lost, **file})

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write the last line, `{"summary": …}`."""
        self._line({"summary": summary})

    def close(self) -> None:
        """Nothing to complete: every line was flushed."""

    def abort(self) -> None:
        """Nothing to undo: every line was flushed."""

    def _line(self, value: Mapping[str, Any]) -> None:
        text = json.dumps(value, allow_nan=False) + "\n"
        try:
            with self._lock:
                self._stream.write(text)
                self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise SinkError(f"standard output: cannot write: {error.strerror or error}") from error


class CsvLines:
    """The same values and the file of each as a table with a header, complete up to the last whole line at any time.

    Args:
        path: created, or replaced if it exists.
        source: name in a first column `source`; none without one.

    Raises:
        UsageError: the target is a directory or device.
        SinkError: the target cannot be created.
    """

    def __init__(self, path: str | os.PathLike[str], source: str = "") -> None:
        self.path, self._source = Path(path), source
        self.rows = 0
        output_target(self.path)
        try:
            self._file: TextIO | None = self.path.open("w", encoding="utf-8", newline="", buffering=1)
        except OSError as error:
            raise SinkError(f"{self.path}: cannot write here: {error.strerror or error}") from error
        self._write([*(["source"] if source else []), *COLUMNS, FILE])

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Write one frame's row; numbers that are not finite become empty cells."""
        values = ["" if value is None else value for value in _values(frame, prediction).values()]
        values[COLUMNS.index("label")] = _inert(prediction.label)
        self._write([*([self._source] if self._source else []), *values, _inert(frame.file)])
        self.rows += 1

    def close(self) -> None:
        """Complete the file on the disk.

        Raises:
            SinkError: the disk refuses.
        """
        file, self._file = self._file, None
        if file is None:
            return
        try:
            with file:
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SinkError(f"{self.path}: cannot complete the file: {error.strerror or error}") from error

    def abort(self) -> None:
        """Keep the whole lines written so far."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _write(self, cells: list[Any]) -> None:
        if self._file is None:
            raise SinkError(f"{self.path}: the file was completed or given up already")
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        try:
            self._file.write(line.getvalue())
            self._file.flush()
        except OSError as error:
            raise SinkError(f"{self.path}: cannot write: {error.strerror or error}") from error


def _values(frame: Frame, prediction: Prediction, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    values = (
        frame.index,
        round(frame.time_s, 6),
        clock_time(time.time() - (clock() - frame.captured_s)),
        prediction.label,
        prediction.index,
        _finite(prediction.probability),
        _finite(prediction.entropy),
        prediction.step,
        prediction.adapted,
    )
    return dict(zip(COLUMNS, values, strict=True))


def clock_time(seconds: float) -> str:
    """Seconds since 1970 in ISO 8601, UTC, with milliseconds."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _inert(label: str) -> str:
    text = " ".join(label.split())
    return f"'{text}" if text.startswith(_FORMULA) else text


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
