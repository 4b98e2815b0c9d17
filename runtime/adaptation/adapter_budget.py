"""How long adaptation may take: what would be late is not begun. Pure.

A step that is due is refused as `budget` while the median of the last steps is above the budget, but for every
sixteenth, which finds out whether it still is; and as `busy` once it has waited for earlier work for longer than the
budget. Without a budget nothing is refused: a batch waits, and its frames are renewed while it does.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from mgg_edge.compat import Self

__all__ = ["Budget"]

RETRY_EVERY = 16
EXPECTED_OVER = 9


@dataclass(frozen=True)
class Budget:
    """The budget of one step and what is known about steps; immutable.

    Attributes:
        limit_ms: longest time, or None.
        times_ms: of the last few steps.
        refused: steps refused as `budget` since the last one made.
        due_s: since when a step is due, or None.
    """

    limit_ms: float | None = None
    times_ms: tuple[float, ...] = ()
    refused: int = 0
    due_s: float | None = None

    def ask(self, due: bool, busy: bool, now_s: float) -> tuple[Self, str | None]:
        """The budget after the question whether a step may be made, and why not; None if it may, or may wait."""
        if self.limit_ms is None or not due:
            return replace(self, due_s=None), None
        since_s = now_s if self.due_s is None else self.due_s
        if busy:
            late = (now_s - since_s) * 1e3 > self.limit_ms
            return replace(self, due_s=None if late else since_s), "busy" if late else None
        over = bool(self.times_ms) and statistics.median(self.times_ms) > self.limit_ms
        if over and self.refused + 1 < RETRY_EVERY:
            return replace(self, due_s=None, refused=self.refused + 1), "budget"
        return replace(self, due_s=None, refused=0), None

    def measured(self, elapsed_ms: float) -> tuple[Self, bool]:
        """The budget after a step, and whether it was late."""
        if self.limit_ms is None:
            return self, False
        return replace(self, times_ms=(*self.times_ms, elapsed_ms)[-EXPECTED_OVER:]), elapsed_ms > self.limit_ms
