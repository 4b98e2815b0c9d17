"""How many processor threads an engine gets."""

from __future__ import annotations

import logging
import os

from mgg_edge.errors import UsageError

__all__ = ["checked_threads", "usable_cores"]

MAX_THREADS = 1024
logger = logging.getLogger(__name__)


def checked_threads(threads: int | None) -> int | None:
    """The number asked for, at most the cores that there are; None leaves it to the engine.

    Raises:
        UsageError: not a positive whole number.
    """
    if threads is None:
        return None
    if not (type(threads) is int and 1 <= threads <= MAX_THREADS):
        raise UsageError(f"threads: expected a whole number from 1 to {MAX_THREADS}, found {threads!r}")
    if threads > (cores := usable_cores()):
        # They would wait for each other: 1,024 on two cores made nine frames take two minutes.
        logger.warning("threads: %d asked for, %d cores here: using %d", threads, cores, cores)
        return cores
    return threads


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
