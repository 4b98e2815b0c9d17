"""Pictures beside a record, within a size: what a live run was made of, as far as it takes to compute it anew.

    DIR/000003-v12/             the fourth part, which begins where version 12 of θ had been published
        state.mggstate          all that was learned by then (`state_file_format`)
        00000731.png            frame 731 at model size, without loss

Kept are the pictures that steps learned from, and some before and after the predicted class changed or θ was touched.
When the parts take more room than they may, the oldest goes; `replay` begins with the state of the first that is left.
A thread of its own writes; what it cannot keep up with is left out and counted, and no frame waits.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from mgg_edge.compat import Self
from mgg_edge.errors import SinkError, SourceError, UsageError
from mgg_edge.runtime.adaptation.adapter import Adapter
from mgg_edge.runtime.adaptation.adapter_checkpoint import Checkpoint
from mgg_edge.runtime.adaptation.adapter_events import Event
from mgg_edge.runtime.adaptation.gate import Observation
from mgg_edge.runtime.store.state_file_format import SavedState, decode_state, encode_state

__all__ = ["KeptPictures", "PictureKeeper"]

STATE = "state.mggstate"
PARTS = 8  # about so many fit into the size
BEFORE, AFTER = 4, 4  # frames around what happened
WAITING = 256  # pictures that the thread may be behind
_PART, _PICTURE = re.compile(r"\d{6}-v\d+"), re.compile(r"\d{8}\.png")
_logger = logging.getLogger(__name__)
Picture = npt.NDArray[np.uint8]


class PictureKeeper:
    """Writes the pictures of one run; nothing it does stops inference.

    Args:
        path: the directory; parts of a former run in it are removed.
        most_bytes: size of all files together, about.
        wait: whether inference waits for what cannot be written in time; else that is left out.

    Attributes:
        left_out: pictures that could not be written in time.
        failure: why keeping ended before its time, or None.

    Raises:
        UsageError: a directory with anything else in it.
        SinkError: it cannot be made or emptied.
    """

    def __init__(self, path: str | os.PathLike[str], most_bytes: int, *, wait: bool = False) -> None:
        self.path, self._most, self._wait = Path(path), most_bytes, wait
        self.left_out = 0
        self.failure: Exception | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            former = list(self.path.iterdir())
            if other := [name.name for name in former if not _PART.fullmatch(name.name)]:
                raise UsageError(
                    f"{path}: expected a directory for pictures alone, found '{other[0]}'; name an empty one"
                )
            for part in former:
                shutil.rmtree(part)
        except OSError as error:
            raise SinkError(f"{path}: cannot keep pictures there: {error.strerror or error}") from error
        self._queue: queue.Queue[tuple[int, Picture] | None] = queue.Queue(WAITING)
        self._lock, self._happened = threading.Lock(), False
        self._recent: deque[tuple[int, Picture]] = deque(maxlen=BEFORE)
        self._wanted: dict[int, Picture] = {}
        self._following, self._class = 0, -1
        self._parts: list[tuple[Path, int]] = []
        self._number, self._written = 0, set[int]()
        self._thread: threading.Thread | None = None

    def begin(self, adapter: Adapter) -> None:
        """Keep pictures of this adapter from now on."""
        self._try(lambda: self._new_part(adapter.checkpoint()))
        self._thread = threading.Thread(target=self._run, args=(adapter,), name="pictures", daemon=True)
        self._thread.start()

    def frame(self, seen: Observation) -> None:
        """Look at an inferred frame; what there is to be written is handed over here, where no lock is held."""
        found = int(seen.logits.argmax())
        with self._lock:
            if self._class not in (-1, found):
                self._happened = True
            self._class = found
            if self._happened:
                self._wanted.update(self._recent)
                self._happened, self._following = False, AFTER
            self._recent.append((seen.index, seen.frame))
            if self._following > 0:
                self._following -= 1
                self._wanted[seen.index] = seen.frame
            wanted, self._wanted = self._wanted, {}
        for item in wanted.items():
            self._hand_over(item)

    def event(self, event: Event) -> None:
        """Keep what a decision about θ was made by; handed over with the next frame, or at the end."""
        with self._lock:
            if event.batch is not None:
                self._wanted.update(zip(event.batch.indices, event.batch.frames, strict=True))
            self._happened = True

    def close(self) -> None:
        """Write what is in hand; safe to call twice."""
        thread, self._thread = self._thread, None
        if thread is not None:
            for item in self._wanted.items():
                self._queue.put(item)
            self._queue.put(None)
            thread.join()
        if self.left_out:
            _logger.warning("%s: %d pictures were left out: writing could not keep up", self.path, self.left_out)
            self.left_out = 0

    def _hand_over(self, item: tuple[int, Picture]) -> None:
        if self.failure is not None:
            return
        try:
            self._queue.put(item, block=self._wait)
        except queue.Full:
            self.left_out += 1

    def _run(self, adapter: Adapter) -> None:
        while (item := self._queue.get()) is not None:
            self._try(functools.partial(self._write, *item, adapter))

    def _try(self, action: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            action()
        except (OSError, ValueError) as error:
            self.failure = error
            reason = getattr(error, "strerror", None) or error
            _logger.error("%s: keeping pictures ended: %s; the run goes on", self.path, reason)

    def _new_part(self, checkpoint: Checkpoint) -> None:
        """Begin a part with what has been learned; drop the oldest ones if there is no room."""
        part = self.path / f"{self._number:06}-v{checkpoint.version}"
        part.mkdir()
        state = encode_state(SavedState(checkpoint, "pictures", 0))
        (part / STATE).write_bytes(state)
        self._number += 1
        self._parts.append((part, len(state)))
        self._written.clear()
        while len(self._parts) > 1 and sum(size for _, size in self._parts) > self._most:
            shutil.rmtree(self._parts.pop(0)[0])

    def _write(self, index: int, picture: Picture, adapter: Adapter) -> None:
        if self._parts[-1][1] > self._most // PARTS:
            self._new_part(adapter.checkpoint())
        if index in self._written:
            return
        part, size = self._parts[-1]
        path = part / f"{index:08}.png"
        Image.fromarray(picture).save(path, compress_level=1)
        self._written.add(index)
        self._parts[-1] = (part, size + path.stat().st_size)


@dataclass(frozen=True)
class KeptPictures:
    """What a `PictureKeeper` left.

    Attributes:
        start: what had been learned where the oldest part begins.
        version: of θ there.
        files: pictures by frame.
    """

    start: Checkpoint
    version: int
    files: dict[int, Path]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Look at a directory.

        Raises:
            UsageError: there are no pictures of a run in it.
            StateError: the oldest part's state is damaged.
        """
        folder = Path(path)
        try:
            parts = sorted(part for part in folder.iterdir() if _PART.fullmatch(part.name))
            if not parts:
                raise UsageError(f"{path}: expected pictures that 'run --record-frames' kept, found none")
            files = [file for part in parts for file in part.iterdir() if _PICTURE.fullmatch(file.name)]
            data = (parts[0] / STATE).read_bytes()
        except OSError as error:
            raise UsageError(f"{path}: cannot read: {error.strerror or error}") from error
        state = decode_state(data, str(parts[0] / STATE))
        version = int(parts[0].name.partition("-v")[2])
        return cls(state.checkpoint, version, {int(file.stem): file for file in files})

    def picture(self, index: int) -> Picture | None:
        """U8[H, W, 3] of a frame; None where it was not kept.

        Raises:
            SourceError: it is damaged.
        """
        if index not in self.files:
            return None
        try:
            with Image.open(self.files[index]) as opened:
                return np.asarray(opened.convert("RGB"))
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.files[index]}: cannot read the picture: {error}") from error
