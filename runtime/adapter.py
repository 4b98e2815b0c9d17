"""The run time in one object: predict every frame, and adapt on the way.

    frame → fit → infer with the committed θ → Prediction
                └→ buffer of B distinct frames → one adaptation step → guard → commit, or count and go on

Adaptation never stops inference: a step that fails or is refused leaves the state as it was.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import EngineError, MggEdgeError, UsageError
from mgg_edge.manifest import Manifest
from mgg_edge.runtime.buffer import FrameBuffer
from mgg_edge.runtime.bundle import Bundle
from mgg_edge.runtime.engine import Engine, open_engine
from mgg_edge.runtime.guard import StepLimits, check_step, default_limits
from mgg_edge.runtime.prediction import Prediction
from mgg_edge.runtime.preprocess import check_picture, fit
from mgg_edge.state import AdaptState

__all__ = ["SCHEDULES", "Adapter", "Counters", "Prediction"]

SCHEDULES = ("always", "off")
# Percentiles of the latest frames; a stream has no end, the memory for its times must have one.
MAX_TIMES = 1 << 16
MAX_LOGGED_REASONS = 50
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counters:
    """What an adapter has done: frames predicted, updates committed, updates refused or failed."""

    frames_inferred: int = 0
    adapt_steps: int = 0
    adapt_rejected: int = 0


class Adapter:
    """Predicts frames one by one and adapts to them; for one camera, used by one thread at a time.

    Args:
        bundle: a verified bundle.
        engine: an engine of that bundle; closed with the adapter.
        adapt: `always` makes a step whenever B distinct frames have come together, `off` never does.
        limits: bounds of one step; None takes those of the bundle's update rule.

    Raises:
        UsageError: an unknown schedule.
    """

    def __init__(
        self, bundle: Bundle, engine: Engine, *, adapt: str = "always", limits: StepLimits | None = None
    ) -> None:
        _check_schedule(adapt)
        self.bundle_id = bundle.id
        self._manifest = bundle.manifest
        self._initial_state = bundle.initial_state
        self._engine, self._adapt = engine, adapt
        self._limits = limits or default_limits(bundle.manifest.rule)
        self._buffer = FrameBuffer(bundle.manifest.adapt_batch)
        self._counters, self._step, self._adapted = Counters(), 0, False
        self._infer_times_ms: deque[float] = deque(maxlen=MAX_TIMES)
        self._adapt_times_ms: deque[float] = deque(maxlen=MAX_TIMES)
        self._last_rejection: str | None = None
        self._logged: set[str] = set()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        engine: str = "auto",
        adapt: str = "always",
        threads: int | None = None,
    ) -> Self:
        """Open a bundle file.

        Args:
            path: the `.mgg` file.
            engine: `auto` or `cpu`.
            adapt: `always` or `off`.
            threads: processor threads; None leaves the number to the engine.

        Raises:
            UsageError: no such file, or an unknown engine or schedule.
            MissingDependencyError: the engine's package is not installed.
            MggEdgeError: a bundle that is damaged or that the engine refuses.
        """
        _check_schedule(adapt)
        bundle = Bundle.load(path)
        return cls(bundle, open_engine(bundle, engine, threads=threads, with_adapt=adapt != "off"), adapt=adapt)

    def __call__(self, frame: npt.NDArray[np.uint8]) -> Prediction:
        """Predict one frame, then make an adaptation step if one is due.

        Args:
            frame: u8[H,W,3] RGB of any size.

        Raises:
            UsageError: a frame of another type or shape.
            EngineError: inference failed.
        """
        start_s = time.perf_counter()
        fitted = fit(check_picture(frame), self._manifest.preprocess)
        logits = self._infer(fitted)
        prediction = Prediction.of(logits, self._manifest.labels, adapted=self._adapted, step=self._step)
        self._infer_times_ms.append((time.perf_counter() - start_s) * 1e3)
        self._counters = replace(self._counters, frames_inferred=self._counters.frames_inferred + 1)
        if self._adapt != "off":
            self._observe(fitted)
        return prediction

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._manifest

    @property
    def engine_name(self) -> str:
        """Engine, device and version."""
        return self._engine.name

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        return self._counters

    @property
    def last_rejection(self) -> str | None:
        """Why the latest refused or failed step was not committed."""
        return self._last_rejection

    @property
    def infer_times_ms(self) -> tuple[float, ...]:
        """Time of each of the latest inferences, resizing included."""
        return tuple(self._infer_times_ms)

    @property
    def adapt_times_ms(self) -> tuple[float, ...]:
        """Time of each of the latest adaptation steps, guard included."""
        return tuple(self._adapt_times_ms)

    def state(self) -> AdaptState:
        """Copy of the committed state."""
        return self._engine.state()

    def load_state(self, state: AdaptState) -> None:
        """Continue from a state of this bundle.

        Raises:
            StateError: other names, types or shapes than the bundle's, or numbers that are not finite.
        """
        self._engine.load_state(state)
        self._buffer = self._buffer.clear()
        self._adapted = not np.array_equal(state["theta"], self._initial_state["theta"])
        # A rule without a step counter starts to count anew.
        self._step = int(state["step"]) if "step" in state else 0

    def close(self) -> None:
        """Release the engine; safe to call twice."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _infer(self, fitted: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        batch = np.broadcast_to(fitted, (self._manifest.infer_batch, *fitted.shape))
        logits: npt.NDArray[np.float32] = self._engine.infer(batch)[0][0]
        if np.isfinite(logits).all():
            return logits
        if not self._adapted:
            raise EngineError("infer: expected finite logits from the source model, found NaN or Inf")
        self._reject("the adapted model gave logits that are not finite; back to the source model")
        self.load_state(self._initial_state)
        return self._infer(fitted)

    def _observe(self, fitted: npt.NDArray[np.uint8]) -> None:
        self._buffer = self._buffer.add(fitted)
        if not self._buffer.is_full:
            return
        batch, self._buffer = self._buffer.batch(), self._buffer.clear()
        start_s = time.perf_counter()
        refusal = self._try_step(batch)
        self._adapt_times_ms.append((time.perf_counter() - start_s) * 1e3)
        if refusal is not None:
            self._reject(refusal)
            return
        self._step, self._adapted = self._step + 1, True
        self._counters = replace(self._counters, adapt_steps=self._counters.adapt_steps + 1)

    def _try_step(self, batch: npt.NDArray[np.uint8]) -> str | None:
        try:
            logits, diagnostics = self._engine.adapt(batch)
            if not np.isfinite(logits).all():
                return "logits are not finite"
            if refusal := check_step(self._engine.state(), self._engine.candidate, diagnostics, self._limits):
                return refusal
            self._engine.commit()
        except MggEdgeError as error:
            return str(error)
        return None

    def _reject(self, reason: str) -> None:
        self._last_rejection = reason
        self._counters = replace(self._counters, adapt_rejected=self._counters.adapt_rejected + 1)
        if reason not in self._logged and len(self._logged) < MAX_LOGGED_REASONS:
            self._logged.add(reason)
            _logger.warning("adaptation step refused: %s", reason)


def _check_schedule(adapt: str) -> None:
    if adapt not in SCHEDULES:
        raise UsageError(f"adapt: expected one of {', '.join(SCHEDULES)}, found '{adapt}'")
