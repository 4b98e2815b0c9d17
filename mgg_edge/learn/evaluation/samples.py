"""What the streams of a sweep look like: the same few pictures in each of their weathers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mgg_edge.learn.evaluation.plots import figure_of, png
from mgg_edge.learn.evaluation.scenery import Scenery
from mgg_edge.scenes.courses import parse_course

__all__ = ["draw_samples"]

PICTURES = 8
MAX_WEATHERS = 16
SEED = 900_005


def draw_samples(sceneries: Mapping[str, Scenery]) -> bytes:
    """A PNG file with one row of pictures for each weather of the streams, the first `MAX_WEATHERS` of them.

    Args:
        sceneries: what each stream, by its name, draws from.
    """
    weathers = {
        weather.name: (weather, scenery)
        for stream, scenery in sceneries.items()
        for weather in parse_course(stream).weathers
    }
    shown = list(weathers.items())[:MAX_WEATHERS]
    figure = figure_of(1.6 + 0.9 * PICTURES, 0.4 + 0.95 * len(shown))
    grid = figure.subplots(len(shown), PICTURES, squeeze=False)
    for row, (name, (weather, scenery)) in zip(grid, shown, strict=True):
        rng = np.random.default_rng(SEED)  # the same pictures in every weather
        labels = rng.choice(scenery.pictures.available, PICTURES)
        clean = scenery.pictures.draw(labels, rng)
        for column, (axes, picture) in enumerate(zip(row, weather(clean, np.random.default_rng(SEED)), strict=True)):
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if not column:
                axes.set_ylabel(name if len(name) <= 24 else f"{name[:23]}…", rotation=0, ha="right", va="center")
            if row is grid[0]:
                axes.set_title(scenery.pictures.classes[int(labels[column])][:14], fontsize=8)
    return png(figure)
