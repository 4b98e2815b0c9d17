"""What every source of pictures offers, and the frame it gives.

    class Mine(ClosingSource):            anything with these attributes and `__iter__` is a source;
        name, live = "mine", False        `IteratorSource` makes one of an ordinary iterable
        ...

A source is iterated by one thread. `interrupt` may come from another and makes a waiting iteration end; `close` comes
after the iteration. Addresses hold passwords: `name` is what may be shown, and is redacted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from mgg_edge.compat import Self
from mgg_edge.errors import SourceError
from mgg_edge.runtime.preprocess import check_picture

__all__ = ["DEFAULT_RATE", "LOST", "UNREADABLE", "ClosingSource", "Frame", "FrameSource", "IteratorSource"]

# In `losses`: missing in the source or not decodable; files of a folder or list that are no picture or video.
LOST, UNREADABLE = "lost", "unreadable"
DEFAULT_RATE = Fraction(25)  # pictures per second, where nothing usable is stated


@dataclass(frozen=True)
class Frame:
    """One picture of a source.

    Attributes:
        index: place in the sequence, from 0.
        time_s: seconds since the first picture, by the source's own clock.
        image: u8[H, W, 3] RGB, upright (rotation metadata applied).
        captured_s: `time.monotonic()` when the decoder gave it; a frame's age counts from here.
        lost: pictures missing in the source right before this one.
        file: what it was read from, where a source is several files; empty otherwise.
    """

    index: int
    time_s: float
    image: npt.NDArray[np.uint8]
    captured_s: float = field(default_factory=time.monotonic)
    lost: int = 0
    file: str = ""


@runtime_checkable
class FrameSource(Protocol):
    """An iterable of frames, used in a `with` statement and iterated once.

    Attributes:
        name: what to call it in messages; holds no credentials.
        live: pictures come whether or not they are taken, so that a slow reader should skip some.
        width, height: size of the first picture, pixels. Later pictures can differ.
        rate: pictures per second, as stated or assumed.
        frames_expected: number of pictures to come, or None.
    """

    name: str
    live: bool
    width: int
    height: int
    rate: Fraction
    frames_expected: int | None

    def __iter__(self) -> Iterator[Frame]:
        """Yield the pictures in order, once.

        Raises:
            SourceError: the source failed for good; what was yielded before is good.
        """

    def losses(self) -> Mapping[str, int]:
        """Pictures lost inside the source so far, by reason."""

    def interrupt(self) -> None:
        """Make a waiting iteration end soon, without an error; called from another thread."""

    def close(self) -> None:
        """Release everything; safe to call twice."""

    def __enter__(self) -> Self:
        """The source itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""


class ClosingSource:
    """What sources share: the `with` statement, nothing lost, nothing to interrupt."""

    def losses(self) -> Mapping[str, int]:
        """Pictures lost inside the source so far, by reason."""
        return {}

    def interrupt(self) -> None:
        """Nothing here waits for long."""

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class IteratorSource(ClosingSource):
    """Pictures of an ordinary iterable as a source.

    Args:
        pictures: u8[H,W,3] RGB arrays, or `Frame`s; the first is taken at once, for its size.
        name: what to call it.
        rate: pictures per second, from which times of arrays are made.
        live: whether a slow reader should skip pictures.
        frames_expected: how many will come; taken from `len(pictures)` where that exists.

    Raises:
        SourceError: there is not a single picture.
        UsageError: the first is not a picture.
    """

    def __init__(
        self,
        pictures: Iterable[npt.NDArray[np.uint8] | Frame],
        *,
        name: str = "iterator",
        rate: Fraction = DEFAULT_RATE,
        live: bool = False,
        frames_expected: int | None = None,
    ) -> None:
        self.name, self.live, self.rate = name, live, Fraction(rate)
        sized: Any = pictures
        self.frames_expected = (
            len(sized) if frames_expected is None and hasattr(pictures, "__len__") else frames_expected
        )
        self._pictures = iter(pictures)
        first = next(self._pictures, None)
        if first is None:
            raise SourceError(f"{name}: expected pictures, found none")
        self._first: Frame | None = self._frame(0, first)
        self.height, self.width = check_picture(self._first.image).shape[:2]

    def __iter__(self) -> Iterator[Frame]:
        """Yield the pictures in order; ends at once the second time."""
        first, self._first = self._first, None
        if first is None:
            return
        yield first
        for index, picture in enumerate(self._pictures, 1):
            yield self._frame(index, picture)

    def _frame(self, index: int, picture: npt.NDArray[np.uint8] | Frame) -> Frame:
        return picture if isinstance(picture, Frame) else Frame(index, float(index / self.rate), picture)
