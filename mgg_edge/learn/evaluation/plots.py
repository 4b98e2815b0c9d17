"""Plots of a sweep as PNG files in memory: means over seeds, and their standard deviation as bars or bands."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mgg_edge.learn.evaluation.jobs import Row
from mgg_edge.learn.evaluation.trial import ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_plots", "figure_of", "png"]

DOTS_PER_INCH = 110
MAX_PANELS = 12
PANEL_INCHES = (4.6, 3.2)
MAX_ANNOTATED = 400  # cells of the heat map that still show their number


def draw_plots(rows: Sequence[Row]) -> dict[str, bytes]:
    """PNG files by name: accuracy over time, accuracy against updates (where measured), and the heat map.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    plots = {"accuracy_over_time": _over_time(rows)}
    if any(row["accuracy_after"] for row in rows):
        plots["accuracy_against_updates"] = _against_updates(rows)
    return {**plots, "accuracy_by_domain": _heat_map(rows)}


def _unique(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _mean_of(values: Sequence[Sequence[float]]) -> list[float]:
    """Element-wise mean over seeds, over the length all of them have."""
    length = min(map(len, values))
    return [float(value) for value in np.mean([part[:length] for part in values], axis=0)]


def _spread_of(values: Sequence[Sequence[float]]) -> list[float]:
    """Element-wise standard deviation over two or more seeds, over the length all of them have."""
    length = min(map(len, values))
    return [float(value) for value in np.std([part[:length] for part in values], axis=0, ddof=1)]


def _over_time(rows: Sequence[Row]) -> bytes:
    figure, panels = _panels(_unique(rows, "stream"))
    for stream, axes in panels:
        for index, method in enumerate(_unique(rows, "method")):
            series = [row["timeline"] for row in rows if (row["stream"], row["method"]) == (stream, method)]
            if series:
                values = 100 * np.array(_smooth(_mean_of(series)))
                places = np.linspace(0, 100, len(values))
                axes.plot(places, values, label=method, **_style(index))
                if len(series) > 1:
                    spread = 100 * np.array(_smooth(_spread_of(series)))
                    axes.fill_between(places, values - spread, values + spread, color=f"C{index % 10}", alpha=0.15)
        axes.set(title=stream, xlabel="share of the stream, %", ylabel="online accuracy, %")
    return png(figure, panels)


def _against_updates(rows: Sequence[Row]) -> bytes:
    streams = [stream for stream in _unique(rows, "stream") if _measured(rows, stream)]
    figure, panels = _panels(streams)
    for stream, axes in panels:
        names = _checkpoints(_measured(rows, stream))
        for index, method in enumerate(_unique(rows, "method")):
            found = [row["accuracy_after"] for row in _measured(rows, stream) if row["method"] == method]
            if found:
                known = [[100 * entry[name] for entry in found if name in entry] for name in names]
                bars = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in known]
                axes.errorbar(
                    range(len(names)), list(map(np.mean, known)), bars if any(bars) else None, marker="o",
                    markersize=3, capsize=2, label=method, **_style(index),
                )  # fmt: skip
        axes.set_xticks(range(len(names)), names)
        axes.set(title=stream, xlabel="batches seen", ylabel="accuracy on held-out frames, %")
    return png(figure, panels)


def _heat_map(rows: Sequence[Row]) -> bytes:
    methods = _unique(rows, "method")
    domains = list(dict.fromkeys(domain for row in rows for domain in row["domains"]))
    cells = np.full((len(methods), len(domains)), np.nan)
    for i, method in enumerate(methods):
        for j, domain in enumerate(domains):
            found = [row["domains"][domain] for row in rows if row["method"] == method and domain in row["domains"]]
            cells[i, j] = 100 * np.mean(found) if found else np.nan
    figure = figure_of(2.2 + 0.62 * len(domains), 1.6 + 0.34 * len(methods))
    axes = figure.subplots()
    image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0, vmax=100)
    axes.set_xticks(range(len(domains)), domains, rotation=60, ha="right")
    axes.set_yticks(range(len(methods)), methods)
    axes.set_title("online accuracy by domain, %")
    if cells.size <= MAX_ANNOTATED:
        for (i, j), value in np.ndenumerate(cells):
            text = "" if math.isnan(value) else f"{value:.0f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="black" if value > 60 else "white")
    figure.colorbar(image, ax=axes)
    return png(figure)


def _measured(rows: Sequence[Row], stream: str) -> list[Row]:
    return [row for row in rows if row["stream"] == stream and row["accuracy_after"]]


def _checkpoints(rows: Sequence[Row]) -> list[str]:
    names = {name for row in rows for name in row["accuracy_after"]}
    return [*sorted(names - {ALL}, key=int), *([ALL] if ALL in names else [])]


def _smooth(values: Sequence[float], width: int = 7) -> list[float]:
    """Moving mean over the neighbours there are."""
    half = width // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def _style(index: int) -> dict[str, Any]:
    """Each line narrower than the one before, so that equal ones show beneath each other."""
    width = max(1.0, 3.4 - 0.4 * (index % 10))
    return {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3], "linewidth": width}


def figure_of(width: float, height: float) -> Figure:
    """An empty figure, sides in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=DOTS_PER_INCH)


def _panels(titles: Sequence[str]) -> tuple[Figure, list[tuple[str, Axes]]]:
    """A grid with one panel a title; past the most a figure can show, the first ones."""
    shown = list(titles)[:MAX_PANELS]
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = figure_of(PANEL_INCHES[0] * columns + 1.4, PANEL_INCHES[1] * lines)
    grid = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in grid[len(shown) :]:
        unused.set_visible(False)
    return figure, list(zip(shown, grid, strict=False))


def png(figure: Figure, panels: Sequence[tuple[str, Axes]] = ()) -> bytes:
    """A PNG file of a figure, with one legend for its panels."""
    if panels:
        handles, labels = panels[0][1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
    for _, axes in panels:
        axes.grid(visible=True, alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
