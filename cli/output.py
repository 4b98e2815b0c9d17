"""Standard output that may be closed, full, read by nobody, or unable to show a letter: one line, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from mgg_edge.errors import SinkError

__all__ = ["standard_output", "stoppable"]

PATIENCE_S, POLL_MS = 1.0, 100
CHUNK = select.PIPE_BUF // 4  # letters, at most four bytes each: what a pipe that is ready takes without blocking


class _Output(io.TextIOBase):
    """A stream whose failures are ours: `SinkError`, or `BrokenPipeError` where the reader has gone."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return int(self._try(lambda stream: stream.write(text)))

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def _try(self, action: Callable[[TextIO], Any]) -> Any:
        if self._stream is None:
            raise SinkError("standard output: cannot write: it is closed")
        try:
            return action(self._stream)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise BrokenPipeError from error  # without its number, by which a library would end the process itself
            raise SinkError(f"standard output: cannot write: {error.strerror or error}") from error

    def abandon(self) -> None:
        """Let what is still buffered go nowhere, so that nothing is said about it at exit."""
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a handle for dup2
                    os.dup2(nowhere.fileno(), self._stream.fileno())


class _Stoppable(io.TextIOBase):
    def __init__(self, stream: TextIO, asked: Callable[[], bool]) -> None:
        self._stream, self._asked, self._asked_s = stream, asked, 0.0
        self._ready = select.poll()
        self._ready.register(stream.fileno(), select.POLLOUT)

    def write(self, text: str) -> int:
        for start in range(0, len(text), CHUNK):
            self._wait()
            self._stream.write(text[start : start + CHUNK])
            self._stream.flush()
        return len(text)

    def _wait(self) -> None:
        while not self._ready.poll(POLL_MS):
            if self._asked():
                self._asked_s = self._asked_s or time.monotonic()
                if time.monotonic() - self._asked_s >= PATIENCE_S:
                    raise SinkError("standard output: nobody reads it, and the run was asked to end; lines are missing")


def stoppable(stream: TextIO, asked: Callable[[], bool]) -> TextIO:
    """The stream; a write to a pipe that nobody empties fails a second after `asked`, instead of lasting for ever.

    What has no file descriptor never blocks, and is given back.
    """
    try:
        return cast(TextIO, _Stoppable(stream, asked))
    except io.UnsupportedOperation:
        return stream


@contextlib.contextmanager
def standard_output(fail: Callable[[SinkError], int]) -> Iterator[None]:
    """Within the context standard output fails in our way; the context ends by `SystemExit`.

    Args:
        fail: says an error and gives the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        # What the locale cannot encode is shown as \\u2026 rather than ending the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    before, output = sys.stdout, _Output(sys.stdout)
    sys.stdout = cast(TextIO, output)
    code: Any = 0
    try:
        try:
            yield
        except SystemExit as ended:
            # Libraries that draw help and tables end the process themselves when its reader goes.
            code = 0 if isinstance(ended.__context__, BrokenPipeError) else ended.code
        if before is not None:
            output.flush()
    except BrokenPipeError:  # the reader has what it wanted
        output.abandon()
    except SinkError as error:
        code = fail(error)
        output.abandon()
    finally:
        sys.stdout = before
    sys.exit(code)
