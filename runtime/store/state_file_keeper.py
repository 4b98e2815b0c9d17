"""Keeps a camera's state on disk while its adapter runs: resumed at the start, saved now and then and at the end."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from mgg_edge.compat import Self
from mgg_edge.errors import SinkError, StateError, UsageError
from mgg_edge.runtime.adaptation.adapter import Adapter
from mgg_edge.runtime.adaptation.adapter_checkpoint import Checkpoint
from mgg_edge.runtime.store.state_file import StateStore

__all__ = ["StateKeeper"]

INTERVAL_S, POLL_S = 60.0, 1.0
_logger = logging.getLogger(__name__)


class StateKeeper:
    """A context in which an adapter's state is kept. Saves never hold up a frame: they are made on a thread.

    What is learned first is saved at once, later changes every `interval_s`. A save that fails is logged and tried
    again at the next interval; the last one, on leaving, raises. Files that are damaged are set aside and the camera
    begins anew, which is logged; a state of another bundle is refused.

    Args:
        adapter: whose state.
        store: where to.
        interval_s: seconds between saves; nothing is written while θ stays as it is.

    Attributes:
        saves, failures: saves made, and saves that failed.

    Raises:
        UsageError: an interval that is not above 0.
    """

    def __init__(self, adapter: Adapter, store: StateStore, interval_s: float = INTERVAL_S) -> None:
        if not (interval_s > 0):
            raise UsageError(f"interval_s: expected a number above 0, found {interval_s}")
        self._adapter, self._store, self._interval_s = adapter, store, interval_s
        self.saves, self.failures = 0, 0
        self._saved_version = -1
        self._leaving, self._saving = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="mgg-edge state", daemon=True)
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        """Lock the files and resume.

        Raises:
            StateError: another process uses them, or they are of another bundle.
            SinkError: the directory cannot be written.
        """
        with ExitStack() as stack:
            stack.enter_context(self._store.locked())
            checkpoint = self._load()
            if checkpoint is not None:
                self._adapter.resume(checkpoint)
                _logger.info(
                    "camera '%s': going on from step %d of an earlier run", self._store.camera, checkpoint.step
                )
            self._saved_version = self._adapter.version
            self._lock = stack.pop_all()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Save once more, if anything changed, and unlock.

        Raises:
            SinkError: the disk refuses; the generation saved before is whole.
        """
        self._leaving.set()
        self._thread.join()
        with self._lock:
            self._adapter.drain()
            with self._saving:
                self._save()

    def snapshot(self) -> Path:
        """Save now, and keep this state under the name of the moment as well.

        Raises:
            SinkError: the disk refuses.
        """
        with self._saving:
            self._save()
            moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
            return self._store.keep(self._adapter.checkpoint(), moment)

    def _load(self) -> Checkpoint | None:
        try:
            return self._store.load()
        except StateError as error:
            if not self._store.is_damaged():
                raise
            moved = ", ".join(str(path) for path in self._store.set_aside())
            _logger.warning("%s; kept as %s; the camera begins anew", error, moved)
            return self._store.load()

    def _keep(self) -> None:
        due_s = time.monotonic()
        while not self._leaving.wait(min(POLL_S, self._interval_s)):
            if time.monotonic() < due_s or self._adapter.version == self._saved_version:
                continue
            due_s = time.monotonic() + self._interval_s
            try:
                with self._saving:
                    self._save()
            except SinkError as error:
                self.failures += 1
                _logger.warning("%s; trying again in %.0f s", error, self._interval_s)

    def _save(self) -> None:
        version = self._adapter.version
        if version == self._saved_version:
            return
        self._store.save(self._adapter.checkpoint())
        self._saved_version = version
        self.saves += 1
