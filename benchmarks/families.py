"""Which of timm's families can be exported: one model of each, the smallest that has norms. docs/BACKBONES.md's table.

    scripts/bench families                                    an hour and a half on one core; finished families are kept
    PYTHONPATH=. python benchmarks/families.py --only vit,swin    those whose name contains one of these

A family is a module of `timm.models`. Its model is exported as anybody would: forward and step are traced and lowered,
opened by ONNX Runtime, and five steps are compared with float64 (`mgg_edge/export/parity.py`); random weights, Adam,
two pictures of the model's own size, statistics of batch normalisation as they are in the source. What an export says
when it refuses is in the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from _export import EXPORTED, REFUSED, try_export
from rich.console import Console
from rich.progress import track

from mgg_edge.errors import MggEdgeError
from mgg_edge.learn.norm_layers import discover_norms
from mgg_edge.learn.norm_statistics import replace_batch_norms

BATCH, TIMEOUT_S = 2, 900
EXPORT = ("--weights", "random", "--rule", "adam", "--norm-statistics", "source", "--parity-steps", 5)
WITHOUT_NORMS = "without norms"
MOST_WORDS = 150  # characters of a refusal


def families() -> dict[str, list[str]]:
    """Names of timm's models by module."""
    modules = timm.list_modules()
    return {name: timm.list_models(module=name) for name in sorted(modules)}


def smallest(names: list[str]) -> str | None:
    """The model with the fewest numbers among those that have norms; None where none has."""
    sizes: dict[str, int] = {}
    for name in names:
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
            replace_batch_norms(model)
            discover_norms(model)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, MggEdgeError):
            continue  # not to be built without numbers, or nothing in it to adapt
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    return min(sizes, key=lambda name: sizes[name]) if sizes else None


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The families that have norms, and what the others are."""
    lines = ["| timm's family | model tried | |", "|---|---|---|"]
    for family, row in rows.items():
        if row["result"] != WITHOUT_NORMS:
            said = row["said"][:MOST_WORDS] if row["result"] == REFUSED else "exported"
            lines.append(f"| {family} | {row['model']} | {said} |")
    able = [row for row in rows.values() if row["result"] != WITHOUT_NORMS]
    exported = sum(row["result"] == EXPORTED for row in able)
    none = ", ".join(family for family, row in rows.items() if row["result"] == WITHOUT_NORMS) or "none"
    share = f"{exported} of {len(able)} families with norms exported ({100 * exported / len(able):.0f} %)"
    lines.append(f"\n{share}; without: {none}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/results/families"), help="a file for each family")
    parser.add_argument("--only", default="", help="comma-separated parts of the names of families")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = {
        name: models for name, models in families().items()
        if any(part in name for part in arguments.only.split(","))
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for family, models in track(wanted.items(), "families", len(wanted), console=Console(stderr=True)):
        part = arguments.out / f"{family}.json"
        if not part.exists():
            model = smallest(models)
            found: dict[str, Any] = {"result": WITHOUT_NORMS}
            if model is not None:
                found = {"model": model, **try_export([*EXPORT, "--backbone", model, "--batch", BATCH], TIMEOUT_S)}
            part.write_text(json.dumps(found))
        rows[family] = json.loads(part.read_text())
    print(table(rows))


if __name__ == "__main__":
    main()
