"""What a run did, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mgg_edge.errors import MggEdgeError

__all__ = ["Ending", "Percentiles", "Summary"]

Ending = Literal["exhausted", "limit", "stopped", "reader-gone", "failed"]


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

    @classmethod
    def worst(cls, several: Sequence[Percentiles]) -> Percentiles:
        """The largest of each."""
        columns = zip(*((one.p50, one.p95, one.p99) for one in several), strict=True)
        return cls(*(max((value for value in column if value is not None), default=None) for column in columns))


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        frames_read: pictures taken from the source, or lost in it.
        frames_inferred: pictures that got a prediction.
        frames_dropped: pictures that got none.
        frames_lost: those of them that were missing in the source or could not be decoded.
        adapt_steps: updates committed.
        adapt_rejected: updates computed and refused, or failed.
        infer_ms, adapt_ms: time of one inference, of one adaptation step.
        wall_s: seconds from the first frame asked for to the last output completed.
        engine: name and version of the engine.
        drops: dropped pictures by reason; they add up to `frames_dropped`.
        frame_age_ms: from a picture's decoding to its prediction.
        reconnects: connections to a camera or stream made anew.
        schedule: when it was adapted; of several runs that differ, all of them.
        resumed: whether it went on from a kept state; of several runs, whether one did.
        snapshots_restored: times a remembered domain was taken up again.
        guard_breaches: refused updates and rollbacks by reason; they add up to `adapt_rejected`.
        ending: why the run ended.
        failure: the error behind the ending `failed`.
    """

    frames_read: int
    frames_inferred: int
    frames_dropped: int
    frames_lost: int
    adapt_steps: int
    adapt_rejected: int
    infer_ms: Percentiles
    adapt_ms: Percentiles
    wall_s: float
    engine: str
    drops: Mapping[str, int]
    frame_age_ms: Percentiles
    reconnects: int
    schedule: str
    resumed: bool
    snapshots_restored: int
    guard_breaches: Mapping[str, int]
    ending: Ending
    failure: MggEdgeError | None

    def to_dict(self) -> dict[str, Any]:
        """The measurements as plain JSON values, without `ending` and `failure`."""
        values = {name: value for name, value in vars(self).items() if name not in ("ending", "failure")}
        return {name: vars(value) if isinstance(value, Percentiles) else value for name, value in values.items()}

    @classmethod
    def of_all(cls, summaries: Sequence[Summary], infer_ms: Percentiles, adapt_ms: Percentiles) -> Summary:
        """Several runs side by side as one: counts added, the longest time, the first failure.

        Args:
            summaries: at least one.
            infer_ms: over all of them; percentiles cannot be added.
            adapt_ms: likewise.
        """
        failures = [one.failure for one in summaries if one.failure is not None]
        endings = [one.ending for one in summaries]
        return cls(
            frames_read=sum(one.frames_read for one in summaries),
            frames_inferred=sum(one.frames_inferred for one in summaries),
            frames_dropped=sum(one.frames_dropped for one in summaries),
            frames_lost=sum(one.frames_lost for one in summaries),
            adapt_steps=sum(one.adapt_steps for one in summaries),
            adapt_rejected=sum(one.adapt_rejected for one in summaries),
            infer_ms=infer_ms,
            adapt_ms=adapt_ms,
            wall_s=max(one.wall_s for one in summaries),
            engine=summaries[0].engine,
            drops=_added([one.drops for one in summaries]),
            frame_age_ms=Percentiles.worst([one.frame_age_ms for one in summaries]),
            reconnects=sum(one.reconnects for one in summaries),
            schedule=", ".join(dict.fromkeys(one.schedule for one in summaries)),
            resumed=any(one.resumed for one in summaries),
            snapshots_restored=sum(one.snapshots_restored for one in summaries),
            guard_breaches=_added([one.guard_breaches for one in summaries]),
            ending="failed" if failures else next((end for end in endings if end != "exhausted"), endings[0]),
            failure=failures[0] if failures else None,
        )


def _added(several: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return dict(sorted(sum((Counter(one) for one in several), Counter[str]()).items()))
