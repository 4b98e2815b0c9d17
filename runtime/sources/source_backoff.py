"""How long to wait before the next attempt: d_k = min(limit, first · 2^k) · (1 − jitter · r), r uniform in [0, 1).

The jitter keeps the cameras of one site, cut off together, from coming back all at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from mgg_edge.errors import UsageError

__all__ = ["Backoff"]


@dataclass
class Backoff:
    """Waiting times between attempts; `reset` after a success.

    Args:
        first_s: before the first attempt, at most.
        limit_s: no wait is longer.
        jitter: share of a wait that chance may take away, 0 to 1.
        seed: of the chance; None takes one from the system.
    """

    first_s: float = 0.25
    limit_s: float = 30.0
    jitter: float = 0.5
    seed: int | None = None
    attempts: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not (0 < self.first_s <= self.limit_s and 0 <= self.jitter <= 1):
            raise UsageError(
                "backoff: expected 0 < first_s ≤ limit_s and jitter from 0 to 1, "
                f"found {self.first_s}, {self.limit_s} and {self.jitter}"
            )
        self._random = random.Random(self.seed)  # noqa: S311 - no secret

    def next_s(self) -> float:
        """Seconds to wait now; counts the attempt."""
        doublings = min(self.attempts, 64)  # beyond, a float overflows
        self.attempts += 1
        return float(min(self.limit_s, self.first_s * 2.0**doublings) * (1 - self.jitter * self._random.random()))

    def reset(self) -> None:
        """The next wait is the first one again."""
        self.attempts = 0
