"""`mgg-edge engines`: built engines on this device: list them, explain them, take them on, delete them."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgg_edge.errors import UsageError

if TYPE_CHECKING:
    from mgg_edge.runtime.engines.engine_cache import EngineCache

__all__ = ["engines_app"]

engines_app = typer.Typer(
    help="Engines built for this device, kept in $MGG_EDGE_ENGINES or the user's cache directory.", no_args_is_help=True
)
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]


@engines_app.command("list", epilog="Example: mgg-edge engines list")
def list_engines(json: AsJson = False) -> None:
    """List the engines, the last used first."""
    cache = _cache()
    rows: list[dict[str, Any]] = [
        {
            "engine": str(entry.path),
            "bundle": entry.bundle,
            "what": entry.key.words,
            "size_bytes": entry.size_bytes,
            "used": time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)),
            "trusted": entry.trusted,
        }
        for entry in cache.entries()
    ]
    if json:
        _print_json({"cache": str(cache.root), "engines": rows})
        return
    from mgg_edge.cli.display import print_table

    print_table(
        ("bundle", "what", "MB", "last used", "trusted", "file"),
        [
            (row["bundle"], row["what"], f"{row['size_bytes'] / 1e6:.1f}", row["used"],
             "yes" if row["trusted"] else "no, built elsewhere", Path(row["engine"]).name)
            for row in rows
        ],
    )  # fmt: skip
    sys.stdout.write(f"{cache.root}: {len(rows)} engines\n")


@engines_app.command(epilog="Example: mgg-edge engines why model.mgg")
def why(
    bundle: Annotated[Path, typer.Argument(help="Bundle to run.", show_default=False)],
    target: Annotated[
        str | None, typer.Option(help="Compute capability, such as sm86; this machine's GPU by default.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Say whether the engines of a bundle are there, and if not, what differs from those that are."""
    from mgg_edge.runtime.engines.tensorrt_plans import explain

    reasons = explain(bundle, target, _cache())
    if json:
        _print_json(reasons)
        return
    for graph, reason in reasons.items():
        sys.stdout.write(f"{graph}: {reason}\n")


@engines_app.command(epilog="Example: mgg-edge engines add from-the-workstation/*.engine")
def add(
    files: Annotated[list[Path], typer.Argument(help="Engines that another device built.", show_default=False)],
) -> None:
    """Take on engines that another device built. An engine is machine code: only take those you trust."""
    cache = _cache()
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path}: no such engine")
        sys.stdout.write(f"{cache.add(path)}\n")


@engines_app.command(epilog="Example: mgg-edge engines clear")
def clear() -> None:
    """Delete all engines; they are built again when needed."""
    cache = _cache()
    sys.stdout.write(f"{cache.root}: {cache.clear()} files deleted\n")


def _cache() -> EngineCache:
    from mgg_edge.runtime.engines.engine_cache import EngineCache, default_cache

    return EngineCache(default_cache())


def _print_json(value: Any) -> None:
    import json

    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
