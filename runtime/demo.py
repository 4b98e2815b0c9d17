"""The demonstration: characters of fonts the reader has never seen, under weather that comes and goes.

One stream, read by three models at once: the frozen reader, the reader with the paper's learned optimiser, and the
default reader. The stream is labelled, so that one can see who reads right; no label reaches a reader.
"""

from __future__ import annotations

import contextlib
import importlib.resources
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import UsageError
from mgg_edge.runtime.adapter import Adapter
from mgg_edge.runtime.prediction import Prediction
from mgg_edge.runtime.source import DEFAULT_RATE, ClosingSource, Frame
from mgg_edge.scenes.glyphs import CHARACTERS, GlyphSet, load_glyphs
from mgg_edge.scenes.sources import GlyphSource
from mgg_edge.scenes.streams import parse_weather

__all__ = [
    "ADAPTED",
    "COURSE",
    "FROZEN",
    "READERS",
    "DemoFrame",
    "DemoSource",
    "Scores",
    "demo_frames",
    "open_readers",
    "packaged",
]

# What the sky does, and the corruption that stands for it.
COURSE = (
    ("clear", "clean"),
    ("fog", "fog@5"),
    ("noise", "gaussian_noise@4"),
    ("blur", "defocus_blur@5"),
    ("night", "night@5"),
    ("clear", "clean"),
)
DEFAULT_BUNDLE, MGG_BUNDLE, FACES = "default.mgg", "reader-mgg.mgg", "characters.safetensors"
FROZEN, MGG, ADAPTED = "frozen", "mgg", "adapted"
READERS = (FROZEN, MGG, ADAPTED)
SIZE, ENLARGED = 32, 8  # pixels of a picture, and times a source enlarges it
WINDOW_FRAMES = 500
LATELY_FRAMES = 60


@dataclass(frozen=True)
class DemoFrame:
    """Attributes: image u8[H, W, 3]; label, an index into the characters; weather, for people; index, from 0."""

    image: npt.NDArray[np.uint8]
    label: int
    weather: str
    index: int


def packaged(name: str, stack: contextlib.ExitStack) -> Path:
    """A data file of the package, on disk while the stack lasts.

    Raises:
        UsageError: this build of the package has no such file.
    """
    resource = importlib.resources.files("mgg_edge.data") / name
    if not resource.is_file():
        raise UsageError(f"demo: this build of the package holds no '{name}'; scripts/build_default makes it")
    return stack.enter_context(importlib.resources.as_file(resource))


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


@contextlib.contextmanager
def open_readers() -> Iterator[tuple[dict[str, Adapter], GlyphSet]]:
    """The three readers by name, and the faces of the stream.

    Raises:
        UsageError: this build of the package lacks a part.
        MissingDependencyError: no engine is installed.
    """
    with contextlib.ExitStack() as stack:
        default, mgg = packaged(DEFAULT_BUNDLE, stack), packaged(MGG_BUNDLE, stack)
        faces = load_glyphs(packaged(FACES, stack))
        readers = {
            FROZEN: stack.enter_context(Adapter.open(default, adapt="off", threads=1)),
            MGG: stack.enter_context(Adapter.open(mgg, threads=1)),
            ADAPTED: stack.enter_context(Adapter.open(default, threads=1)),
        }
        yield readers, faces


class DemoSource(ClosingSource):
    """The demonstration's pictures as a source of frames, enlarged so that captions have room.

    Args:
        frames_each: frames of each weather.
        seed: of characters, fonts and weather.

    Raises:
        UsageError: this build of the package lacks the faces.
    """

    def __init__(self, frames_each: int = 300, seed: int = 0) -> None:
        with contextlib.ExitStack() as stack:
            self._glyphs = load_glyphs(packaged(FACES, stack))
        self._frames_each, self._seed = frames_each, seed
        self.name, self.live, self.rate = "demo", False, DEFAULT_RATE
        self.width = self.height = ENLARGED * SIZE
        self.frames_expected: int | None = frames_each * len(COURSE)

    def __iter__(self) -> Iterator[Frame]:
        for frame in demo_frames(self._glyphs, self._frames_each, self._seed):
            image = frame.image.repeat(ENLARGED, 0).repeat(ENLARGED, 1)
            yield Frame(frame.index, float(frame.index / self.rate), image)


@dataclass
class Scores:
    """Who read right, frame by frame.

    Attributes:
        right: of each reader, one entry a frame.
        weathers: of each frame.
        lately: of each reader, the latest frames.
    """

    right: dict[str, list[bool]] = field(default_factory=lambda: {name: [] for name in READERS})
    weathers: list[str] = field(default_factory=list)
    lately: dict[str, deque[bool]] = field(
        default_factory=lambda: {name: deque(maxlen=LATELY_FRAMES) for name in READERS}
    )

    def add(self, frame: DemoFrame, predictions: dict[str, Prediction]) -> None:
        """Take note of one frame."""
        self.weathers.append(frame.weather)
        for name, prediction in predictions.items():
            right = prediction.label == CHARACTERS[frame.label]
            self.right[name].append(right)
            self.lately[name].append(right)

    def recent(self, name: str) -> float:
        """Share of right ones among the latest frames; 0 before the first."""
        return sum(self.lately[name]) / max(len(self.lately[name]), 1)

    def accuracy(self, name: str) -> float:
        """Share of right ones in all; 0 before the first."""
        return sum(self.right[name]) / max(len(self.right[name]), 1)

    def summary(self) -> dict[str, Any]:
        """Accuracies as fractions: in all, by stretch of weather, and the adapted lead in the worst 500 frames."""
        adapted, frozen = (np.array(self.right[name], np.float64) for name in (ADAPTED, FROZEN))
        window = min(WINDOW_FRAMES, len(adapted))
        lead = np.convolve(adapted - frozen, np.ones(window) / window, "valid") if window else np.zeros(1)
        return {
            "frames": len(self.weathers),
            **{f"accuracy_{name}": self.accuracy(name) for name in READERS},
            "worst_lead_in_500_frames": float(lead.min()),
            "stretches": self._stretches(),
        }

    def _stretches(self) -> list[dict[str, Any]]:
        edges = [i for i in range(len(self.weathers)) if i == 0 or self.weathers[i] != self.weathers[i - 1]]
        spans = zip(edges, [*edges[1:], len(self.weathers)], strict=True)
        return [
            {
                "weather": self.weathers[start],
                "frames": end - start,
                **{name: sum(self.right[name][start:end]) / (end - start) for name in READERS},
            }
            for start, end in spans
        ]
