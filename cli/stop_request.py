"""Signals that ask a command to end well: what is in hand is completed."""

from __future__ import annotations

import signal
import time
from types import FrameType

from mgg_edge.compat import Self

__all__ = ["StopRequest", "asked_to_end"]

IMPATIENCE_S = 0.5


def asked_to_end(*, reloads: bool) -> tuple[signal.Signals, ...]:
    """Signals that ask a run to end; a hang-up only where it is not ignored (nohup) and asks for nothing else."""
    hang_up = () if reloads or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hang_up)


class StopRequest:
    """Turns SIGINT, SIGTERM or SIGHUP into a wish the run can grant between two frames; a second Ctrl-C is prompt.

    Supervisors signal a process and its whole group, so one request often comes twice.

    Args:
        reloads: leave SIGHUP to others.

    Attributes:
        signal: the signal received, or None.
    """

    def __init__(self, *, reloads: bool = False) -> None:
        self._numbers = asked_to_end(reloads=reloads)
        self.signal: int | None = None
        self._asked_s = 0.0

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in self._numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._asked_s = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._asked_s >= IMPATIENCE_S:
            raise KeyboardInterrupt
