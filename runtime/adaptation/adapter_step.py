"""The costly half of adaptation: one step with its checks, and the trial of snapshots.

It decides nothing and keeps nothing but the canaries; it runs on one thread at a time, beside inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import MggEdgeError
from mgg_edge.runtime.adaptation.adapter_inference import infer_all
from mgg_edge.runtime.adaptation.adapter_settings import AdapterSettings
from mgg_edge.runtime.adaptation.buffer import Batch
from mgg_edge.runtime.adaptation.guard import Breach, BreachCode, check_logits, check_step, default_limits
from mgg_edge.runtime.adaptation.guard_canary import CanarySet, check_canaries, entropies
from mgg_edge.runtime.adaptation.guard_collapse import ClassWindow, check_collapse
from mgg_edge.runtime.adaptation.schedule_bank import Snapshot, best_fit
from mgg_edge.runtime.adaptation.schedule_drift import SourceStatistics
from mgg_edge.runtime.adaptation.site_statistics import MOVING, with_clean_statistics
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Diagnostics, Engine
from mgg_edge.state import AdaptState

__all__ = ["Attempt", "Stepper"]

Array = npt.NDArray[np.float32]
# Under θ of severe weather 94 to 98 % of the reader's clean predictions stay (docs/LOG.md): less means harm.
SITE_AGREEMENT = 0.8
# A window rule is back at θ₀ by itself when the weather clears, so θ may be good for nothing but its weather: on real
# pictures three in four stay. Less than half is no weather any more.
SITE_AGREEMENT_OF_WINDOW = 0.5


@dataclass(frozen=True)
class Attempt:
    """What came of a step.

    Attributes:
        candidate: copy of the state it proposes, or None where there is none fit to be looked at.
        breach: why it must not be committed, or None.
        diagnostics: its scalars, or None where the engine failed.
        verified: whether canaries or predictions were there to judge it by, and it passed.
    """

    candidate: AdaptState | None
    breach: Breach | None
    diagnostics: Diagnostics | None
    verified: bool = False


class Stepper:
    """Makes and checks steps.

    Args:
        bundle: a verified bundle.
        engine: an engine of that bundle, opened with its adaptation graph.
        settings: limits, canaries, collapse.

    Attributes:
        canaries: frames that candidates are verified on; replaced as a whole.
        verifies_all: every candidate is verified, as the site has canaries of its own; otherwise some are.
        limits: bounds of one step.
    """

    def __init__(self, bundle: Bundle, engine: Engine, settings: AdapterSettings) -> None:
        self._engine, self._settings, self._source = engine, settings, bundle.initial_state
        self._batch = bundle.manifest.infer_batch
        self._site, self._of_source = bundle.manifest.site, bundle.manifest.rule.schedule == "window"
        self._knows_calm = bundle.manifest.rule.knows_calm
        self.limits = settings.limits or default_limits(bundle.manifest.rule, bundle.initial_state)
        self.canaries = _first_canaries(bundle, settings)
        self.verifies_all = self._site is not None

    def attempt(self, previous: AdaptState, batch: Batch, window: ClassWindow | None) -> Attempt:
        """One step from `previous`, the engine's committed state; commits nothing and raises nothing.

        Args:
            previous: the engine's committed state.
            batch: what to learn from.
            window: classes predicted lately, where the candidate is to be verified; None leaves that out.
        """
        try:
            logits, diagnostics = self._engine.adapt(batch.frames)
            candidate = self._engine.candidate
            breach = check_logits(logits) or check_step(previous, candidate, diagnostics, self.limits, self._source)
            breach = breach or self._check_calm(batch, logits, previous)
            verified = False
            if breach is None and window is not None:
                breach, verified = self._verify(candidate, batch, logits, window)
            copy = AdaptState({name: array.copy() for name, array in candidate.items()})
        except MggEdgeError as error:
            return Attempt(None, Breach(BreachCode.ENGINE, str(error)), None)
        return Attempt(copy, breach, diagnostics, verified)

    def fit(self, frames: npt.NDArray[np.uint8], state: AdaptState, statistics: SourceStatistics) -> float:
        """Drift of the mean features of frames u8[n,H,W,3] under a state."""
        _, features = infer_all(self._engine, frames, state, self._batch)
        return statistics.drift(features.mean(axis=0, dtype=np.float64))

    def choose(
        self,
        frames: npt.NDArray[np.uint8],
        present: AdaptState,
        candidates: Sequence[Snapshot],
        statistics: SourceStatistics,
    ) -> Snapshot | None:
        """The snapshot that fits frames u8[n,H,W,3], or None."""
        others = [candidate for candidate in candidates if candidate.state is not present]  # no better than itself
        drifts = [self.fit(frames, candidate.state, statistics) for candidate in others]
        chosen = best_fit(drifts, others, self.fit(frames, present, statistics))
        return None if chosen is None else others[chosen]

    def _check_calm(self, batch: Batch, logits: Array, previous: AdaptState) -> Breach | None:
        """At a calibrated site: refuse to adapt to frames the source model is as sure of as of clean ones.

        What passes may be as hard to name as anything in fog. Rules that tell the two apart by themselves are asked.
        """
        site = self._site
        if site is None or self._knows_calm:
            return None
        # A step reports the logits of the state it started from; those of a rule without a gradient are under θ₀. Where
        # statistics move, they are under the moved ones, never the source's.
        under_source = self._of_source or np.array_equal(previous["theta"], self._source["theta"])
        is_source = under_source and MOVING not in self._source
        found = logits if is_source else self._infer(batch.frames, self._source)
        if float(entropies(found).mean()) <= site.clean_entropy:
            return Breach(BreachCode.CALM, "the source model is as sure of these frames as of the site's clean ones")
        return None

    def _verify(
        self, candidate: AdaptState, batch: Batch, logits: Array, window: ClassWindow
    ) -> tuple[Breach | None, bool]:
        """Why the candidate or what led to it is unsound, and whether it was judged and is sound."""
        if not self.canaries.is_full:
            newest = batch.frames[-1:]
            self.canaries = self.canaries.offer(newest[0], self._infer(newest, self._source)[0])
        judged = with_clean_statistics(candidate, self._source)
        if breach := check_canaries(self.canaries, lambda frames: self._infer(frames, judged), self._batch):
            return breach, False
        if window.is_suspicious and (
            breach := check_collapse(logits, self._infer(batch.frames, self._source), window.settings)
        ):
            return breach, False
        # A suspicion that B frames did not confirm is still one: only canaries can dispel it.
        return None, self.canaries.can_judge or (window.is_full and not window.is_suspicious)

    def _infer(self, frames: npt.NDArray[np.uint8], state: AdaptState) -> Array:
        return infer_all(self._engine, frames, state, self._batch)[0]


def _first_canaries(bundle: Bundle, settings: AdapterSettings) -> CanarySet:
    """The self-test's frames, as far as the source model is sure of them; a calibrated site brings its own."""
    canaries = CanarySet(settings.canary)
    if bundle.manifest.site is not None and bundle.manifest.site.canaries:
        frames = bundle.self_test["canaries"].astype(np.uint8)
        agreement = SITE_AGREEMENT_OF_WINDOW if bundle.manifest.rule.schedule == "window" else SITE_AGREEMENT
        at_site = replace(settings.canary, capacity=len(frames), min_agreement=agreement)
        return CanarySet(at_site, tuple(frames), bundle.manifest.site.canaries)
    logits = bundle.self_test["adapt.logits"].astype(np.float32)
    frames = bundle.self_test["frames"].astype(np.uint8)
    for frame, row in zip(frames, logits, strict=False):  # more frames than logits where the infer batch is larger
        canaries = canaries.offer(frame, row)
    return canaries
