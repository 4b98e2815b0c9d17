"""Labelled pictures for training and evaluation: glyph files, and directories with one folder a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mgg_edge.errors import UsageError
from mgg_edge.learn.images import find_images, load_images
from mgg_edge.learn.statistics import MIN_SOURCE_IMAGES
from mgg_edge.manifest import PreprocessInfo
from mgg_edge.scenes.glyphs import Split, load_glyphs
from mgg_edge.scenes.sources import GlyphSource, ImageSource, require_labels

__all__ = ["FolderSource", "LoadedSource", "open_pictures", "open_training_data"]

LOAD_BATCH = 64
MAX_LOADED = 4096
HELD_OUT_EVERY = 5


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
    path: Path, info: PreprocessInfo, classes: int, *, labelled: bool
) -> tuple[ImageSource, ImageSource]:
    """Pictures to train on, and others to choose by.

    Args:
        path: a glyph file, whose source and validation families are taken; or a directory of images, of which every
            fifth is set aside.
        info: the model's preprocessing.
        classes: C of the model.
        labelled: whether labels are needed: the directory then has one folder a class, else it may hold any images.

    Raises:
        UsageError: nothing there, too few pictures, or pictures that do not fit the model.
        SourceError: a file that cannot be read.
    """
    if not path.is_dir():
        train, held_out = (open_pictures(path, split, info, classes) for split in ("source-train", "source-validation"))
        return train, held_out
    paths = find_images(path)
    if labelled:
        paths = [found for found in paths if found.parent != path]
    names = sorted({_class_of(found, path) for found in paths}) if labelled else ["any"]
    if not 1 <= len(names) <= classes:
        raise UsageError(f"{path}: expected one folder of images a class, at most {classes}, found {len(names)}")
    if len(paths) > MAX_LOADED:
        paths = [paths[index * len(paths) // MAX_LOADED] for index in range(MAX_LOADED)]
    if len(paths) < MIN_SOURCE_IMAGES:
        raise UsageError(f"{path}: expected at least {MIN_SOURCE_IMAGES} images to train on, found {len(paths)}")
    labels = np.array([names.index(_class_of(found, path)) if labelled else 0 for found in paths])
    frames = torch.cat(list(load_images(paths, info, LOAD_BATCH))).numpy()
    aside = np.arange(len(paths)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return LoadedSource(frames[~aside], labels[~aside], names), LoadedSource(frames[aside], labels[aside], names)


def _class_of(path: Path, directory: Path) -> str:
    return path.relative_to(directory).parts[0]


def open_pictures(path: Path, split: Split, info: PreprocessInfo, classes: int) -> ImageSource:
    """Pictures of a split of a glyph file, or of all of an ImageFolder directory.

    Raises:
        UsageError: nothing there, or pictures that do not fit the model.
        SourceError: a glyph file that cannot be read.
    """
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
