"""A sweep as one HTML file that needs nothing else: style and pictures are inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from mgg_edge.learn.evaluation.tables import Summary, summary_table, verdicts

__all__ = ["html_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
.wide { overflow-x: auto } img { max-width: 100% } dt { float: left; clear: left; width: 12rem; color: #666 }
"""
_NOTES = """<p><b>online</b>: answers given while adapting. <b>after n</b>: the state after n batches, frozen, on
held-out frames of the same domain. <b>worst 500</b>: least online accuracy of 500 consecutive frames. <b>clean</b>: the
last state on clean frames. Mean ± standard deviation over seeds.</p>"""


def html_report(
    title: str,
    facts: Mapping[str, str],
    summaries: Sequence[Summary],
    plots: Mapping[str, bytes],
    mapping: Mapping[str, str],
) -> str:
    """The report.

    Args:
        title: heading.
        facts: what was run, by name.
        summaries: the table.
        plots: PNG files by name.
        mapping: class of each folder.
    """
    header, rows = summary_table(summaries)
    sentences = "".join(f"<p>{escape(sentence)}</p>\n" for sentence in verdicts(summaries))
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    pictures = "".join(
        f'<h2>{escape(name.replace("_", " ").capitalize())}</h2>\n<img alt="{escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">\n'
        for name, data in plots.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{sentences}<dl>{entries}</dl>\n"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'
        f"{_NOTES}\n{pictures}{_mapping(mapping)}</body></html>\n"
    )


def _mapping(mapping: Mapping[str, str]) -> str:
    """Which folder was taken for which class."""
    if not mapping:
        return ""
    rows = "".join(f"<tr><td>{escape(folder)}</td><td>{escape(known)}</td></tr>\n" for folder, known in mapping.items())
    return (
        f"<details><summary>Folders and classes ({len(mapping)})</summary><table><thead><tr><th>folder</th>"
        f"<th>class</th></tr></thead><tbody>\n{rows}</tbody></table></details>\n"
    )
