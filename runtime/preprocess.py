"""From a picture of any size to the frame a graph takes: resize and centre crop by the manifest's rule.

The rule (`PreprocessInfo.resized_size`) is timm's, and the training half follows the same one. The scaler is FFmpeg's
swscale, which decodes' colour conversion passes through anyway. It widens its filter when it shrinks a picture, as PIL
does; tests state how close the two are. Scaling of values and normalisation are in the graph.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import SourceError, UsageError
from mgg_edge.manifest import PreprocessInfo

if TYPE_CHECKING:
    import av

__all__ = ["check_picture", "fit"]

Picture: TypeAlias = "npt.NDArray[np.uint8] | av.VideoFrame"
# Beyond this a picture is cropped before it is resized: a strip of 1 × 10,000 pixels would become gigabytes.
MAX_ASPECT_EXCESS = 4
# swscale's flags as numbers: PyAV names all of them only from version 18 on.
_FILTERS = {"bilinear": 0x2, "bicubic": 0x4}
_FULL_CHROMA_INT, _FULL_CHROMA_INPUT, _ACCURATE_ROUNDING, _BIT_EXACT = 0x2000, 0x4000, 0x40000, 0x80000
# Bit-exact, so that a frame does not depend on the processor's vector width; full chroma for YUV sources.
_EXACT = _FULL_CHROMA_INT | _FULL_CHROMA_INPUT | _ACCURATE_ROUNDING | _BIT_EXACT
_local = threading.local()


def fit(picture: Picture, info: PreprocessInfo) -> npt.NDArray[np.uint8]:
    """Resize and crop a picture for the model.

    Args:
        picture: u8[h,w,3] RGB, or a decoded video frame of any pixel format (converted and scaled in one pass).
        info: the manifest's rule.

    Returns:
        u8[height,width,3] RGB, C-contiguous. An array already of that size is returned as it is.

    Raises:
        UsageError: an array that is not u8[h,w,3].
        SourceError: the scaler refused the picture.
    """
    if isinstance(picture, np.ndarray):
        if check_picture(picture).shape == (info.height, info.width, 3):
            return np.ascontiguousarray(picture)
        picture = _trim(picture, info)
    height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)
    resized = _scale(picture, info.resized_size(height, width), info.interpolation)
    return np.ascontiguousarray(_centre(resized, (info.height, info.width)))


def check_picture(picture: Any) -> npt.NDArray[np.uint8]:
    """A picture as the run time takes it.

    Raises:
        UsageError: not u8[h,w,3] with h, w ≥ 1.
    """
    if not isinstance(picture, np.ndarray):
        raise UsageError(f"frame: expected a numpy array uint8[height, width, 3], found {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        raise UsageError(
            f"frame: expected uint8[height, width, 3] RGB with at least one pixel, "
            f"found {picture.dtype}{list(picture.shape)}"
        )
    return picture


def _trim(picture: npt.NDArray[np.uint8], info: PreprocessInfo) -> npt.NDArray[np.uint8]:
    if info.resize == "squash":
        return picture
    height, width = picture.shape[:2]
    highest = max(1, math.ceil(MAX_ASPECT_EXCESS * width * info.height / info.width))
    widest = max(1, math.ceil(MAX_ASPECT_EXCESS * height * info.width / info.height))
    return _centre(picture, (min(height, highest), min(width, widest)))


def _centre(picture: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    top, left = (round((extent - wanted) / 2) for extent, wanted in zip(picture.shape, size, strict=False))
    return picture[top : top + size[0], left : left + size[1]]


def _scale(picture: Picture, size: tuple[int, int], interpolation: str) -> npt.NDArray[np.uint8]:
    import av
    from av.video.reformatter import VideoReformatter

    if not hasattr(_local, "reformatter"):
        _local.reformatter = VideoReformatter()  # keeps its tables while sizes stay the same
    height, width = size
    flags = _FILTERS[interpolation] | _EXACT
    try:
        if isinstance(picture, np.ndarray):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
        scaled = _local.reformatter.reformat(picture, width, height, "rgb24", interpolation=flags, threads=1)
        pixels: npt.NDArray[np.uint8] = scaled.to_ndarray()
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise SourceError(f"picture: cannot be resized to {size[1]} x {size[0]} pixels: {error}") from error
    return pixels
