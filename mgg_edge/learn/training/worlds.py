"""What update rules are meta-trained on: pictures of a source in weathers of their own, with something to aim at.

    target of a picture    its label, where the source has labels; otherwise what the frozen model says of the picture
                           before the weather: on clean pictures it can be believed

A `World` draws `Weather`s; a weather draws pictures. All chance comes from generators that are passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.scenes.domains import Domain, draw_domain
from mgg_edge.scenes.sources import ImageSource

__all__ = ["TARGETS", "Drawn", "Weather", "World"]

TARGETS = ("labels", "predictions")
SORTED_CLASSES = 3
Rng = np.random.Generator


class Drawn(NamedTuple):
    """Attributes: frames u8[n, H, W, 3]; targets i64[n]."""

    frames: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Weather:
    """One domain over one source.

    Attributes:
        domain: what the pictures go through.
        source: where they come from.
        aim: targets i64[n] of labels i64[n] and clean frames u8[n, H, W, 3].
        classes: labels to draw from at first, so that a window may show few of them.
    """

    domain: Domain
    source: ImageSource
    aim: Callable[[NDArray[np.int64], NDArray[np.uint8]], Tensor]
    classes: NDArray[np.int64]

    def draw(self, count: int, rng: Rng, *, all_classes: bool = False) -> Drawn:
        """Pictures of this weather.

        Args:
            count: how many.
            rng: where chance comes from.
            all_classes: draw from every class, whatever `classes` says.
        """
        labels = rng.choice(self.source.available if all_classes else self.classes, count)
        clean = self.source.draw(labels, rng)
        return Drawn(torch.from_numpy(self.domain(clean, rng)), self.aim(labels, clean))

    def frames(self, count: int, rng: Rng) -> Tensor:
        """Pictures u8[count, H, W, 3] of this weather with nothing to aim at: those `draw` would give."""
        return torch.from_numpy(self.domain(self.source.draw(rng.choice(self.classes, count), rng), rng))


@dataclass(frozen=True)
class World:
    """Weathers over one source.

    Attributes:
        source: pictures.
        predict: classes i64[n] the frozen model sees in frames u8[n, H, W, 3], for targets without labels.
        target: `labels` or `predictions`.
        sorted_share: share of weathers whose windows show three classes only, as cameras do.

    Raises:
        UsageError: another target.
    """

    source: ImageSource
    predict: Callable[[Tensor], Tensor]
    target: str = "labels"
    sorted_share: float = 0.2

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"meta-training: expected a target of {', '.join(TARGETS)}, found '{self.target}'")

    def weather(self, rng: Rng, *, clean_share: float | None = None) -> Weather:
        """A random weather."""
        domain = draw_domain(rng) if clean_share is None else draw_domain(rng, clean_share)
        classes = self.source.available
        if rng.random() < self.sorted_share:
            classes = rng.choice(classes, min(SORTED_CLASSES, len(classes)), replace=False)
        return Weather(domain, self.source, self._aim, classes)

    def _aim(self, labels: NDArray[np.int64], clean: NDArray[np.uint8]) -> Tensor:
        if self.target == "labels":
            return torch.from_numpy(labels)
        return self.predict(torch.from_numpy(clean))
