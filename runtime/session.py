"""One run: every frame of a source through an adapter into the sinks, and a summary of what happened.

Whatever ends a run, what was done until then is kept: sinks are completed and the summary is made.

    exhausted     the source has no more frames
    limit         the asked number of frames is done
    stopped       the caller asked to stop; what was read by then is done
    reader-gone   nobody reads a sink's output any more
    failed        a source, sink or engine failed; `Summary.failure` says which and how

Frames add up: read = inferred + dropped. The reasons a frame is dropped for:

    superseded    a newer frame came before this one could be looked at (policy `latest`)
    left-over     it still waited when the run ended
    malformed     it is no picture u8[H,W,3]
    unreadable    a file of a folder or list that is no picture or video
    lost          missing in a video file, or not decodable
    failed        the engine failed on it, which ends the run
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mgg_edge.errors import MggEdgeError, UsageError
from mgg_edge.runtime.adaptation.adapter import Adapter, Prediction
from mgg_edge.runtime.outputs.sinks import Sink
from mgg_edge.runtime.pipeline import LEFT_OVER, SUPERSEDED, Reader, ReaderCounts
from mgg_edge.runtime.preprocess import check_picture
from mgg_edge.runtime.session_summary import Ending, Percentiles, Summary
from mgg_edge.runtime.sources.source import LOST, UNREADABLE, Frame

__all__ = ["DROP_REASONS", "Ending", "Percentiles", "Progress", "Summary", "run"]

POLL_S = 0.1  # between looks at `stop` while no frame comes
DRAIN_S = 5.0  # for a source to end after it was asked to
MAX_AGES = 1 << 16  # a stream has no end, the memory for its frames' ages must have one
MALFORMED, FAILED = "malformed", "failed"
DROP_REASONS = (SUPERSEDED, LEFT_OVER, MALFORMED, UNREADABLE, LOST, FAILED)
_logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Called after each frame, on the thread that runs."""

    def __call__(self, frame: Frame, prediction: Prediction, /) -> None:
        """Take note of one prediction."""


def run(
    source: Iterable[Frame] | Reader,
    adapter: Adapter,
    sinks: Sequence[Sink] = (),
    progress: Progress | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    limit: int | None = None,
    heartbeat: Callable[[], None] = lambda: None,
) -> Summary:
    """Run a source through an adapter.

    Args:
        source: frames in order, taken one by one; or a `Reader`, which is closed at the end.
        adapter: predicts, and adapts by its own schedule.
        sinks: each gets every prediction; completed at the end.
        progress: told of every prediction.
        stop: asked before each frame, and while none comes; True ends the run after what is in hand.
        limit: number of frames after which to end, or None.
        heartbeat: called often, also while no frame comes; silence means that the run hangs.

    Returns:
        The summary, also after a failure of the source, a sink or the engine.

    Raises:
        BaseException: anything unforeseen; the sinks are aborted, so that nothing half-written stays.
    """
    start_s, before = time.perf_counter(), adapter.counters
    feed = _ReaderFeed(source, stop, limit) if isinstance(source, Reader) else _Feed(source, stop, limit)
    lane = _Lane(feed, adapter, sinks, progress, heartbeat)
    failures: list[MggEdgeError] = []
    try:
        try:
            lane.predict_all()
        except BrokenPipeError:
            feed.ending = "reader-gone"
        except MggEdgeError as error:
            failures.append(error)
        finally:
            feed.close()
            adapter.drain()
        for sink in sinks:
            try:
                sink.close()
            except MggEdgeError as error:
                failures.append(error)
    except BaseException:
        for sink in sinks:
            sink.abort()
        raise
    after, counts = adapter.counters, feed.counts
    return Summary(
        frames_read=counts.captured,
        frames_inferred=after.frames_inferred - before.frames_inferred,
        frames_dropped=sum(counts.dropped.values()),
        frames_lost=counts.dropped.get(LOST, 0),
        adapt_steps=after.adapt_steps - before.adapt_steps,
        adapt_rejected=after.adapt_rejected - before.adapt_rejected,
        infer_ms=Percentiles.of(adapter.infer_times_ms),
        adapt_ms=Percentiles.of(adapter.adapt_times_ms),
        wall_s=round(time.perf_counter() - start_s, 4),
        engine=adapter.engine_name,
        drops=dict(sorted(counts.dropped.items())),
        frame_age_ms=Percentiles.of(lane.ages_ms),
        reconnects=feed.reconnects,
        schedule=adapter.schedule_name,
        resumed=adapter.resumed,
        snapshots_restored=after.restores - before.restores,
        guard_breaches=dict(sorted((Counter(after.rejected) - Counter(before.rejected)).items())),
        ending="failed" if failures else feed.ending,
        failure=failures[0] if failures else None,
    )


class _Feed:
    """The frames of an iterable up to a limit or a request to stop, counted; nothing is read ahead."""

    def __init__(self, source: Iterable[Frame], stop: Callable[[], bool], limit: int | None) -> None:
        self._source, self._stop, self._limit = source, stop, limit
        self._taken, self._dropped = 0, Counter[str]()
        self.ending: Ending = "exhausted"
        self.reconnects = 0

    @property
    def counts(self) -> ReaderCounts:
        return ReaderCounts(self._taken, self._taken - self._dropped.total(), dict(self._dropped))

    def drop(self, reason: str) -> None:
        """Count the frame in hand as dropped."""
        self._dropped[reason] += 1

    def frames(self) -> Iterator[Frame | None]:
        """Frames; None while there is none yet."""
        frames = iter(self._source)
        while self._may_go_on(self._taken):
            frame = next(frames, None)
            if frame is None:
                return
            self._taken += 1
            yield frame

    def close(self) -> None:
        """The iterable is its owner's."""

    def _may_go_on(self, taken: int) -> bool:
        # Asked before the next frame is taken: a frame that was read is always predicted.
        if self._stop():
            self.ending = "stopped"
        elif self._limit is not None and taken >= self._limit:
            self.ending = "limit"
        return self.ending == "exhausted"


class _ReaderFeed(_Feed):
    """The frames of a reader; asked to stop, it hands over what was read already."""

    def __init__(self, reader: Reader, stop: Callable[[], bool], limit: int | None) -> None:
        super().__init__((), stop, limit)
        self._reader = reader

    @property
    def counts(self) -> ReaderCounts:
        return self._reader.counts

    def drop(self, reason: str) -> None:
        self._reader.drop(reason)

    def frames(self) -> Iterator[Frame | None]:
        taken = 0
        while self._may_go_on(taken):
            frame = self._reader.take(POLL_S)
            if frame is None and self._reader.ended:
                return
            taken += frame is not None
            yield frame
        if self.ending == "stopped":
            yield from self._rest()

    def _rest(self) -> Iterator[Frame]:
        self._reader.stop()
        deadline_s = time.monotonic() + DRAIN_S
        while not self._reader.ended and time.monotonic() <= deadline_s:
            frame = self._reader.take(POLL_S)
            if frame is not None:
                yield frame

    def close(self) -> None:
        self._reader.close()
        self.reconnects = getattr(getattr(self._reader.source, "stats", None), "reconnects", 0)


@dataclass(frozen=True)
class _Lane:
    """One source, one adapter, and where their predictions go."""

    feed: _Feed
    adapter: Adapter
    sinks: Sequence[Sink]
    progress: Progress | None
    heartbeat: Callable[[], None]
    ages_ms: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_AGES))
    logged: set[str] = field(default_factory=set)

    def predict_all(self) -> None:
        for frame in self.feed.frames():
            self.heartbeat()
            if frame is None or not self._is_picture(frame):
                continue
            try:
                prediction = self.adapter(frame.image, frame.time_s)
            except MggEdgeError:
                self.feed.drop(FAILED)
                raise
            self.ages_ms.append(max(0.0, time.monotonic() - frame.captured_s) * 1e3)
            for sink in self.sinks:
                sink.write(frame, prediction)
            if self.progress is not None:
                self.progress(frame, prediction)

    def _is_picture(self, frame: Frame) -> bool:
        try:
            check_picture(frame.image)
        except UsageError as error:
            self.feed.drop(MALFORMED)
            if str(error) not in self.logged and len(self.logged) < 20:
                self.logged.add(str(error))
                _logger.warning("frame %d dropped: %s", frame.index, error)
            return False
        return True
