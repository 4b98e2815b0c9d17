"""The data of an evaluation: labelled pictures, the streams made of them, and frames kept apart for each domain.

    glyphs.safetensors     characters of unseen families for streams, of the source families for source knowledge
    ImageFolder directory  one folder a class; class numbers are the sorted folder names' places

What it gives is what `evaluate` takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.pictures import open_pictures
from mgg_edge.manifest import PreprocessInfo
from mgg_edge.scenes.sources import ImageSource, LabelledFrames
from mgg_edge.scenes.streams import Stream, parse_course, parse_weather

__all__ = ["Scenery", "open_scenery"]

# Seeds of what is kept apart, far from those of streams, which count from 0.
HELD_OUT_SEED, CLEAN_SEED, SOURCE_SEED, WEATHER_SEED = 900_001, 900_002, 900_003, 900_004


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
    pictures = open_pictures(data, "test", info, classes)
    return Scenery(pictures, open_pictures(source_data or data, "source-train", info, classes))


def _draw(source: ImageSource, count: int, seed: int) -> LabelledFrames:
    rng = np.random.default_rng(seed)
    labels = rng.choice(source.available, count)
    return LabelledFrames(source.draw(labels, rng), labels)
