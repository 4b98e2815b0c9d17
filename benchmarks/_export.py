"""Bundles for benchmarks, exported when they are missing or older than what they are made of."""

from __future__ import annotations

from pathlib import Path

from mgg_edge.cli.main import main as mgg_edge


def export_if_stale(out: Path, words: list[object], learned: Path | None) -> Path:
    """Run `mgg-edge export` with one parity step, unless `out` is there and no older than its learned numbers."""
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
