"""Pictures and videos from files, one after another: a folder, a pattern, a list, or a single picture.

Order is that of people: `frame2.png` before `frame10.png`; a list keeps its own. Each picture counts 1/25 s; times go
on from one file to the next. A file that cannot be read is said, counted as lost (`unreadable`) and left out.
"""

from __future__ import annotations

import glob
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from mgg_edge.errors import MggEdgeError, SourceError, UsageError
from mgg_edge.runtime.sources.source import DEFAULT_RATE, ClosingSource, Frame
from mgg_edge.runtime.sources.source_picture import MAX_PIXELS
from mgg_edge.runtime.sources.video import VideoSource

__all__ = [
    "PICTURE_SUFFIXES",
    "VIDEO_FILE_SUFFIXES",
    "FileSequence",
    "files_in",
    "files_like",
    "files_listed",
    "read_picture",
]

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
VIDEO_FILE_SUFFIXES = frozenset(
    {".mp4", ".mov", ".mkv", ".avi", ".webm", ".ts", ".m4v", ".mpg", ".mpeg", ".mjpeg", ".flv"}
)
MAX_LIST_BYTES = 1 << 26
UNREADABLE = "unreadable"
_logger = logging.getLogger(__name__)


class FileSequence(ClosingSource):
    """Files as one sequence of frames.

    Args:
        name: what to call it.
        paths: pictures and videos, told apart by their suffixes.

    Raises:
        SourceError: not one of them can be read.
    """

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        self.name, self.live, self.rate = name, False, DEFAULT_RATE
        self._paths = list(paths)
        self._lost: Counter[str] = Counter()
        pictures = all(path.suffix.lower() in PICTURE_SUFFIXES for path in self._paths)
        self.frames_expected = len(self._paths) if pictures else None
        self._frames = self._read()
        first = next(self._frames, None)
        if first is None:
            raise SourceError(f"{name}: none of {len(self._paths)} files can be read")
        self._first: Frame | None = first
        self.height, self.width = first.image.shape[:2]

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames of all files in order; ends at once the second time."""
        first, self._first = self._first, None
        if first is None:
            return
        yield first
        yield from self._frames

    def losses(self) -> Mapping[str, int]:
        """Files left out, as `unreadable`."""
        return dict(self._lost)

    def _read(self) -> Iterator[Frame]:
        index, start_s = 0, 0.0
        for path in self._paths:
            end_s = start_s
            try:
                for time_s, image, captured_s in _frames_of(path):
                    end_s = start_s + time_s + float(1 / self.rate)
                    yield Frame(index, start_s + time_s, image, captured_s)
                    index += 1
            except MggEdgeError as error:
                self._lost[UNREADABLE] += 1
                _logger.warning("left out: %s", error)
            start_s = end_s


def read_picture(path: Path) -> npt.NDArray[np.uint8]:
    """A picture file as u8[H,W,3] RGB, upright by its own metadata; transparency goes, 16 bits become 8.

    Raises:
        SourceError: not a readable picture.
    """
    try:
        with Image.open(path) as image:
            if not image.width * image.height <= MAX_PIXELS:
                raise SourceError(f"{path}: expected at most {MAX_PIXELS} pixels, found {image.width}x{image.height}")
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or upright.mode == "I":
                deep = np.asarray(upright).astype(np.int64) >> 8
                grey = deep.clip(0, 255).astype(np.uint8)
                return np.ascontiguousarray(np.repeat(grey[:, :, None], 3, axis=2))
            return np.array(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise SourceError(f"{path}: not a readable picture: {getattr(error, 'strerror', None) or error}") from error


def files_in(folder: Path) -> list[Path]:
    """Pictures and videos of a folder, not of folders within.

    Raises:
        UsageError: there are none.
    """
    return _known(sorted(folder.iterdir(), key=_natural), f"{folder}")


def files_like(pattern: str) -> list[Path]:
    """Pictures and videos that match a pattern; `**` reaches into folders.

    Raises:
        UsageError: there are none.
    """
    return _known(sorted(map(Path, glob.glob(pattern, recursive=True)), key=_natural), pattern)  # noqa: PTH207


def files_listed(path: Path) -> list[Path]:
    """Paths in a text file, one a line, relative to its folder; empty lines and lines with `#` first are skipped.

    Raises:
        UsageError: the list is empty, not text, or names something that is not a picture or video.
    """
    try:
        if not path.stat().st_size <= MAX_LIST_BYTES:
            raise UsageError(f"{path}: expected a list of at most {MAX_LIST_BYTES} bytes, found a larger file")
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a text file with one path a line: {error}") from error
    names = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found = []
    for number, name in names:
        if not name or name.startswith("#"):
            continue
        if Path(name).suffix.lower() not in PICTURE_SUFFIXES | VIDEO_FILE_SUFFIXES:
            raise UsageError(f"{path}: line {number}: expected the path of a picture or video, found '{name[:80]}'")
        found.append(path.parent / name)
    if not found:
        raise UsageError(f"{path}: expected one path a line, found none")
    return found


def _frames_of(path: Path) -> Iterator[tuple[float, npt.NDArray[np.uint8], float]]:
    if path.suffix.lower() in PICTURE_SUFFIXES:
        image = read_picture(path)
        yield 0.0, image, time.monotonic()
        return
    with VideoSource(path) as video:
        for frame in video:
            yield frame.time_s, frame.image, frame.captured_s


def _known(paths: Sequence[Path], where: str) -> list[Path]:
    known = [path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES | VIDEO_FILE_SUFFIXES and path.is_file()]
    if not known:
        raise UsageError(f"{where}: expected pictures or videos, found none ({len(paths)} other entries)")
    return known


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
