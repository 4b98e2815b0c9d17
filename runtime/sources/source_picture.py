"""A decoded picture as the run time takes it: u8[H,W,3] RGB, upright, with its own colours.

Range (16–235 or 0–255) and matrix (BT.601, BT.709, …) are those the stream states; where it states none, FFmpeg's
defaults hold: limited range, full for the `yuvj` formats, and BT.601.

Pixels that are not square are made so. A display matrix is applied as FFmpeg does. For the pixel at (x, y), counted
across and down from the picture's middle,

    x' = a·x + c·y,   y' = b·x + d·y

with one of a, c and one of b, d being ±1 and the others 0: quarter turns, mirrored or not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter

from mgg_edge.runtime.sources.source import DEFAULT_RATE
from mgg_edge.scenes.picture_file import MAX_PIXELS

__all__ = ["MAX_PIXELS", "PictureConverter", "oriented", "square_size", "stated_pixel_aspect", "usable_rate"]

MAX_RATE, MAX_RATE_DENOMINATOR = 1000, 1001  # 30000/1001 is a rate of television; finer ones are noise
SQUARE, MAX_PIXEL_ASPECT = Fraction(1), 8  # television has 0.9 to 1.5; a damaged header can state anything
MATRIX_TOLERANCE = 1e-3
_logger = logging.getLogger(__name__)


class PictureConverter:
    """Converts the pictures of one stream; keeps the scaler's tables while nothing changes.

    Args:
        pixel_aspect: width of a pixel over its height. Where it is not 1 the picture is stretched, never shrunk, so
            that its pixels become square: whoever keeps the aspect ratio afterwards keeps that of the scene.
    """

    def __init__(self, pixel_aspect: Fraction = SQUARE) -> None:
        self._reformatter, self._pixel_aspect = VideoReformatter(), pixel_aspect
        self._said = False

    def convert(self, picture: av.VideoFrame) -> npt.NDArray[np.uint8]:
        """u8[H,W,3] RGB, upright, C-contiguous.

        Raises:
            FFmpegError, ValueError: swscale does not know the pixel format.
        """
        width, height = square_size(picture.width, picture.height, self._pixel_aspect)
        rgb = self._reformatter.reformat(picture, width, height, format="rgb24", threads=1)
        image = rgb.to_ndarray().astype(np.uint8, copy=False)
        matrix = _display_matrix(picture)
        if matrix is None:
            return image
        turned = oriented(image, matrix)
        if turned is None:
            if not self._said:
                _logger.warning("the display matrix %s is no quarter turn: ignored", matrix.tolist())
            self._said = True
            return image
        return turned


def oriented(image: npt.NDArray[np.uint8], matrix: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8] | None:
    """A picture u8[H,W,3] under [[a, b], [c, d]], C-contiguous; None if that is no quarter turn, mirrored or not."""
    (a, b), (c, d) = matrix.tolist()
    if abs(a) == abs(d) == 1 and b == c == 0:
        return np.ascontiguousarray(image[::d, ::a])
    if abs(b) == abs(c) == 1 and a == d == 0:
        return np.ascontiguousarray(image.transpose(1, 0, 2)[::b, ::c])
    return None


def square_size(width: int, height: int, pixel_aspect: Fraction) -> tuple[int, int]:
    """Width and height, pixels, with square pixels: the longer side of a pixel decides."""
    if pixel_aspect > 1:
        width = round(width * pixel_aspect)
    elif pixel_aspect < 1:
        height = round(height / pixel_aspect)
    return width, height


def stated_pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Width of a pixel over its height; 1 where nothing, or nothing usable, is stated."""
    stated = Fraction(stream.sample_aspect_ratio or 1)
    width, height = square_size(stream.width, stream.height, stated) if stated > 0 else (0, 0)
    usable = 1 / MAX_PIXEL_ASPECT <= stated <= MAX_PIXEL_ASPECT and 0 < width * height <= MAX_PIXELS
    return stated if usable else SQUARE


def _display_matrix(picture: av.VideoFrame) -> npt.NDArray[np.int8] | None:
    """[[a, b], [c, d]] rounded to whole numbers, 9 standing for what is none; None where no matrix is stated."""
    # PyAV's stub takes the container for a mapping of names; it iterates over its entries.
    entries: Iterable[Any] = picture.side_data
    for data in entries:
        if data.type is Type.DISPLAYMATRIX:
            values = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2] / (1 << 16)
            whole = np.rint(values)
            return np.where(np.abs(values - whole) < MATRIX_TOLERANCE, whole, 9).astype(np.int8)
    return None


def usable_rate(stream: av.VideoStream) -> Fraction:
    """Pictures per second as the stream states or suggests, or the default."""
    for rate in (stream.average_rate, stream.guessed_rate):
        limited = Fraction(rate or 0).limit_denominator(MAX_RATE_DENOMINATOR)
        if 0 < limited <= MAX_RATE:
            return limited
    return DEFAULT_RATE
