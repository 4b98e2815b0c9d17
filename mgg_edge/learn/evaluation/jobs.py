"""Jobs of a sweep, and their results on disk: one file a job, written whole or not at all.

    FOLDER/parts/KEY.jsonl      one line: {"job": settings, "result": …};  KEY = SHA-256 of the settings

A result counts only for the very settings it was made with, so an interrupted sweep goes on where it stopped, and a
changed one starts anew what has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mgg_edge.errors import SinkError
from mgg_edge.files import write_whole

__all__ = ["Job", "PartStore", "Row"]

Row = dict[str, Any]
KEY_DIGITS = 24
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One method on one stream with one seed.

    Attributes:
        method: as the user wrote it.
        stream: as the user wrote it.
        seed: of the stream and of whatever the method draws.
        setting: everything else that decides the result, as JSON can hold it; contents of files by their digest.
    """

    method: str
    stream: str
    seed: int
    setting: Mapping[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {"method": self.method, "stream": self.stream, "seed": self.seed, "setting": dict(self.setting)}

    @cached_property
    def key(self) -> str:
        """Name of the result."""
        text = json.dumps(self.settings, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


class PartStore:
    """Results of a sweep in a folder, which is made if it is not there.

    Raises:
        SinkError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "parts"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SinkError(f"{folder}: cannot make the folder: {error}") from error

    def path(self, job: Job) -> Path:
        """File of a job's result."""
        return self.folder / f"{job.key}.jsonl"

    def write(self, job: Job, result: Row) -> None:
        """Keep a result.

        Raises:
            SinkError: it cannot be written.
        """
        line = json.dumps({"job": job.settings, "result": result}, allow_nan=False)
        write_whole(self.path(job), f"{line}\n".encode())

    def read(self, job: Job) -> Row | None:
        """The result of a job, or None if there is none; a file that is not one is named and ignored."""
        path = self.path(job)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["job"] == json.loads(json.dumps(job.settings)) and isinstance(found["result"], dict):
                return dict(found["result"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        _logger.warning("%s: not a result of this sweep; the job is done again", path)
        return None
