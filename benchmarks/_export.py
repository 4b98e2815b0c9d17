"""Exports for benchmarks: bundles that are missing or older than what they are made of, and exports to be judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgg_edge.cli.main import main as mgg_edge

EXPORTED, REFUSED = "exported", "refused"


def try_export(words: Sequence[object], timeout_s: float, threads: int = 1) -> dict[str, Any]:
    """Export in a process of its own, which may need much memory or never end: `result`, and what was said of it.

    Args:
        words: of `mgg-edge export`, without `--out`.
        timeout_s: after which it is taken for refused.
        threads: of PyTorch and ONNX Runtime.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = ["export", *words, "--out", Path(folder) / "x.mgg", "--json"]
        started = time.monotonic()
        try:
            ended = subprocess.run(
                [sys.executable, "-c", "from mgg_edge.cli.main import main; main()", *map(str, given)],
                capture_output=True, text=True, timeout=timeout_s, check=False,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"result": REFUSED, "said": f"not done after {timeout_s:.0f} s"}
    seconds = round(time.monotonic() - started, 1)
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.startswith("error")] or ended.stderr.splitlines()
        return {"result": REFUSED, "said": said[-1].removeprefix("error: "), "code": ended.returncode, "s": seconds}
    return {"result": EXPORTED, "s": seconds, "facts": json.loads(ended.stdout)}


def export_if_stale(out: Path, words: list[object], learned: Path | None) -> Path:
    """Run `mgg-edge export` with five parity steps, unless `out` is there and no older than its learned numbers."""
    if out.exists() and (learned is None or learned.stat().st_mtime <= out.stat().st_mtime):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    own = [] if learned is None else ["--mgg", learned]
    try:
        mgg_edge(["export", *map(str, [*words, *own, "--parity-steps", 5, "--out", out, "--json"])])
    except SystemExit as ended:
        if ended.code:
            raise
    return out
