"""One run: every frame of a source through an adapter into the sinks, and a summary of what happened.

Whatever ends a run, what was done until then is kept: sinks are completed and the summary is made.

    exhausted     the source has no more frames
    limit         the asked number of frames is done
    stopped       the caller asked to stop
    reader-gone   nobody reads a sink's output any more
    failed        a source, sink or engine failed; `Summary.failure` says which and how
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from mgg_edge.errors import MggEdgeError
from mgg_edge.runtime.adapter import Adapter, Prediction
from mgg_edge.runtime.sinks import Sink
from mgg_edge.runtime.video import Frame

__all__ = ["Ending", "Percentiles", "Progress", "Summary", "run"]

Ending = Literal["exhausted", "limit", "stopped", "reader-gone", "failed"]


class Progress(Protocol):
    """Called after each frame, on the thread that runs."""

    def __call__(self, frame: Frame, prediction: Prediction, /) -> None:
        """Take note of one prediction."""


@dataclass(frozen=True)
class Percentiles:
    """Latencies in milliseconds; None where nothing was measured."""

    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Percentiles:
        """Percentiles of measured times, linearly interpolated."""
        if not len(times_ms):
            return cls(None, None, None)
        return cls(*(round(float(value), 4) for value in np.percentile(times_ms, (50, 95, 99))))


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        frames_read: pictures taken from the source.
        frames_inferred: pictures that got a prediction.
        frames_dropped: pictures read but given none.
        adapt_steps: updates committed.
        adapt_rejected: updates computed and refused, or failed.
        infer_ms, adapt_ms: time of one inference, of one adaptation step.
        wall_s: seconds from the first frame asked for to the last output completed.
        engine: name and version of the engine.
        ending: why the run ended.
        failure: the error behind the ending `failed`.
    """

    frames_read: int
    frames_inferred: int
    frames_dropped: int
    adapt_steps: int
    adapt_rejected: int
    infer_ms: Percentiles
    adapt_ms: Percentiles
    wall_s: float
    engine: str
    ending: Ending
    failure: MggEdgeError | None

    def to_dict(self) -> dict[str, Any]:
        """The measurements as plain JSON values, without `ending` and `failure`."""
        values = {name: value for name, value in vars(self).items() if name not in ("ending", "failure")}
        return {name: vars(value) if isinstance(value, Percentiles) else value for name, value in values.items()}


def run(
    source: Iterable[Frame],
    adapter: Adapter,
    sinks: Sequence[Sink] = (),
    progress: Progress | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    limit: int | None = None,
) -> Summary:
    """Run a source through an adapter.

    Args:
        source: frames in order.
        adapter: predicts, and adapts by its own schedule.
        sinks: each gets every prediction; completed at the end.
        progress: told of every prediction.
        stop: asked before each frame; True ends the run after what is in hand.
        limit: number of frames after which to end, or None.

    Returns:
        The summary, also after a failure of the source, a sink or the engine.

    Raises:
        BaseException: anything unforeseen; the sinks are aborted, so that nothing half-written stays.
    """
    start_s, before = time.perf_counter(), adapter.counters
    feed = _Feed(source, stop, limit)
    failures: list[MggEdgeError] = []
    try:
        try:
            _predict_all(feed, adapter, sinks, progress)
        except BrokenPipeError:
            feed.ending = "reader-gone"
        except MggEdgeError as error:
            failures.append(error)
        for sink in sinks:
            try:
                sink.close()
            except MggEdgeError as error:
                failures.append(error)
    except BaseException:
        for sink in sinks:
            sink.abort()
        raise
    after = adapter.counters
    inferred = after.frames_inferred - before.frames_inferred
    return Summary(
        frames_read=feed.frames,
        frames_inferred=inferred,
        frames_dropped=feed.frames - inferred,
        adapt_steps=after.adapt_steps - before.adapt_steps,
        adapt_rejected=after.adapt_rejected - before.adapt_rejected,
        infer_ms=Percentiles.of(adapter.infer_times_ms),
        adapt_ms=Percentiles.of(adapter.adapt_times_ms),
        wall_s=round(time.perf_counter() - start_s, 4),
        engine=adapter.engine_name,
        ending="failed" if failures else feed.ending,
        failure=failures[0] if failures else None,
    )


class _Feed:
    """The frames of a source up to a limit or a request to stop, counted."""

    def __init__(self, source: Iterable[Frame], stop: Callable[[], bool], limit: int | None) -> None:
        self._source, self._stop, self._limit = source, stop, limit
        self.frames = 0
        self.ending: Ending = "exhausted"

    def __iter__(self) -> Iterator[Frame]:
        frames = iter(self._source)
        while True:
            # Asked before the next frame is taken: a frame that was read is always predicted.
            if self._stop():
                self.ending = "stopped"
                return
            if self._limit is not None and self.frames >= self._limit:
                self.ending = "limit"
                return
            frame = next(frames, None)
            if frame is None:
                return
            self.frames += 1
            yield frame


def _predict_all(feed: _Feed, adapter: Adapter, sinks: Sequence[Sink], progress: Progress | None) -> None:
    for frame in feed:
        prediction = adapter(frame.image)
        for sink in sinks:
            sink.write(frame, prediction)
        if progress is not None:
            progress(frame, prediction)
