"""Labelled pictures for training and evaluation: glyph files, and directories with one folder a class."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mgg_edge.errors import UsageError
from mgg_edge.learn.class_folders import ClassFolders, Naming, open_class_folders
from mgg_edge.learn.images import find_images, load_images
from mgg_edge.learn.statistics import MIN_SOURCE_IMAGES
from mgg_edge.manifest import PreprocessInfo
from mgg_edge.scenes.glyphs import Split, load_glyphs
from mgg_edge.scenes.sources import GlyphSource, ImageSource, LabelledFrames, require_labels

__all__ = ["FolderSource", "LoadedSource", "open_glyphs", "open_training_data", "split_folders"]

LOAD_BATCH = 64
MAX_LOADED = 4096
HELD_OUT_EVERY = 5


class FolderSource:
    """Pictures of a directory with one folder a class, fitted as the model wants them.

    Attributes:
        classes: labels of all classes of the model.
        available: those that have pictures, ascending.
        paths: pictures of each.

    Args:
        paths: pictures of each class by its number; at least one picture.
        labels: of all classes of the model.
        info: the model's preprocessing.
    """

    def __init__(self, paths: Mapping[int, Sequence[Path]], labels: tuple[str, ...], info: PreprocessInfo) -> None:
        self.paths = {label: tuple(paths[label]) for label in sorted(paths) if paths[label]}
        self.classes, self._info = labels, info
        self.available: NDArray[np.int64] = np.array(list(self.paths), np.int64)

    def __len__(self) -> int:
        return sum(map(len, self.paths.values()))

    def load(self, paths: Sequence[Path]) -> NDArray[np.uint8]:
        """These pictures: u8[n, H, W, 3].

        Raises:
            SourceError: a file cannot be read as an image.
        """
        return torch.cat(list(load_images(list(paths), self._info, LOAD_BATCH))).numpy()

    def draw(self, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
        """One picture for each label: u8[n, H, W, 3].

        Raises:
            SourceError: a file cannot be read as an image.
        """
        found = require_labels(labels, len(self.classes))
        return self.load([self.paths[int(label)][int(rng.integers(len(self.paths[int(label)])))] for label in found])

    def once(self, batch: int, rng: np.random.Generator) -> Iterator[LabelledFrames]:
        """Every picture once, in random order, by batches; the last one may be smaller.

        Raises:
            SourceError: a file cannot be read as an image.
        """
        pairs = [(path, label) for label, paths in self.paths.items() for path in paths]
        order = rng.permutation(len(pairs))
        for start in range(0, len(pairs), batch):
            part = [pairs[index] for index in order[start : start + batch]]
            yield LabelledFrames(
                self.load([path for path, _ in part]), np.array([label for _, label in part], np.int64)
            )

    def clip(self, label: int, frames: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """One picture shown for some frames: u8[frames, H, W, 3]."""
        return np.repeat(self.draw(np.array([label]), rng), frames, axis=0)


def split_folders(found: ClassFolders, shares: Sequence[float], info: PreprocessInfo) -> list[FolderSource]:
    """The pictures of a directory in parts that share none.

    Which part a picture falls into is decided by the hash of its path, class by class, so that it is the same every
    time. A class of fewer pictures than parts is absent from the last ones.

    Args:
        found: the directory.
        shares: of each part; together 1.
        info: the model's preprocessing.

    Raises:
        UsageError: a part without any picture.
    """
    parts: list[dict[int, list[Path]]] = [{} for _ in shares]
    ends = np.cumsum(shares) / np.sum(shares)
    for label, paths in found.paths.items():
        shuffled = sorted(paths, key=lambda path: _hash(path.relative_to(found.directory)))
        cuts = np.maximum(np.round(ends * len(shuffled)).astype(int), np.arange(1, len(shares) + 1))
        for part, start, end in zip(parts, [0, *cuts[:-1]], cuts, strict=True):
            part[label] = sorted(shuffled[start:end])
    sources = [FolderSource(part, found.labels, info) for part in parts]
    if not all(map(len, sources)):
        raise UsageError(
            f"{found.directory}: expected a class of at least {len(shares)} pictures, so that those of the stream, "
            "those kept apart and those of the source differ; found fewer: add pictures, name others with "
            "--source-data, or keep none apart with --held-out 0"
        )
    return sources


def _hash(path: Path) -> str:
    return hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).hexdigest()


class LoadedSource:
    """Pictures kept in memory, fitted as the model wants them.

    Args:
        frames: u8[n, H, W, 3].
        labels: i64[n].
        classes: names of the classes.
    """

    def __init__(self, frames: NDArray[np.uint8], labels: NDArray[np.int64], classes: Sequence[str]) -> None:
        self._frames, self._labels, self._classes = frames, labels, tuple(classes)
        self._places = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all classes."""
        return self._classes

    @property
    def available(self) -> NDArray[np.int64]:
        """Labels that have pictures."""
        return np.array(sorted(self._places))

    def draw(self, labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.uint8]:
        """One picture for each label: u8[n, H, W, 3]."""
        return self._frames[[rng.choice(self._places[int(label)]) for label in labels]]

    def clip(self, label: int, frames: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """One picture shown for some frames: u8[frames, H, W, 3]."""
        return np.repeat(self.draw(np.array([label]), rng), frames, axis=0)


def open_training_data(
    path: Path, info: PreprocessInfo, naming: Naming, *, labelled: bool
) -> tuple[ImageSource, ImageSource]:
    """Pictures to train on, and others to choose by.

    Args:
        path: a glyph file, whose source and validation families are taken; or a directory of images, of which every
            fifth is set aside.
        info: the model's preprocessing.
        naming: what the model's classes are called.
        labelled: whether labels are needed: the directory then has one folder a class, else it may hold any images.

    Raises:
        UsageError: nothing there, too few pictures, or pictures that do not fit the model.
        SourceError: a file that cannot be read.
    """
    if not path.is_dir():
        train, held_out = (open_glyphs(path, split, info, naming) for split in ("source-train", "source-validation"))
        return train, held_out
    if labelled:
        by_class = open_class_folders(path, naming).paths
        pairs = sorted((picture, label) for label, pictures in by_class.items() for picture in pictures)
    else:
        pairs = [(picture, 0) for picture in find_images(path)]
    if len(pairs) > MAX_LOADED:
        pairs = [pairs[index * len(pairs) // MAX_LOADED] for index in range(MAX_LOADED)]
    if len(pairs) < MIN_SOURCE_IMAGES:
        raise UsageError(f"{path}: expected at least {MIN_SOURCE_IMAGES} images to train on, found {len(pairs)}")
    labels = np.array([label for _, label in pairs])
    frames = torch.cat(list(load_images([picture for picture, _ in pairs], info, LOAD_BATCH))).numpy()
    aside = np.arange(len(pairs)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    names = naming.labels if labelled else ("any",)
    return LoadedSource(frames[~aside], labels[~aside], names), LoadedSource(frames[aside], labels[aside], names)


def open_glyphs(path: Path, split: Split, info: PreprocessInfo, naming: Naming) -> GlyphSource:
    """Characters of a split of a glyph file.

    Raises:
        UsageError: no such file, or a model that does not read its characters.
        SourceError: a file that cannot be read.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such glyph file or directory of images")
    source = GlyphSource(load_glyphs(path).select(split), info.height)
    if info.height != info.width or len(source.classes) != len(naming.labels):
        raise UsageError(
            f"{path}: expected a model of square frames and {len(source.classes)} classes, "
            f"found {info.width}x{info.height} and {len(naming.labels)}"
        )
    return source
