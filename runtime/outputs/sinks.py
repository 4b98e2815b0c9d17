"""Where predictions go: lines of text (`sinks_lines`), an annotated video in a file.

Any object with the three methods of `Sink` can be one.

A video is written beside its target under a temporary name and takes the target's name when it is complete:
whatever happens, the target is either what it was before or a whole video.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Protocol, cast

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from mgg_edge.errors import MissingDependencyError, SinkError, UsageError
from mgg_edge.files import create_beside, output_target
from mgg_edge.runtime.adaptation.adapter import Prediction
from mgg_edge.runtime.outputs.overlay import Caption, Overlay
from mgg_edge.runtime.outputs.sinks_lines import CsvLines, JsonLines
from mgg_edge.runtime.sources.source import Frame

__all__ = ["VIDEO_SUFFIXES", "AnnotatedVideo", "CsvLines", "JsonLines", "Sink", "VideoFile"]

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi")
# Best first. Quality is near-transparent: captions must stay readable.
ENCODERS: Mapping[str, Mapping[str, str]] = {
    "libx264": {"preset": "veryfast", "crf": "20"},
    "mpeg4": {"flags": "+qscale", "global_quality": "354"},  # 3 on its scale from 1 (best) to 31, times 118
}
TICKS_PER_S = Fraction(60_000)  # 24, 25, 30, 50, 60 and 30000/1001 pictures a second are whole numbers of them

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """A destination for predictions; exactly one of `close` and `abort` ends it, more calls do nothing."""

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Take one prediction.

        Raises:
            SinkError: it cannot be written; the sink has undone what it began.
        """

    def close(self) -> None:
        """Complete the output.

        Raises:
            SinkError: it cannot be completed.
        """

    def abort(self) -> None:
        """Leave nothing half-written behind."""


class VideoFile:
    """A video of pictures of one size.

    Args:
        path: target; its suffix (`VIDEO_SUFFIXES`) names the container. Replaced if it exists, when complete.
        width, height: size of the pictures, pixels, even.
        rate: pictures per second.

    Attributes:
        codec: encoder in use: `libx264`, or `mpeg4` where there is no other.
        frames: pictures written so far.
        completed: the target has its name and is whole.

    Raises:
        UsageError: the suffix is unknown or the target is a directory.
        SinkError: the target cannot be created.
    """

    def __init__(self, path: str | os.PathLike[str], width: int, height: int, rate: Fraction) -> None:
        self.path = Path(path)
        self.frames = 0
        self.completed = False
        self._temporary = _create_temporary(self.path)
        self._container: av.container.OutputContainer | None = None
        with self._undone_on_failure():
            self.codec = _encoder()
            self._container = av.open(str(self._temporary), "w")
            stream = self._container.add_stream(self.codec, rate=rate, options=dict(ENCODERS[self.codec]))
            self._stream = cast(av.VideoStream, stream)
            self._stream.width, self._stream.height = width, height
            self._stream.pix_fmt = "yuv420p"
            # AVI holds no times, only pictures at one rate; elsewhere they stand where the source had them.
            self._ticks_per_s = rate if self.path.suffix.lower() == ".avi" else TICKS_PER_S
            self._stream.codec_context.time_base = 1 / self._ticks_per_s
            self._step = max(1, round(self._ticks_per_s / rate))
            self._place = -self._step
        _logger.info("writing %s (%dx%d, encoder %s)", self.path, width, height, self.codec)

    def append(self, picture: npt.NDArray[np.uint8], time_s: float | None = None) -> None:
        """Encode one picture u8[H, W, 3].

        Args:
            picture: of the size of the video.
            time_s: when it is on, seconds from the beginning; one picture's length after the one before if that is
                not before it, or if None.

        Raises:
            SinkError: the encoder or the disk refuses it; the temporary file is gone, the target untouched.
        """
        if self._container is None:
            raise SinkError(f"{self.path}: the video was completed or given up already")
        with self._undone_on_failure():
            encoded = av.VideoFrame.from_ndarray(picture, format="rgb24")
            following = self._place + self._step
            wanted = following if time_s is None else round(time_s * self._ticks_per_s)
            self._place = wanted if wanted > self._place else following  # times must rise, whatever a source says
            encoded.pts = self._place
            encoded.time_base = 1 / self._ticks_per_s
            self._container.mux(self._stream.encode(encoded))
        self.frames += 1

    def close(self) -> None:
        """Complete the file and give it its name; without any picture, leave none.

        Raises:
            SinkError: the disk refuses; the temporary file is gone, the target untouched.
        """
        if self._container is None:
            return
        if not self.frames:
            self.abort()
            return
        with self._undone_on_failure():
            self._container.mux(self._stream.encode(None))
            self._container.close()
            with self._temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(self._temporary, output_target(self.path))  # through a link, not over it
        self._container = None
        self.completed = True

    def abort(self) -> None:
        """Delete what was written; the target stays as it was."""
        container, self._container = self._container, None
        try:
            if container is not None:
                container.close()
        except (FFmpegError, OSError, ValueError) as error:
            _logger.debug("%s: closing an abandoned video: %s", self.path, error)
        finally:
            self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        try:
            yield
        except (FFmpegError, OSError) as error:
            self.abort()
            raise SinkError(f"{self.path}: cannot write the video: {error.strerror or error}") from error
        except BaseException:
            self.abort()
            raise


class AnnotatedVideo(VideoFile):
    """The pictures with label, probability, `source` or `adapted (step n)`, and a sparkline of the entropy.

    Args:
        path: target, see `VideoFile`.
        width, height: size of the source pictures, pixels. Odd ones are padded by a row or column.
        rate: pictures per second.
    """

    def __init__(self, path: str | os.PathLike[str], width: int, height: int, rate: Fraction) -> None:
        self._overlay = Overlay(width, height)
        super().__init__(path, *self._overlay.size, rate)

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Annotate one picture and encode it.

        Raises:
            SinkError: the encoder or the disk refuses it; the temporary file is gone, the target untouched.
        """
        caption = Caption(prediction.label, prediction.probability, prediction.entropy, prediction.step)
        with self._undone_on_failure():
            picture = self._overlay.draw(frame.image, caption)
        self.append(picture, frame.time_s)


def _create_temporary(path: Path) -> Path:
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise UsageError(f"{path}: expected a video file ending in {', '.join(VIDEO_SUFFIXES)}, found '{path.suffix}'")
    return create_beside(output_target(path), path.suffix.lower())


def _encoder() -> str:
    for name in ENCODERS:
        if name in av.codecs_available:
            return name
    raise MissingDependencyError(f"PyAV has none of the encoders {', '.join(ENCODERS)}: pip install --upgrade av")
