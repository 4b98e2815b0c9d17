"""Standard output that may be closed, full, read by nobody, or unable to show a letter: one line, never a traceback."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from mgg_edge.errors import SinkError

__all__ = ["standard_output"]


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
