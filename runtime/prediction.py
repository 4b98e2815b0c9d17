"""What the model says of one frame: p = softmax(logits), the most probable class, and H = −Σ p log p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mgg_edge.compat import Self

__all__ = ["Prediction"]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one frame.

    Attributes:
        label: name of the most probable class.
        index: its place among the C classes.
        probability: its softmax probability, 0 to 1.
        entropy: of the softmax distribution, nats, 0 to ln C.
        logits: f32[C], read-only.
        adapted: whether θ is no longer the source model's.
        step: updates committed before this prediction.
        labels: names of all classes.
    """

    label: str
    index: int
    probability: float
    entropy: float
    logits: npt.NDArray[np.float32]
    adapted: bool
    step: int
    labels: Sequence[str] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, logits: npt.NDArray[np.float32], labels: Sequence[str], *, adapted: bool, step: int) -> Self:
        """The prediction that finite logits f32[C] stand for, computed in float64; makes them read-only."""
        logits.flags.writeable = False
        shifted = logits.astype(np.float64) - logits.max()
        log_probabilities = shifted - np.log(np.exp(shifted).sum())
        probabilities = np.exp(log_probabilities)
        index = int(logits.argmax())
        return cls(
            label=labels[index],
            index=index,
            probability=float(probabilities[index]),
            entropy=max(0.0, float(-(probabilities * log_probabilities).sum())),
            logits=logits,
            adapted=adapted,
            step=step,
            labels=labels,
        )

    def probabilities(self) -> npt.NDArray[np.float64]:
        """Softmax of the logits, f64[C]."""
        shifted = np.exp(self.logits.astype(np.float64) - self.logits.max())
        return np.asarray(shifted / shifted.sum())

    def top(self, count: int) -> list[tuple[str, int, float]]:
        """The most probable classes, at most `count`: name, place among the C classes, softmax probability."""
        probabilities = self.probabilities()
        places = np.argsort(-probabilities, kind="stable")[:count]
        return [(self.labels[place], int(place), float(probabilities[place])) for place in places]
