"""Pictures and videos from files, one after another: a folder, a pattern, a list, or a single picture.

Order is that of people: `frame2.png` before `frame10.png`; a list keeps its own. Each picture counts 1/25 s, those of
an animation (WebP, GIF, PNG) what it states; times go on from one file to the next. A file that cannot be read is said,
counted as lost (`unreadable`) and left out.
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

from mgg_edge.errors import MggEdgeError, SourceError, UsageError
from mgg_edge.files import is_clutter
from mgg_edge.runtime.sources.source import DEFAULT_RATE, UNREADABLE, ClosingSource, Frame
from mgg_edge.runtime.sources.video import VideoSource
from mgg_edge.scenes.picture_file import read_animation

__all__ = [
    "PICTURE_SUFFIXES",
    "VIDEO_FILE_SUFFIXES",
    "FileSequence",
    "files_in",
    "files_like",
    "files_listed",
]

PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
)
VIDEO_FILE_SUFFIXES = frozenset(
    {
        ".mp4", ".mov", ".mkv", ".avi", ".webm", ".ts", ".m4v", ".mpg", ".mpeg", ".mjpeg", ".flv", ".m2ts", ".mts",
        ".wmv", ".ogv", ".3gp", ".3g2", ".asf", ".mxf", ".vob",
    }
)  # fmt: skip
ANIMATED_SUFFIXES = frozenset({".gif", ".webp"})  # may hold several pictures
MAX_LIST_BYTES = 1 << 26
MAX_NAMED = 5
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
        suffixes = {path.suffix.lower() for path in self._paths}
        self.frames_expected = len(self._paths) if suffixes <= PICTURE_SUFFIXES - ANIMATED_SUFFIXES else None
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
                    yield Frame(index, start_s + time_s, image, captured_s, file=str(path))
                    index += 1
            except MggEdgeError as error:
                self._lost[UNREADABLE] += 1
                _logger.warning("left out: %s", error)
            start_s = end_s


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
        lines = path.read_text("utf-8-sig").splitlines()  # some editors begin with a byte-order mark
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
        for time_s, image in read_animation(path):
            yield time_s, image, time.monotonic()
        return
    with VideoSource(path) as video:
        for frame in video:
            yield frame.time_s, frame.image, frame.captured_s


def _known(paths: Sequence[Path], where: str) -> list[Path]:
    known = [
        path
        for path in paths
        if path.suffix.lower() in PICTURE_SUFFIXES | VIDEO_FILE_SUFFIXES
        and not is_clutter(Path(path.name))
        and path.is_file()
    ]
    if not known:
        raise UsageError(f"{where}: expected pictures or videos, found none ({len(paths)} other entries)")
    taken = set(known)
    others = [path.name for path in paths if path not in taken and path.is_file() and not is_clutter(Path(path.name))]
    if others:
        named = ", ".join(others[:MAX_NAMED]) + (", …" if len(others) > MAX_NAMED else "")
        _logger.warning(
            "%s: %d other files left out, no pictures or videos by their names: %s", where, len(others), named
        )
    return known


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]
