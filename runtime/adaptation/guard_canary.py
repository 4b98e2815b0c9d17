"""Canaries: frames whose class the source model was sure of. A sound candidate still classifies most of them so.

A frame becomes a canary when the source model gives its class at least 90 % and fewer than two canaries of that class
are held; nothing replaces a canary once chosen, or a slow decay could take the measure along. The bundle's self-test
frames are offered first, then live frames, as far as the source model's logits for them are known anyway.

A candidate passes if the canaries are fewer than `min_frames`, or at least `min_agreement` of them keep their class.
The source model itself agrees with all, so going back to it always passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mgg_edge.compat import Self
from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.guard import Breach, BreachCode

__all__ = ["CanarySet", "CanarySettings", "check_canaries", "entropies", "probabilities"]

Infer = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class CanarySettings:
    """What becomes a canary, and how many must live.

    Attributes:
        capacity: most canaries held.
        per_class: most of one class.
        min_probability: the source model's softmax probability from which a frame is one.
        min_frames: canaries below which nothing is judged.
        min_agreement: least fraction that must keep its class.

    Raises:
        UsageError: a fraction outside 0 to 1, or a negative number.
    """

    capacity: int = 8
    per_class: int = 2
    min_probability: float = 0.9
    min_frames: int = 3
    min_agreement: float = 0.75

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            most = 1 if name in ("min_probability", "min_agreement") else float("inf")
            if not (0 <= value <= most):
                raise UsageError(f"canary.{name}: expected a number from 0 to {most}, found {value}")


@dataclass(frozen=True)
class CanarySet:
    """The canaries; immutable.

    Attributes:
        settings: how they are chosen.
        frames: u8[H,W,3] each, at model size.
        classes: the source model's class of each.
    """

    settings: CanarySettings = field(default_factory=CanarySettings)
    frames: tuple[npt.NDArray[np.uint8], ...] = ()
    classes: tuple[int, ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether no more are taken."""
        return len(self.frames) >= self.settings.capacity

    @property
    def can_judge(self) -> bool:
        """Whether there are enough to judge a candidate by."""
        return len(self.classes) >= self.settings.min_frames

    def offer(self, frame: npt.NDArray[np.uint8], source_logits: npt.NDArray[np.float32]) -> Self:
        """The set with a copy of `frame`, if the source model's logits f32[C] make it a canary."""
        best = int(source_logits.argmax())
        probability = float(probabilities(source_logits[None])[0, best])
        if not (probability >= self.settings.min_probability) or self.is_full:
            return self
        if self.classes.count(best) >= self.settings.per_class:
            return self
        return replace(self, frames=(*self.frames, frame.copy()), classes=(*self.classes, best))


def check_canaries(canaries: CanarySet, infer: Infer, batch: int = 1) -> Breach | None:
    """Judge a candidate by its classes of the canaries, asked in their order until enough keep theirs, or too few can.

    Args:
        canaries: what it is judged by.
        infer: its logits f32[n,C] of frames u8[n,H,W,3].
        batch: frames it is asked about at once.
    """
    count = len(canaries.classes) if canaries.can_judge else 0
    least, kept = canaries.settings.min_agreement * count, 0
    for start in range(0, count, batch):
        chunk = slice(start, start + batch)
        logits, classes = infer(np.stack(canaries.frames[chunk])), canaries.classes[chunk]
        if not np.isfinite(logits).all():
            return Breach(BreachCode.CANARY, "logits of the canaries are not finite")
        kept += int((logits.argmax(axis=1) == np.array(classes)).sum())
        asked = start + len(classes)
        if kept + count - asked < least:
            return Breach(BreachCode.CANARY, f"only {kept} of {asked} canaries keep their class")
        if kept >= least:
            break
    return None


def entropies(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Entropy f64[n] of the predictions of logits f32[n,C], nats; NaN where a row is not finite."""
    found = probabilities(logits)
    return np.asarray(-(found * np.log(np.maximum(found, np.finfo(np.float64).tiny))).sum(1))


def probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Softmax of logits f32[n,C], in float64; NaN where a row is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))
