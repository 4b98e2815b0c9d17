"""What happens before a camera, as few events: labels that stay, adaptation, camera lost and back.

    p̄ ← a · p̄ + (1 − a) · p,   a = exp(−1 / frames)              smoothed softmax probabilities f64[C]
    label = argmax p̄  where  max p̄ ≥ threshold,  else `unknown`

    {"time": …, "camera": "door", "event": "label", "label": "bus", "before": "unknown", "probability": 0.8, "frame": 9}

| event | when | further values |
|---|---|---|
| `label` | the smoothed label is another one | `label`, `before`, `probability` of the smoothed distribution, `frame` |
| `adapted` | an update was committed | `step` |
| `refused` | a guard refused one; at most one a second | `reason` |
| `rolled-back` | θ was set back | `to` |
| `lost`, `back` | the connection broke, came again | `down_s` of `back` |
| `ended` | the camera's run is over | |
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.adapter import Adapter, Prediction
from mgg_edge.runtime.adaptation.adapter_settings import Counters
from mgg_edge.runtime.adaptation.guard import BreachCode
from mgg_edge.runtime.outputs.sinks_lines import clock_time
from mgg_edge.runtime.sources.source import Frame

__all__ = ["UNKNOWN", "EventSettings", "EventSink", "Smoothed"]

UNKNOWN = "unknown"
REFUSALS_S = 1.0
Emit = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class EventSettings:
    """When a label counts.

    Attributes:
        threshold: least smoothed probability, 0 to 1; below it nobody knows.
        frames: how many frames a label needs to prevail, about; 0 takes each as it is.

    Raises:
        UsageError: a value out of its range.
    """

    threshold: float = 0.5
    frames: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"event-threshold: expected a number from 0 to 1, found {self.threshold}")
        if not 0 <= self.frames <= 10_000:
            raise UsageError(f"event-frames: expected a number from 0 to 10000, found {self.frames}")


@dataclass(frozen=True)
class Smoothed:
    """The smoothed distribution of a camera's labels, and the label that follows from it.

    Attributes:
        probabilities: f64[C], or None before the first frame.
        label: a class's name, or `unknown`.
        probability: of the most probable class.
    """

    probabilities: npt.NDArray[np.float64] | None = None
    label: str = UNKNOWN
    probability: float = 0.0

    def after(self, prediction: Prediction, settings: EventSettings) -> Smoothed:
        """With one prediction more."""
        seen = prediction.probabilities()
        kept = math.exp(-1 / settings.frames) if settings.frames > 0 else 0.0
        mixed = seen if self.probabilities is None else kept * self.probabilities + (1 - kept) * seen
        best = int(mixed.argmax())
        known = mixed[best] >= settings.threshold
        return Smoothed(mixed, prediction.labels[best] if known else UNKNOWN, float(mixed[best]))


class EventSink:
    """A sink that turns one camera's predictions into events; `beat` notices what comes without a frame.

    All of it is called by the one thread that runs the camera.

    Args:
        camera: its name.
        adapter: its adapter; only counters are read.
        connection: says whether the camera is connected and for how long it was not; empty for what cannot be lost.
        settings: when a label counts.
        emit: takes an event and never blocks.
    """

    def __init__(
        self,
        camera: str,
        adapter: Adapter,
        connection: Callable[[], Mapping[str, Any]],
        settings: EventSettings,
        emit: Emit,
    ) -> None:
        self._camera, self._adapter, self._connection = camera, adapter, connection
        self._settings, self._emit = settings, emit
        self._smoothed = Smoothed()
        self._counters, self._connected, self._down_s = adapter.counters, True, 0.0
        self._refused_s = -REFUSALS_S

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Take note of one prediction."""
        self.beat()
        before, self._smoothed = self._smoothed, self._smoothed.after(prediction, self._settings)
        if self._smoothed.label != before.label:
            facts = {"label": self._smoothed.label, "before": before.label}
            self._say("label", **facts, probability=round(self._smoothed.probability, 4), frame=frame.index)

    def beat(self) -> None:
        """Look whether anything else has happened."""
        self._notice_adaptation(self._adapter.counters)
        facts = self._connection()
        connected = bool(facts.get("connected", True))
        if self._connected and not connected and facts.get("disconnects", 0):
            self._connected, self._down_s = False, float(facts["downtime_s"])
            self._say("lost")
        elif connected and not self._connected:
            self._connected = True
            self._say("back", down_s=round(float(facts["downtime_s"]) - self._down_s, 1))

    def close(self) -> None:
        """The camera's run is over."""
        self.beat()
        self._say("ended")

    def abort(self) -> None:
        """The camera's run is over."""
        self._say("ended")

    def _notice_adaptation(self, now: Counters) -> None:
        before, self._counters = self._counters, now
        if now is before:
            return
        if now.adapt_steps > before.adapt_steps:
            self._say("adapted", step=now.adapt_steps)
        for rung, count in now.rollbacks.items():
            if count > before.rollbacks.get(rung, 0):
                self._say("rolled-back", to=rung)
        if _refused(now) > _refused(before) and time.monotonic() - self._refused_s >= REFUSALS_S:
            self._refused_s = time.monotonic()
            self._say("refused", reason=self._adapter.last_rejection)

    def _say(self, event: str, **facts: Any) -> None:
        self._emit({"time": clock_time(time.time()), "camera": self._camera, "event": event, **facts})


def _refused(counters: Counters) -> int:
    return counters.adapt_rejected - counters.rejected.get(BreachCode.CALM, 0)
