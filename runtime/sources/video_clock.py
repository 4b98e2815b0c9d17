"""When a picture of a file is on: times that never decrease, from one kind of stamp, and how many pictures are missing.

Presentation stamps are what counts. Some containers (AVI) hold none, and FFmpeg fills in stamps in the order of
decoding: with B-frames they run backwards. Which kind is to be trusted is decided once, on the first pictures, as
FFmpeg's own tool does: the kind that runs backwards less often. Where there is none, pictures are counted. Browsers
state no rate in what they record, and FFmpeg guesses one picture a tick, 1000 a second: where the first pictures are
further apart, their own distance is the rate, and none is missing between them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import av

from mgg_edge.runtime.sources.source_picture import usable_rate

__all__ = ["LOOK_AHEAD", "Place", "VideoClock"]

LOOK_AHEAD = 6  # pictures; B-frames are decoded at most four places early
RESTART_S = 1.0  # a clock that falls back further than this began anew
CONSTANT = 0.01  # two statements of the rate that agree so well mean that every picture lasts equally long

_logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Of a picture.

    Attributes:
        time_s: seconds since the first picture; never less than the one before.
        lost: pictures missing right before this one.
    """

    time_s: float
    lost: int


class VideoClock:
    """Places pictures in time, one after the other.

    Args:
        name: of the file, for warnings.
        stream: the track they come from.
        first: the first pictures, at most `LOOK_AHEAD`.

    Attributes:
        rate: pictures per second.
        presented: stamps are those of presentation, not of decoding.
        constant: all pictures last equally long, so that a longer step means that some are missing.
    """

    def __init__(self, name: str, stream: av.VideoStream, first: Sequence[av.VideoFrame]) -> None:
        self._name, self._base = name, stream.time_base
        kinds: tuple[Callable[[av.VideoFrame], int | None], ...] = (lambda one: one.pts, lambda one: one.dts)
        faults = [_faults([kind(picture) for picture in first]) for kind in kinds]
        self._stamp = kinds[0] if faults[0] <= faults[1] else kinds[1]
        guessed = Fraction(stream.guessed_rate or 0)
        self.presented = faults[0] <= faults[1]
        self.rate = usable_rate(stream)
        if not self.presented and 0 < guessed < self.rate:
            self.rate = guessed
        self.constant = guessed > 0 and abs(self.rate / guessed - 1) < CONSTANT
        observed = _usual_step([self._stamp(picture) for picture in first])
        if self._base is not None and abs(self.rate * self._base - 1) < CONSTANT and observed > 1:
            # What is guessed where nothing is stated: a picture a tick. The pictures say otherwise.
            self.rate, self.constant = 1 / (observed * Fraction(self._base)), False
        self._start_s: float | None = None
        self._last_s: float | None = None
        self._count = self._late = self._lost = 0

    def place(self, picture: av.VideoFrame) -> Place:
        """The next picture's place."""
        stamp = self._stamp(picture)
        step_s = float(1 / self.rate)
        if stamp is None or self._base is None:
            stamp_s = (self._start_s or 0.0) + (0.0 if self._last_s is None else self._last_s + step_s)
        else:
            stamp_s = float(stamp * self._base)
        if self._start_s is None:
            self._start_s = stamp_s
        time_s, last_s = stamp_s - self._start_s, self._last_s
        if last_s is None:
            self._last_s = time_s
            return Place(time_s, 0)
        if time_s < last_s - RESTART_S:
            _logger.warning(
                "%s: its clock falls back by %.1f s at frame %d: going on from %.1f s",
                *(self._name, last_s - time_s, self._count + 1, last_s),
            )
            self._start_s -= last_s + step_s - time_s
            time_s = last_s + step_s
        self._count += 1
        self._last_s = max(last_s, time_s)
        return Place(self._last_s, self._missing((time_s - last_s) / step_s) if self.constant else 0)

    def _missing(self, steps: float) -> int:
        """Pictures missing in a step of so many pictures' length."""
        if steps < -0.5:  # one that comes late was counted as missing before: it is taken off the next ones
            self._late = min(self._late + 1, self._lost)
        missing = max(0, round(steps) - 1)
        taken_off = min(self._late, missing)
        self._late -= taken_off
        self._lost += missing - taken_off
        return missing - taken_off


def _usual_step(stamps: Sequence[int | None]) -> int:
    """Ticks from picture to picture, the median of the first steps; 0 where too few are known."""
    known = [stamp for stamp in stamps if stamp is not None]
    steps = sorted(later - earlier for earlier, later in itertools.pairwise(known) if later > earlier)
    return steps[len(steps) // 2] if len(steps) > 1 else 0


def _faults(stamps: Sequence[int | None]) -> int:
    """How often stamps are absent or do not rise."""
    known = [stamp for stamp in stamps if stamp is not None]
    backwards = sum(later <= earlier for earlier, later in itertools.pairwise(known))
    return backwards + len(stamps) - len(known)
