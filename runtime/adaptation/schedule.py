"""When to adapt: a pure state machine over the drift of each frame.

    always   whenever a batch is ready
    window   the same, for rules that map a sliding window of frames to θ and remember nothing else
    off      never
    burst    adapting ──K updates──▶ settling ──baseline measured──▶ frozen ──drift other for long──▶ waking
                ▲                                                                                       │
                └────────────── no snapshot fits ◀────────────────────────▶ settling, if one does ──────┘

`burst` learns a domain with K updates and freezes. While `settling` it waits until the drift meter has forgotten the
frames before the freeze, then takes its drift as baseline d₀. `frozen`, it wakes after `patience_frames` frames whose
drift d is another: r = max(d/d₀, d₀/d) ≥ wake_ratio, d and d₀ not taken below min_drift. A drift that falls counts as
well: what was learned in bad weather does not fit better weather (docs/RELIABILITY.md: waking upwards alone made
`burst` worse than no adaptation). Hysteresis: a frame with r ≤ rest_ratio sets that count to zero, one in between
leaves it. The frame that wakes it starts a new batch; when that is gathered, a stored snapshot that fits it is
restored, else another K updates are made, from the source model (`schedule_bank`).

A schedule is immutable and small, and says what it knows as plain numbers, for state files. See `Schedule`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from mgg_edge.compat import Self, StrEnum
from mgg_edge.errors import StateError, UsageError

__all__ = [
    "AUTO",
    "SCHEDULES",
    "Action",
    "Always",
    "Burst",
    "BurstSettings",
    "Off",
    "Phase",
    "Schedule",
    "Window",
    "schedule_of",
]

SCHEDULES = ("always", "window", "burst", "off")
AUTO = "auto"  # the schedule that the bundle's rule is made for


class Action(StrEnum):
    """What may be done with the next batch."""

    HOLD = "hold"
    ADAPT = "adapt"
    WAKE = "wake"


class Schedule(Protocol):
    """Decides when to adapt; immutable."""

    @property
    def name(self) -> str:
        """What it is called in settings and records."""

    @property
    def needs_drift(self) -> bool:
        """Whether `observe` looks at the drift."""

    def observe(self, drift: float, /) -> tuple[Self, Action]:
        """The schedule after a frame, and what may be done with a batch that is ready.

        `WAKE` asks for a snapshot that fits the batch; it is repeated until `woken` tells what came of it.
        """

    def stepped(self) -> tuple[Self, bool]:
        """The schedule after a step was made, committed or refused, and whether it froze: worth a snapshot."""

    def woken(self, restored: bool, /) -> Self:
        """The schedule after the snapshots were tried, with or without one that fits."""

    def reset(self) -> Self:
        """The schedule at its start: θ was set from outside or rolled back to the source."""

    def numbers(self) -> Mapping[str, float]:
        """What it knows, for a state file."""

    def recall(self, numbers: Mapping[str, float], /) -> Self:
        """The schedule as it was when it gave `numbers`.

        Raises:
            StateError: not its numbers.
        """


@dataclass(frozen=True)
class Always:
    """Adapts whenever a batch is ready."""

    name: str = "always"
    needs_drift: bool = False
    action: Action = Action.ADAPT

    def observe(self, _: float, /) -> tuple[Self, Action]:
        """Always the same."""
        return self, self.action

    def stepped(self) -> tuple[Self, bool]:
        """Itself."""
        return self, False

    def woken(self, _: bool, /) -> Self:
        """Itself: it never sleeps."""
        return self

    def reset(self) -> Self:
        """Itself."""
        return self

    def numbers(self) -> Mapping[str, float]:
        """It knows nothing."""
        return {}

    def recall(self, numbers: Mapping[str, float], /) -> Self:  # noqa: ARG002
        """Itself; what another schedule knew does not matter to it."""
        return self


@dataclass(frozen=True)
class Window(Always):
    """Adapts whenever a batch is ready: what it leads to depends on the frames in the window alone."""

    name: str = "window"


@dataclass(frozen=True)
class Off(Always):
    """Never adapts."""

    name: str = "off"
    action: Action = Action.HOLD


class Phase(enum.IntEnum):
    """Where `Burst` stands; the numbers are stable, as state files hold them."""

    ADAPTING = 0
    SETTLING = 1
    FROZEN = 2
    WAKING = 3


@dataclass(frozen=True)
class BurstSettings:
    """The schedule `burst`.

    Attributes:
        updates: K, steps of a burst.
        settle_frames: frames after a freeze before the baseline is taken; some times the drift meter's window.
        wake_ratio: r from which a frame counts towards waking.
        rest_ratio: r up to which a frame sets the count to zero; at most `wake_ratio`.
        patience_frames: such frames that wake it.
        min_drift: drift and baseline below it are taken for it: between small numbers nothing wakes it.

    Raises:
        UsageError: a number out of its range.
    """

    updates: int = 10
    settle_frames: int = 96
    wake_ratio: float = 1.25
    rest_ratio: float = 1.1
    patience_frames: int = 24
    min_drift: float = 0.05

    def __post_init__(self) -> None:
        for name, least in (("updates", 1), ("settle_frames", 1), ("patience_frames", 1), ("min_drift", 0)):
            if not (getattr(self, name) >= least):
                raise UsageError(f"burst.{name}: expected a number of at least {least}, found {getattr(self, name)}")
        if not (1 <= self.rest_ratio <= self.wake_ratio):
            raise UsageError(
                f"burst.rest_ratio: expected 1 ≤ rest_ratio ≤ wake_ratio {self.wake_ratio}, found {self.rest_ratio}"
            )


_COUNTS = ("phase", "updates_left", "settle_left", "high_frames")


@dataclass(frozen=True)
class Burst:
    """K updates, then frozen until the drift calls for more.

    Attributes:
        settings: its thresholds.
        phase: where it stands.
        updates_left: steps until the freeze, while adapting.
        settle_left: frames until the baseline is taken, while settling.
        baseline: drift of this domain under this θ.
        high_frames: frames counted towards waking.
    """

    settings: BurstSettings = field(default_factory=BurstSettings)
    phase: Phase = Phase.ADAPTING
    updates_left: int = -1
    settle_left: int = 0
    baseline: float = 0.0
    high_frames: int = 0
    name: str = "burst"
    needs_drift: bool = True

    def __post_init__(self) -> None:
        if self.updates_left < 0:
            object.__setattr__(self, "updates_left", self.settings.updates)

    def observe(self, drift: float, /) -> tuple[Self, Action]:
        """One frame; a drift that is not finite is no reason for anything."""
        if self.phase is Phase.ADAPTING:
            return self, Action.ADAPT
        if self.phase is Phase.WAKING:
            return self, Action.WAKE
        if not math.isfinite(drift):
            return self, Action.HOLD
        if self.phase is Phase.SETTLING:
            left = self.settle_left - 1
            if left > 0:
                return replace(self, settle_left=left), Action.HOLD
            return replace(self, phase=Phase.FROZEN, settle_left=0, baseline=drift, high_frames=0), Action.HOLD
        return self._watch(drift)

    def _watch(self, drift: float) -> tuple[Self, Action]:
        low, high = sorted(max(value, self.settings.min_drift) for value in (drift, self.baseline))
        if high <= self.settings.rest_ratio * low:
            return replace(self, high_frames=0), Action.HOLD
        if not (high >= self.settings.wake_ratio * low):
            return self, Action.HOLD
        high_frames = self.high_frames + 1
        if high_frames < self.settings.patience_frames:
            return replace(self, high_frames=high_frames), Action.HOLD
        return replace(self, phase=Phase.WAKING, high_frames=0), Action.WAKE

    def stepped(self) -> tuple[Self, bool]:
        """One step less to go; after the last, settling. Refused ones count: a burst always ends."""
        if self.phase is not Phase.ADAPTING:
            return self, False
        if self.updates_left > 1:
            return replace(self, updates_left=self.updates_left - 1), False
        return self._settle(), True

    def woken(self, restored: bool, /) -> Self:
        """Settling if a snapshot was restored, else another burst."""
        return self._settle() if restored else self.reset()

    def reset(self) -> Self:
        """At the start of a burst."""
        return replace(
            self, phase=Phase.ADAPTING, updates_left=self.settings.updates, settle_left=0, baseline=0.0, high_frames=0
        )

    def numbers(self) -> Mapping[str, float]:
        """Everything but the settings."""
        return {"baseline": self.baseline, **{name: float(getattr(self, name)) for name in _COUNTS}}

    def recall(self, numbers: Mapping[str, float], /) -> Self:
        """The schedule as it was; one that knew nothing (`always`) leaves it at its start.

        Raises:
            StateError: numbers are missing, unknown or out of range.
        """
        if not numbers:
            return self.reset()
        if set(numbers) != {"baseline", *_COUNTS} or not all(0 <= value < math.inf for value in numbers.values()):
            raise StateError(f"state: expected the numbers of the schedule 'burst', found {dict(numbers)}")
        counts = {name: int(numbers[name]) for name in _COUNTS}
        if counts["phase"] not in set(Phase):
            raise StateError(f"state: expected a phase of the schedule 'burst', found {counts['phase']}")
        return replace(
            self,
            phase=Phase(counts["phase"]),
            updates_left=counts["updates_left"],
            settle_left=counts["settle_left"],
            high_frames=counts["high_frames"],
            baseline=float(numbers["baseline"]),
        )

    def _settle(self) -> Self:
        return replace(
            self, phase=Phase.SETTLING, updates_left=0, settle_left=self.settings.settle_frames, high_frames=0
        )


def schedule_of(name: str, burst: BurstSettings | None = None, default: str = "burst") -> Schedule:
    """The schedule called `name`, or the `default` one for `auto`.

    Raises:
        UsageError: there is none of that name.
    """
    name = default if name == AUTO else name
    if name == "burst":
        return Burst(burst or BurstSettings())
    if name not in SCHEDULES:
        raise UsageError(f"adapt: expected one of {', '.join((AUTO, *SCHEDULES))}, found '{name}'")
    return {"always": Always, "window": Window, "off": Off}[name]()
