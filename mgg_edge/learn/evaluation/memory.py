"""Peak memory of this process while something runs: resident set size, in MB of 10⁶ bytes."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["peak_memory_mb", "reset_peak_memory"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)


def reset_peak_memory() -> None:
    """Let the peak start from what is in use now; where the system cannot, it stays that of the whole process."""
    with suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)


def peak_memory_mb() -> float:
    """Largest resident set size since the last reset."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 1e6
