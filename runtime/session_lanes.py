"""Several cameras at once: for each a state, a reader and a thread of its own, and one set of weights for each bundle.

Each camera has its own θ and the infer graph takes one θ for a batch, so frames of different cameras are not batched.
What ends one camera is said at once and leaves the others running; only a reader of the output that goes away ends all
of them. Cameras that have never been there are waited for as long as another one runs. While they run, cameras may be
ended and others begun.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mgg_edge.errors import UsageError
from mgg_edge.runtime import session
from mgg_edge.runtime.adaptation.adapter import Adapter
from mgg_edge.runtime.outputs.sinks import Sink
from mgg_edge.runtime.pipeline import Reader
from mgg_edge.runtime.session import Progress
from mgg_edge.runtime.session_summary import Percentiles, Summary

__all__ = ["Lane", "Lanes", "run_lanes"]

POLL_S = 0.2
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lane:
    """One camera: its name, reader and adapter, and where its predictions go."""

    name: str
    reader: Reader
    adapter: Adapter
    sinks: Sequence[Sink] = ()
    progress: Progress | None = None
    heartbeats: Sequence[Callable[[], None]] = ()

    @property
    def was_never_there(self) -> bool:
        """Whether it is a camera whose first connection has not come about yet."""
        return getattr(self.reader.source, "failure", None) is not None


def run_lanes(
    lanes: Sequence[Lane],
    *,
    stop: Callable[[], bool] = lambda: False,
    limit: int | None = None,
    attend: Sequence[Callable[[Lanes], None]] = (),
) -> tuple[Summary, dict[str, Summary]]:
    """Run cameras side by side until all have ended.

    Args:
        lanes: at least one, with different names; a single one that nobody attends runs on the calling thread.
        stop: asked often; True ends all of them after what is in hand.
        limit: number of frames of each camera.
        attend: called often on the calling thread, one after the other; may end and begin cameras.

    Returns:
        The summary over all, and each camera's by name; of a camera that was begun again, each time's.

    Raises:
        UsageError: no lane, or two of one name.
        BaseException: anything unforeseen in one of them, after the others were stopped.
    """
    names = [lane.name for lane in lanes]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"sources: expected different names, found {', '.join(names) or 'none'}")
    running = Lanes(stop, limit)
    if len(lanes) == 1 and not attend:
        running.ended.append(_run(lanes[0], stop, limit))
    else:
        running.run(lanes, attend)
    infer_ms = Percentiles.of([time_ms for one in running.ended for time_ms in one.infer_ms])
    adapt_ms = Percentiles.of([time_ms for one in running.ended for time_ms in one.adapt_ms])
    return Summary.of_all([one.summary for one in running.ended], infer_ms, adapt_ms), running.by_name(names)


class Ended(NamedTuple):
    """What is left of a camera that has ended: its adapter is its owner's."""

    name: str
    summary: Summary
    infer_ms: Sequence[float]
    adapt_ms: Sequence[float]


def _run(lane: Lane, stop: Callable[[], bool], limit: int | None) -> Ended:
    def beat() -> None:
        for heartbeat in lane.heartbeats:
            heartbeat()

    summary = session.run(lane.reader, lane.adapter, lane.sinks, lane.progress, stop=stop, limit=limit, heartbeat=beat)
    return Ended(lane.name, summary, lane.adapter.infer_times_ms, lane.adapter.adapt_times_ms)


class Lanes:
    """Cameras that run, each on a thread; used from one thread.

    Attributes:
        ended: what is left of cameras that have ended.
    """

    def __init__(self, stop: Callable[[], bool], limit: int | None) -> None:
        self.ended: list[Ended] = []
        self._stop, self._limit = stop, limit
        self._enough = threading.Event()
        self._running: dict[str, tuple[Lane, threading.Thread, threading.Event]] = {}
        self._unforeseen: list[BaseException] = []
        self._one_is_over = False

    def begin(self, lane: Lane) -> None:
        """Run one more camera; its name is not among those that run."""
        ending = threading.Event()
        thread = threading.Thread(target=self._work, args=(lane, ending), name=f"camera {lane.name}")
        self._running[lane.name] = (lane, thread, ending)
        thread.start()

    def end(self, name: str) -> None:
        """End a camera after what is in hand, and wait for it; nothing happens where none of that name runs."""
        if name in self._running:
            _, thread, ending = self._running.pop(name)
            ending.set()
            thread.join()

    def run(self, lanes: Sequence[Lane], attend: Sequence[Callable[[Lanes], None]]) -> None:
        """Run cameras until all have ended."""
        for lane in lanes:
            self.begin(lane)
        try:
            while self._running:
                for one in attend:
                    one(self)
                self._wait_a_little()
        finally:
            self._enough.set()
            for _, thread, _ in self._running.values():
                thread.join()
        if self._unforeseen:
            raise self._unforeseen[0]

    def by_name(self, first: Sequence[str]) -> dict[str, Summary]:
        """Summaries by camera, those named first in that order; `NAME 2` where a camera was begun again."""
        found: dict[str, Summary] = {}
        for one in sorted(self.ended, key=lambda one: _place(one.name, first)):
            number = sum(known == one.name or known.startswith(f"{one.name} ") for known in found)
            found[f"{one.name} {number + 1}" if number else one.name] = one.summary
        return found

    def _wait_a_little(self) -> None:
        alive = {name: parts for name, parts in self._running.items() if parts[1].is_alive()}
        self._one_is_over |= len(alive) < len(self._running)  # by itself: who was asked to end is no longer among them
        if alive and self._one_is_over and all(lane.was_never_there for lane, _, _ in alive.values()):
            if not self._enough.is_set():
                _logger.warning("never there: %s; the run ends with the others", ", ".join(alive))
            self._enough.set()
        self._running = alive
        if alive:
            next(iter(alive.values()))[1].join(POLL_S)  # in pieces: the main thread must see signals

    def _work(self, lane: Lane, ending: threading.Event) -> None:
        try:
            ended = _run(lane, lambda: ending.is_set() or self._enough.is_set() or self._stop(), self._limit)
            self.ended.append(ended)
            summary = ended.summary
            if summary.failure is not None:
                _logger.error(
                    "camera %s ended after %d frames: %s", lane.name, summary.frames_inferred, summary.failure
                )
            if summary.ending == "reader-gone":
                self._enough.set()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            self._unforeseen.append(error)
            self._enough.set()


def _place(name: str, first: Sequence[str]) -> int:
    return first.index(name) if name in first else len(first)
