"""Everything an adapter knows besides θ, as one immutable value: gate, buffer, schedule, drift, guard, counters.

frame → gate ─ admitted ─▶ buffer ─ ready ─┐
          └─ shows something ─▶ drift ─▶ schedule ─ may adapt ─┴─▶ a step is due
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from mgg_edge.compat import Self
from mgg_edge.runtime.adaptation.adapter_settings import AdapterSettings, Counters
from mgg_edge.runtime.adaptation.buffer import Buffer, FrameBuffer
from mgg_edge.runtime.adaptation.gate import FrameGate, Gate, GateReason, Observation
from mgg_edge.runtime.adaptation.guard_collapse import ClassWindow
from mgg_edge.runtime.adaptation.guard_ladder import Ladder
from mgg_edge.runtime.adaptation.schedule import Action, Schedule
from mgg_edge.runtime.adaptation.schedule_bank import SnapshotBank
from mgg_edge.runtime.adaptation.schedule_drift import DriftMeter, SourceStatistics
from mgg_edge.runtime.bundle.bundle import Bundle

__all__ = ["Watch"]

# A covered lens is no new domain: such frames say nothing about drift.
_SHOWS_NOTHING = frozenset({GateReason.NOT_FINITE, GateReason.DARK, GateReason.BLOWN, GateReason.FLAT})


@dataclass(frozen=True)
class Watch:
    """What was seen and done so far; every method gives the next one.

    Attributes:
        gate, buffer, schedule: decide what is learned from, and when.
        meter: drift, where the schedule wants it.
        ladder, window: the guard's.
        bank: domains learned before.
        action: what the schedule allows.
        counters: what was done.
    """

    gate: Gate
    buffer: Buffer
    schedule: Schedule
    meter: DriftMeter | None
    ladder: Ladder
    window: ClassWindow
    bank: SnapshotBank
    action: Action = Action.HOLD
    counters: Counters = field(default_factory=Counters)

    @classmethod
    def start(
        cls,
        bundle: Bundle,
        schedule: Schedule,
        settings: AdapterSettings,
        gate: Gate | None = None,
        buffer: Buffer | None = None,
    ) -> Self:
        """Nothing seen yet.

        Raises:
            UsageError: the schedule wants drift and the bundle has no source statistics.
        """
        statistics = SourceStatistics.of(bundle) if schedule.needs_drift else None
        own_buffer = FrameBuffer(bundle.manifest.adapt_batch, settings.patience_frames, settings.max_age_frames)
        return cls(
            gate=gate if gate is not None else FrameGate(settings.gate),
            buffer=buffer if buffer is not None else own_buffer,
            schedule=schedule,
            meter=None if statistics is None else DriftMeter(statistics, settings.drift_window_frames),
            ladder=Ladder.start(bundle.initial_state, settings.ladder),
            window=ClassWindow(settings.collapse),
            bank=SnapshotBank(bundle.initial_state, settings.snapshots),
        )

    @property
    def is_due(self) -> bool:
        """Whether a batch is ready and may be used."""
        return self.action is not Action.HOLD and not self.ladder.is_frozen and self.buffer.is_ready

    @property
    def drift(self) -> float | None:
        """Present drift from the source, in its standard deviations, where it is measured."""
        return None if self.meter is None else self.meter.drift

    def observe(self, seen: Observation) -> tuple[Self, str | None]:
        """After one inferred frame, and why the gate refused it."""
        gate, reason = self.gate.admit(seen)
        meter = self.meter
        if meter is not None and reason not in _SHOWS_NOTHING:
            meter = meter.observe(seen.features)
        schedule, action = self.schedule.observe(0.0 if meter is None else meter.drift)
        buffer = self.buffer.drop_old(seen.index)
        wakes = action is Action.WAKE and self.action is not Action.WAKE
        if wakes:
            buffer = buffer.clear()  # what it holds is from before
        if reason is None:
            buffer = buffer.add(seen)
        window = self.window.add(int(seen.logits.argmax())) if np.isfinite(seen.logits).all() else self.window
        counted = self.counters.plus(frames_inferred=1, wakes=int(wakes))
        after = replace(
            self,
            gate=gate,
            buffer=buffer,
            schedule=schedule,
            meter=meter,
            ladder=self.ladder.frame(),
            window=window,
            action=action,
            counters=counted.plus(frames_admitted=1) if reason is None else counted.plus(frames_refused=reason),
        )
        return after, reason

    def taken(self) -> Self:
        """After the batch was taken for a step."""
        return replace(self, buffer=self.buffer.clear())

    def dropped(self, reason: str) -> Self:
        """After the batch was given up."""
        return replace(self.taken(), counters=self.counters.plus(adapt_dropped=reason))

    def stepped(self) -> tuple[Self, bool]:
        """After a step, committed or refused, and whether the schedule froze."""
        schedule, froze = self.schedule.stepped()
        after = replace(self, schedule=schedule)
        return (after.jumped() if froze else after), froze

    def jumped(self) -> Self:
        """After θ was replaced by another, or will stay as it is: earlier features and predictions do not compare."""
        meter = None if self.meter is None else self.meter.restart()
        return replace(self, meter=meter, window=replace(self.window, classes=()), buffer=self.buffer.clear())
