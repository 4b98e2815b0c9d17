"""What passes between the parts of an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mgg_edge.runtime.adaptation.buffer import Batch
from mgg_edge.runtime.adaptation.schedule import Action
from mgg_edge.runtime.engines.engine import Diagnostics, Inference
from mgg_edge.state import AdaptState

__all__ = ["Event", "Hold", "Published", "Work"]


class Hold(Enum):
    """What keeps an adapter from learning: paused, the source model infers; frozen, θ as it is."""

    PAUSED = "paused"
    FROZEN = "frozen"

    @property
    def event(self) -> str:
        """What its beginning is called in a record."""
        return "pause" if self is Hold.PAUSED else "freeze"


@dataclass(frozen=True)
class Published:
    """What inference uses, swapped as one reference.

    Attributes:
        state: the committed state.
        step: updates behind it.
        adapted: whether θ is not the source model's.
        version: swaps so far.
        since: version from which inference has read the same numbers.
        settled: inference with these numbers folded in, once they have stood still for a while; else None.
    """

    state: AdaptState
    step: int = 0
    adapted: bool = False
    version: int = 0
    since: int = 0
    settled: Inference | None = None


@dataclass(frozen=True)
class Work:
    """A step, or first a trial of the snapshots, that is due."""

    action: Action
    batch: Batch


@dataclass(frozen=True)
class Event:
    """Something that happened to the state, or was kept from happening to it.

    Attributes:
        kind: `commit`, `refuse`, `void`, `rollback`, `restore`, `rest`, `load` or `drop`; of a person, `pause`,
            `freeze`, `resume` or `reset`.
        version: of what is published afterwards.
        state: what is published afterwards.
        batch: the frames learned from; None where none were.
        candidate: the state a step proposed.
        reason: of a refusal, rollback or drop.
        diagnostics: of a step.
    """

    kind: str
    version: int
    state: AdaptState
    batch: Batch | None = None
    candidate: AdaptState | None = None
    reason: str = ""
    diagnostics: Diagnostics | None = None

    @property
    def frames(self) -> tuple[int, ...]:
        """Indices of the frames learned from; empty where none were."""
        return () if self.batch is None else self.batch.indices
