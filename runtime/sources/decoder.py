"""A decoding process seen from outside: started, listened to against the clock, and killed when it says nothing.

Reads of cameras and networks can block for ever in a driver or a library, and damaged streams crash decoders. Here
both end one child process, which is replaced; the run goes on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import mgg_edge
from mgg_edge.errors import MggEdgeError, MissingDependencyError, SourceError, UsageError
from mgg_edge.runtime.sources.decoder_link import PixelMemory, take_message
from mgg_edge.runtime.sources.source_address import redact

__all__ = ["Decoder", "EndedError", "Opened", "Picture", "StalledError"]

CHUNK_BYTES = 1 << 16
START_S = 120.0  # for a process to load its packages: twenty at once on a small machine take half a minute
MAX_WAIT_S = 5.0  # for a killed process to be gone; one in an uninterruptible call of the kernel may take longer
_KINDS: Mapping[str, type[MggEdgeError]] = {
    error.code: error for error in (SourceError, UsageError, MissingDependencyError)
}
_logger = logging.getLogger(__name__)


class EndedError(SourceError):
    """The stream ended without an error."""


class StalledError(SourceError):
    """Nothing came for longer than allowed."""


@dataclass(frozen=True)
class Opened:
    """What is known once a source is open: pictures per second, and whether it has an end."""

    rate: Fraction
    finite: bool


@dataclass(frozen=True)
class Picture:
    """A picture u8[H,W,3] with the stream's time, or None, and `time.monotonic()` of its arrival."""

    image: npt.NDArray[np.uint8]
    time_s: float | None
    captured_s: float


class Decoder:
    """One decoding process, for one source, used by one thread; `kill` may come from any.

    Args:
        request: see `decoder_read`; goes to the process through a pipe, so that no process list shows an address.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._memory = PixelMemory()
        self._received = bytearray()
        try:
            self._process = _starter().submit(_start, self._memory.handle).result()
        except (OSError, RuntimeError) as error:  # RuntimeError: the interpreter ends
            self._memory.close()
            reason = getattr(error, "strerror", None) or error
            raise SourceError(f"decoder: cannot start a process: {reason}") from error
        self._tell(json.dumps(request).encode() + b"\n")

    @property
    def process_id(self) -> int:
        """Of the decoding process."""
        return self._process.pid

    def started(self, timeout_s: float = START_S) -> None:
        """Wait until the process has loaded its packages and turns to the source.

        Raises:
            SourceError: it has not within the time, or died.
        """
        try:
            message = self._next(time.monotonic() + timeout_s)
        except StalledError as error:
            raise SourceError(f"decoder: no process within {timeout_s:g} s: the machine is overloaded") from error
        if message.get("kind") != "started":
            raise SourceError(f"decoder: expected 'started', found {str(message.get('kind'))[:40]!r}")

    def opened(self, timeout_s: float) -> Opened:
        """Wait until the source is open, once the process has started.

        Raises:
            MggEdgeError: it cannot be opened, or not within the time.
        """
        message = self._next(time.monotonic() + timeout_s)
        try:
            if message["kind"] != "opened":
                raise SourceError(f"decoder: expected 'opened', found {str(message['kind'])[:40]!r}")
            numerator, denominator = message["rate"]
            return Opened(Fraction(int(numerator), int(denominator)), bool(message["finite"]))
        except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
            raise SourceError("decoder: expected the answer to a request, found something else") from error

    def picture(self, timeout_s: float) -> Picture:
        """Wait for the next picture.

        Raises:
            StalledError: none came within the time.
            EndedError: there are no more.
            MggEdgeError: the source failed, or the process died.
        """
        message = self._next(time.monotonic() + timeout_s)
        try:
            if message["kind"] == "end":
                raise EndedError("the stream ended")
            stated, captured_s = message["time_s"], float(message["captured_s"])
            if not math.isfinite(captured_s):
                raise SourceError("decoder: expected the time of a picture, found a number that is not finite")
            picture = Picture(
                self._memory.read(int(message["offset"]), int(message["height"]), int(message["width"])),
                None if stated is None else float(stated),
                captured_s,
            )
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise SourceError("decoder: expected a picture, found something else") from error
        self._tell(b"\0")  # the slot is free again
        return picture

    def kill(self) -> None:
        """End the process at once; a waiting call then fails. Safe from any thread and at any time."""
        self._process.kill()

    def close(self) -> None:
        """End the process, collect it, and release pipes and memory; safe to call twice."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a broken pipe has nothing left to lose
                    pipe.close()
        self._memory.close()
        try:
            self._process.wait(MAX_WAIT_S)
        except subprocess.TimeoutExpired:
            # `subprocess` collects it when a later process is started.
            _logger.warning("decoder process %d does not end: it hangs in the kernel", self._process.pid)

    def _next(self, deadline_s: float) -> dict[str, Any]:
        while (message := take_message(self._received)) is None:
            self._receive(deadline_s)
        if message.get("kind") == "error":
            raise _KINDS.get(str(message.get("code")), SourceError)(redact(str(message.get("text"))))
        return message

    def _receive(self, deadline_s: float) -> None:
        pipe = self._process.stdout
        if pipe is None or pipe.closed:
            raise SourceError("decoder: closed")
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        if not poller.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            raise StalledError("nothing came in time")
        data = os.read(pipe.fileno(), CHUNK_BYTES)
        if not data:
            code = self._process.wait(MAX_WAIT_S)
            how = f"by signal {-code}" if code < 0 else f"with code {code}"
            raise SourceError(f"the decoding process ended {how}")
        self._received += data

    def _tell(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # the next read says how the process ended
            os.write(self._process.stdin.fileno(), data)  # type: ignore[union-attr] # a pipe by construction


@functools.cache
def _starter_of(process: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a forked child has none of its parent's threads
    return ThreadPoolExecutor(1, "decoder starter")


def _starter() -> ThreadPoolExecutor:
    """The thread that starts all decoding processes: Linux ends them with it, not with the process it is of."""
    return _starter_of(os.getpid())


def _start(memory: int) -> subprocess.Popen[bytes]:
    root = str(Path(mgg_edge.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # Nothing there multiplies matrices: no idle threads for it.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # As `python -P -m` does it, which Python 3.10 does not know: the working directory is no place to import from.
    child = "from mgg_edge.runtime.sources.decoder_child import main; main()"
    code = f"import sys; sys.path[:] = filter(None, sys.path); {child}"
    words = [sys.executable, "-c", code, str(memory)]
    return subprocess.Popen(  # noqa: S603 - our own module, with numbers for arguments
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        pass_fds=(memory,),
        env=environment,
    )
