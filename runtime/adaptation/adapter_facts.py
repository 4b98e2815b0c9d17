"""What can be read off an adapter at any time, from any thread."""

from __future__ import annotations

from mgg_edge.manifest import Manifest
from mgg_edge.runtime.adaptation.adapter_events import Work
from mgg_edge.runtime.adaptation.adapter_learner import Learner
from mgg_edge.runtime.adaptation.adapter_settings import Counters
from mgg_edge.runtime.adaptation.adapter_times import Times
from mgg_edge.runtime.adaptation.adapter_worker import Worker
from mgg_edge.runtime.adaptation.guard import StepLimits, drift_ratio
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Engine

__all__ = ["AdapterFacts"]


class AdapterFacts:
    """The properties of `Adapter`; it has the parts they look at."""

    _bundle: Bundle
    _engine: Engine
    _learner: Learner
    _limits: StepLimits
    _worker: Worker[Work] | None
    _infer_times: Times

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self._bundle.manifest

    @property
    def engine_name(self) -> str:
        """Engine, device and version."""
        return self._engine.name

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        return self._learner.counters

    @property
    def last_rejection(self) -> str | None:
        """Why the latest refused or failed step was not committed."""
        return self._learner.last_rejection

    @property
    def drift(self) -> float | None:
        """How far the features are from the source's, in its standard deviations, where the schedule measures it."""
        return self._learner.watch.drift

    @property
    def drift_ratio(self) -> float:
        """‖θ − θ₀‖₂ over the largest the guard allows."""
        return drift_ratio(self._learner.published.state, self._bundle.initial_state, self._limits)

    @property
    def adapted(self) -> bool:
        """Whether θ is no longer the source model's."""
        return self._learner.published.adapted

    @property
    def held(self) -> str | None:
        """`paused` or `frozen` where a person has said so, or None."""
        held = self._learner.held
        return None if held is None else held.value

    @property
    def version(self) -> int:
        """Swaps of θ so far, by commits, rollbacks, restores and loads."""
        return self._learner.published.version

    @property
    def failure(self) -> Exception | None:
        """What ended adaptation in the background before its time; nobody foresaw it."""
        return None if self._worker is None else self._worker.failure

    @property
    def infer_times_ms(self) -> tuple[float, ...]:
        """Time of each of the latest inferences, resizing included."""
        return tuple(self._infer_times.latest_ms)

    @property
    def adapt_times_ms(self) -> tuple[float, ...]:
        """Time of each of the latest adaptation steps, guard included."""
        with self._learner.lock:
            return tuple(self._learner.times.latest_ms)

    @property
    def infer_totals(self) -> tuple[int, float]:
        """Inferences so far, and milliseconds that they took in all."""
        return self._infer_times.count, self._infer_times.sum_ms

    @property
    def adapt_totals(self) -> tuple[int, float]:
        """Adaptation steps so far, refused ones included, and milliseconds that they took in all."""
        with self._learner.lock:
            return self._learner.times.count, self._learner.times.sum_ms
