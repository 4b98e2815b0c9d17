"""What a run leaves to the next: θ with the rule's memory, where schedule and guard stand, the snapshots.

Pictures are not part of it: neither those gathered for the next step nor the canaries, which are found anew. So a
resumed run goes on bit for bit as the first would have from the moment after a step, when the buffer is empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mgg_edge.compat import Self
from mgg_edge.errors import StateError
from mgg_edge.runtime.adaptation.adapter_events import Published
from mgg_edge.runtime.adaptation.adapter_watch import Watch
from mgg_edge.runtime.adaptation.guard_ladder import Rung
from mgg_edge.runtime.adaptation.schedule_bank import Snapshot
from mgg_edge.runtime.engines.engine import check_state
from mgg_edge.state import AdaptState, TensorSpec

__all__ = ["Checkpoint", "resumed_watch"]

_LADDER_COUNTS = ("rung", "commits", "verifications", "refused", "frozen_frames")


@dataclass(frozen=True)
class Checkpoint:
    """All that a later run needs to go on.

    Attributes:
        bundle_id: the bundle it belongs to.
        state: the committed state.
        step: updates behind it.
        schedule: name of the schedule.
        schedule_numbers: what the schedule knew.
        ladder_numbers: where the guard stood.
        last_good, older: the guard's states to go back to.
        snapshots: domains learned before, the one used last at the end, with the fit of each.
        drift_mean: f64[D] running mean of the features, empty where none was measured.
        drift_frames: frames in it.
        classes: predicted lately.
        counters: of the run that made it, for people.
        version: swaps of θ before it in the run that made it; a file does not keep it.
    """

    bundle_id: str
    state: AdaptState
    step: int
    schedule: str
    schedule_numbers: Mapping[str, float]
    ladder_numbers: Mapping[str, int]
    last_good: AdaptState
    older: AdaptState
    snapshots: tuple[tuple[AdaptState, float], ...]
    drift_mean: npt.NDArray[np.float64]
    drift_frames: int
    classes: tuple[int, ...]
    counters: Mapping[str, Any]
    version: int = 0

    @classmethod
    def of(cls, bundle_id: str, published: Published, watch: Watch) -> Self:
        """The checkpoint of an adapter."""
        meter = watch.meter
        return cls(
            bundle_id=bundle_id,
            state=published.state,
            step=published.step,
            schedule=watch.schedule.name,
            schedule_numbers=dict(watch.schedule.numbers()),
            ladder_numbers={name: int(getattr(watch.ladder, name)) for name in _LADDER_COUNTS},
            last_good=watch.ladder.last_good,
            older=watch.ladder.older,
            snapshots=tuple((snapshot.state, snapshot.fit) for snapshot in watch.bank.snapshots),
            drift_mean=np.empty(0) if meter is None or meter.mean is None else meter.mean,
            drift_frames=0 if meter is None else meter.frames,
            classes=watch.window.classes,
            counters=watch.counters.to_dict(),
            version=published.version,
        )

    def check(self, bundle_id: str, specs: Sequence[TensorSpec]) -> None:
        """Compare with the bundle it is to go on with.

        Raises:
            StateError: another bundle, or states that do not fit.
        """
        if self.bundle_id != bundle_id:
            raise StateError(
                f"state: expected one of bundle {bundle_id}, found one of bundle {self.bundle_id}; "
                f"use that bundle, or begin anew with 'mgg-edge state reset'"
            )
        for state in (self.state, self.last_good, self.older, *(state for state, _ in self.snapshots)):
            check_state(state, tuple(specs))


def resumed_watch(watch: Watch, checkpoint: Checkpoint) -> Watch:
    """The watch of a checkpoint; another schedule than it was made with starts anew.

    Raises:
        StateError: numbers that are not those of this schedule or guard.
    """
    numbers, meter = checkpoint.ladder_numbers, watch.meter
    if set(numbers) != set(_LADDER_COUNTS) or not all(value >= 0 for value in numbers.values()):
        raise StateError(f"state: expected the numbers of the guard {list(_LADDER_COUNTS)}, found {dict(numbers)}")
    if numbers["rung"] > max(Rung):
        raise StateError(f"state: expected a rung of the guard up to {int(max(Rung))}, found {numbers['rung']}")
    own = checkpoint.schedule == watch.schedule.name
    if meter is not None:
        fits = own and checkpoint.drift_mean.shape == meter.statistics.mean.shape
        mean, frames = (checkpoint.drift_mean, checkpoint.drift_frames) if fits else (None, 0)
        meter = replace(meter, mean=mean, frames=frames)
    return replace(
        watch,
        schedule=watch.schedule.recall(checkpoint.schedule_numbers) if own else watch.schedule.reset(),
        meter=meter,
        ladder=replace(
            watch.ladder,
            last_good=checkpoint.last_good,
            older=checkpoint.older,
            rung=Rung(numbers["rung"]),
            commits=numbers["commits"],
            verifications=numbers["verifications"],
            refused=numbers["refused"],
            frozen_frames=numbers["frozen_frames"],
        ),
        bank=replace(watch.bank, snapshots=tuple(Snapshot(state, fit) for state, fit in checkpoint.snapshots)),
        window=replace(watch.window, classes=checkpoint.classes),
        buffer=watch.buffer.clear(),
    )
