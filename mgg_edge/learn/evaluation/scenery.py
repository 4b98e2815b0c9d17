"""The data of an evaluation: labelled pictures, the streams made of them, and frames kept apart for each domain.

    glyphs.safetensors     characters of unseen families for streams, of the source families for source knowledge;
                           every picture is drawn anew, those kept apart as well
    directory              one folder a class, named as the class. Its pictures fall into parts that share none: those
                           of the stream, those kept apart, and, unless others are named, those of the source domain

What it gives is what `evaluate` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.class_folders import Naming, open_class_folders
from mgg_edge.learn.images import find_images, load_images
from mgg_edge.learn.pictures import open_glyphs, split_folders
from mgg_edge.manifest import PreprocessInfo
from mgg_edge.scenes.courses import parse_course, parse_weather
from mgg_edge.scenes.sources import ImageSource, LabelledFrames
from mgg_edge.scenes.streams import FiniteSource, Stream

__all__ = ["Scenery", "open_scenery"]

# Seeds of what is kept apart, far from those of streams, which count from 0.
HELD_OUT_SEED, CLEAN_SEED, SOURCE_SEED, WEATHER_SEED = 900_001, 900_002, 900_003, 900_004
STREAM_SHARE, APART_SHARE, SOURCE_SHARE = 0.6, 0.2, 0.2
LOAD_BATCH = 64


@dataclass(frozen=True)
class Scenery:
    """What an evaluation draws from.

    Attributes:
        pictures: of the streams.
        apart: those no stream shows; None where nothing is kept apart.
        open_source: gives clean pictures u8[≤ count, H, W, 3] of the domain the model was trained on.
        classes: the only labels there are, ascending, where answers are to be chosen among them alone; else None.
        mapping: class of each folder, for reports.
    """

    pictures: ImageSource
    apart: ImageSource | None
    open_source: Callable[[int], NDArray[np.uint8]]
    classes: NDArray[np.int64] | None = None
    mapping: Mapping[str, str] = field(default_factory=dict)

    def stream(self, text: str, *, batch: int, frames: int, seed: int) -> Stream:
        """The stream a user named.

        Raises:
            UsageError: no such stream, or fewer frames than one batch.
        """
        return Stream(self.pictures, parse_course(text), batch, frames, seed)

    def held_out(self, domain: str, count: int) -> LabelledFrames:
        """Frames of a weather that no stream shows; of a directory each picture at most once.

        Raises:
            UsageError: no such weather, or nothing is kept apart.
        """
        clean = _take(self._kept_apart, count, HELD_OUT_SEED)
        return clean._replace(frames=parse_weather(domain)(clean.frames, np.random.default_rng(WEATHER_SEED)))

    def clean(self, count: int) -> LabelledFrames:
        """Clean frames like those of the streams, which shows none of them."""
        return _take(self._kept_apart, count, CLEAN_SEED)

    def source_frames(self, count: int) -> Tensor:
        """Clean frames u8[≤ count, H, W, 3] of the source domain, without labels.

        Raises:
            UsageError: there are none.
        """
        return torch.from_numpy(self.open_source(count))

    @cached_property
    def _kept_apart(self) -> ImageSource:
        if self.apart is None:
            raise UsageError("evaluation: no pictures are kept apart")
        return self.apart


def open_scenery(
    data: Path,
    source_data: Path | None,
    info: PreprocessInfo,
    naming: Naming,
    *,
    keep_apart: bool = True,
    mask: bool = True,
    is_source: bool = True,
) -> Scenery:
    """Open the data of an evaluation.

    Args:
        data: a file of glyph masters or a directory with one folder a class; streams are drawn from it.
        source_data: the same for the source domain, or a directory of any images. None takes the source families of a
            glyph file, or a part of a directory's pictures.
        info: the model's preprocessing.
        naming: what the model's classes are called.
        keep_apart: whether pictures are kept out of the streams.
        mask: whether answers are chosen among the classes there are folders of alone.
        is_source: whether pictures of a directory may stand for the source domain, where no others are named.

    Raises:
        UsageError: data that is not there or does not fit the model.
        SourceError: a glyph file that cannot be read.
    """
    elsewhere = None if source_data is None else _open_source(source_data, info, naming)
    if not data.is_dir():
        pictures = open_glyphs(data, "test", info, naming)
        return Scenery(pictures, pictures if keep_apart else None, elsewhere or _open_source(data, info, naming))
    found = open_class_folders(data, naming)
    shares = {"stream": STREAM_SHARE, **({"apart": APART_SHARE} if keep_apart else {})}
    if elsewhere is None and not is_source:
        elsewhere = _refuse_source
    if elsewhere is None:
        shares["source"] = SOURCE_SHARE
    parts = dict(zip(shares, split_folders(found, list(shares.values()), info), strict=True))
    classes = np.array(list(found.paths)) if mask and found.absent else None
    source = elsewhere or (lambda count: _take(parts["source"], count, SOURCE_SEED).frames)
    return Scenery(parts["stream"], parts.get("apart"), source, classes, found.facts)


def _refuse_source(_count: int) -> NDArray[np.uint8]:
    raise UsageError("source data: a method wants clean pictures, which these are not; name some with --source-data")


def _open_source(path: Path, info: PreprocessInfo, naming: Naming) -> Callable[[int], NDArray[np.uint8]]:
    """Clean pictures of a glyph file's source families, or any images of a directory, once they are asked for."""
    if not path.exists():
        raise UsageError(f"{path}: no such glyph file or directory of images")

    def read(count: int) -> NDArray[np.uint8]:
        if not path.is_dir():
            return _take(open_glyphs(path, "source-train", info, naming), count, SOURCE_SEED).frames
        paths = find_images(path)
        chosen = np.random.default_rng(SOURCE_SEED).permutation(len(paths))[:count]
        return torch.cat(list(load_images([paths[index] for index in sorted(chosen)], info, LOAD_BATCH))).numpy()

    return read


def _take(source: ImageSource, count: int, seed: int) -> LabelledFrames:
    """Pictures of a source: each at most once of a finite one, drawn anew from any other."""
    rng = np.random.default_rng(seed)
    if isinstance(source, FiniteSource):
        return next(source.once(min(count, len(source)), rng))
    labels = rng.choice(source.available, count)
    return LabelledFrames(source.draw(labels, rng), labels)
