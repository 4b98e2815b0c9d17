"""Everything a finished sweep leaves in its folder.

results.csv      one line a job
predictions.npz  every answer: arrays `STREAM|METHOD|SEED|labels`, `…|predicted`, `…|confidence`
summary.json     the table: mean and standard deviation over seeds, for each method on each stream
*.png            the plots, and samples.png: pictures of each weather
report.html      all of it for people, in one file
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mgg_edge.files import write_whole
from mgg_edge.learn.evaluation.jobs import Row
from mgg_edge.learn.evaluation.plots import draw_plots
from mgg_edge.learn.evaluation.report import html_report
from mgg_edge.learn.evaluation.tables import Summary, rows_as_csv, summarise, verdicts

__all__ = ["write_outcome"]

TITLE = "Adaptation methods on streams"


def write_outcome(
    folder: Path,
    rows: Sequence[Row],
    facts: Mapping[str, str],
    samples: bytes | None = None,
    mapping: Mapping[str, str] | None = None,
) -> list[Summary]:
    """Write the files, each whole or not at all.

    Args:
        folder: where to.
        rows: as `run_sweep` gives them.
        facts: what was run, by name.
        samples: a PNG file of pictures of the streams.
        mapping: class of each folder.

    Returns:
        The table.

    Raises:
        SinkError: a file cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    summaries = summarise(rows)
    plots = {**({} if samples is None else {"samples": samples}), **draw_plots(rows)}
    table = [entry.to_dict() for entry in summaries]
    summary = {
        "facts": dict(facts), "classes": dict(mapping or {}), "verdicts": verdicts(summaries), "summary": table,
    }  # fmt: skip
    contents = {
        "results.csv": rows_as_csv(rows).encode(),
        "predictions.npz": _answers(rows),
        "summary.json": (json.dumps(summary, indent=1) + "\n").encode(),
        "report.html": html_report(TITLE, facts, summaries, plots, mapping or {}).encode(),
        **{f"{name}.png": data for name, data in plots.items()},
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    return summaries


def _answers(rows: Sequence[Row]) -> bytes:
    arrays = {
        f"{row['stream']}|{row['method']}|{row['seed']}|{name}": np.array(values)
        for row in rows
        for name, values in row["answers"].items()
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
