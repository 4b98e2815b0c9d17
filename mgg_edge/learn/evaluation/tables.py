"""Rows of a sweep as tables: mean ± standard deviation over seeds, for people and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mgg_edge.learn.evaluation.jobs import Row
from mgg_edge.learn.evaluation.trial import ALL, CHECKPOINTS

__all__ = ["COLUMNS", "Column", "Summary", "means", "rows_as_csv", "summarise", "summary_table", "verdicts"]

ABSENT = "-"


@dataclass(frozen=True)
class Column:
    """A measured quantity.

    Attributes:
        name: in CSV and JSON.
        title: in tables for people.
        read: the quantity of a row, or None where it was not measured.
        scale: what people see is the quantity times this.
        digits: after the point, for people.
    """

    name: str
    title: str
    read: Callable[[Row], float | None]
    scale: float = 100.0
    digits: int = 1


def _after(count: str) -> Callable[[Row], float | None]:
    return lambda row: row["accuracy_after"].get(count)


COLUMNS = (
    Column("accuracy", "online %", lambda row: row["accuracy"]),
    Column("calibration_error", "ECE %", lambda row: row["calibration_error"]),
    *(
        Column(f"accuracy_after_{count}", f"after {count} %", _after(count))
        for count in ("0", *map(str, CHECKPOINTS), ALL)
    ),
    Column("worst_window", "worst 500 %", lambda row: row["worst_window"]),
    Column("clean_accuracy_after", "clean %", lambda row: row["clean_accuracy_after"]),
    Column("frame_ms", "ms/frame", lambda row: row["frame_ms"], 1.0, 2),
    Column("peak_memory_mb", "peak MB", lambda row: row["peak_memory_mb"], 1.0, 0),
)


@dataclass(frozen=True)
class Summary:
    """A method on a stream over all seeds.

    Attributes:
        method, stream: as the user wrote them.
        seeds: how many.
        mean: of each column by name; None where it was not measured for every seed.
        std: unbiased standard deviation over seeds, 0 for one seed.
    """

    method: str
    stream: str
    seeds: int
    mean: dict[str, float | None]
    std: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"method": self.method, "stream": self.stream, "seeds": self.seeds, "mean": self.mean, "std": self.std}


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary for each method on each stream, in the order of their first rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["stream"], row["method"]), []).append(row)
    summaries = []
    for (stream, method), members in groups.items():
        mean, std = dict[str, float | None](), dict[str, float | None]()
        for column in COLUMNS:
            values = [column.read(row) for row in members]
            known = [value for value in values if value is not None]
            complete = len(known) == len(values)
            mean[column.name] = float(np.mean(known)) if complete else None
            std[column.name] = (float(np.std(known, ddof=1)) if len(known) > 1 else 0.0) if complete else None
        summaries.append(Summary(method, stream, len(members), mean, std))
    return summaries


def summary_table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people; columns that nothing was measured for are left out."""
    shown = [column for column in COLUMNS if any(entry.mean[column.name] is not None for entry in summaries)]
    header = ["stream", "method", "seeds", *(column.title for column in shown)]
    identities = [[entry.stream, entry.method, str(entry.seeds)] for entry in summaries]
    cells = [[_cell(entry, column) for column in shown] for entry in summaries]
    return header, [identity + part for identity, part in zip(identities, cells, strict=True)]


def means(summaries: Sequence[Summary]) -> dict[str, float]:
    """Online accuracy of each method, mean over its streams: ImageNet-C's figure, where each stream is a kind."""
    found: dict[str, list[float]] = {}
    for entry in summaries:
        found.setdefault(entry.method, []).append(entry.mean["accuracy"] or 0.0)
    return {method: float(np.mean(values)) for method, values in found.items()}


def verdicts(summaries: Sequence[Summary]) -> list[str]:
    """One sentence a stream: which method answers best online, and whether its lead over none is more than noise.

    Where several seeds were run, a lead below twice the spread of both is called none.
    """
    streams: dict[str, list[Summary]] = {}
    for entry in summaries:
        streams.setdefault(entry.stream, []).append(entry)
    return [_verdict(stream, members) for stream, members in streams.items()]


def _verdict(stream: str, members: Sequence[Summary]) -> str:
    best = max(members, key=lambda entry: entry.mean["accuracy"] or 0.0)
    frozen = next((entry for entry in members if entry.method == "none"), None)
    first = f"On {stream} {best.method} answers best online: {_percent(best)}."
    if frozen is None:
        return first
    if best is frozen:
        return f"On {stream} no method is better online than none: {_percent(frozen)}."
    lead = 100 * ((best.mean["accuracy"] or 0.0) - (frozen.mean["accuracy"] or 0.0))
    spread = 100 * float(np.hypot(best.std["accuracy"] or 0.0, frozen.std["accuracy"] or 0.0))
    doubt = "one seed says nothing about chance" if best.seeds == 1 else f"spread {spread:.1f}"
    within = best.seeds > 1 and lead < 2 * spread
    return f"{first} That is {lead:+.1f} points on none ({doubt}){', within what chance does' if within else ''}."


def _percent(entry: Summary) -> str:
    spread = f" ± {100 * (entry.std['accuracy'] or 0.0):.1f}" if entry.seeds > 1 else ""
    return f"{100 * (entry.mean['accuracy'] or 0.0):.1f}{spread} %"


def rows_as_csv(rows: Sequence[Row]) -> str:
    """One line a job, fractions and milliseconds as measured; empty where nothing was."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["stream", "method", "seed", "frames", "batches", *(column.name for column in COLUMNS)])
    for row in rows:
        values = [column.read(row) for column in COLUMNS]
        identity = [row["stream"], row["method"], row["seed"], row["frames"], row["batches"]]
        writer.writerow([*identity, *("" if value is None else f"{value:.6g}" for value in values)])
    return file.getvalue()


def _cell(entry: Summary, column: Column) -> str:
    mean, std = entry.mean[column.name], entry.std[column.name]
    if mean is None or std is None:
        return ABSENT
    text = f"{mean * column.scale:.{column.digits}f}"
    return text if entry.seeds == 1 else f"{text} ±{std * column.scale:.{column.digits}f}"
