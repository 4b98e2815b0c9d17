"""A micro-buffer of B diverse recent frames: the batch of one adaptation step.

Neighbouring frames of a video are nearly equal, and the discrepancy term needs spread within the batch. The rule:

    1. A frame older than `max_age_frames` inferred frames leaves.
    2. A frame closer than 2 grey levels (`gate_thumbnail`) to one held is left out.
    3. While fewer than B frames are held, every other frame is taken.
    4. When B are held, the newcomer takes the place of the older one of the closest pair, if it is further from all
       the others than that pair is apart: the least distance within the buffer never falls.

A batch is ready when B frames are held and `patience_frames` were offered since the last batch. With patience B, the
default, that is at once; more patience buys more diversity with older frames. Each frame costs B comparisons.

Any object with these methods can take its place: see `Buffer`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mgg_edge.compat import Self
from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.gate import Observation
from mgg_edge.runtime.adaptation.gate_thumbnail import difference_levels

__all__ = ["MIN_DIFFERENCE_LEVELS", "Batch", "Buffer", "FrameBuffer"]

MIN_DIFFERENCE_LEVELS = 2.0
MAX_AGE_FRAMES = 1500  # a minute at 25 frames per second
Distances = npt.NDArray[np.float64]
BufferT = TypeVar("BufferT", bound="FrameBuffer")


def _no_distances() -> Distances:
    return np.empty((0, 0))


@dataclass(frozen=True)
class Batch:
    """What one adaptation step learns from.

    Attributes:
        frames: u8[B,H,W,3] in order of arrival.
        indices: `Observation.index` of each.
    """

    frames: npt.NDArray[np.uint8]
    indices: tuple[int, ...]


class Buffer(Protocol):
    """Gathers admitted frames; immutable."""

    def add(self, seen: Observation, /) -> Self:
        """The buffer after an admitted frame."""

    def drop_old(self, index: int, /) -> Self:
        """The buffer without frames that are too old by the time of frame `index`."""

    @property
    def is_ready(self) -> bool:
        """Whether `batch` may be called."""

    def batch(self) -> Batch:
        """The frames to learn from."""

    def clear(self) -> Self:
        """An empty buffer of the same settings."""


@dataclass(frozen=True)
class FrameBuffer:
    """The buffer of this module's rule.

    Attributes:
        capacity: B, frames of a batch.
        patience_frames: frames offered before a batch is ready; less than B is as B.
        max_age_frames: inferred frames after which a held frame leaves.
        held: the frames in order of arrival, at most B; `frame` is a copy.
        distances: f64[n,n] differences of the held frames, grey levels, infinite on the diagonal.
        offered: frames offered since the last batch.
    """

    capacity: int
    patience_frames: int = 0
    max_age_frames: int = MAX_AGE_FRAMES
    held: tuple[Observation, ...] = ()
    distances: Distances = field(default_factory=_no_distances)
    offered: int = 0

    @property
    def is_ready(self) -> bool:
        """Whether B frames are held and patience is over."""
        return len(self.held) >= self.capacity and self.offered >= self.patience_frames

    def add(self, seen: Observation, /) -> Self:
        """The buffer after an admitted frame, by the rule."""
        recent = self.drop_old(seen.index)
        recent = replace(recent, offered=recent.offered + 1)
        apart = np.array([difference_levels(seen.thumbnail, other.thumbnail) for other in recent.held])
        if not (apart >= MIN_DIFFERENCE_LEVELS).all():
            return recent
        if len(recent.held) < self.capacity:
            return _grown(recent, seen, apart)
        leaving, least = _closest(recent.distances)
        others = np.arange(len(apart)) != leaving
        if not (apart[others].min(initial=np.inf) > least):
            return recent
        return _grown(_kept(recent, others), seen, apart[others])

    def drop_old(self, index: int, /) -> Self:
        """The buffer without frames older than `max_age_frames` at frame `index`."""
        if not self.held or index - self.held[0].index <= self.max_age_frames:
            return self
        return _kept(self, np.array([index - seen.index <= self.max_age_frames for seen in self.held]))

    def batch(self) -> Batch:
        """The frames held.

        Raises:
            UsageError: fewer than B.
        """
        if len(self.held) < self.capacity:
            raise UsageError(f"buffer: expected {self.capacity} frames, found {len(self.held)}")
        return Batch(np.stack([seen.frame for seen in self.held]), tuple(seen.index for seen in self.held))

    def clear(self) -> Self:
        """An empty buffer of the same settings."""
        return replace(self, held=(), distances=_no_distances(), offered=0)


def _closest(distances: Distances) -> tuple[int, float]:
    """Place of the older one of the closest pair, and their difference."""
    first, second = np.unravel_index(int(distances.argmin()), distances.shape)
    return int(min(first, second)), float(distances.min())


def _grown(buffer: BufferT, seen: Observation, apart: Distances) -> BufferT:
    count = len(buffer.held)
    distances = np.full((count + 1, count + 1), np.inf)
    distances[:count, :count] = buffer.distances
    distances[count, :count] = distances[:count, count] = apart
    # A copy: callers reuse their frame's memory.
    return replace(buffer, held=(*buffer.held, replace(seen, frame=seen.frame.copy())), distances=distances)


def _kept(buffer: BufferT, chosen: npt.NDArray[np.bool_]) -> BufferT:
    held = tuple(seen for seen, keep in zip(buffer.held, chosen, strict=True) if keep)
    return replace(buffer, held=held, distances=buffer.distances[np.ix_(chosen, chosen)])
