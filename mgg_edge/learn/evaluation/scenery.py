"""The data of an evaluation: labelled pictures, the streams made of them, and frames kept apart for each domain.

    glyphs.safetensors     characters of unseen families for streams, of the source families for source knowledge
    ImageFolder directory  one folder a class; class numbers are the sorted folder names' places

This module alone knows `mgg_edge.scenes`; what it gives is what `evaluate` takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.images import find_images, load_images
from mgg_edge.manifest import PreprocessInfo
from mgg_edge.scenes.glyphs import Split, load_glyphs
from mgg_edge.scenes.sources import GlyphSource, ImageSource, LabelledFrames, require_labels
from mgg_edge.scenes.streams import Stream, parse_course, parse_weather

__all__ = ["FolderSource", "Scenery", "open_scenery"]

# Seeds of what is kept apart, far from those of streams, which count from 0.
HELD_OUT_SEED, CLEAN_SEED, SOURCE_SEED, WEATHER_SEED = 900_001, 900_002, 900_003, 900_004
LOAD_BATCH = 64


@dataclass(frozen=True)
class Scenery:
    """Attributes: pictures: for streams and what is kept apart; source: of the domain the model was trained on."""

    pictures: ImageSource
    source: ImageSource

    def stream(self, text: str, *, batch: int, frames: int, seed: int) -> Stream:
        """The stream a user named.

        Raises:
            UsageError: no such stream, or fewer frames than one batch.
        """
        return Stream(self.pictures, parse_course(text), batch, frames, seed)

    def held_out(self, domain: str, count: int) -> LabelledFrames:
        """Frames of a weather that no stream shows.

        Raises:
            UsageError: no such weather.
        """
        clean = _draw(self.pictures, count, HELD_OUT_SEED)
        return clean._replace(frames=parse_weather(domain)(clean.frames, np.random.default_rng(WEATHER_SEED)))

    def clean(self, count: int) -> LabelledFrames:
        """Clean frames like those of the streams."""
        return _draw(self.pictures, count, CLEAN_SEED)

    def source_frames(self, count: int) -> Tensor:
        """Clean frames u8[count, H, W, 3] of the source domain, without labels."""
        return torch.from_numpy(_draw(self.source, count, SOURCE_SEED).frames)


class FolderSource:
    """Pictures of an ImageFolder directory, fitted as the model wants them.

    Args:
        directory: one folder a class.
        info: the model's preprocessing.
        classes: C of the model; there may be no more folders.

    Raises:
        UsageError: no such directory, no image in it, or more folders than classes.
    """

    def __init__(self, directory: Path, info: PreprocessInfo, classes: int) -> None:
        paths = find_images(directory)
        self._names = sorted({path.relative_to(directory).parts[0] for path in paths if path.parent != directory})
        if not 1 <= len(self._names) <= classes:
            raise UsageError(
                f"{directory}: expected one folder of images a class, at most {classes}, found {len(self._names)}"
            )
        self._info = info
        self._paths: list[list[Path]] = [[] for _ in self._names]
        for path in paths:
            if path.parent != directory:
                self._paths[self._names.index(path.relative_to(directory).parts[0])].append(path)

    @property
    def classes(self) -> tuple[str, ...]:
        """Folder names, sorted."""
        return tuple(self._names)

    @property
    def available(self) -> NDArray[np.int64]:
        """All labels."""
        return np.arange(len(self._names))

    def draw(self, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
        """One picture for each label: u8[n, H, W, 3].

        Raises:
            SourceError: a file cannot be read as an image.
        """
        found = require_labels(labels, len(self._names))
        chosen = [self._paths[label][int(rng.integers(len(self._paths[label])))] for label in found]
        return torch.cat(list(load_images(chosen, self._info, LOAD_BATCH))).numpy()

    def clip(self, label: int, frames: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """One picture shown for some frames: u8[frames, H, W, 3]."""
        return np.repeat(self.draw(np.array([label]), rng), frames, axis=0)


def open_scenery(data: Path, source_data: Path | None, info: PreprocessInfo, classes: int) -> Scenery:
    """Open the data of an evaluation.

    Args:
        data: a file of glyph masters or an ImageFolder directory; streams are drawn from it.
        source_data: the same for the source domain. None takes the source families of a glyph file, and must be given
            for a directory.
        info: the model's preprocessing.
        classes: C of the model.

    Raises:
        UsageError: data that is not there or does not fit the model, or a directory without source data.
        SourceError: a glyph file that cannot be read.
    """
    if data.is_dir() and source_data is None:
        raise UsageError(f"{data}: expected clean images of the source domain beside it; name them with --source-data")
    pictures = _open(data, "test", info, classes)
    return Scenery(pictures, _open(source_data or data, "source-train", info, classes))


def _open(path: Path, split: Split, info: PreprocessInfo, classes: int) -> ImageSource:
    if path.is_dir():
        return FolderSource(path, info, classes)
    if not path.is_file():
        raise UsageError(f"{path}: no such glyph file or directory of images")
    source = GlyphSource(load_glyphs(path).select(split), info.height)
    if info.height != info.width or len(source.classes) != classes:
        raise UsageError(
            f"{path}: expected a model of square frames and {len(source.classes)} classes, "
            f"found {info.width}x{info.height} and {classes}"
        )
    return source


def _draw(source: ImageSource, count: int, seed: int) -> LabelledFrames:
    rng = np.random.default_rng(seed)
    labels = rng.choice(source.available, count)
    return LabelledFrames(source.draw(labels, rng), labels)
