"""One thread beside inference that performs one piece of work at a time; there is no queue to fall behind in.

It runs at the lowest priority: where inference has no processor of its own, it still comes first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Worker", "yield_to_inference"]

WorkT = TypeVar("WorkT")
LOWEST_PRIORITY = 19
_logger = logging.getLogger(__name__)


class Worker(Generic[WorkT]):
    """Calls `perform` on its own thread.

    Args:
        perform: the work; what it raises ends the worker, is logged with its traceback and kept in `failure`.

    Attributes:
        failure: what ended the worker before its time, or None.
    """

    def __init__(self, perform: Callable[[WorkT], None]) -> None:
        self._perform = perform
        self._changed = threading.Condition()
        self._work: WorkT | None = None
        self._closing = False
        self.failure: Exception | None = None
        # A daemon: a program that forgets to close its adapter can still end.
        self._thread = threading.Thread(target=self._run, name="mgg-edge adaptation", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether work is waiting or being performed, or none will be performed any more."""
        with self._changed:
            return self._work is not None or self._closing or self.failure is not None

    def submit(self, work: WorkT) -> bool:
        """Hand over work; False if the worker is busy."""
        with self._changed:
            if self._work is not None or self._closing or self.failure is not None:
                return False
            self._work = work
            self._changed.notify_all()
            return True

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is being performed; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._work is None or self.failure is not None, timeout_s)

    def close(self) -> None:
        """End after the work in hand; safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        yield_to_inference()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work is not None or self._closing)
                work = self._work
            if work is None:
                return
            try:
                self._perform(work)
            except Exception as error:
                _logger.exception("adaptation ended: it failed in a way nobody foresaw; inference goes on")
                self.failure = error
            with self._changed:
                self._work = None
                self._changed.notify_all()
            if self.failure is not None:
                return


def yield_to_inference() -> None:
    """Lower the calling thread's priority where threads have one of their own, as on Linux."""
    if os.uname().sysname == "Linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it; nothing is wrong then, only slower
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
