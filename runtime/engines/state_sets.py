"""The two sets of state buffers that every engine owns: a step reads the committed one and writes the other."""

from __future__ import annotations

from typing import Generic, TypeVar

from mgg_edge.errors import StateError

__all__ = ["StateSets"]

SetT = TypeVar("SetT")


class StateSets(Generic[SetT]):
    """Two sets, one of them committed; to commit is to swap which.

    Attributes:
        both: the sets; a step from `both[i]` writes `both[1 - i]`.
        place: i, which of them is committed.

    Args:
        first: committed at the start.
        second: the other.
    """

    def __init__(self, first: SetT, second: SetT) -> None:
        self.both = (first, second)
        self.place = 0
        self._has_candidate = False

    @property
    def committed(self) -> SetT:
        """The set a step reads."""
        return self.both[self.place]

    @property
    def candidate(self) -> SetT:
        """The set the last step wrote.

        Raises:
            StateError: no step was made since the last commit.
        """
        if not self._has_candidate:
            raise StateError("state: expected a candidate, found none; call adapt first")
        return self.both[1 - self.place]

    def propose(self) -> None:
        """A step has written the other set."""
        self._has_candidate = True

    def drop(self) -> None:
        """What the other set holds is no candidate, or no longer one."""
        self._has_candidate = False

    def commit(self) -> None:
        """Make the candidate the committed set.

        Raises:
            StateError: no step was made since the last commit.
        """
        _ = self.candidate  # raises where there is none
        self.place, self._has_candidate = 1 - self.place, False
