"""Collapse: the adapted model calls everything by a few names while the source model still tells the frames apart.

Entropy minimisation has a trivial optimum, one class for all. The number of classes in use is taken as

    n = exp(H(histogram))        1: a single class; k: k classes equally often

Suspicion: one class has at least `max_share` of the last `window` predictions. That is normal for a camera that looks
at one thing. Only then is the source model asked about the B frames of the step at hand: where it is sure
(probability ≥ `min_probability`) of at least `min_frames` of them, the adapted model has collapsed if

    n_adapted < min_fraction · n_source        on those same frames, with n_source ≥ 2

The certainty matters: in heavy noise the source model's guesses are diverse and worthless.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mgg_edge.compat import Self
from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.guard import Breach, BreachCode
from mgg_edge.runtime.adaptation.guard_canary import probabilities

__all__ = ["ClassWindow", "CollapseSettings", "check_collapse", "effective_classes"]


@dataclass(frozen=True)
class CollapseSettings:
    """When predictions count as collapsed; see the module's rule.

    Raises:
        UsageError: a fraction outside 0 to 1, or a count below 1.
    """

    window: int = 64
    max_share: float = 0.9
    min_probability: float = 0.5
    min_frames: int = 3
    min_fraction: float = 0.6

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least, most = (1.0, float("inf")) if isinstance(value, int) else (0.0, 1.0)
            if not (least <= value <= most):
                raise UsageError(f"collapse.{name}: expected a number from {least} to {most}, found {value}")


@dataclass(frozen=True)
class ClassWindow:
    """Classes predicted lately; immutable."""

    settings: CollapseSettings = field(default_factory=CollapseSettings)
    classes: tuple[int, ...] = ()

    def add(self, index: int) -> Self:
        """The window after one more prediction."""
        return replace(self, classes=(*self.classes, index)[-self.settings.window :])

    @property
    def is_full(self) -> bool:
        """Whether there are enough predictions to judge by."""
        return len(self.classes) >= self.settings.window

    @property
    def is_suspicious(self) -> bool:
        """Whether the window is full and one class has nearly all of it."""
        if not self.is_full:
            return False
        (_, count), *_ = Counter(self.classes).most_common(1)
        return count >= self.settings.max_share * len(self.classes)


def check_collapse(
    adapted: npt.NDArray[np.float32], source: npt.NDArray[np.float32], settings: CollapseSettings
) -> Breach | None:
    """Compare the logits f32[B,C] of the adapted and of the source model for the same B frames."""
    sure = probabilities(source).max(axis=1) >= settings.min_probability
    if int(sure.sum()) < settings.min_frames:
        return None
    found, expected = (effective_classes(logits[sure].argmax(axis=1)) for logits in (adapted, source))
    if expected < 2 or found >= settings.min_fraction * expected:
        return None
    return Breach(
        BreachCode.COLLAPSE, f"predictions collapsed: {found:.1f} classes where the source model sees {expected:.1f}"
    )


def effective_classes(indices: npt.NDArray[np.integer]) -> float:
    """exp of the entropy of the histogram of class indices [n], n ≥ 1."""
    _, counts = np.unique(indices, return_counts=True)
    shares = counts / counts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))
