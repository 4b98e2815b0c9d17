"""What engines on the processor share: two sets of state buffers as numpy arrays."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import check_state
from mgg_edge.runtime.engines.state_sets import StateSets
from mgg_edge.state import AdaptState

__all__ = ["HostStates"]


class HostStates:
    """The part of `Engine` that is about states.

    Args:
        bundle: whose.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._specs = bundle.manifest.state
        self._sets = StateSets(self._empty(), self._empty())

    @property
    def candidate(self) -> AdaptState:
        """Result of the last `adapt`: views, valid until the next `adapt` or `commit`.

        Raises:
            StateError: no step was made since the last commit.
        """
        return AdaptState(self._sets.candidate)

    def commit(self) -> None:
        """Make the candidate the committed state.

        Raises:
            StateError: no step was made since the last commit.
        """
        self._sets.commit()

    def state(self) -> AdaptState:
        """Copy of the committed state."""
        return AdaptState({name: array.copy() for name, array in self._sets.committed.items()})

    def load_state(self, state: AdaptState) -> None:
        """Replace the committed state; drops a candidate.

        Raises:
            StateError: other names, types or shapes than the bundle's, or numbers that are not finite.
        """
        check_state(state, self._specs)
        for name, array in state.items():
            np.copyto(self._sets.committed[name], array)
        self._sets.drop()

    def _empty(self) -> dict[str, npt.NDArray[np.generic]]:
        return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in self._specs}
