"""The demonstration's pictures: characters of fonts the reader has never seen, under weather that comes and goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mgg_edge.files import packaged_file
from mgg_edge.runtime.sources.source import DEFAULT_RATE, ClosingSource, Frame
from mgg_edge.scenes.courses import parse_weather
from mgg_edge.scenes.glyphs import GlyphSet, load_glyphs
from mgg_edge.scenes.sources import GlyphSource

__all__ = ["COURSE", "DemoFrame", "DemoSource", "demo_frames", "packaged_faces"]

# What the sky does, and the corruption that stands for it.
COURSE = (
    ("clear", "clean"),
    ("fog", "fog@5"),
    ("noise", "gaussian_noise@4"),
    ("blur", "defocus_blur@5"),
    ("night", "night@5"),
    ("clear", "clean"),
)
FACES = "characters.safetensors"
SIZE, ENLARGED = 32, 8  # pixels of a picture, and times a source enlarges it


@dataclass(frozen=True)
class DemoFrame:
    """Attributes: image u8[H, W, 3]; label, an index into the characters; weather, for people; index, from 0."""

    image: npt.NDArray[np.uint8]
    label: int
    weather: str
    index: int


def packaged_faces() -> GlyphSet:
    """The faces of the demonstration.

    Raises:
        UsageError: this build of the package has none.
        SourceError: they cannot be read.
    """
    return load_glyphs(packaged_file(FACES))


def demo_frames(glyphs: GlyphSet, frames_each: int, seed: int, size: int = SIZE) -> Iterator[DemoFrame]:
    """The stream: `frames_each` frames of each weather of `COURSE`, the same for the same seed."""
    source, rng = GlyphSource(glyphs, size), np.random.default_rng(seed)
    chunk = 25
    index = 0
    for name, text in COURSE:
        weather = parse_weather(text)
        for start in range(0, frames_each, chunk):
            labels = rng.choice(source.available, min(chunk, frames_each - start))
            for image, label in zip(weather(source.draw(labels, rng), rng), labels, strict=True):
                yield DemoFrame(image, int(label), name, index)
                index += 1


class DemoSource(ClosingSource):
    """The demonstration's pictures as a source of frames, enlarged so that captions have room.

    Args:
        frames_each: frames of each weather.
        seed: of characters, fonts and weather.

    Raises:
        UsageError: this build of the package lacks the faces.
    """

    def __init__(self, frames_each: int = 300, seed: int = 0) -> None:
        self._glyphs = packaged_faces()
        self._frames_each, self._seed = frames_each, seed
        self.name, self.live, self.rate = "demo", False, DEFAULT_RATE
        self.width = self.height = ENLARGED * SIZE
        self.frames_expected: int | None = frames_each * len(COURSE)

    def __iter__(self) -> Iterator[Frame]:
        for frame in demo_frames(self._glyphs, self._frames_each, self._seed):
            image = frame.image.repeat(ENLARGED, 0).repeat(ENLARGED, 1)
            yield Frame(frame.index, float(frame.index / self.rate), image)
