"""The source model's opinion, for comparison with the adapted one's on the live page."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import MggEdgeError
from mgg_edge.runtime.adaptation.adapter import Adapter, Prediction

__all__ = ["FrozenModel"]

_logger = logging.getLogger(__name__)


class FrozenModel:
    """The source model beside the adapted one, for comparison; one for all cameras, opened when first asked.

    Args:
        opener: opens an adapter with `adapt="off"` on the same bundle; closed with this.
    """

    def __init__(self, opener: Callable[[], Adapter]) -> None:
        self._opener, self._lock = opener, threading.Lock()
        self._adapter: Adapter | None = None
        self._failed = False

    def ask(self, image: npt.NDArray[np.uint8]) -> Prediction | None:
        """What the source model says of a picture u8[H,W,3]; None once it has failed, which is logged."""
        with self._lock:
            if self._failed:
                return None
            try:
                self._adapter = self._adapter or self._opener()
                return self._adapter(image)
            except MggEdgeError as error:
                self._failed = True
                _logger.warning("live page: no comparison with the source model: %s", error)
                return None

    def close(self) -> None:
        """Release the engine; there are no more answers."""
        with self._lock:
            self._failed = True
            if self._adapter is not None:
                self._adapter.close()
