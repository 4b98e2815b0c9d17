"""What a `--source` means.

The first rule that fits decides:

    an object                       a `FrameSource` as it is; any other iterable as `IteratorSource`
    demo                            characters under changing weather, what `mgg-edge demo` reads (a file: ./demo)
    synthetic:OPTIONS               `SyntheticSource`
    a pipeline with ` ! ` in it     GStreamer, by OpenCV
    -                               standard input, to its end (MPEG-TS, Matroska); likewise a named pipe
    rtsp:// rtsps:// http:// https:// udp://      a stream, by FFmpeg; http(s) also a file at that address
    http(s)://…/snapshot.jpg#every=1              a picture, asked for again every second
    v4l2:///dev/video0?width=1280&height=720&fps=30&format=mjpeg      a camera with settings
    file:///PATH                    the path
    digits, such as 0               camera /dev/video0 (a file of that name: ./0)
    /dev/video…                     a camera
    a folder                        its pictures and videos
    * ? or [ and no such file       what matches
    a file ending in .txt           a list of pictures and videos
    a file with a picture's suffix  that picture
    any other file                  a video

`NAME=SOURCE` calls a source NAME (letters, digits, `-`, `_`; unless there is a file of the whole text).
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mgg_edge.errors import MissingDependencyError, UsageError
from mgg_edge.runtime.sources.source import FrameSource, IteratorSource
from mgg_edge.runtime.sources.source_address import SCHEMES, redact, scheme_of
from mgg_edge.runtime.sources.source_demo import DemoSource
from mgg_edge.runtime.sources.source_files import PICTURE_SUFFIXES, FileSequence, files_in, files_like, files_listed
from mgg_edge.runtime.sources.source_live import LiveOptions, LiveSource
from mgg_edge.runtime.sources.source_synthetic import SyntheticOptions, SyntheticSource
from mgg_edge.runtime.sources.video import VideoSource

__all__ = ["open_source", "split_name", "suggest_name"]

_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]{0,31})=(.+)", re.DOTALL)
_EVERY = re.compile(r"every=(\d{1,4}(?:\.\d+)?)")
_LEAST_EVERY_S = 0.05
_CAMERA_OPTIONS = {"width": r"\d{1,5}", "height": r"\d{1,5}", "fps": r"\d{1,4}(\.\d+)?", "format": r"[a-z0-9]{2,12}"}
ENCODE = (
    "special characters of a name or password must be percent-encoded: / is %2F, ? is %3F, # is %23, @ is %40, "
    ": is %3A, a space is %20, % is %25"
)
LOW_DELAY = {"fflags": "nobuffer", "flags": "low_delay"}


def open_source(
    source: str | os.PathLike[str] | Iterable[Any], options: LiveOptions | None = None, *, strict: bool = False
) -> FrameSource:
    """Open a source by the rules above.

    Args:
        source: a path, an address, a camera's number, a pipeline, or an object.
        options: patience with cameras and streams.
        strict: a video file ends with an error at the first picture that is lost.

    Raises:
        UsageError: nothing like that exists, or the text cannot be understood.
        SourceError: it exists and cannot be read.
        MissingDependencyError: it needs a package that is absent.
    """
    if isinstance(source, FrameSource):
        return source
    if isinstance(source, str):
        if not source.strip() or "\0" in source:
            raise UsageError("source: expected a path or an address, found an empty text or one with a null byte")
        return _open_special(source, options) or _open_path(source, options, strict=strict)
    if isinstance(source, os.PathLike):
        return _open_path(os.fspath(source), options, strict=strict)
    if isinstance(source, Iterable):
        pictures: Iterable[Any] = source
        return IteratorSource(pictures)
    raise UsageError(f"source: expected a path, an address or an iterable, found {type(source).__name__}")


def split_name(text: str) -> tuple[str | None, str]:
    """The name and the source of `NAME=SOURCE`; no name where there is none.

    Raises:
        UsageError: what stands before a source is no name.
    """
    found = _NAMED.fullmatch(text)
    if os.path.lexists(text):
        return None, text
    if found is not None:
        return found.group(1), found.group(2)
    name, equals, source = text.partition("=")
    if equals and not re.search(r"[/:!?]", name) and (os.path.lexists(source) or scheme_of(source) is not None):
        raise UsageError(
            f"source: expected before '=' a name of at most 32 letters, digits, '-' and '_' that begins with a letter, "
            f"found '{name}'"
        )
    return None, text


def suggest_name(text: str, index: int) -> str:
    """A short name without credentials for an unnamed source, from its file, host or camera number."""
    scheme = scheme_of(text)
    if text == "-":
        return "stdin"
    if text.isdecimal() or text.startswith("/dev/video") or scheme == "v4l2":
        found = re.search(r"\d+", text.rpartition("/")[2])
        return f"camera{found.group() if found else index}"
    if scheme is not None:
        base = _host(text)
    else:
        base = (
            "pipeline"
            if " ! " in text
            else Path(text.partition(":")[0] if text.startswith("synthetic:") else text).stem
        )
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", base).strip("-.")[:32] or f"source{index}"


def _after_user(text: str) -> str:
    """What follows the last `@`, up to the end of the host."""
    return re.split(r"[/?#]", text.rpartition("@")[2])[0]


def _host(text: str) -> str:
    try:
        return urllib.parse.urlsplit(text).hostname or ""
    except ValueError:
        return ""


def _open_special(text: str, options: LiveOptions | None) -> FrameSource | None:
    if text == "demo":
        return DemoSource()
    if text == "-":
        return _open_standard_input(options)
    if text.startswith("synthetic:"):
        synthetic = SyntheticOptions.parse(text)
        request = {"reader": "synthetic", "address": text}
        return LiveSource(request, "synthetic", options) if synthetic.live else SyntheticSource(synthetic)
    if " ! " in text and not Path(text).exists():
        return _open_pipeline(text, options)
    scheme = scheme_of(text)
    if scheme == "v4l2":
        return _open_camera(text, options)
    if scheme in SCHEMES:
        return _open_stream(text, scheme, options)
    if scheme == "file":
        return _open_path(urllib.parse.unquote(urllib.parse.urlsplit(text).path))
    if scheme is not None and not Path(text).exists():
        known = ", ".join(f"{name}://" for name in (*SCHEMES, "v4l2", "file"))
        raise UsageError(f"source: {redact(text)}: expected one of {known}, found {scheme}://")
    if text.isdecimal() or text.startswith("/dev/video"):
        device = f"/dev/video{int(text)}" if text.isdecimal() else text
        return _open_camera(f"v4l2://{device}", options)
    return None


def _open_path(text: str, options: LiveOptions | None = None, *, strict: bool = False) -> FrameSource:
    path = Path(text)
    if "@" in text and not path.exists():
        raise UsageError(f"source: ***@{_after_user(text)}: no such file; an address begins with its scheme, rtsp://…")
    if path.is_dir():
        return FileSequence(text, files_in(path))
    if not path.exists() and any(letter in text for letter in "*?["):
        return FileSequence(text, files_like(text))
    if path.suffix.lower() == ".txt" and path.is_file():
        return FileSequence(text, files_listed(path))
    if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file():
        return FileSequence(text, [path])
    if path.is_fifo():
        return _open_pipe(text, text, options)
    return VideoSource(path, strict=strict)


def _open_standard_input(options: LiveOptions | None) -> FrameSource:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("source: expected a video on standard input, found a terminal; … | mgg-edge run --source -")
    # Opened anew by the decoding process, whose own standard input is another.
    return _open_pipe(f"/proc/{os.getpid()}/fd/{sys.stdin.fileno()}", "standard input", options)


def _open_pipe(path: str, name: str, options: LiveOptions | None) -> FrameSource:
    settings = {"protocol_whitelist": "file"}
    return LiveSource({"reader": "ffmpeg", "address": f"file:{path}", "options": settings, "ends": True}, name, options)


def _open_stream(text: str, scheme: str, options: LiveOptions | None) -> FrameSource:
    try:
        parts = urllib.parse.urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"source: {scheme}://***: not an address; {ENCODE}") from error
    # Where an unencoded character ends the host early, what follows is a part of the password: nothing of it is shown.
    cut = "@" not in parts.netloc and ":" in parts.netloc and "@" in text.partition("://")[2]
    if cut or any(map(str.isspace, text)) or (not host and not (scheme == "udp" and port)):
        form = f"{scheme}://HOST:PORT/PATH"
        raise UsageError(f"source: {scheme}://***: expected an address with a host, {form}; {ENCODE}")
    name = redact(text)
    # What is at a web address may be a recording: without these, none of its pictures is left out.
    settings = {"protocol_whitelist": SCHEMES[scheme]} | ({} if scheme in ("http", "https") else LOW_DELAY)
    if scheme in ("rtsp", "rtsps"):
        # Within the connection, where nothing is lost; some cameras can only do datagrams.
        settings |= {"rtsp_flags": "prefer_tcp", "allowed_media_types": "video"}
    request = {"reader": "ffmpeg", "address": text, "options": settings}
    if scheme in ("http", "https") and (found := _EVERY.fullmatch(parts.fragment)):
        return _open_snapshots(request, name, float(found[1]), options or LiveOptions())
    return LiveSource(request, name, options)


def _open_snapshots(request: Mapping[str, Any], name: str, every_s: float, options: LiveOptions) -> FrameSource:
    if not every_s >= _LEAST_EVERY_S:
        raise UsageError(f"source: {name}: every: expected at least {_LEAST_EVERY_S} seconds, found {every_s:g}")
    own = {"reader": "snapshots", "address": request["address"].rpartition("#")[0], "every_s": every_s}
    patience = replace(options, stall_timeout_s=options.stall_timeout_s + every_s)
    return LiveSource({**request, **own}, name, patience)


def _open_camera(text: str, options: LiveOptions | None) -> FrameSource:
    parts = urllib.parse.urlsplit(text)
    device = parts.netloc + parts.path
    if not re.fullmatch(r"/dev/[\w./-]+", device) or ".." in device:
        raise UsageError(f"source: {text}: expected v4l2:///dev/videoN, found the device '{device}'")
    wanted = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    for name, value in wanted.items():
        if name not in _CAMERA_OPTIONS:
            raise UsageError(f"source: {text}: expected the settings {', '.join(_CAMERA_OPTIONS)}, found '{name}'")
        if not re.fullmatch(_CAMERA_OPTIONS[name], value):
            raise UsageError(f"source: {text}: {name}: cannot be '{value}'")
    if ("width" in wanted) != ("height" in wanted):
        raise UsageError(f"source: {text}: width and height come together")
    if not Path(device).is_char_device() and (options is None or options.must_connect):
        present = ", ".join(sorted(map(str, Path("/dev").glob("video*")))) or "none"
        raise UsageError(f"source: {device}: no such camera; cameras here: {present}")
    settings = {"video_size": f"{wanted['width']}x{wanted['height']}"} if "width" in wanted else {}
    settings |= {"framerate": wanted["fps"]} if "fps" in wanted else {}
    settings |= {"input_format": wanted["format"]} if "format" in wanted else {}
    request = {"reader": "ffmpeg", "address": device, "format": "v4l2", "options": settings}
    return LiveSource(request, device, options)


def _open_pipeline(text: str, options: LiveOptions | None) -> FrameSource:
    if "appsink" not in text.rpartition("!")[2]:
        raise UsageError(f"source: {redact(text)}: expected a pipeline that ends in appsink")
    if importlib.util.find_spec("cv2") is None:
        raise MissingDependencyError(
            "source: a GStreamer pipeline needs OpenCV built with GStreamer; on a Jetson: apt install python3-opencv, "
            "and an environment that sees the system's packages (python3 -m venv --system-site-packages)"
        )
    return LiveSource({"reader": "gstreamer", "address": text}, redact(text), options)
