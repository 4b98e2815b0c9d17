"""Which frames may be learned from. Pure: a gate and an observation give the next gate and a verdict.

A frame is admitted unless, in this order,

    not-finite   its logits or features hold NaN or Inf
    time         its time is not later than the frame's before
    dark, blown  its mean luma is below 10 or above 245 grey levels: night without a lamp, a lens cap, a blinded sensor
    flat         the spread of its thumbnail is below 4 grey levels: fog on the lens, a test card of one colour
    scene-cut    it, or one of the frames before it, begins another scene: change ≥ 20 levels and ≥ 4 × the usual change
    duplicate    it differs by less than 2 levels from the frame admitted last

A change is measured between neighbours that show something. The usual change is their running mean, so that a stream
whose every frame is another picture (a folder of photographs) has no cuts. After a cut two more frames are held
back: encoders blend and cameras refocus. Time that jumps back costs one frame, not all until it has caught up.

Any object with `admit` can take this gate's place: see `Gate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mgg_edge.compat import Self, StrEnum
from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.gate_thumbnail import difference_levels, thumbnail

__all__ = ["FrameGate", "Gate", "GateReason", "GateSettings", "Observation"]


class GateReason(StrEnum):
    """Why a frame is not learned from; the names are stable."""

    NOT_FINITE = "not-finite"
    TIME = "time"
    DARK = "dark"
    BLOWN = "blown"
    FLAT = "flat"
    SCENE_CUT = "scene-cut"
    DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Observation:
    """One inferred frame, as gate, buffer and schedule see it.

    Attributes:
        index: frames inferred before it.
        frame: u8[H,W,3] at model size.
        thumbnail: f32[cells,cells], grey levels.
        logits: f32[C].
        features: f32[D].
        time_s: the source's clock, seconds, or None where it has none.
    """

    index: int
    frame: npt.NDArray[np.uint8]
    thumbnail: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]
    time_s: float | None = None

    @classmethod
    def of(
        cls,
        index: int,
        frame: npt.NDArray[np.uint8],
        logits: npt.NDArray[np.float32],
        features: npt.NDArray[np.float32],
        time_s: float | None = None,
    ) -> Self:
        """An observation with its thumbnail."""
        return cls(index, frame, thumbnail(frame), logits, features, time_s)


class Gate(Protocol):
    """Judges frames one after the other; immutable."""

    def admit(self, seen: Observation, /) -> tuple[Self, str | None]:
        """The next gate, and why the frame is refused (a short stable name for the counters) or None."""


@dataclass(frozen=True)
class GateSettings:
    """Thresholds of the gate; grey levels are 0 to 255.

    Attributes:
        min_luma, max_luma: bounds of the mean luma, grey levels.
        min_contrast: least standard deviation of the thumbnail, grey levels.
        min_difference: least difference from the frame admitted last, grey levels.
        cut_levels: least change that can be a scene cut, grey levels.
        cut_ratio: least ratio of such a change to the usual one.
        settle_frames: frames held back after a cut, besides the one that begins the scene.

    Raises:
        UsageError: a threshold that is not a number of at least 0.
    """

    min_luma: float = 10.0
    max_luma: float = 245.0
    min_contrast: float = 4.0
    min_difference: float = 2.0
    cut_levels: float = 20.0
    cut_ratio: float = 4.0
    settle_frames: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value >= 0):
                raise UsageError(f"gate.{name}: expected a number of at least 0, found {value}")


CHANGE_RATE = 0.1  # of the running mean of changes: it forgets within some ten frames


@dataclass(frozen=True)
class FrameGate:
    """The gate of this module's table.

    Attributes:
        settings: its thresholds.
        time_s: time of the latest frame that had one.
        shown: thumbnail of the latest frame that shows something.
        admitted: thumbnail of the frame admitted last.
        usual_change: running mean of the changes between neighbours, grey levels; None before the first.
        held_back: frames held back after a cut, counting the latest and those to come.
    """

    settings: GateSettings = field(default_factory=GateSettings)
    time_s: float | None = None
    shown: npt.NDArray[np.float32] | None = None
    admitted: npt.NDArray[np.float32] | None = None
    usual_change: float | None = None
    held_back: int = 0

    def admit(self, seen: Observation, /) -> tuple[Self, str | None]:
        """The next gate, and the `GateReason` for which the frame is refused, or None."""
        if not (np.isfinite(seen.logits).all() and np.isfinite(seen.features).all()):
            return self, GateReason.NOT_FINITE
        time_s, small = self.time_s if seen.time_s is None else seen.time_s, seen.thumbnail
        reason = _time_reason(self.time_s, seen.time_s) or _content_reason(small, self.settings)
        if reason is not None:
            return replace(self, time_s=time_s if math.isfinite(time_s or 0.0) else self.time_s), reason
        usual_change, held_back = self._follow(small)
        gate = replace(self, time_s=time_s, shown=small, usual_change=usual_change, held_back=held_back)
        if held_back > 0:
            return gate, GateReason.SCENE_CUT
        if self.admitted is not None and not (difference_levels(small, self.admitted) >= self.settings.min_difference):
            return gate, GateReason.DUPLICATE
        return replace(gate, admitted=small), None

    def _follow(self, small: npt.NDArray[np.float32]) -> tuple[float | None, int]:
        """The usual change, and the frames to hold back counting this one, after a frame that shows something."""
        if self.shown is None:
            return None, 0
        change = min(difference_levels(small, self.shown), 255.0)
        usual = change if self.usual_change is None else self.usual_change
        cut = change >= max(self.settings.cut_levels, self.settings.cut_ratio * usual)
        held_back = 1 + self.settings.settle_frames if cut else max(0, self.held_back - 1)
        return usual + CHANGE_RATE * (change - usual), held_back


def _time_reason(previous_s: float | None, time_s: float | None) -> GateReason | None:
    if time_s is None:
        return None
    increasing = math.isfinite(time_s) and (previous_s is None or time_s > previous_s)
    return None if increasing else GateReason.TIME


def _content_reason(small: npt.NDArray[np.float32], settings: GateSettings) -> GateReason | None:
    luma = float(small.mean())
    if not (luma >= settings.min_luma):
        return GateReason.DARK
    if not (luma <= settings.max_luma):
        return GateReason.BLOWN
    return None if float(small.std()) >= settings.min_contrast else GateReason.FLAT
