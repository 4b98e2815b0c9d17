"""Recording of a run: every decision about θ and every hash, so that the run can be replayed (`record_replay`).

A record is JSON lines:

    {"mggrun": 1, "bundle": …, "engine": …, "settings": {…}, "facts": {…}, "state": …}       first: what ran
    {"frame": 7, "time_s": 0.28, "sha": …, "version": 1, "settled": false, "refused": null, "logits": …}
                                                                                             one an inferred frame
    {"event": "commit", "version": 2, "frames": [3, 5, 6, 7], "candidate": …, "state": …}    one a decision about θ
    {"end": {"lines": 11, "state": …}, "sha256": …}                                          last: digest of the rest

`version` counts the swaps of θ: a frame was inferred under the θ of its version, `settled` where θ was folded into the
weights by then, which rounds otherwise. Frames stand in order of inference,
events in order of happening; with adaptation in the background the two interleave freely. Hashes are SHA-256, those of
frames (at model size) and logits cut to 16 digits. The run time draws no random numbers; a source's seeds belong into
`facts`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import SinkError
from mgg_edge.files import output_target
from mgg_edge.runtime.adaptation.adapter import Adapter
from mgg_edge.runtime.adaptation.adapter_events import Event, Published
from mgg_edge.runtime.adaptation.gate import Observation
from mgg_edge.runtime.store.record_pictures import PictureKeeper
from mgg_edge.runtime.store.state_file_format import SavedState, encode_state

__all__ = ["FORMAT", "RunRecorder", "compact_json", "short_hash"]

FORMAT = 1
_logger = logging.getLogger(__name__)


def short_hash(array: npt.NDArray[np.generic]) -> str:
    """16 hex digits of the SHA-256 over an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


class RunRecorder:
    """A `Journal` that writes a record; nothing it does stops inference.

    Open it, give it to the adapter as `journal`, call `begin` with the adapter, and `close` at the end. What happens
    before `begin` is not recorded.

    Args:
        path: the file to write, replaced if it exists.
        pictures: keeps some of the pictures beside it; closed with this.

    Attributes:
        failure: why recording ended before its time, or None.

    Raises:
        UsageError: a directory, device or pipe.
        SinkError: the file cannot be created.
    """

    def __init__(self, path: str | os.PathLike[str], pictures: PictureKeeper | None = None) -> None:
        self.path, self._pictures = Path(path), pictures
        self.failure: OSError | None = None
        self._hasher, self._lines = hashlib.sha256(), 0
        self._lock, self._begun = threading.Lock(), False
        self._last_state = ""
        output_target(path)  # opening a pipe would wait for its reader
        try:
            self._file: IO[bytes] | None = self.path.open("wb")
        except OSError as error:
            raise SinkError(f"{path}: cannot write the record: {error.strerror or error}") from error

    def begin(self, adapter: Adapter, facts: Mapping[str, Any] | None = None) -> None:
        """Write the first line.

        Args:
            adapter: whose run it is; its present state is where the record starts.
            facts: what else is worth knowing, as plain JSON values: source, threads, seeds.
        """
        checkpoint = adapter.checkpoint()
        self._last_state = checkpoint.state.digest()
        header: dict[str, Any] = {
            "mggrun": FORMAT,
            "bundle": adapter.bundle_id,
            "engine": adapter.engine_name,
            "schedule": adapter.schedule_name,
            "settings": _plain(adapter.settings.to_dict()),
            "facts": _plain(facts or {}),
            "version": adapter.version,
            "state": self._last_state,
            "start": None,
        }
        if adapter.adapted:
            # A run that began with a saved state can only be replayed from it.
            header["start"] = base64.b64encode(encode_state(SavedState(checkpoint, "record", 0))).decode()
        with self._lock:
            self._begun = True
            self._write(header)
        if self._pictures is not None:
            self._pictures.begin(adapter)

    def frame(self, seen: Observation, published: Published, refusal: str | None, /) -> None:
        """Note an inferred frame."""
        line = {
            "frame": seen.index,
            "time_s": seen.time_s,
            "sha": short_hash(seen.frame),
            "version": published.version,
            "settled": published.settled is not None,
            "refused": None if refusal is None else str(refusal),
            "logits": short_hash(seen.logits),
        }
        with self._lock:
            self._write(_plain(line))
        if self._pictures is not None:
            self._pictures.frame(seen)

    def event(self, event: Event, /) -> None:
        """Note a decision about θ."""
        line = {
            "event": event.kind,
            "version": event.version,
            "frames": list(event.frames),
            "reason": event.reason,
            "candidate": None if event.candidate is None else event.candidate.digest(),
            "diagnostics": None if event.diagnostics is None else event.diagnostics._asdict(),
            "state": event.state.digest(),
        }
        with self._lock:
            self._last_state = event.state.digest()
            self._write(_plain(line))
            self._flush()
        if self._pictures is not None:
            self._pictures.event(event)

    def close(self) -> None:
        """Write the last line; safe to call twice."""
        if self._pictures is not None:
            self._pictures.close()
        with self._lock:
            if self._begun:
                self._write({"end": {"lines": self._lines, "state": self._last_state}}, last=True)
            file, self._file = self._file, None
            if file is not None:
                try:
                    file.close()
                except OSError as error:
                    self._give_up(error)

    def _write(self, line: Mapping[str, Any], *, last: bool = False) -> None:
        if self._file is None or not self._begun:
            return
        data = compact_json(line)
        self._hasher.update(data)
        if last:
            data = compact_json({**line, "sha256": self._hasher.hexdigest()})
        self._lines += 1
        try:
            self._file.write(data)
        except OSError as error:
            self._give_up(error)

    def _flush(self) -> None:
        if self._file is None:
            return
        try:
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        file, self._file = self._file, None
        self.failure = error
        if file is not None:
            with contextlib.suppress(
                OSError
            ):  # what is buffered cannot be written either; the handle goes all the same
                file.close()
        _logger.error("%s: recording ended: %s; the run goes on", self.path, error.strerror or error)


def compact_json(value: Mapping[str, Any]) -> bytes:
    """One line of a record, with its line break."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinities: they become text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
