"""Nothing grows: 20,000 frames here, 1,000,000 by `scripts/soak`.

Each soak is a process of its own: what other tests have freed would be counted, or used up first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FRAMES = 20_000


def soak(frames: int, *options: str) -> dict[str, Any]:
    script = Path(__file__).with_name("soak.py")
    command = [sys.executable, str(script), "--frames", str(frames), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.stdout, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == bool(report["failures"])
    return report


def test_memory_descriptors_and_threads_stay_as_they_are() -> None:
    report = soak(FRAMES)
    assert not report["failures"], report
    assert report["frames"] + report["dropped"] == FRAMES
    assert report["adapt_steps"] > 100


def test_control_a_leak_of_memory_is_found() -> None:
    report = soak(800, "--leak", "memory")
    assert any("memory grew" in failure for failure in report["failures"]), report


def test_control_a_leak_of_descriptors_is_found() -> None:
    report = soak(400, "--leak", "descriptors")
    assert any("descriptors went" in failure for failure in report["failures"]), report
