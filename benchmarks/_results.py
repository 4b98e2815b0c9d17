"""Tables of docs/RESULTS.md from the kept parts of `adaptation` and `streams`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

ORDER = ("sgd", "sgd-1/t", "adam", "mgg", "mgg+", "adam+", "forward")
UPDATES, WINDOWS = ("1", "5", "10", "25"), ("4", "8", "16", "32", "64", "128")


def read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """Kept parts; of several made from different files the newest counts."""
    newest: dict[tuple[str, int], tuple[float, dict[str, Any]]] = {}
    for path in folder.glob(pattern):
        if path.name.startswith("stream."):
            continue
        found = json.loads(path.read_text())
        key = (found["name"], found["seed"])
        if key not in newest or newest[key][0] < path.stat().st_mtime:
            newest[key] = (path.stat().st_mtime, found)
    return [found for _, found in newest.values()]


def spread(values: list[float]) -> str:
    """Mean and deviation over seeds, in per cent."""
    text = f"{100 * np.mean(values):.1f}"
    return f"{text} ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else text


def adaptation_tables(folder: Path) -> str:
    """Accuracy by rule, updates and batch; `forward` by frames; clean loss."""
    parts = read(folder, "*.json")
    source = {part["seed"]: part for part in parts if part["name"] == "source"}
    frozen = {seed: float(np.mean(part["frozen"]["kinds"])) for seed, part in source.items()}
    oracle = {seed: float(np.mean(part["oracle"]["kinds"])) for seed, part in source.items()}
    lines = [f"Frozen {spread(list(frozen.values()))}, supervised norms (oracle) {spread(list(oracle.values()))}.", ""]
    # `mgg-seed1` is another meta-training of `mgg`
    names = sorted({part["name"] for part in parts})
    rules = [name for base in ORDER for name in names if name.partition("-seed")[0] == base]

    def row(name: str, batch: str) -> list[str]:
        own = [part for part in parts if part["name"] == name and batch in part["kinds"]]
        cells = []
        for count in UPDATES:
            means = {part["seed"]: float(np.mean(part["kinds"][batch][count])) for part in own}
            share = np.mean([(means[s] - frozen[s]) / (oracle[s] - frozen[s]) for s in means]) if means else np.nan
            cells.append(f"{spread(list(means.values()))} ({share:.0%})" if means else "")
        return cells

    for batch in ("16", "4", "8", "64"):
        lines += [f"Batch {batch}:", "", "| rule | 1 update | 5 | 10 | 25 |", "|---|---|---|---|---|"]
        for name in rules:
            if not name.startswith("forward") and any(cells := row(name, batch)):
                lines.append(f"| `{name}` | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| `forward` from M frames | " + " | ".join(WINDOWS) + " |", "|---" * (len(WINDOWS) + 1) + "|"]
    for name in (name for name in sorted({part["name"] for part in parts}) if name.startswith("forward")):
        own = [part for part in parts if part["name"] == name]
        cells = []
        for count in WINDOWS:
            means = {part["seed"]: float(np.mean(part["kinds"][count])) for part in own}
            share = np.mean([(means[s] - frozen[s]) / (oracle[s] - frozen[s]) for s in means])
            cells.append(f"{spread(list(means.values()))} ({share:.0%})")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "Clean pictures, frozen " + spread([part["frozen"]["clean"] for part in source.values()]) + ":", ""]
    lines += ["| rule | accuracy on clean pictures afterwards |", "|---|---|"]
    for name in [*rules]:
        own = [part for part in parts if part["name"] == name]
        counts = own[0]["clean"].keys()
        unit = "frames" if name.startswith("forward") else "updates"
        cells = [f"{count} {unit}: {spread([part['clean'][count] for part in own])}" for count in counts]
        lines.append(f"| `{name}` | {'; '.join(cells)} |")
    return "\n".join(lines)


def sensitivity_table(folder: Path) -> str:
    """Accuracy after 10 updates at multiples of each rule's rate; one seed."""
    parts = {part["name"]: part["sensitivity"] for part in read(folder, "*.json") if "sensitivity" in part}
    factors = ("0.1", "0.3", "1.0", "3.0", "10.0")
    lines = ["| rule | " + " | ".join(f"× {factor}" for factor in factors) + " |", "|---" * (len(factors) + 1) + "|"]
    for name in (name for name in ORDER if name in parts):
        cells = [f"{100 * parts[name][factor]:.1f}" if factor in parts[name] else "refused" for factor in factors]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kinds_table(folder: Path, kinds: tuple[str, ...]) -> str:
    """Each kind: frozen, `forward` from 16 and 64 frames, oracle."""
    parts = read(folder, "*.json")
    source = [part for part in parts if part["name"] == "source"]
    own = [part for part in parts if part["name"] == "forward"]
    columns = {
        "frozen": np.mean([part["frozen"]["kinds"] for part in source], 0),
        "`forward`, 16 frames": np.mean([part["kinds"]["16"] for part in own], 0),
        "`forward`, 64 frames": np.mean([part["kinds"]["64"] for part in own], 0),
        "oracle": np.mean([part["oracle"]["kinds"] for part in source], 0),
    }
    lines = ["| kind | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for index, kind in enumerate(kinds):
        lines.append(f"| {kind} | " + " | ".join(f"{100 * column[index]:.1f}" for column in columns.values()) + " |")
    return "\n".join(lines)


def stream_table(folder: Path) -> str:
    """Online accuracy of each rule on each stream."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("stream.*.json"))]
    names = list(dict.fromkeys(part["stream"] for part in parts))
    names = [name for name in ("clean", "sorted", "one scene", "drift", "recurring", "long") if name in names]
    lines = ["| rule | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for rule in ("frozen", *ORDER):
        own = [part for part in parts if part["rule"] == rule]
        if not own:
            continue
        cells = []
        for name in names:
            values = [part["accuracy"] for part in own if part["stream"] == name]
            last = [part["last"] for part in own if part["stream"] == name]
            text = spread(values) if values else ""
            cells.append(f"{text}, last 500: {100 * np.mean(last):.1f}" if name == "long" and last else text)
        lines.append(f"| `{rule}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)
