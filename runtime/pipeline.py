"""The reader of a source: a thread that always drains it, and hands frames over by one of two policies.

    latest        a slot for one frame; a newer frame replaces the one that waits, which is dropped (`superseded`)
    every-frame   a short queue; the reader waits when it is full

Nothing is lost silently. At every moment

    captured = delivered + Σ dropped by reason + waiting

and once the reader is closed nothing waits. A source whose latency must not grow needs `latest`: what is not read
out of a network stream piles up in front of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mgg_edge.compat import Self
from mgg_edge.errors import SourceError, UsageError
from mgg_edge.runtime.sources.source import Frame, FrameSource

__all__ = ["LEFT_OVER", "POLICIES", "SUPERSEDED", "Policy", "Reader", "ReaderCounts"]

Policy = Literal["latest", "every-frame"]
POLICIES: tuple[Policy, ...] = ("latest", "every-frame")
QUEUE_FRAMES = 4
SUPERSEDED, LEFT_OVER = "superseded", "left-over"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReaderCounts:
    """Frames of one source.

    Attributes:
        captured: taken from the source, or lost in it.
        delivered: handed over.
        dropped: never handed over, by reason.
        waiting: taken and not yet handed over.
    """

    captured: int = 0
    delivered: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    waiting: int = 0


class Reader:
    """Drains one source on a thread of its own, from construction on.

    Args:
        source: iterated and closed by this reader.
        policy: `latest` or `every-frame`; None takes `latest` for live sources.
        limit: under `every-frame`, number of frames after which to read no more.
        stall_timeout_s: how long an in-process source that is not live may give nothing while a frame is waited for;
            live sources watch themselves.

    Raises:
        UsageError: an unknown policy.
    """

    def __init__(
        self,
        source: FrameSource,
        policy: Policy | None = None,
        *,
        limit: int | None = None,
        stall_timeout_s: float = 60.0,
    ) -> None:
        if policy is not None and policy not in POLICIES:
            raise UsageError(f"policy: expected one of {', '.join(POLICIES)}, found '{policy}'")
        self.source = source
        self.policy: Policy = policy or ("latest" if source.live else "every-frame")
        self._limit = limit if self.policy == "every-frame" else None
        self._stall_timeout_s = stall_timeout_s
        self._changed = threading.Condition()
        self._frames: deque[Frame] = deque()
        self._captured = self._delivered = 0
        self._dropped: Counter[str] = Counter()
        self._stopping = self._ended = self._closed = False
        self._waited_s = 0.0  # since the last frame was handed over
        self._failure: BaseException | None = None
        # A daemon: a source that hangs in this process cannot keep the process from ending.
        self._thread = threading.Thread(target=self._drain, name=f"reader {source.name[:40]}", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to take."""
        with self._changed:
            return self._ended and not self._frames

    @property
    def counts(self) -> ReaderCounts:
        """A consistent view of the counters."""
        with self._changed:
            lost = self.source.losses()
            dropped = dict(Counter(lost) + self._dropped)
            waiting = len(self._frames)
            captured = self._captured + sum(lost.values())
        return ReaderCounts(captured, self._delivered, dropped, waiting)

    def take(self, timeout_s: float) -> Frame | None:
        """The next frame, or None if there is none within the time or no more at all (`ended`).

        Raises:
            SourceError: the source failed; every frame before was handed over. Or it hangs in this process.
            BaseException: what the source raised unforeseen.
        """
        start_s = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: bool(self._frames) or self._ended, timeout_s)
            if self._frames:
                self._delivered, self._waited_s = self._delivered + 1, 0.0
                frame = self._frames.popleft()
                self._changed.notify_all()
                return frame
            failure, self._failure = self._failure, None
            self._waited_s += time.monotonic() - start_s
            if failure is None and not self._ended and not self.source.live:
                failure = self._hanging()
        if failure is not None:
            raise failure
        return None

    def drop(self, reason: str) -> None:
        """Count a frame that was handed over as dropped after all, for a reason."""
        with self._changed:
            self._delivered -= 1
            self._dropped[reason] += 1

    def stop(self) -> None:
        """Read no more; frames that wait can still be taken."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self.source.interrupt()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop, count what still waits as `left-over`, and close the source; safe to call twice."""
        self.stop()
        self._thread.join(timeout_s)
        with self._changed:
            self._dropped.update({LEFT_OVER: len(self._frames)} if self._frames else {})
            self._frames.clear()
            self._ended = self._closed = True
        if self._thread.is_alive():
            # Closing under a running decoder would crash it.
            _logger.warning("%s: hangs and is left behind", self.source.name)
            return
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hanging(self) -> SourceError | None:
        if self._waited_s <= self._stall_timeout_s:
            return None
        return SourceError(f"{self.source.name}: gave no picture for {self._stall_timeout_s:g} s: it hangs")

    def _drain(self) -> None:
        failure: BaseException | None = None
        try:
            if self._limit != 0:
                for frame in self.source:
                    if not self._put(frame):
                        break
        except BaseException as error:  # noqa: BLE001 - raised again where frames are taken
            failure = error
        with self._changed:
            self._failure, self._ended = failure, True
            self._changed.notify_all()

    def _put(self, frame: Frame) -> bool:
        with self._changed:
            if self.policy == "latest":
                self._dropped.update({SUPERSEDED: len(self._frames)} if self._frames else {})
                self._frames.clear()
            else:
                self._changed.wait_for(lambda: len(self._frames) < QUEUE_FRAMES or self._stopping)
            if self._closed:  # too late: it hung, and was left behind
                return False
            self._captured += 1
            self._frames.append(frame)
            self._changed.notify_all()
            return not self._stopping and (self._limit is None or self._captured < self._limit)
