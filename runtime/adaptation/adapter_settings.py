"""Everything about an adapter that can be set, as frozen dataclasses, and everything it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from mgg_edge.compat import Self
from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.buffer import MAX_AGE_FRAMES
from mgg_edge.runtime.adaptation.gate import GateSettings
from mgg_edge.runtime.adaptation.guard import StepLimits
from mgg_edge.runtime.adaptation.guard_canary import CanarySettings
from mgg_edge.runtime.adaptation.guard_collapse import CollapseSettings
from mgg_edge.runtime.adaptation.guard_ladder import LadderSettings
from mgg_edge.runtime.adaptation.schedule import BurstSettings
from mgg_edge.runtime.adaptation.schedule_drift import WINDOW_FRAMES

__all__ = ["AdapterSettings", "Counters"]


def _none() -> Mapping[str, int]:
    return MappingProxyType({})


@dataclass(frozen=True)
class AdapterSettings:
    """How an adapter adapts.

    Attributes:
        gate: which frames are learned from.
        burst: the schedule `burst`.
        canary, collapse, ladder: the guard's checks and what follows a breach.
        limits: bounds of one step; None takes those of the bundle's update rule.
        patience_frames: admitted frames offered to the buffer before a batch is ready; less than B is as B.
        max_age_frames: inferred frames after which a frame leaves the buffer.
        drift_window_frames: frames the drift reaches back, about.
        snapshots: domains remembered by `burst`, besides the source.
        budget_ms: longest time of one step, or None. Steps that are expected to take longer are dropped and counted,
            but for every sixteenth, which finds out whether that still holds.
        settle_frames: frames through which θ must stand still before inference has it folded in (`Engine.settle`);
            0 never does. Folding costs about what it saves in as many.

    Raises:
        UsageError: a number out of its range.
    """

    gate: GateSettings = field(default_factory=GateSettings)
    burst: BurstSettings = field(default_factory=BurstSettings)
    canary: CanarySettings = field(default_factory=CanarySettings)
    collapse: CollapseSettings = field(default_factory=CollapseSettings)
    ladder: LadderSettings = field(default_factory=LadderSettings)
    limits: StepLimits | None = None
    patience_frames: int = 0
    max_age_frames: int = MAX_AGE_FRAMES
    drift_window_frames: int = WINDOW_FRAMES
    snapshots: int = 3
    budget_ms: float | None = None
    settle_frames: int = 32

    def __post_init__(self) -> None:
        for name, least in (
            ("patience_frames", 0),
            ("max_age_frames", 1),
            ("drift_window_frames", 1),
            ("snapshots", 0),
            ("settle_frames", 0),
        ):
            if not (getattr(self, name) >= least):
                raise UsageError(f"{name}: expected a number of at least {least}, found {getattr(self, name)}")
        if self.budget_ms is not None and not (self.budget_ms > 0):
            raise UsageError(f"budget_ms: expected a number above 0, found {self.budget_ms}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Counters:
    """What an adapter has done. frames_inferred = frames_admitted + Σ frames_refused, unless it is `off`.

    Attributes:
        frames_inferred: frames predicted.
        adapt_steps: updates committed.
        adapt_rejected: updates refused or failed, and rollbacks after predictions that were not finite.
        frames_admitted: frames the gate let through to the buffer.
        frames_refused: frames it held back, by reason (`GateReason`).
        rejected: `adapt_rejected` by reason (`BreachCode`).
        adapt_dropped: steps that were due and not made, by reason: `busy` or `budget`.
        adapt_late: steps that took longer than the budget; committed all the same.
        rollbacks: by rung (`Rung`).
        wakes: times the drift ended a freeze.
        restores: wakes answered by a snapshot.
    """

    frames_inferred: int = 0
    adapt_steps: int = 0
    adapt_rejected: int = 0
    frames_admitted: int = 0
    frames_refused: Mapping[str, int] = field(default_factory=_none)
    rejected: Mapping[str, int] = field(default_factory=_none)
    adapt_dropped: Mapping[str, int] = field(default_factory=_none)
    adapt_late: int = 0
    rollbacks: Mapping[str, int] = field(default_factory=_none)
    wakes: int = 0
    restores: int = 0

    def plus(self, **additions: int | str) -> Self:
        """The counters with whole numbers added, and one more under a name for the counters by reason."""
        changes: dict[str, Any] = {}
        for name, addition in additions.items():
            value = getattr(self, name)
            if isinstance(addition, str):
                # str(): members of an enumeration print and serialise as their names everywhere.
                changes[name] = MappingProxyType({**value, str(addition): value.get(str(addition), 0) + 1})
            else:
                changes[name] = value + addition
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The counters as plain JSON values."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}
