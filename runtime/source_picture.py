"""A decoded picture as the run time takes it: u8[H,W,3] RGB, upright, with its own colours.

Range (16–235 or 0–255) and matrix (BT.601, BT.709, …) are those the stream states; where it states none, FFmpeg's
defaults hold: limited range, full for the `yuvj` formats, and BT.601. Rotation metadata is applied in quarter turns.
"""

from __future__ import annotations

import logging
from fractions import Fraction

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from mgg_edge.runtime.source import DEFAULT_RATE

__all__ = ["MAX_PIXELS", "PictureConverter", "usable_rate"]

MAX_PIXELS = 1 << 26  # 8K has half of it; a damaged header can claim gigabytes
MAX_RATE, MAX_RATE_DENOMINATOR = 1000, 1001  # 30000/1001 is a rate of television; finer ones are noise
_logger = logging.getLogger(__name__)


class PictureConverter:
    """Converts the pictures of one stream; keeps the scaler's tables while nothing changes."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._said = False

    def convert(self, picture: av.VideoFrame) -> npt.NDArray[np.uint8]:
        """u8[H,W,3] RGB, upright, C-contiguous.

        Raises:
            FFmpegError, ValueError: swscale does not know the pixel format.
        """
        rgb = self._reformatter.reformat(picture, format="rgb24", threads=1)
        image = rgb.to_ndarray().astype(np.uint8, copy=False)
        quarter_turns, rest = divmod(picture.rotation, 90)  # counter-clockwise, like rot90
        if rest:
            if not self._said:
                _logger.warning("rotation by %d degrees is not a quarter turn: ignored", picture.rotation)
            self._said = True
            return image
        return np.ascontiguousarray(np.rot90(image, quarter_turns))


def usable_rate(stream: av.VideoStream) -> Fraction:
    """Pictures per second as the stream states or suggests, or the default."""
    for rate in (stream.average_rate, stream.guessed_rate):
        limited = Fraction(rate or 0).limit_denominator(MAX_RATE_DENOMINATOR)
        if 0 < limited <= MAX_RATE:
            return limited
    return DEFAULT_RATE
