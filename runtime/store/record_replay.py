"""Replay of a record: the same pictures through the same decisions must give the same hashes, bit for bit.

The decisions (which frames made a batch, what was committed, when θ was swapped) are the record's, so that timing,
which no two runs share, does not matter. Everything computed is computed anew: each picture at model size, each
inference under the θ of its version, each step. The first hash that differs ends the replay and is explained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import StateError
from mgg_edge.runtime.adaptation.adapter_inference import infer_all
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Diagnostics, Engine, Inference
from mgg_edge.runtime.preprocess import Picture, fit
from mgg_edge.runtime.store.record import short_hash
from mgg_edge.runtime.store.record_file import EventLine, FrameLine, Record
from mgg_edge.runtime.store.record_pictures import KeptPictures
from mgg_edge.state import AdaptState

__all__ = ["Replay", "ReplayReport"]

_STEPS = frozenset({"commit", "refuse"})
_SWAPS = frozenset({"rollback", "restore", "rest", "load", "pause", "freeze", "resume", "reset"})
Progress = Callable[[int, int], None]


@dataclass
class ReplayReport:
    """What a replay found.

    Attributes:
        frames: recorded frames found in the source, with equal pictures and logits.
        skipped: pictures of the source that the record does not have: dropped when it was made.
        not_kept: recorded frames whose pictures were not kept, or came before those that were.
        steps: adaptation steps computed anew, with equal candidates.
        states: published states with equal hashes.
        not_replayed: decisions that leave nothing to compare, such as a step the engine failed at.
        difference: the first difference, explained, or None.
    """

    frames: int = 0
    skipped: int = 0
    not_kept: int = 0
    steps: int = 0
    states: int = 0
    not_replayed: int = 0
    difference: str | None = None


class _Differs(Exception):  # noqa: N818 (control flow within this module, not an error)
    pass


@dataclass
class Replay:
    """One replay.

    Args:
        record: what to replay.
        bundle: the bundle it was made with.
        engine: an engine of that bundle, opened with its adaptation graph; it is left in the replay's last state.
        kept: the pictures that were kept of the run, if not all of them are at hand; the replay begins where they do.

    Raises:
        StateError: the record is of another bundle.
    """

    record: Record
    bundle: Bundle
    engine: Engine
    kept: KeptPictures | None = None
    report: ReplayReport = field(default_factory=ReplayReport)

    def __post_init__(self) -> None:
        if self.record.bundle_id != self.bundle.id:
            raise StateError(
                f"{self.record.path}: the record belongs to bundle {self.record.bundle_id}, not to bundle "
                f"{self.bundle.id}; name the other bundle"
            )
        start = self.record.start if self.kept is None else self.kept.start
        self._state = self.bundle.initial_state if start is None else start.state
        if start is not None:
            start.check(self.bundle.id, self.bundle.manifest.state)
        # States that a later swap goes back to, and frames that a later step learns from, are kept; others are not.
        self._wanted = {line.state for line in self.record.events if line.event in _SWAPS}
        self._kept: dict[str, AdaptState] = {}
        for state in (self.bundle.initial_state, self._state):
            self._kept[state.digest()] = state
        if start is not None:
            others = (start.last_good, start.older, *(state for state, _ in start.snapshots))
            self._kept.update({state.digest(): state for state in others})
        self._last_use = {index: place for place, line in enumerate(self.record.events) for index in line.frames}
        self._hashes = {} if self.kept is None else {line.frame: line.sha for line in self.record.frames}
        self._pictures: dict[int, npt.NDArray[np.uint8]] = {}
        self._next_event = 0
        if self.kept is not None:
            self._next_event = sum(line.version <= self.kept.version for line in self.record.events)
            self.report.not_replayed = self._next_event
        self._held_digest = ""
        self._folded: tuple[AdaptState, Inference] | None = None

    def run(self, pictures: Iterable[Picture] = (), progress: Progress = lambda _done, _total: None) -> ReplayReport:
        """Replay with the pictures of the source, of any size, in order; with those that were kept, none are needed."""
        try:
            if self.kept is None:
                self._check(self._state.digest() == self.record.header["state"], "the state the run began with differs")
            source = iter(pictures)
            for done, line in enumerate(self.record.frames):
                self._catch_up(line)
                if (image := self._find(line, source)) is not None:
                    self._frame(line, image)
                progress(done + 1, len(self.record.frames))
            self._catch_up(None)
        except _Differs as found:
            self.report.difference = str(found)
        return self.report

    def _frame(self, line: FrameLine, image: npt.NDArray[np.uint8]) -> None:
        settled = self._settled() if line.settled else None
        logits, _ = infer_all(self.engine, image[None], self._state, self.bundle.manifest.infer_batch, settled)
        if (found := short_hash(logits[0])) != line.logits:
            raise _Differs(
                f"frame {line.frame}: same picture and same θ (version {line.version}), but logits {found} instead of "
                f"{line.logits}: {self._engines()}"
            )
        if self.kept is None and line.frame in self._last_use:
            self._pictures[line.frame] = image
        self.report.frames += 1

    def _settled(self) -> Inference:
        """Inference with the present state folded in, as the recorded run had it; kept until there is another."""
        if self._folded is None or self._folded[0] is not self._state:
            settled = self.engine.settle(self._state)
            if settled is None:
                raise _Differs(f"recorded with θ folded into inference, which is not done here: {self._engines()}")
            self._folded = (self._state, settled)
        return self._folded[1]

    def _find(self, line: FrameLine, source: Iterator[Picture]) -> npt.NDArray[np.uint8] | None:
        if self.kept is not None:
            image = None if line.version < self.kept.version else self._kept_picture(line.frame, self.kept)
            self.report.not_kept += image is None
            return image
        first, skipped = "", 0
        for picture in source:
            image = fit(picture, self.bundle.manifest.preprocess)
            found = short_hash(image)
            if found == line.sha:
                self.report.skipped += skipped
                return image
            first, skipped = first or found, skipped + 1
        if not skipped:
            raise _Differs(f"frame {line.frame}: the source has no more pictures, the record has")
        raise _Differs(
            f"frame {line.frame}: no picture of the source has the hash {line.sha}, the next one has {first}: another "
            f"source, or another version of the decoder (recorded {self._fact('av')})"
        )

    def _kept_picture(self, index: int, kept: KeptPictures) -> npt.NDArray[np.uint8] | None:
        image = kept.picture(index)
        if image is not None and (found := short_hash(image)) != (sha := self._hashes.get(index)):
            raise _Differs(f"frame {index}: the kept picture has the hash {found}, the record {sha}")
        return image

    def _catch_up(self, until: FrameLine | None) -> None:
        """The events that came before a frame was inferred; all that are left, if None."""
        while self._next_event < len(self.record.events):
            line = self.record.events[self._next_event]
            ready = self.kept is not None or all(index in self._pictures for index in line.frames)
            if until is not None and not (line.version <= until.version and ready):
                return
            self._event(line)
            for index in line.frames:
                if self._last_use[index] == self._next_event:
                    self._pictures.pop(index, None)
            self._next_event += 1

    def _event(self, line: EventLine) -> None:
        if line.event in _STEPS and line.candidate is not None:
            self._step(line)
        elif line.event in _SWAPS:
            found = self._kept.get(line.state)
            if found is None:
                raise _Differs(
                    f"version {line.version}: '{line.event}' to state {line.state[:16]}, which the replay has not come "
                    f"by: it was set from outside the run"
                )
            self._state = found
        else:
            self.report.not_replayed += 1
        digest = self._state.digest()
        if digest != line.state:
            raise _Differs(f"version {line.version}: state {digest[:16]} instead of {line.state[:16]} ({line.event})")
        if digest in self._wanted:
            self._kept[digest] = self._state
        self.report.states += 1

    def _step(self, line: EventLine) -> None:
        pictures = []
        for index in line.frames:
            image = self._pictures.get(index) if self.kept is None else self._kept_picture(index, self.kept)
            if image is None:
                what = "recorded" if self.kept is None else "kept"
                raise _Differs(f"version {line.version}: the step learned from frame {index}, which is not {what}")
            pictures.append(image)
        self.engine.load_state(self._state)
        _, diagnostics = self.engine.adapt(np.stack(pictures))
        candidate = AdaptState({name: array.copy() for name, array in self.engine.candidate.items()})
        if candidate.digest() != line.candidate:
            raise _Differs(self._explain(line, candidate, diagnostics))
        if line.event == "commit":
            self._state = candidate
        self.report.steps += 1

    def _explain(self, line: EventLine, candidate: AdaptState, diagnostics: Diagnostics) -> str:
        recorded = line.diagnostics or {}
        other = [
            f"{name} {value:.9g} instead of {recorded.get(name)}"
            for name, value in diagnostics._asdict().items()
            if value != recorded.get(name)
        ]
        return (
            f"version {line.version}, step on frames {list(line.frames)}: from the same state and the same pictures, "
            f"candidate {candidate.digest()[:16]} instead of {str(line.candidate)[:16]}; "
            f"{', '.join(other) if other else 'all diagnostics are equal'}: {self._engines()}"
        )

    def _engines(self) -> str:
        threads = self._fact("threads")
        return f"recorded with {self.record.header['engine']} and {threads} threads, replayed with {self.engine.name}"

    def _fact(self, name: str) -> str:
        return str(self.record.header.get("facts", {}).get(name, "unknown"))

    @staticmethod
    def _check(holds: bool, otherwise: str) -> None:
        if not holds:
            raise _Differs(otherwise)
