"""How long things took."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

__all__ = ["Times"]

LATEST = 1 << 16


@dataclass
class Times:
    """Durations in milliseconds: each of the latest 65,536, and of all their number and sum.

    Attributes:
        latest_ms: oldest first.
        count: how many there were in all.
        sum_ms: what they come to.
    """

    latest_ms: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    count: int = 0
    sum_ms: float = 0.0

    def add(self, elapsed_ms: float) -> None:
        """Take note of one."""
        self.latest_ms.append(elapsed_ms)
        self.count, self.sum_ms = self.count + 1, self.sum_ms + elapsed_ms
