"""The run time in one object: predict every frame, and adapt on the way.

    frame → fit → infer with the published θ → Prediction
                       └→ gate → buffer of B diverse frames → schedule → step → guard → publish another θ, or count

Adaptation never stops inference: a step that fails or is refused leaves the state as it was. In the background it never
delays it either: inference takes whatever θ is published when it begins.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mgg_edge.compat import Self
from mgg_edge.errors import EngineError, UsageError
from mgg_edge.runtime.adaptation.adapter_budget import Budget
from mgg_edge.runtime.adaptation.adapter_checkpoint import Checkpoint, resumed_watch
from mgg_edge.runtime.adaptation.adapter_events import Event, Hold, Published, Work
from mgg_edge.runtime.adaptation.adapter_facts import AdapterFacts
from mgg_edge.runtime.adaptation.adapter_inference import infer_all
from mgg_edge.runtime.adaptation.adapter_learner import Learner
from mgg_edge.runtime.adaptation.adapter_settings import AdapterSettings, Counters
from mgg_edge.runtime.adaptation.adapter_settler import Settler
from mgg_edge.runtime.adaptation.adapter_step import Stepper
from mgg_edge.runtime.adaptation.adapter_times import Times
from mgg_edge.runtime.adaptation.adapter_watch import Watch
from mgg_edge.runtime.adaptation.adapter_worker import Worker
from mgg_edge.runtime.adaptation.buffer import Buffer
from mgg_edge.runtime.adaptation.gate import Gate, Observation
from mgg_edge.runtime.adaptation.guard import StepLimits
from mgg_edge.runtime.adaptation.schedule import AUTO, SCHEDULES, Schedule, schedule_of
from mgg_edge.runtime.adaptation.site import default_schedule
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Engine, check_state, open_engine
from mgg_edge.runtime.prediction import Prediction
from mgg_edge.runtime.preprocess import check_picture, fit
from mgg_edge.state import AdaptState

__all__ = ["SCHEDULES", "Adapter", "AdapterSettings", "Counters", "Journal", "Prediction"]

# Percentiles of the latest frames; a stream has no end, the memory for its times must have one.
FORKED = (
    "adapter: it was opened in another process, whose engine and threads are not in this one; open an adapter after "
    "the fork, in the process that uses it"
)
Frames = npt.NDArray[np.uint8]


class Journal(Protocol):
    """Told of everything that decides about θ; called on the threads it happens on, must not raise."""

    def frame(self, seen: Observation, published: Published, refusal: str | None, /) -> None:
        """A frame was inferred under `published`, and refused by the gate or admitted."""

    def event(self, event: Event, /) -> None:
        """The state changed, or was kept from changing."""


class Adapter(AdapterFacts):
    """Predicts frames and adapts to them, for one camera; safe to call from several threads, one frame at a time.

    Args:
        bundle: a verified bundle.
        engine: an engine of that bundle; closed with the adapter.
        adapt: `auto` takes what calibration found, or the schedule that the bundle's rule is made for. `always` and
            `window` make a step whenever B diverse frames have come together, `burst` makes some and waits until the
            drift calls for more, `off` never does. Or a `Schedule` of your own.
        limits: bounds of one step; None takes those of the settings.
        settings: everything else; None takes the defaults.
        background: adapt on a thread of its own instead of between two frames.
        gate, buffer: parts of your own instead of the usual ones.
        journal: told of everything that decides about θ.

    Attributes:
        bundle_id: id of the bundle.
        schedule_name: when it adapts.
        resumed: whether it goes on from a checkpoint.

    Raises:
        UsageError: an unknown schedule, or one that the bundle has no source statistics for.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        *,
        adapt: str | Schedule = AUTO,
        limits: StepLimits | None = None,
        settings: AdapterSettings | None = None,
        background: bool = False,
        gate: Gate | None = None,
        buffer: Buffer | None = None,
        journal: Journal | None = None,
    ) -> None:
        chosen = settings or AdapterSettings()
        self.settings = chosen if limits is None else replace(chosen, limits=limits)
        default = default_schedule(bundle.manifest)
        schedule = schedule_of(adapt, self.settings.burst, default) if isinstance(adapt, str) else adapt
        self.bundle_id, self.schedule_name, self.resumed = bundle.id, schedule.name, False
        self._bundle, self._engine, self._journal = bundle, engine, journal
        stepper = Stepper(bundle, engine, self.settings)
        self._limits = stepper.limits
        self._learner = Learner(
            bundle.initial_state,
            engine,
            stepper,
            Watch.start(bundle, schedule, self.settings, gate, buffer),
            reads=bundle.manifest.infer_state,
            budget=Budget(self.settings.budget_ms),
            journal=None if journal is None else journal.event,
        )
        self._worker = Worker[Work](self._learner.perform) if background and self._adapts else None
        looked_at = self._learner.watch.meter is not None or gate is not None or journal is not None
        self._settler = Settler(
            engine, self._learner, self.settings.settle_frames, features=looked_at, background=background
        )
        if not self._adapts and self.settings.settle_frames:
            self._settler.settle(self._learner.published)
        self._calling = threading.RLock()
        self._infer_times = Times()
        self._process = os.getpid()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        engine: str = "auto",
        adapt: str = AUTO,
        threads: int | None = None,
        settings: AdapterSettings | None = None,
        background: bool = False,
        journal: Journal | None = None,
    ) -> Self:
        """Open a bundle file.

        Args:
            path: the `.mgg` file.
            engine: `auto`, `tensorrt`, `cuda` or `cpu`; see `open_engine`.
            adapt: `auto`, `always`, `window`, `burst` or `off`.
            threads: processor threads; None leaves the number to the engine.
            settings: how to adapt; None takes the defaults.
            background: adapt on a thread of its own instead of between two frames.
            journal: told of everything that decides about θ.

        Raises:
            UsageError: no such file, or an unknown engine or schedule.
            MissingDependencyError: the engine's package is not installed.
            MggEdgeError: a bundle that is damaged or that the engine refuses.
        """
        schedule_of(adapt)
        bundle = Bundle.load(path)
        opened = open_engine(bundle, engine, threads=threads, with_adapt=adapt != "off")
        try:
            return cls(bundle, opened, adapt=adapt, settings=settings, background=background, journal=journal)
        except BaseException:
            opened.close()
            raise

    def __call__(self, frame: Frames, time_s: float | None = None) -> Prediction:
        """Predict one frame, then see to an adaptation step if one is due.

        Args:
            frame: u8[H,W,3] RGB of any size.
            time_s: its time by the source's clock, seconds; frames whose time does not increase are not learned from.

        Raises:
            UsageError: a frame of another type or shape.
            EngineError: inference failed.
        """
        return self.predict_batch((frame,), None if time_s is None else (time_s,))[0]

    def predict_batch(
        self, frames: Sequence[Frames] | Frames, times_s: Sequence[float] | None = None
    ) -> list[Prediction]:
        """Predict several frames under the same θ, then see to adaptation for each in turn.

        Args:
            frames: u8[H,W,3] RGB of any sizes, or one array u8[n,H,W,3].
            times_s: their times, seconds, or None.

        Raises:
            UsageError: a frame of another type or shape, times that are not one for each frame, or another process
                than the one that opened the adapter.
            EngineError: inference failed.
        """
        if times_s is not None and len(times_s) != len(frames):
            raise UsageError(f"times_s: expected {len(frames)} times, one a frame, found {len(times_s)}")
        if os.getpid() != self._process:
            raise UsageError(FORKED)
        with self._calling:
            start_s = time.perf_counter()
            fitted = [fit(check_picture(frame), self.manifest.preprocess) for frame in frames]
            if not fitted:
                return []
            published, logits, features = self._infer(np.stack(fitted))
            labels = self.manifest.labels
            predictions = [Prediction.of(row, labels, adapted=published.adapted, step=published.step) for row in logits]
            elapsed_ms = (time.perf_counter() - start_s) * 1e3 / len(fitted)
            for number, image in enumerate(fitted):
                self._infer_times.add(elapsed_ms)
                moment_s = None if times_s is None else times_s[number]
                self._observe(image, published, logits[number], features[number], moment_s)
                self._settler.observe(published)
            return predictions

    def state(self) -> AdaptState:
        """The committed state."""
        return self._learner.published.state

    def load_state(self, state: AdaptState) -> None:
        """Continue from a state of this bundle; a step being made is void.

        Raises:
            StateError: other names, types or shapes than the bundle's, or numbers that are not finite.
        """
        check_state(state, self.manifest.state)
        # A rule without a step counter starts to count anew.
        self._learner.load(state, int(state["step"]) if "step" in state else 0)

    def checkpoint(self) -> Checkpoint:
        """All that a later run needs to go on from here."""
        with self._learner.lock:
            return Checkpoint.of(self.bundle_id, self._learner.learned, self._learner.watch)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this bundle; pictures gathered for the next step are not part of it.

        Raises:
            StateError: it belongs to another bundle or does not fit.
        """
        checkpoint.check(self.bundle_id, self.manifest.state)
        with self._learner.lock:
            self._learner.load(checkpoint.state, checkpoint.step, resumed_watch(self._learner.watch, checkpoint))
            self.resumed = True

    def pause(self) -> None:
        """Infer by the source model and learn nothing until `go_on`, which brings back what was learned."""
        self._learner.hold(Hold.PAUSED)

    def freeze(self) -> None:
        """Leave θ as it is until `go_on`."""
        self._learner.hold(Hold.FROZEN)

    def go_on(self) -> None:
        """End a pause, or a freeze."""
        self._learner.release()

    def reset(self) -> None:
        """Back to the source model, all that was learned and seen forgotten."""
        self._learner.forget()

    def drain(self) -> None:
        """Wait for a step being made in the background."""
        if self._worker is not None:
            self._worker.drain()

    def close(self) -> None:
        """End adaptation after the step in hand, and release the engine; safe to call twice."""
        if os.getpid() != self._process:
            return  # threads and locks of another process cannot be waited for here
        if self._worker is not None:
            self._worker.close()
        with self._calling:
            self._settler.close()
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _adapts(self) -> bool:
        return self.schedule_name != "off"

    def _infer(self, fitted: Frames) -> tuple[Published, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        published = self._learner.published
        batch = self.manifest.infer_batch
        logits, features = infer_all(self._engine, fitted, published.state, batch, published.settled)
        if np.isfinite(logits).all():
            return published, logits, features
        if not published.adapted:
            raise EngineError("infer: expected finite logits from the source model, found NaN or Inf")
        self._learner.abandon(published)
        return self._infer(fitted)

    def _observe(
        self,
        image: Frames,
        published: Published,
        logits: npt.NDArray[np.float32],
        features: npt.NDArray[np.float32],
        time_s: float | None,
    ) -> None:
        if not self._adapts and self._journal is None:
            self._learner.count_frame()
            return
        seen = Observation.of(self.counters.frames_inferred, image, logits, features, time_s)
        refusal = self._learner.observe(seen)
        if self._journal is not None:
            self._journal.frame(seen, published, refusal)
        if self._worker is None:
            if (work := self._learner.take()) is not None:
                self._learner.perform(work)
        elif (work := self._learner.take(busy=self._worker.busy)) is not None:
            self._worker.submit(work)
