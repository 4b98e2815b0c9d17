"""Opening and reading of a live source, inside the decoding process.

{"reader": "ffmpeg", "address": …, "format": …, "options": {…}}     network streams and cameras, by PyAV
                                              "ends": true          a pipe: its end is the end
{"reader": "snapshots", "address": …, "options": {…}, "every_s": 1}  one picture at a time, asked for again and again
{"reader": "gstreamer", "address": pipeline}                         by OpenCV, where it was built with GStreamer
{"reader": "synthetic", "address": …}                                made here, with faults
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.error import FFmpegError

from mgg_edge.errors import MissingDependencyError, SourceError
from mgg_edge.runtime.sources.source import DEFAULT_RATE
from mgg_edge.runtime.sources.source_address import redact
from mgg_edge.runtime.sources.source_picture import MAX_PIXELS, PictureConverter, stated_pixel_aspect, usable_rate
from mgg_edge.runtime.sources.source_track import choose_track

__all__ = ["DecodedPicture", "Reader", "open_reader"]

REFUSED_FORMATS = frozenset({"concat", "tty"})  # read local files of the sender's choice; draw text
DECODER_ERRORS = (FFmpegError, OSError, IndexError, ValueError)
# Streams lose packets: so many pictures in a row may be undecodable before the connection counts as broken.
MAX_BAD_PACKETS = 300


@dataclass(frozen=True)
class DecodedPicture:
    """A picture u8[H,W,3] with the stream's time, or None, and `time.monotonic()` of its arrival."""

    image: npt.NDArray[np.uint8]
    time_s: float | None
    captured_s: float


@dataclass(frozen=True)
class Reader:
    """An opened source: pictures per second, whether it has a known end, and its pictures."""

    rate: Fraction
    finite: bool
    pictures: Iterator[DecodedPicture]


def open_reader(request: Mapping[str, Any]) -> Reader:
    """Open what a request names.

    Raises:
        SourceError: it cannot be opened.
        MissingDependencyError: OpenCV is absent, or has no GStreamer.
    """
    readers = {
        "ffmpeg": _open_ffmpeg, "snapshots": _open_snapshots, "gstreamer": _open_gstreamer, "synthetic": _open_synthetic
    }  # fmt: skip
    return readers[request["reader"]](request)


def _open_ffmpeg(request: Mapping[str, Any]) -> Reader:
    container, stream = _open_stream(request)
    finite = bool(request.get("ends")) or _has_end(container)
    return Reader(usable_rate(stream), finite, _decode(container, stream))


def _open_snapshots(request: Mapping[str, Any]) -> Reader:
    every_s = float(request["every_s"])
    return Reader(Fraction(1 / every_s).limit_denominator(1001), False, _snapshots(request, every_s))


def _snapshots(request: Mapping[str, Any], every_s: float) -> Iterator[DecodedPicture]:
    while True:
        due_s = time.monotonic() + every_s
        container, stream = _open_stream(request)
        with container:
            picture = next(_decode(container, stream), None)
        if picture is None:
            raise SourceError("expected a picture at that address, found none")
        yield replace(picture, time_s=None)
        time.sleep(max(0.0, due_s - time.monotonic()))


def _open_stream(request: Mapping[str, Any]) -> tuple[av.container.InputContainer, av.VideoStream]:
    open_s, stall_s = float(request["open_timeout_s"]), float(request["stall_timeout_s"])
    try:
        container = av.open(
            request["address"],
            format=request.get("format"),
            options=dict(request.get("options", {})),
            # Whoever waits for this process gives up first and says why; this is for one that nobody waits for.
            timeout=(2 * open_s, 2 * stall_s),
            metadata_errors="replace",
        )
    except (FFmpegError, OSError, ValueError) as error:
        raise SourceError(f"cannot open: {_reason(error)}") from error
    if REFUSED_FORMATS.intersection(container.format.name.split(",")):
        raise SourceError("expected a video stream, found text or a list of files")
    stream = choose_track("stream", container)
    if not hasattr(stream, "width"):
        raise SourceError("no decoder for this video")
    if not 0 <= stream.width * stream.height <= MAX_PIXELS:
        raise SourceError(f"expected at most {MAX_PIXELS} pixels, found {stream.width}x{stream.height}")
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    # Frame threads would hold back one picture for each of them.
    stream.thread_type = "SLICE"
    return container, stream


def _has_end(container: av.container.InputContainer) -> bool:
    """Whether it is a recording: it states its duration, or the answer that holds it states its length."""
    if container.duration is not None:
        return True
    playlist = {"hls", "dash"}.intersection(container.format.name.split(","))
    return not playlist and container.size > 0


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[DecodedPicture]:
    converter, bad = PictureConverter(stated_pixel_aspect(stream)), 0
    try:
        for packet in _until_all_are_read(container, stream):
            try:
                pictures = packet.decode()
            except DECODER_ERRORS as error:
                bad += 1
                if not bad <= MAX_BAD_PACKETS:
                    raise SourceError(f"{bad} packets in a row cannot be decoded: {_reason(error)}") from error
                continue
            for picture in pictures:
                bad = 0
                captured_s = time.monotonic()
                time_s = picture.time if picture.pts is not None else None
                yield DecodedPicture(converter.convert(picture), time_s, captured_s)
    except DECODER_ERRORS as error:
        raise SourceError(f"reading failed: {_reason(error)}") from error


def _until_all_are_read(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet[Any]]:
    """Packets of a stream, at last the one that flushes the decoder.

    FFmpeg takes the end of an answer without a length for an error. Where the file says how many pictures it has, and
    all are there, it is the end.
    """
    read = 0
    try:
        for packet in container.demux(stream):
            read += packet.size > 0
            yield packet
    except DECODER_ERRORS:
        if not 0 < stream.frames <= read:
            raise
        flush = av.Packet()
        flush.stream = stream
        yield flush


def _open_gstreamer(request: Mapping[str, Any]) -> Reader:
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise MissingDependencyError(
            f"a GStreamer pipeline needs OpenCV built with GStreamer, and OpenCV is missing ({error}); "
            "on a Jetson install the system's python3-opencv"
        ) from error
    if not any("GStreamer" in line and "YES" in line for line in cv2.getBuildInformation().splitlines()):
        raise MissingDependencyError(
            f"a GStreamer pipeline needs OpenCV built with GStreamer, and OpenCV {cv2.__version__} here is built "
            "without; on a Jetson install the system's python3-opencv"
        )
    capture = cv2.VideoCapture(request["address"], cv2.CAP_GSTREAMER)
    if not capture.isOpened():
        raise SourceError("GStreamer cannot start the pipeline; try it with gst-launch-1.0 (it must end in appsink)")
    rate = Fraction(capture.get(cv2.CAP_PROP_FPS) or 0).limit_denominator(1001)
    return Reader(rate if rate > 0 else DEFAULT_RATE, False, _grab(cv2, capture))


def _grab(cv2: Any, capture: Any) -> Iterator[DecodedPicture]:
    while True:
        good, image = capture.read()
        captured_s = time.monotonic()
        if not good:
            raise SourceError("the GStreamer pipeline gives no more pictures")
        yield DecodedPicture(np.ascontiguousarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)), None, captured_s)


def _open_synthetic(request: Mapping[str, Any]) -> Reader:
    from mgg_edge.runtime.sources.source_synthetic import SyntheticSource

    source = SyntheticSource.parse(request["address"], in_decoder=True)
    pictures = (DecodedPicture(frame.image, frame.time_s, frame.captured_s) for frame in source)
    return Reader(source.rate, False, pictures)


def _reason(error: Exception) -> str:
    return redact(getattr(error, "strerror", None) or str(error))
