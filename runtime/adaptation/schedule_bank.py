"""Snapshots of domains learned before, so that a domain that returns is restored instead of learned again.

A snapshot is the state at a freeze and its *fit*: the drift of the last batch's mean features under its own θ. When the
schedule wakes, every snapshot and the source model are tried on the same new batch:

    d_k = drift of the batch's mean features under θ_k,    d = drift under the present θ

The best one is restored, and nothing needs to be learned, if it fits clearly better than the present θ, d_k ≤ 0.8 d,
and as well as when it was made, d_k ≤ 1.2 fit_k. Otherwise learning begins anew at the source model, θ and rule state
together: what was learned in another weather is a bad start (docs/LOG.md), and domains that follow each other do not
carry θ ever further away. The source model has no fit of its own; it must come as close as the best snapshot did.
Comparing on the same frames takes out what they happen to show, which drift on different frames cannot. A trial costs
B inferences a snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mgg_edge.compat import Self
from mgg_edge.state import AdaptState

__all__ = ["Snapshot", "SnapshotBank", "best_fit"]

MAX_FRACTION_OF_PRESENT = 0.8
MAX_RATIO_TO_FIT = 1.2
SAME_DOMAIN_FRACTION = 0.25


@dataclass(frozen=True)
class Snapshot:
    """A domain learned before.

    Attributes:
        state: the whole state at the freeze.
        fit: drift of its last batch under its own θ.
    """

    state: AdaptState
    fit: float


@dataclass(frozen=True)
class SnapshotBank:
    """A few snapshots, the one used last at the end; immutable.

    Attributes:
        source: the source model's state, which is always among the candidates.
        capacity: most snapshots held besides.
        snapshots: those held.
    """

    source: AdaptState
    capacity: int = 3
    snapshots: tuple[Snapshot, ...] = ()

    @property
    def candidates(self) -> tuple[Snapshot, ...]:
        """Everything that can be restored: the snapshots, then the source model with the best of their fits."""
        return (*self.snapshots, Snapshot(self.source, min((other.fit for other in self.snapshots), default=0.0)))

    def keep(self, snapshot: Snapshot) -> Self:
        """The bank with a snapshot; it replaces one of the same domain, or else the one not used for longest."""
        others = [other for other in self.snapshots if not self._same_domain(other, snapshot)]
        return replace(self, snapshots=(*others, snapshot)[-self.capacity :] if self.capacity else ())

    def used(self, chosen: Snapshot) -> Self:
        """The bank after a snapshot was restored."""
        if all(other is not chosen for other in self.snapshots):
            return self
        return replace(self, snapshots=(*(other for other in self.snapshots if other is not chosen), chosen))

    def _same_domain(self, first: Snapshot, second: Snapshot) -> bool:
        apart = _distance(first.state, second.state)
        return apart <= SAME_DOMAIN_FRACTION * _distance(second.state, self.source)


def best_fit(drifts: Sequence[float], candidates: Sequence[Snapshot], present_drift: float) -> int | None:
    """Which candidate needs no learning, by their drifts on one batch.

    Args:
        drifts: d_k of every candidate; NaN and Inf never win.
        candidates: in the same order.
        present_drift: d.

    Returns:
        Its place, or None if none fits.
    """
    order = sorted((drift, index) for index, drift in enumerate(drifts) if np.isfinite(drift))
    if not order:
        return None
    drift, index = order[0]
    fits = drift <= MAX_FRACTION_OF_PRESENT * present_drift and drift <= MAX_RATIO_TO_FIT * candidates[index].fit
    return index if fits else None


def _distance(first: AdaptState, second: AdaptState) -> float:
    return float(np.linalg.norm(np.subtract(first["theta"], second["theta"], dtype=np.float64)))
