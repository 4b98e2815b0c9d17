"""Picture files as u8[H,W,3] RGB: upright, 16 bits scaled to 8, animations whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from mgg_edge.errors import SourceError, UsageError
from mgg_edge.files import is_clutter

__all__ = ["MAX_PIXELS", "find_images", "read_animation", "read_picture"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
MAX_PIXELS = 1 << 26  # 8K has half of it; a damaged header can claim gigabytes
DEFAULT_DURATION_S = 0.1  # of an animation's picture that states none, as browsers show it
_MOVING = ("GIF", "WEBP", "PNG")
_SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def find_images(directory: Path) -> list[Path]:
    """Image files below a directory, sorted by path; what systems and tools leave there (`is_clutter`) is no data.

    Raises:
        UsageError: no such directory, or no image in it.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: expected a directory of images")
    paths = sorted(
        path
        for path in directory.rglob("*")
        if path.suffix.lower() in SUFFIXES and not is_clutter(path.relative_to(directory)) and path.is_file()
    )
    if not paths:
        raise UsageError(f"{directory}: found no images ({', '.join(SUFFIXES)})")
    return paths


def read_picture(path: Path) -> npt.NDArray[np.uint8]:
    """The picture, the first one of an animation; turned by its EXIF orientation, without transparency.

    Raises:
        SourceError: not a readable picture, or of a kind whose range is not known (floating point).
    """
    with _opened(path) as image:
        return _pixels(path, image)


def read_animation(path: Path) -> Iterator[tuple[float, npt.NDArray[np.uint8]]]:
    """Every picture of a file with its time in seconds: one at 0 for an ordinary picture.

    Only some formats move (`_MOVING`). The further pictures of a phone's photograph (MPO) are depth or gain maps and
    previews, those of a TIFF its pages and thumbnails: none of them was seen after the first.

    Raises:
        SourceError: as `read_picture`.
    """
    with _opened(path) as image:
        time_s = 0.0
        for number in itertools.count():
            try:
                image.seek(number)
            except EOFError:
                return
            yield time_s, _pixels(path, image)
            if image.format not in _MOVING or not getattr(image, "is_animated", False):
                return
            time_s += max(0.0, float(image.info.get("duration", 0))) / 1e3 or DEFAULT_DURATION_S


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if not image.width * image.height <= MAX_PIXELS:
                raise SourceError(f"{path}: expected at most {MAX_PIXELS} pixels, found {image.width}x{image.height}")
            yield image
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise SourceError(f"{path}: not a readable picture: {getattr(error, 'strerror', None) or error}") from error


def _pixels(path: Path, image: Image.Image) -> npt.NDArray[np.uint8]:
    upright = ImageOps.exif_transpose(image)
    if upright.mode in _SIXTEEN_BITS:
        deep = np.asarray(upright).astype(np.int64)
        if deep.min() < 0 or deep.max() > 0xFFFF:
            raise SourceError(f"{path}: expected at most 16 bits a pixel, found values {deep.min()} to {deep.max()}")
        return np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if upright.mode == "F":
        raise SourceError(f"{path}: expected 8 or 16 bits a pixel, found floating point; save it with 8 bits")
    return np.array(upright.convert("RGB"))
