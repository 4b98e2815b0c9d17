"""Video files in: one RGB picture after another, with its place in time.

A file is opened and its first picture decoded at once, so that everything wrong with it is known before any work
starts. Later damage ends the iteration with `SourceError`; the pictures before it are good.

FFmpeg also plays things that are no video of the user's: text (drawn as on a terminal), and playlists that name other
files or addresses. Those are refused.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator, Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.error import FFmpegError

from mgg_edge.errors import SourceError, UsageError
from mgg_edge.runtime.sources.source import DEFAULT_RATE, ClosingSource, Frame
from mgg_edge.runtime.sources.source_picture import MAX_PIXELS, PictureConverter, usable_rate
from mgg_edge.runtime.sources.source_track import choose_track

__all__ = ["DEFAULT_RATE", "Frame", "VideoSource"]

REFUSED_FORMATS = frozenset({"concat", "dash", "hls", "sdp", "tty"})
# PyAV raises the last two for streams that appear on the way and for pixel formats it does not know.
DECODER_ERRORS = (FFmpegError, OSError, IndexError, ValueError)
# Clocks are rounded, and some writers count a last picture that is not there.
SHORTFALL_FRAMES = 3
SHORTFALL_FRACTION = 0.01

_logger = logging.getLogger(__name__)


class VideoSource(ClosingSource):
    """A video file as an iterator of `Frame`; use it in a `with` statement.

    Args:
        path: a video file.

    Attributes:
        name: the path as given.
        live: False; a file waits.
        width, height: size of the first picture, pixels, after rotation. Later pictures can differ.
        rate: pictures per second.
        frames_expected: number of pictures the file states or implies, or None.

    Raises:
        UsageError: there is no such file, or it is not a regular file.
        SourceError: not a video, or one without a single picture.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.name, self.live = str(path), False
        self._container = _open(self.path)
        try:
            self._stream = _video_stream(self.path, self._container)
            self._pictures = _decode(self.path, self._container, self._stream)
            first = next(self._pictures, None)
            if first is None:
                raise SourceError(f"{self.path}: the video holds no pictures")
        except BaseException:
            self._container.close()
            raise
        self._first: Frame | None = first
        self.height, self.width = first.image.shape[:2]
        self.rate = usable_rate(self._stream)
        self.frames_expected: int | None = _frames_expected(self._container, self._stream)

    def __iter__(self) -> Iterator[Frame]:
        """Yield every picture in order, once.

        Raises:
            SourceError: the file is damaged from here on, or ends before the length it states.
        """
        first, self._first = self._first, None
        if first is None:
            raise UsageError(f"{self.path}: this video was read already; open it again")
        size = first.image.shape
        yield first
        for frame in self._pictures:
            if frame.image.shape != size:
                _logger.warning(
                    "%s: the picture size changes from %dx%d to %dx%d at frame %d",
                    *(self.path, size[1], size[0], frame.image.shape[1], frame.image.shape[0], frame.index),
                )
                size = frame.image.shape
            yield frame

    def close(self) -> None:
        """Close the file; the iteration ends."""
        self._pictures.close()
        self._container.close()


def _open(path: Path) -> av.container.InputContainer:
    if not path.exists():
        raise UsageError(f"{path}: no such video")
    if not path.is_file():  # opening a named pipe would block
        raise UsageError(f"{path}: expected a video file, found something that is not a regular file")
    try:
        # An absolute path, as FFmpeg would take what stands before a colon for a protocol. From a file it opens other
        # files only, never the network.
        container = av.open(str(path.absolute()), metadata_errors="replace")
    except (FFmpegError, OSError) as error:
        raise SourceError(f"{path}: not a readable video: {_reason(error)}") from error
    if refused := REFUSED_FORMATS.intersection(container.format.name.split(",")):
        container.close()
        kind = "text" if "tty" in refused else "a playlist"
        raise SourceError(f"{path}: expected a video, found {kind}")
    return container


def _video_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    stream = choose_track(str(path), container)
    if not hasattr(stream, "width"):  # PyAV gives such a stream no codec context, whatever its types say
        raise SourceError(f"{path}: no decoder for this video; convert it to H.264 or another common format")
    if not 0 < stream.width * stream.height <= MAX_PIXELS:
        raise SourceError(
            f"{path}: expected a picture of 1 to {MAX_PIXELS} pixels, found {stream.width}x{stream.height}"
        )
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the size can change on the way
    return stream


def _decode(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> Generator[Frame]:
    rate, converter = usable_rate(stream), PictureConverter()
    index, start_s, end_s = 0, 0.0, 0.0
    try:
        for picture in container.decode(stream):
            stamp_s = picture.time if picture.pts is not None else start_s + index / float(rate)
            start_s = stamp_s if index == 0 else start_s
            time_s = stamp_s - start_s
            end_s = max(end_s, time_s + _duration_s(picture, rate))
            captured_s = time.monotonic()
            yield Frame(index, time_s, converter.convert(picture), captured_s)
            index += 1
    except DECODER_ERRORS as error:
        raise SourceError(_damage(path, index, end_s, _reason(error))) from error
    expected_s = _stated_duration_s(container, stream)
    if index and expected_s is not None:
        # Some formats count their length from the first picture, some from zero: the later end decides.
        found_s = end_s + max(start_s, 0.0) + SHORTFALL_FRAMES / float(rate)
        # A file cut between two pictures decodes without any error.
        if not found_s >= expected_s * (1 - SHORTFALL_FRACTION):
            raise SourceError(_damage(path, index, end_s, f"expected {expected_s:.1f} s, so its end is missing"))


def _damage(path: Path, frames: int, end_s: float, what: str) -> str:
    if not frames:
        return f"{path}: not a readable video: {what}"
    return f"{path}: the video is damaged or cut short after {frames} frames ({end_s:.1f} s): {what}"


def _duration_s(picture: av.VideoFrame, rate: Fraction) -> float:
    if picture.duration and picture.time_base:
        return float(picture.duration * picture.time_base)
    return float(1 / rate)


def _stated_duration_s(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    # The container's duration is that of its longest stream: only ours if there is no other.
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def _frames_expected(container: av.container.InputContainer, stream: av.VideoStream) -> int | None:
    if stream.frames > 0:
        return int(stream.frames)
    duration_s = _stated_duration_s(container, stream)
    return None if duration_s is None else max(1, round(duration_s * usable_rate(stream)))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
