"""Video files in: one RGB picture after another, with its place in time.

A file is opened and its first picture decoded at once, so that everything wrong with it is known before any work
starts. Pictures that cannot be decoded later are passed over, counted and said; the iteration ends with `SourceError`
only where nothing good follows.

FFmpeg also plays things that are no video of the user's: text (drawn as on a terminal), and playlists that name other
files or addresses. Those are refused.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from mgg_edge.errors import SourceError, UsageError
from mgg_edge.runtime.sources.source import DEFAULT_RATE, LOST, ClosingSource, Frame
from mgg_edge.runtime.sources.source_picture import MAX_PIXELS, PictureConverter, stated_pixel_aspect
from mgg_edge.runtime.sources.source_track import choose_track
from mgg_edge.runtime.sources.video_clock import LOOK_AHEAD, VideoClock

__all__ = ["DEFAULT_RATE", "Frame", "VideoSource"]

REFUSED_FORMATS = frozenset({"concat", "dash", "hls", "sdp", "tty"})
# PyAV raises the last two for streams that appear on the way and for pixel formats it does not know.
DECODER_ERRORS = (FFmpegError, OSError, IndexError, ValueError)
# Clocks are rounded, and some writers count a last picture that is not there.
SHORTFALL_FRAMES = 3
SHORTFALL_FRACTION = 0.01
MAX_UNREADABLE = 100  # places in a row that cannot be read: a container that is damaged so far gives nothing more

_logger = logging.getLogger(__name__)


class VideoSource(ClosingSource):
    """A video file as an iterator of `Frame`; use it in a `with` statement.

    Args:
        path: a video file.
        strict: end with an error at the first picture that cannot be decoded or is missing.

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

    def __init__(self, path: str | os.PathLike[str], *, strict: bool = False) -> None:
        self.path = Path(path)
        self.name, self.live = str(path), False
        self._container = _open(self.path)
        try:
            stream = _video_stream(self.path, self._container)
            decoded, duration_s = _pictures(self._container, stream), _stated_duration_s(self._container, stream)
            ahead = _look_ahead(decoded)
            clock = VideoClock(str(path), stream, [one for one in ahead if isinstance(one, av.VideoFrame)])
            converter = PictureConverter(stated_pixel_aspect(stream))
            self._pictures = _frames(self.path, itertools.chain(ahead, decoded), converter, clock, duration_s, strict)
            first = next(self._pictures, None)
            if first is None:
                raise SourceError(f"{self.path}: the video holds no pictures")
        except BaseException:
            self._container.close()
            raise
        self._first: Frame | None = first
        self._lost = 0
        self.height, self.width = first.image.shape[:2]
        self.rate = clock.rate
        self.frames_expected: int | None = _frames_expected(stream, duration_s, clock)

    def __iter__(self) -> Iterator[Frame]:
        """Yield every picture in order, once.

        Raises:
            SourceError: nothing can be decoded from here on, or the file ends before the length it states; under
                `strict`, something is damaged or missing.
        """
        first, self._first = self._first, None
        if first is None:
            raise UsageError(f"{self.path}: this video was read already; open it again")
        size = first.image.shape
        for frame in itertools.chain((first,), self._pictures):
            self._lost += frame.lost
            if frame.image.shape != size:
                _logger.warning(
                    "%s: the picture size changes from %dx%d to %dx%d at frame %d",
                    *(self.path, size[1], size[0], frame.image.shape[1], frame.image.shape[0], frame.index),
                )
                size = frame.image.shape
            yield frame

    def losses(self) -> Mapping[str, int]:
        """Pictures that are missing or cannot be decoded so far, as `lost`."""
        return {LOST: self._lost} if self._lost else {}

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
    # The size can change on the way. A picture that leans on a lost one is shown as players show it, not left out.
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS), "flags": "+output_corrupt"}
    return stream


def _look_ahead(packets: Iterator[Decoded]) -> list[Decoded]:
    """What comes first, until there are pictures enough to set a clock by."""
    found: list[Decoded] = []
    pictures = 0
    for one in packets:
        found.append(one)
        pictures += isinstance(one, av.VideoFrame)
        if pictures == LOOK_AHEAD:
            break
    return found


def _frames(
    path: Path,
    decoded: Iterable[Decoded],
    converter: PictureConverter,
    clock: VideoClock,
    expected_s: float | None,
    strict: bool,
) -> Generator[Frame]:
    """Frames, with what is missing before each; what cannot be decoded is passed over, unless `strict`."""
    index, start_s, end_s, faults, reason = 0, 0.0, 0.0, 0, ""
    for one in decoded:
        if isinstance(one, DecoderError):
            faults, reason = faults + 1, one.reason
            if strict:
                break
            continue
        place = clock.place(one)
        start_s = float(one.time or 0.0) if index == 0 else start_s
        # Where all pictures last equally long, times tell what is missing; a faulty packet may cost none, or several.
        lost = place.lost if clock.constant else faults
        if lost and strict:
            reason = reason or f"{lost} pictures are missing"
            break
        if lost:
            _logger.warning("%s: %d pictures lost between %.2f and %.2f s", path, lost, end_s, place.time_s)
        end_s = max(end_s, place.time_s + _duration_s(one, clock.rate))
        yield Frame(index, place.time_s, _converted(path, index, end_s, converter, one), time.monotonic(), lost)
        index, faults, reason = index + 1, 0, ""
    if reason:  # nothing good follows
        raise SourceError(_damage(path, index, end_s, reason))
    if index and expected_s is not None:
        # Some formats count their length from the first picture, some from zero: the later end decides.
        found_s = end_s + max(start_s, 0.0) + SHORTFALL_FRAMES / float(clock.rate)
        # A file cut between two pictures decodes without any error.
        if not found_s >= expected_s * (1 - SHORTFALL_FRACTION):
            raise SourceError(_damage(path, index, end_s, f"expected {expected_s:.1f} s, so its end is missing"))


class DecoderError(NamedTuple):
    """In the place of pictures that cannot be decoded."""

    reason: str


Decoded: TypeAlias = av.VideoFrame | DecoderError


def _pictures(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[Decoded]:
    """Decoded pictures; a packet that cannot be decoded, and a place that cannot be read, as an error among them."""
    unreadable = 0
    while True:
        try:
            for packet in container.demux(stream):
                unreadable = 0
                try:
                    yield from packet.decode()  # the last, empty packet brings what the decoder held back
                except DECODER_ERRORS as error:
                    yield DecoderError(_reason(error))
            return
        except DECODER_ERRORS as error:
            unreadable += 1
            yield DecoderError(_reason(error))
            if not unreadable < MAX_UNREADABLE:
                return


def _converted(
    path: Path, index: int, end_s: float, converter: PictureConverter, picture: av.VideoFrame
) -> npt.NDArray[np.uint8]:
    try:
        return converter.convert(picture)
    except DECODER_ERRORS as error:
        raise SourceError(_damage(path, index, end_s, _reason(error))) from error


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


def _frames_expected(stream: av.VideoStream, duration_s: float | None, clock: VideoClock) -> int | None:
    if stream.frames > 0 and clock.presented:  # in the order of decoding, half pictures may be counted
        return int(stream.frames)
    return None if duration_s is None else max(1, round(duration_s * clock.rate))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
