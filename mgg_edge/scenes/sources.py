"""Where the pictures of a stream come from: anything that draws labelled frames with a generator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mgg_edge.errors import UsageError
from mgg_edge.scenes.glyphs import CHARACTERS, GlyphSet
from mgg_edge.scenes.render import draw_scene, jitter, render

__all__ = ["GlyphSource", "ImageSource", "LabelledFrames"]


class LabelledFrames(NamedTuple):
    """frames: u8[n, H, W, 3], RGB; labels: i64[n], indices into the classes of the source."""

    frames: NDArray[np.uint8]
    labels: NDArray[np.int64]


class ImageSource(Protocol):
    """What a stream needs of a set of labelled pictures."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        ...

    @property
    def available(self) -> NDArray[np.int64]:
        """Labels that have pictures, ascending."""
        ...

    def draw(self, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
        """One picture for each label: u8[n, H, W, 3]."""
        ...

    def clip(self, label: int, frames: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Consecutive views of one thing: u8[frames, H, W, 3]."""
        ...


@dataclass(frozen=True)
class GlyphSource:
    """Pictures of glyphs, rendered when they are asked for.

    Attributes:
        glyphs: the faces to draw from; a family of n faces is √n times as likely as one of a single face.
        size: width and height of a picture in pixels.
    """

    glyphs: GlyphSet
    size: int = 32

    @cached_property
    def _cumulative(self) -> NDArray[np.float64]:
        """Cumulative probability of each face."""
        sizes = Counter(face.family for face in self.glyphs.faces)
        weights = np.cumsum([sizes[face.family] ** -0.5 for face in self.glyphs.faces])
        cumulative: NDArray[np.float64] = weights / weights[-1]
        return cumulative

    def _draw_faces(self, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
        return np.searchsorted(self._cumulative, rng.random(count), side="right")

    @property
    def classes(self) -> tuple[str, ...]:
        """The 36 characters."""
        return tuple(CHARACTERS)

    @property
    def available(self) -> NDArray[np.int64]:
        """All 36 labels: every face has every character."""
        return np.arange(len(CHARACTERS))

    def draw(self, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
        """One picture for each label, each with a face, pose and light of its own: u8[n, size, size, 3]."""
        faces = self._draw_faces(len(labels), rng)
        masters = self.glyphs.masters[faces, require_labels(labels, len(CHARACTERS))]
        return render(masters, draw_scene(len(labels), rng), self.size, rng)

    def clip(self, label: int, frames: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """One glyph seen by a hand-held camera for some frames: u8[frames, size, size, 3]."""
        require_labels(np.array([label]), len(CHARACTERS))
        master = self.glyphs.masters[self._draw_faces(1, rng)[0], label]
        scene, views = draw_scene(1, rng), []
        for _ in range(frames):
            views.append(render(master[None], scene, self.size, rng))
            scene = jitter(scene, rng)
        return np.concatenate(views)


def require_labels(labels: NDArray[np.int64] | Sequence[int], classes: int) -> NDArray[np.int64]:
    """Labels as i64[n].

    Raises:
        UsageError: a label that is no index of a class.
    """
    found = np.asarray(labels, np.int64)
    if found.size and not (found.min() >= 0 and found.max() < classes):
        raise UsageError(f"labels: expected 0 to {classes - 1}, found {found.min()} to {found.max()}")
    return found
