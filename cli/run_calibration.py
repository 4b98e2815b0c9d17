"""`calibrate` as a control of a run: a site bundle from the camera's next pictures, built beside it and swapped in.

    asked ─ tap on the running camera ─ calibrate, on a thread of the lowest priority ─ bundle in --state ─ camera anew

The camera goes on with what it has until the new bundle is whole. What it had learned belongs to the old one and is set
aside.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from mgg_edge.errors import MggEdgeError, UsageError
from mgg_edge.runtime.adaptation.adapter import Prediction
from mgg_edge.runtime.adaptation.adapter_worker import yield_to_inference
from mgg_edge.runtime.adaptation.calibration import LIVE_SECONDS, calibrate
from mgg_edge.runtime.sources.source import ClosingSource, Frame

__all__ = ["Calibration", "Tap", "each_done"]

WAITING_FRAMES = 8  # what calibration has not looked at yet; more are left out
QUIET_S = 0.5
_logger = logging.getLogger(__name__)


class Tap(ClosingSource):
    """A sink that is a source: pictures that pass while somebody iterates, times counted from the first one.

    Args:
        name: of the camera.
    """

    live, rate = True, Fraction(25)
    width = height = 0
    frames_expected: int | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self._frames: queue.Queue[Frame] = queue.Queue(WAITING_FRAMES)
        self._open, self._over = threading.Event(), threading.Event()

    def write(self, frame: Frame, _prediction: Prediction) -> None:
        """Let a picture pass; nothing waits here."""
        if self._open.is_set() and not self._frames.full():
            self._frames.put_nowait(frame)

    def close(self) -> None:
        """No more pictures will come."""
        self._over.set()

    def abort(self) -> None:
        """As `close`."""
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        self._open.set()
        first_s: float | None = None
        try:
            while not self._over.is_set():
                try:
                    frame = self._frames.get(timeout=QUIET_S)
                except queue.Empty:
                    continue
                first_s = frame.time_s if first_s is None else first_s
                yield Frame(frame.index, frame.time_s - first_s, frame.image)
        finally:
            self._open.clear()


class Calibration:
    """One calibration, on a thread from construction on.

    Args:
        bundle: to start from.
        tap: of the camera's pictures.
        folder: where the new bundle is written.
        minutes: of footage; three by default.
        threads: of the engine.

    Attributes:
        out: the new bundle, there once `done` says so.

    Raises:
        UsageError: minutes out of range.
    """

    def __init__(self, bundle: Path, tap: Tap, folder: Path, minutes: float | None, threads: int | None) -> None:
        self.seconds = LIVE_SECONDS if minutes is None else 60 * minutes
        if not 1.0 <= self.seconds <= 86_400:
            raise UsageError(f"minutes: expected a number between 0.02 and 1440, found {minutes}")
        self.name = tap.name
        self.out = folder / f"{tap.name}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.mgg"
        self._failed: MggEdgeError | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(bundle, tap, threads), name=f"calibration {tap.name}", daemon=True
        )
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return not self._thread.is_alive()

    @property
    def failure(self) -> MggEdgeError | None:
        """Why there is no new bundle."""
        return self._failed

    def end(self) -> None:
        """Give up, if it is still gathering; a bundle that is being built is waited for."""
        self._ending.set()
        self._thread.join()

    def _work(self, bundle: Path, tap: Tap, threads: int | None) -> None:
        yield_to_inference()
        try:
            site = calibrate(bundle, tap, self.out, threads=threads, seconds=self.seconds, stop=self._ending.is_set)
        except MggEdgeError as error:
            self._failed = error
            return
        changed = f"{site.clean_changed:.1%} of its clean pictures changed by adapting"
        _logger.info("camera %s: calibrated on %d pictures: %s, %s", self.name, site.frames, site.verdict, changed)


def each_done(running: dict[str, Calibration], swap: Callable[[Calibration], None]) -> None:
    """Swap in what is done, and say what has failed."""
    for name in [name for name, one in running.items() if one.done]:
        calibration = running.pop(name)
        if calibration.failure is not None:
            _logger.error("camera %s: not calibrated, it goes on as it was: %s", name, calibration.failure)
        else:
            swap(calibration)
