"""When inference has θ folded in: once it has stood still for a while.

Waiting costs the frames that could have been faster, folding costs a session that the next commit may void. Where both
cost the same, waiting for as long as folding takes is never worse than twice the best that could be known beforehand.
"""

from __future__ import annotations

import logging
import threading

from mgg_edge.errors import MggEdgeError
from mgg_edge.runtime.adaptation.adapter_events import Published
from mgg_edge.runtime.adaptation.adapter_learner import Learner
from mgg_edge.runtime.engines.engine import Engine

__all__ = ["Settler"]

_logger = logging.getLogger(__name__)


class Settler:
    """Folds what inference reads of the published state into an inference of its own.

    Args:
        engine: does the folding.
        learner: publishes it.
        frames: through which the numbers must stand still; 0 never folds.
        features: whether anything looks at the features of an inferred frame.
        background: fold on a thread of its own instead of between two frames.
    """

    def __init__(self, engine: Engine, learner: Learner, frames: int, *, features: bool, background: bool) -> None:
        self._engine, self._learner, self._frames = engine, learner, frames
        self._features, self._background = features, background
        self._since, self._stood, self._pays = -1, 0, frames > 0
        self._thread: threading.Thread | None = None

    def observe(self, published: Published) -> None:
        """Take note of a frame inferred by what is published; on one thread at a time."""
        if not self._pays or published.settled is not None:
            return
        if published.since != self._since:
            self._since, self._stood = published.since, 0
        self._stood += 1
        if self._stood >= self._frames and not self._is_folding:
            self._begin(published)

    def settle(self, published: Published) -> None:
        """Fold at once, whatever has stood still; raises nothing: without it inference is slower, and the same."""
        try:
            settled = self._engine.settle(published.state, features=self._features)
        except MggEdgeError as error:
            self._pays = False
            _logger.warning("inference stays as it is: %s", error)
            return
        if settled is None:
            self._pays = False
        else:
            self._learner.settle(published.since, settled)

    def close(self) -> None:
        """Wait for a folding in hand; safe to call twice."""
        if self._thread is not None:
            self._thread.join()

    @property
    def _is_folding(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _begin(self, published: Published) -> None:
        if not self._background:
            self.settle(published)
            return
        # Not the adaptation's thread: threads of the session would inherit its low priority.
        self._thread = threading.Thread(target=self.settle, args=(published,), name="mgg-edge settling", daemon=True)
        self._thread.start()
