"""Streams: seeded batches of labelled pictures whose weather changes. Training, evaluation and run time share them.

A stream can be gone through again and is then the same. `courses.py` says what there is to show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mgg_edge.errors import UsageError
from mgg_edge.scenes.courses import Course
from mgg_edge.scenes.sources import ImageSource, LabelledFrames

__all__ = ["Batch", "FiniteSource", "Stream"]


@runtime_checkable
class FiniteSource(ImageSource, Protocol):
    """Pictures that can be gone through once."""

    def once(self, batch: int, rng: np.random.Generator) -> Iterator[LabelledFrames]:
        """Every picture once, in random order, by batches; the last one may be smaller."""
        ...

    def __len__(self) -> int:
        """Number of pictures."""
        ...


@dataclass(frozen=True)
class Batch:
    """Attributes: frames u8[B, H, W, 3]; labels i64[B]; domain: name of the weather."""

    frames: NDArray[np.uint8]
    labels: NDArray[np.int64]
    domain: str


@dataclass(frozen=True)
class Stream:
    """Batches that can be gone through again, the same each time.

    Attributes:
        source: pictures to draw.
        course: what it shows.
        batch: B.
        frames: in all; what does not fill a batch is left out. A course that shows every picture once ignores it.
        seed: of everything drawn.

    Raises:
        UsageError: fewer frames than one batch.
    """

    source: ImageSource
    course: Course
    batch: int
    frames: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= self.frames:
            raise UsageError(f"stream: expected at least one batch of {self.batch} frames, found {self.frames} frames")

    def __iter__(self) -> Iterator[Batch]:
        rng, batch = np.random.default_rng(self.seed), 1 if self.course.single else self.batch
        count = self.frames // batch
        if self.course.once:
            yield from self._once(batch, rng)
            return
        order = self.course.order.draw(self.source.available, count * batch, rng)
        for number in range(count):
            weather = self.course.weathers[number * len(self.course.weathers) // count]
            span = slice(number * batch, (number + 1) * batch)
            labels = rng.choice(self.source.available, batch) if order is None else order[span]
            yield Batch(weather(self.source.draw(labels, rng), rng), labels, weather.name)

    def _once(self, batch: int, rng: np.random.Generator) -> Iterator[Batch]:
        if not isinstance(self.source, FiniteSource):
            raise UsageError("stream: one-pass expected a folder of pictures; drawn characters have no end")
        count, weathers = -(-len(self.source) // batch), self.course.weathers
        for number, (frames, labels) in enumerate(self.source.once(batch, rng)):
            weather = weathers[number * len(weathers) // count]
            yield Batch(weather(frames, rng), labels, weather.name)
