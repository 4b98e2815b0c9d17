"""Two baselines without any gradient: the source model, and batch normalisation under the batch's statistics."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mgg_edge.errors import UnsupportedError
from mgg_edge.learn.methods.base import Classifier

__all__ = ["BatchStatistics", "NoAdaptation"]


class Nothing(NamedTuple):
    """The source model remembers nothing."""


class NoAdaptation:
    """The source model as it is."""

    name: ClassVar[str] = "none"

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    def init(self) -> Nothing:
        """The empty state."""
        return Nothing()

    def step(self, frames: Tensor, state: Nothing) -> tuple[Tensor, Nothing]:
        """Logits f[B, C] of the source model."""
        return self.predict(frames, state), state

    def predict(self, frames: Tensor, state: Nothing) -> Tensor:  # noqa: ARG002
        """Logits f[B, C] of the source model."""
        return self._classifier.frozen(frames, self._classifier.theta, None)


class Statistics(NamedTuple):
    """Attributes: statistics: f[M], means and variances of all batch normalisation layers."""

    statistics: Tensor


class BatchStatistics:
    """Batch normalisation with (μ, σ²) ← (1−α)(μ, σ²) + α(μ_B, σ²_B), θ untouched.

    α is the backbone's `norm_statistics`: `batch` (α = 1) is prediction-time batch normalisation (arXiv 2006.10963),
    `mix:ALPHA` the mixture of arXiv 2006.16971, equation 1, kept up from batch to batch.

    Raises:
        UnsupportedError: the backbone has no batch normalisation whose statistics move.
    """

    name: ClassVar[str] = "bn"

    def __init__(self, classifier: Classifier) -> None:
        backbone, statistics = classifier.backbone, classifier.statistics()
        if statistics is None:
            raise UnsupportedError(
                f"bn: '{backbone.name}' has no batch normalisation whose statistics move (norm statistics: "
                f"{backbone.norm_statistics}); leave the method out, or use a backbone with batch normalisation"
            )
        self._classifier, self._start = classifier, statistics

    def init(self) -> Statistics:
        """The source's statistics."""
        return Statistics(self._start)

    def step(self, frames: Tensor, state: Statistics) -> tuple[Tensor, Statistics]:
        """Logits f[B, C] under the moved statistics."""
        with torch.no_grad():
            output = self._classifier.moving(frames, self._classifier.theta, state.statistics)
        return output.logits, state if output.statistics is None else Statistics(output.statistics)

    def predict(self, frames: Tensor, state: Statistics) -> Tensor:
        """Logits f[B, C] under the statistics reached."""
        return self._classifier.frozen(frames, self._classifier.theta, state.statistics)
