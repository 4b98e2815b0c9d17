"""Fixed cameras that different things pass: cut-outs pasted before photographs.

A camera sees one scene for months while what stands before it changes. So what a rule learns has to come from the
weather alone, not from what happens to be in view: clean pictures show some objects, the stream shows others.

    picture = scene with a cut-out of 60 to 85 % of its side, anywhere, mirrored or not

Scenes and objects fall into four parts by their names alone (`part_of`), the same for everybody: what is tested on was
never shown to anything that was trained or chosen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mgg_edge.errors import SourceError, UsageError
from mgg_edge.scenes.picture_file import find_images

__all__ = [
    "PARTS",
    "TEST",
    "TRAINING",
    "VALIDATION",
    "CutOut",
    "Scene",
    "load_cut_outs",
    "load_scenes",
    "number_of",
    "part_of",
    "place",
]

PARTS = 4
TEST, VALIDATION, TRAINING = (0,), (1,), (2, 3)
SMALLEST, LARGEST = 0.60, 0.85  # side of an object over that of the picture
MAX_SIDE = 512  # of a cut-out kept in memory
OPAQUE = 128  # alpha from which a pixel belongs to the object
LEAST_SHARE, MOST_SHARE = 0.02, 0.98  # of opaque pixels: less is nothing, more has no outline


@dataclass(frozen=True)
class Scene:
    """A fixed camera's view with nothing before it. Attributes: name; frame: u8[H, W, 3] at model size."""

    name: str
    frame: NDArray[np.uint8]


@dataclass(frozen=True)
class CutOut:
    """A thing with its outline. Attributes: name; image: RGBA, cropped to what is opaque."""

    name: str
    image: Image.Image


def part_of(name: str) -> int:
    """Which of four parts a scene (its file name) or an object (its path) belongs to: SHA-1 of the name modulo 4."""
    return number_of(name) % PARTS


def number_of(name: str) -> int:
    """SHA-1 of a name as a number: a draw that is the same for everybody."""
    return int.from_bytes(hashlib.sha1(name.encode(), usedforsecurity=False).digest(), "big")


def load_scenes(
    folder: Path, height: int, width: int, parts: Sequence[int] | None = None, views: int = 1
) -> tuple[Scene, ...]:
    """Photographs below a folder, resized to cover the frame and cropped to its centre.

    Args:
        folder: where they lie.
        height: of the model's input, pixels.
        width: likewise.
        parts: those wanted, by the file name; None for all.
        views: of each photograph; those after the first are random parts of it, mirrored or not.

    Raises:
        UsageError: no such folder, or no picture in it.
        SourceError: a file that is no picture.
    """
    chosen = [path for path in find_images(folder) if parts is None or part_of(path.name) in parts]
    found = []
    for path in chosen:
        image, name = _read(path, "RGB"), path.relative_to(folder).as_posix()
        found.append(Scene(name, _cover(image, height, width)))
        for number in range(1, views):
            rng = np.random.default_rng([number, *name.encode()])
            found.append(Scene(f"{name}#{number}", _cover(_part(image, rng), height, width)))
    return tuple(found)


def _part(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    share = rng.uniform(0.45, 1.0)
    width, height = (max(1, int(side * share)) for side in image.size)
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    part = image.crop((left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def load_cut_outs(folder: Path, parts: Sequence[int] | None = None, *, whole: bool = False) -> tuple[CutOut, ...]:
    """Cut-outs below a folder: pictures with an alpha channel that outlines something.

    Args:
        folder: where they lie.
        parts: those wanted, by the path below the folder; None for all.
        whole: pictures without an outline are taken as they are, as pictures held before the camera.

    Raises:
        UsageError: no such folder, or no picture with an outline in it.
        SourceError: a file that is no picture.
    """
    named = [(path.relative_to(folder).as_posix(), path) for path in find_images(folder)]
    found = [(name, _outlined(path, whole)) for name, path in named if parts is None or part_of(name) in parts]
    cut_outs = tuple(CutOut(name, image) for name, image in found if image is not None)
    if not cut_outs:
        raise UsageError(f"{folder}: expected pictures with an alpha channel that outlines an object, found none")
    return cut_outs


def place(scene: Scene, cut_out: CutOut, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The scene with an object in it: u8[H, W, 3]."""
    height, width = scene.frame.shape[:2]
    scale = rng.uniform(SMALLEST, LARGEST) * min(height, width) / max(cut_out.image.size)
    size = (max(1, round(cut_out.image.width * scale)), max(1, round(cut_out.image.height * scale)))
    thing = cut_out.image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if rng.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = int(rng.integers(width - size[0] + 1)), int(rng.integers(height - size[1] + 1))
    picture = Image.fromarray(scene.frame)
    picture.paste(thing, (left, top), thing)
    return np.asarray(picture).copy()


def _read(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(f"{path}: not a readable picture: {error}") from error


def _cover(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    ratio = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * ratio)), max(height, round(image.height * ratio)))
    resized = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(resized.crop((left, top, left + width, top + height))).copy()


def _outlined(path: Path, whole: bool) -> Image.Image | None:
    """What is opaque of a picture; where that is nothing or everything, all of it or None."""
    image = _read(path, "RGBA")
    opaque = np.asarray(image)[..., 3] >= OPAQUE
    box = Image.fromarray(opaque).getbbox()
    outlined = box is not None and LEAST_SHARE <= opaque.mean() <= MOST_SHARE
    if not (outlined or whole):
        return None
    cropped = image.crop(box) if outlined else image
    cropped.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return cropped
