"""What follows a breach: a pure state machine that gives back, rung by rung, what adaptation changed.

    rung        the state goes back to
    last-good   the latest one that passed every check, also canaries and collapse
    older       one verified some checks before that
    source      the source model
    frozen      the source model, and no adaptation for `freeze_frames` frames

A *verification* is made at every `verify_every`-th commit. A candidate that fails it is refused, and as the commits
since the last verification are suspect too, the ladder is climbed by one rung. One that had nothing to judge by (no
canaries, too few predictions) allows the commit and proves nothing: neither does it make a good state, nor does it go
down a rung. A refusal by the cheap checks alone changes nothing; `refusals` of them in a row climb a rung, as then the
state itself leads nowhere. Rungs that would change nothing are left out. Each verification passed goes one rung down.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

import numpy as np

from mgg_edge.compat import Self
from mgg_edge.errors import UsageError
from mgg_edge.state import AdaptState

__all__ = ["Ladder", "LadderSettings", "Rung"]


class Rung(enum.IntEnum):
    """How far back; the numbers are stable, as state files hold them."""

    LAST_GOOD = 0
    OLDER = 1
    SOURCE = 2
    FROZEN = 3

    @property
    def label(self) -> str:
        """Its name in counters and records."""
        return self.name.lower().replace("_", "-")


@dataclass(frozen=True)
class LadderSettings:
    """How often to verify and how long to wait.

    Attributes:
        verify_every: k, commits from one verification to the next.
        older_every: verifications from one older state to the next.
        refusals: refused steps in a row that climb a rung.
        freeze_frames: frames without adaptation on the last rung.

    Raises:
        UsageError: a number below 1.
    """

    verify_every: int = 8
    older_every: int = 8
    refusals: int = 8
    freeze_frames: int = 7500  # five minutes at 25 frames per second

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value >= 1):
                raise UsageError(f"ladder.{name}: expected a number of at least 1, found {value}")


@dataclass(frozen=True)
class Ladder:
    """Where the guard stands; immutable.

    Attributes:
        source: the source model's state.
        last_good: the latest verified state.
        older: one verified earlier.
        settings: its numbers.
        rung: the next to climb to.
        commits: since the last verification.
        verifications: passed, since `older` was taken.
        refused: steps refused in a row.
        frozen_frames: frames still to wait.
    """

    source: AdaptState
    last_good: AdaptState
    older: AdaptState
    settings: LadderSettings = field(default_factory=LadderSettings)
    rung: Rung = Rung.LAST_GOOD
    commits: int = 0
    verifications: int = 0
    refused: int = 0
    frozen_frames: int = 0

    @classmethod
    def start(cls, source: AdaptState, settings: LadderSettings | None = None) -> Self:
        """A ladder for a model that is as trained."""
        return cls(source, source, source, settings or LadderSettings())

    @property
    def is_frozen(self) -> bool:
        """Whether adaptation has to wait."""
        return self.frozen_frames > 0

    @property
    def verification_due(self) -> bool:
        """Whether the next commit must be verified first."""
        return self.commits + 1 >= self.settings.verify_every

    def frame(self) -> Self:
        """After one more inferred frame."""
        return replace(self, frozen_frames=self.frozen_frames - 1) if self.frozen_frames else self

    def after_commit(self, state: AdaptState, verified: bool) -> Self:
        """After a commit, whose verification was passed, inconclusive or not due."""
        if verified:
            return self.verified(state)
        return self.inconclusive() if self.verification_due else self.committed()

    def committed(self) -> Self:
        """After a commit without verification."""
        return replace(self, commits=self.commits + 1, refused=0)

    def inconclusive(self) -> Self:
        """After a commit whose verification had nothing to judge by; the next is `verify_every` commits off."""
        return replace(self, commits=0, refused=0)

    def verified(self, state: AdaptState) -> Self:
        """After a commit of a verified state."""
        passed = self.verifications + 1
        renew = passed >= self.settings.older_every
        return replace(
            self,
            last_good=state,
            older=self.last_good if renew else self.older,
            verifications=0 if renew else passed,
            rung=Rung(max(self.rung - 1, 0)),
            commits=0,
            refused=0,
        )

    def refuse(self, current: AdaptState) -> tuple[Self, Rung | None]:
        """After a step refused by the cheap checks: the rung climbed, if it was one too many."""
        refused = replace(self, refused=self.refused + 1)
        return refused.climb(current) if refused.refused >= self.settings.refusals else (refused, None)

    def climb(self, current: AdaptState) -> tuple[Self, Rung]:
        """After a failed verification: the rung to go to from the committed state `current`."""
        rung = self.rung
        while rung < Rung.FROZEN and _same(self.target(rung), current):
            rung = Rung(rung + 1)
        climbed = replace(self, rung=Rung(min(rung + 1, Rung.FROZEN)), commits=0, refused=0)
        if rung is Rung.FROZEN:
            climbed = replace(climbed, rung=Rung.SOURCE, frozen_frames=self.settings.freeze_frames)
        return climbed, rung

    def target(self, rung: Rung) -> AdaptState:
        """The state a rung goes back to."""
        return {Rung.LAST_GOOD: self.last_good, Rung.OLDER: self.older}.get(rung, self.source)

    def rebase(self, state: AdaptState) -> Self:
        """After the state was set from outside, or restored from a snapshot verified before."""
        return replace(self, last_good=state, older=self.source, commits=0, verifications=0, refused=0)


def _same(first: AdaptState, second: AdaptState) -> bool:
    if first is second:
        return True
    return first.specs == second.specs and all(np.array_equal(first[name], second[name]) for name in first)
