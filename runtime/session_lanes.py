"""Several cameras at once: one set of weights, and for each camera a state, a reader and a thread of its own.

Each camera has its own θ and the infer graph takes one θ for a batch, so frames of different cameras are not batched.
What ends one camera is said at once and leaves the others running; only a reader of the output that goes away ends all
of them. Cameras that have never been there are waited for as long as another one runs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mgg_edge.errors import UsageError
from mgg_edge.runtime import session
from mgg_edge.runtime.adaptation.adapter import Adapter
from mgg_edge.runtime.outputs.sinks import Sink
from mgg_edge.runtime.pipeline import Reader
from mgg_edge.runtime.session import Progress
from mgg_edge.runtime.session_summary import Percentiles, Summary

__all__ = ["Lane", "run_lanes"]

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
    heartbeat: Callable[[], None] = lambda: None

    @property
    def was_never_there(self) -> bool:
        """Whether it is a camera whose first connection has not come about yet."""
        return getattr(self.reader.source, "failure", None) is not None


def run_lanes(
    lanes: Sequence[Lane], *, stop: Callable[[], bool] = lambda: False, limit: int | None = None
) -> tuple[Summary, dict[str, Summary]]:
    """Run cameras side by side until all have ended.

    Args:
        lanes: at least one, with different names; a single one runs on the calling thread.
        stop: asked often; True ends all of them after what is in hand.
        limit: number of frames of each camera.

    Returns:
        The summary over all, and each camera's by name.

    Raises:
        UsageError: no lane, or two of one name.
        BaseException: anything unforeseen in one of them, after the others were stopped.
    """
    names = [lane.name for lane in lanes]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"sources: expected different names, found {', '.join(names) or 'none'}")
    results: dict[str, Summary] = {}
    if len(lanes) == 1:
        results[names[0]] = _run(lanes[0], stop, limit)
    else:
        _run_threads(lanes, results, stop, limit)
    infer_ms = [time_ms for lane in lanes for time_ms in lane.adapter.infer_times_ms]
    adapt_ms = [time_ms for lane in lanes for time_ms in lane.adapter.adapt_times_ms]
    total = Summary.of_all([results[name] for name in names], Percentiles.of(infer_ms), Percentiles.of(adapt_ms))
    return total, results


def _run(lane: Lane, stop: Callable[[], bool], limit: int | None) -> Summary:
    return session.run(
        lane.reader, lane.adapter, lane.sinks, lane.progress, stop=stop, limit=limit, heartbeat=lane.heartbeat
    )


def _run_threads(
    lanes: Sequence[Lane], results: dict[str, Summary], stop: Callable[[], bool], limit: int | None
) -> None:
    enough = threading.Event()
    unforeseen: list[BaseException] = []

    def work(lane: Lane) -> None:
        try:
            summary = _run(lane, lambda: enough.is_set() or stop(), limit)
            results[lane.name] = summary
            if summary.failure is not None:
                _logger.error(
                    "camera %s ended after %d frames: %s", lane.name, summary.frames_inferred, summary.failure
                )
            if summary.ending == "reader-gone":
                enough.set()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            unforeseen.append(error)
            enough.set()

    threads = {lane.name: threading.Thread(target=work, args=(lane,), name=f"camera {lane.name}") for lane in lanes}
    for thread in threads.values():
        thread.start()
    try:
        while running := [lane for lane in lanes if threads[lane.name].is_alive()]:
            if len(running) < len(lanes) and all(lane.was_never_there for lane in running) and not enough.is_set():
                _logger.warning(
                    "never there: %s; the run ends with the others", ", ".join(lane.name for lane in running)
                )
                enough.set()
            threads[running[0].name].join(POLL_S)  # in pieces: the main thread must see signals
    finally:
        enough.set()
        for thread in threads.values():
            thread.join()
    if unforeseen:
        raise unforeseen[0]
