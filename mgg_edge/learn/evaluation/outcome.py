"""Everything a finished sweep leaves in its folder.

results.csv      one line a job
summary.json     the table: mean and standard deviation over seeds, for each method on each stream
*.png            the plots
report.html      all of it for people, in one file
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mgg_edge.files import write_whole
from mgg_edge.learn.evaluation.jobs import Row
from mgg_edge.learn.evaluation.plots import draw_plots
from mgg_edge.learn.evaluation.report import html_report
from mgg_edge.learn.evaluation.tables import Summary, rows_as_csv, summarise

__all__ = ["write_outcome"]

TITLE = "Adaptation methods on streams"


def write_outcome(folder: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> list[Summary]:
    """Write the files, each whole or not at all.

    Args:
        folder: where to.
        rows: as `run_sweep` gives them.
        facts: what was run, by name.

    Returns:
        The table.

    Raises:
        SinkError: a file cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    summaries = summarise(rows)
    plots = draw_plots(rows)
    table = [entry.to_dict() for entry in summaries]
    contents = {
        "results.csv": rows_as_csv(rows).encode(),
        "summary.json": (json.dumps({"facts": dict(facts), "summary": table}, indent=1) + "\n").encode(),
        "report.html": html_report(TITLE, facts, summaries, plots).encode(),
        **{f"{name}.png": data for name, data in plots.items()},
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
    return summaries
