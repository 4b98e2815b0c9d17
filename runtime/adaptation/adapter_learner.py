"""The adapting half of an adapter: observe → gate → buffer → schedule → step → guard → commit, roll back or restore.

    observe   after each inferred frame, on the caller's thread: a fraction of a millisecond
    take      the work that is due, if any
    perform   the step: on the caller's thread (sync) or on a worker's (background)

What inference uses is one immutable object, `Published`. A commit, a rollback, a restored snapshot, a loaded state:
each is one swap of that reference. A step that finds another version published than it started from is void.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from mgg_edge.errors import MggEdgeError
from mgg_edge.runtime.adaptation.adapter_budget import Budget
from mgg_edge.runtime.adaptation.adapter_events import Event, Hold, Published, Work
from mgg_edge.runtime.adaptation.adapter_settings import Counters
from mgg_edge.runtime.adaptation.adapter_step import Attempt, Stepper
from mgg_edge.runtime.adaptation.adapter_times import Times
from mgg_edge.runtime.adaptation.adapter_watch import Watch
from mgg_edge.runtime.adaptation.buffer import Batch
from mgg_edge.runtime.adaptation.gate import Observation
from mgg_edge.runtime.adaptation.guard import Breach, BreachCode
from mgg_edge.runtime.adaptation.guard_ladder import Rung
from mgg_edge.runtime.adaptation.schedule import Action
from mgg_edge.runtime.adaptation.schedule_bank import Snapshot
from mgg_edge.runtime.engines.engine import Engine, Inference
from mgg_edge.state import AdaptState

__all__ = ["Learner"]

# Percentiles of the latest steps; a stream has no end, the memory for its times must have one.
MAX_LOGGED_REASONS = 50
_logger = logging.getLogger(__name__)


class Learner:
    """Adapts one camera's state; `observe` and `take` on one thread, `perform` on the same or another.

    Args:
        source: the source model's state.
        engine: opened with its adaptation graph; only `perform` uses it, but for inference under a given state.
        stepper: makes and checks steps with that engine.
        watch: what decides.
        reads: names of the state tensors that inference reads.
        budget: how long a step may take.
        journal: told of every event, on the thread it happens on.
        clock: seconds, monotonic.

    Attributes:
        published: what inference uses.
        watch: what decides, as of now.
        held: what keeps it from learning until `release`, or None.
        last_rejection: why the latest refused or failed step was not committed.
        times: durations of steps.
        lock: held for every change of these, never during a step or an inference.
    """

    def __init__(
        self,
        source: AdaptState,
        engine: Engine,
        stepper: Stepper,
        watch: Watch,
        *,
        reads: Sequence[str] = ("theta",),
        budget: Budget | None = None,
        journal: Callable[[Event], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._source, self._engine, self._stepper, self._reads = source, engine, stepper, reads
        self._budget, self._journal, self._clock = budget or Budget(), journal, clock
        self._engine_version, self._logged = 0, set[str]()
        self._performing, self.lock = threading.Lock(), threading.RLock()
        self.published, self.watch = Published(source), watch
        self._first_watch, self._put_aside = watch, self.published
        self.held: Hold | None = None
        self.last_rejection: str | None = None
        self.times = Times()

    @property
    def counters(self) -> Counters:
        """What was done so far."""
        return self.watch.counters

    @property
    def learned(self) -> Published:
        """What was learned: what inference uses, or would but for a pause."""
        return self._put_aside if self.held is Hold.PAUSED else self.published

    def hold(self, how: Hold) -> None:
        """Learn nothing until `release`; a step being made is void."""
        with self.lock:
            if self.held is not None:
                self.release()
            self.held, self._put_aside = how, self.published
            if how is Hold.PAUSED:
                self._publish(self._source, 0)
            self._tell(how.event)

    def release(self) -> None:
        """Go on from where `hold` found it; nothing happens where it holds nothing."""
        with self.lock:
            if self.held is None:
                return
            if self.held is Hold.PAUSED:
                self._publish(self._put_aside.state, self._put_aside.step)
            self.held, self.watch = None, self.watch.jumped()
            self._tell("resume")

    def forget(self) -> None:
        """Back to the source model, as if nothing had been seen; counters go on."""
        with self.lock:
            self.held = None
            self._publish(self._source, 0)
            self.watch = replace(self._first_watch, counters=self.counters)
            self._tell("reset")

    def observe(self, seen: Observation) -> str | None:
        """Take note of an inferred frame; the reason to refuse it, or None."""
        with self.lock:
            if self.held is not None:
                self.count_frame()
                return self.held.value
            self.watch, reason = self.watch.observe(seen)
            if reason is None and not self.published.adapted:
                # As long as the source model infers, its certainty comes for nothing.
                self._stepper.canaries = self._stepper.canaries.offer(seen.frame, seen.logits)
            return reason

    def count_frame(self) -> None:
        """Take note of an inferred frame that nothing is learned from."""
        with self.lock:
            self.watch = replace(self.watch, counters=self.counters.plus(frames_inferred=1))

    def take(self, *, busy: bool = False) -> Work | None:
        """The work that is due, or None; what comes too late for the budget is dropped and counted.

        Args:
            busy: earlier work is still being performed, so that this has to wait.
        """
        with self.lock:
            if self.held is not None:
                return None
            self._budget, refusal = self._budget.ask(self.watch.is_due, busy, self._clock())
            if refusal is not None:
                self.watch = self.watch.dropped(refusal)
                self._tell("drop", reason=refusal)
            if refusal is not None or busy or not self.watch.is_due:
                return None
            work = Work(self.watch.action, self.watch.buffer.batch())
            self.watch = self.watch.taken()
            return work

    def perform(self, work: Work) -> None:
        """Try the snapshots, if it was a wake, and make a step, if none fits."""
        with self._performing:
            start_s = self._clock()
            try:
                self._sync_engine()
                if work.action is not Action.WAKE or not self._restore(work.batch):
                    self._step(work.batch)
            except MggEdgeError as error:
                self._reject(Breach(BreachCode.ENGINE, str(error)))
            elapsed_ms = (self._clock() - start_s) * 1e3
            with self.lock:
                self.times.add(elapsed_ms)
                self._budget, late = self._budget.measured(elapsed_ms)
                self.watch = replace(self.watch, counters=self.counters.plus(adapt_late=int(late)))

    def load(self, state: AdaptState, step: int, watch: Watch | None = None) -> None:
        """Publish a state from outside, checked already; with the watch that goes with it, or the schedule anew.

        A pause is over by that.
        """
        with self.lock:
            self.held = None if self.held is Hold.PAUSED else self.held
            self._publish(state, step)
            if watch is None:
                anew = self.watch.schedule.reset()
                watch = replace(self.watch, schedule=anew, ladder=self.watch.ladder.rebase(state)).jumped()
            self.watch = watch
            self._tell("load")

    def abandon(self, failed: Published) -> None:
        """Back to the source model at once, if `failed` is still what inference uses; never waits for a step."""
        with self.lock:
            if self.published.version != failed.version:
                return
            message = "the adapted model gave logits that are not finite; back to the source model"
            self._reject(Breach(BreachCode.NON_FINITE, message))
            self.load(self._source, 0)

    def settle(self, since: int, settled: Inference) -> None:
        """Infer by what was folded from the numbers published since then, unless others have been by now."""
        with self.lock:
            if self.published.since == since:
                self.published = replace(self.published, settled=settled)

    def _sync_engine(self) -> None:
        """The engine follows what was published; only `commit` goes the other way."""
        published = self.published
        if self._engine_version != published.version:
            self._engine.load_state(published.state)
            self._engine_version = published.version

    def _step(self, batch: Batch) -> None:
        before, watch = self.published, self.watch
        if self._engine_version != before.version:
            return  # replaced since this work began; the frames belong to what was
        verify = watch.ladder.verification_due or self._stepper.verifies_all
        attempt = self._stepper.attempt(before.state, batch, watch.window if verify else None)
        with self.lock:
            if self._is_void(before):
                self._tell("void", batch, attempt)
                return
            breach = attempt.breach or self._commit(before, attempt)
            if breach is None and attempt.candidate is not None:
                ladder = self.watch.ladder.after_commit(attempt.candidate, attempt.verified)
                self.watch = replace(self.watch, ladder=ladder, counters=self.counters.plus(adapt_steps=1))
                self._tell("commit", batch, attempt)
            elif breach is not None:
                self._reject(breach)
                self._tell("refuse", batch, attempt, breach.code)
                self._climb(breach)
            self.watch, froze = self.watch.stepped()
        if froze:
            self._remember(batch)

    def _is_void(self, begun: Published) -> bool:
        """Whether work that began with these numbers came too late: others were published, or a person said hold."""
        return self.published.version != begun.version or self.held is not None

    def _commit(self, before: Published, attempt: Attempt) -> Breach | None:
        if attempt.candidate is None:
            return Breach(BreachCode.ENGINE, "the step gave no state")
        try:
            self._engine.commit()
        except MggEdgeError as error:
            return Breach(BreachCode.ENGINE, str(error))
        self._publish(attempt.candidate, before.step + 1)
        self._engine_version = self.published.version
        return None

    def _restore(self, batch: Batch) -> bool:
        """Take the snapshot that fits, or else the source; True if nothing is left to learn from this batch."""
        present, bank, meter = self.published, self.watch.bank, self.watch.meter
        chosen = None
        if meter is not None:
            chosen = self._stepper.choose(batch.frames, present.state, bank.candidates, meter.statistics)
        fits = chosen is not None
        state = self._source if chosen is None else chosen.state
        with self.lock:
            if self._is_void(present):
                return True
            self._publish(state, _steps(state, self.published.step))
            self.watch = replace(
                self.watch,
                schedule=self.watch.schedule.woken(fits),
                bank=bank if chosen is None else bank.used(chosen),
                ladder=self.watch.ladder.rebase(state),
                counters=self.counters.plus(restores=int(fits)),
            ).jumped()
            self._tell("restore", batch, reason="fits" if fits else "source")
        self._sync_engine()
        return fits

    def _remember(self, batch: Batch) -> None:
        published, meter = self.published, self.watch.meter
        if meter is None or not published.adapted:
            return
        snapshot = Snapshot(published.state, self._stepper.fit(batch.frames, published.state, meter.statistics))
        with self.lock:
            self.watch = replace(self.watch, bank=self.watch.bank.keep(snapshot))

    def _climb(self, breach: Breach) -> None:
        """What the ladder makes of a refused step; a failing engine says nothing about the state."""
        if breach.code is BreachCode.ENGINE:
            return
        if breach.code is BreachCode.CALM:
            self._rest()
            return
        current = self.published.state
        rung: Rung | None
        if breach.code in (BreachCode.CANARY, BreachCode.COLLAPSE):
            ladder, rung = self.watch.ladder.climb(current)
        else:
            ladder, rung = self.watch.ladder.refuse(current)
        self.watch = replace(self.watch, ladder=ladder)
        if rung is None:
            return
        target = ladder.target(rung)
        self._publish(target, _steps(target, self.published.step))
        watch = replace(self.watch, counters=self.counters.plus(rollbacks=rung.label)).jumped()
        if rung >= Rung.SOURCE:
            watch = replace(watch, schedule=watch.schedule.reset())
        self.watch = watch
        self._tell("rollback", reason=rung.label)
        self._warn(f"rolled back to {rung.label}: {breach.message}")

    def _rest(self) -> None:
        """Back to the source, where there is nothing to adapt to."""
        if self.published.adapted:
            self._publish(self._source, 0)
            self.watch = replace(self.watch, ladder=self.watch.ladder.rebase(self._source)).jumped()
            self._tell("rest")

    def _publish(self, state: AdaptState, step: int) -> None:
        before, version = self.published, self.published.version + 1
        adapted = not self._reads_alike(state, self._source)
        kept = self._reads_alike(state, before.state)
        since, settled = (before.since, before.settled) if kept else (version, None)
        self.published = Published(state, step if adapted else 0, adapted, version, since, settled)

    def _reads_alike(self, one: AdaptState, other: AdaptState) -> bool:
        """Whether inference reads the same numbers of both states, bit for bit."""
        return all(one[name].tobytes() == other[name].tobytes() for name in self._reads)

    def _reject(self, breach: Breach) -> None:
        with self.lock:
            self.last_rejection = breach.message
            counters = self.counters.plus(adapt_rejected=1, rejected=breach.code)
            self.watch = replace(self.watch, counters=counters)
        if breach.code is not BreachCode.CALM:  # that is as it should be
            self._warn(f"adaptation step refused: {breach.message}")

    def _warn(self, text: str) -> None:
        """Log once a text, and not without end: a stream has none."""
        if text not in self._logged and len(self._logged) < MAX_LOGGED_REASONS:
            self._logged.add(text)
            _logger.warning("%s", text)

    def _tell(self, kind: str, batch: Batch | None = None, attempt: Attempt | None = None, reason: str = "") -> None:
        if self._journal is None:
            return
        published = self.published
        self._journal(
            Event(
                kind=kind,
                version=published.version,
                state=published.state,
                batch=batch,
                candidate=None if attempt is None else attempt.candidate,
                reason=str(reason),
                diagnostics=None if attempt is None else attempt.diagnostics,
            )
        )


def _steps(state: AdaptState, otherwise: int) -> int:
    """Updates behind a state, which most rules count themselves."""
    return int(state["step"]) if "step" in state else otherwise
