"""Reading of a record (`record` has the format): every line is checked before any is used."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgg_edge.compat import Self
from mgg_edge.errors import SourceError, StateError, UsageError
from mgg_edge.runtime.adaptation.adapter_checkpoint import Checkpoint
from mgg_edge.runtime.store.record import FORMAT, compact_json
from mgg_edge.runtime.store.state_file_format import decode_state

__all__ = ["EventLine", "FrameLine", "Record"]

MAX_LINE_BYTES = 1 << 30


@dataclass(frozen=True)
class FrameLine:
    """An inferred frame; see `record`."""

    frame: int
    time_s: float | None
    sha: str
    version: int
    refused: str | None
    logits: str
    settled: bool = False  # records older than settled inference leave it out


@dataclass(frozen=True)
class EventLine:
    """A decision about θ; see `record`."""

    event: str
    version: int
    frames: tuple[int, ...]
    reason: str
    candidate: str | None
    diagnostics: Mapping[str, float | str] | None
    state: str


@dataclass(frozen=True)
class Record:
    """A whole record.

    Attributes:
        path: the file.
        header: its first line.
        frames: in order of inference.
        events: in order of happening.
        complete: whether it has its last line; a run that was killed leaves it out.
    """

    path: Path
    header: Mapping[str, Any]
    frames: tuple[FrameLine, ...]
    events: tuple[EventLine, ...]
    complete: bool

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check a record.

        Raises:
            UsageError: there is no such file.
            SourceError: not a record, or damaged.
        """
        file = Path(path)
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise UsageError(f"{path}: no such record; write one with 'mgg-edge run --record'") from error
        except OSError as error:
            raise SourceError(f"{path}: cannot read the record: {error.strerror or error}") from error
        body, complete = _verified(data, str(path))
        lines = [_parsed(line, number, str(path)) for number, line in enumerate(body, 1)]
        if not lines or lines[0].get("mggrun") != FORMAT:
            found = lines[0].get("mggrun", "none") if lines else "none"
            raise SourceError(f"{path}: expected a record of format {FORMAT} (.mggrun), found {found}")
        for number, line in enumerate(lines[1:], 2):
            if "frame" not in line and "event" not in line:
                raise SourceError(
                    f"{path}: line {number}: expected a frame or an event, found {', '.join(line) or 'nothing'}"
                )
        try:
            frames = tuple(FrameLine(**line) for line in lines[1:] if "frame" in line)
            events = tuple(
                EventLine(**{**line, "frames": tuple(map(int, line["frames"]))})
                for line in lines[1:]
                if "event" in line
            )
        except (TypeError, KeyError, ValueError) as error:
            raise SourceError(f"{path}: a line of the record is malformed: {error}") from error
        return cls(file, lines[0], frames, events, complete)

    @property
    def bundle_id(self) -> str:
        """The bundle that ran."""
        return str(self.header["bundle"])

    @property
    def start(self) -> Checkpoint | None:
        """What the run began with, or None for the source model.

        Raises:
            SourceError: it is damaged.
        """
        encoded = self.header.get("start")
        if encoded is None:
            return None
        try:
            return decode_state(base64.b64decode(encoded, validate=True), f"{self.path}: start").checkpoint
        except (StateError, ValueError) as error:
            raise SourceError(f"{self.path}: the state it starts from is damaged: {error}") from error


def _verified(data: bytes, where: str) -> tuple[list[bytes], bool]:
    """Lines of the body, and whether the record is complete."""
    if not data.startswith(b"{"):
        raise SourceError(f"{where}: expected a record (.mggrun), found something else")
    whole, _, rest = data.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    if rest or not lines or not lines[-1].startswith(b'{"end":'):
        return lines, False  # killed while writing: what is whole is good
    last = _parsed(lines[-1], len(lines), where)
    body = data[: len(data) - len(lines[-1]) - 1]
    digest = hashlib.sha256(body + compact_json({"end": last.get("end")})).hexdigest()
    if set(last) != {"end", "sha256"} or last["sha256"] != digest:
        raise SourceError(f"{where}: the record is damaged or altered (SHA-256 differs)")
    return lines[:-1], True


def _parsed(line: bytes, number: int, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: line {number}: expected JSON, found {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{where}: line {number}: expected an object, found {type(value).__name__}")
    return value
