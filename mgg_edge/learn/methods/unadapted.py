"""Baselines without any gradient: the source model, and batch normalisation under the batch's own statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mgg_edge.errors import UnsupportedError, UsageError
from mgg_edge.learn.methods.base import Classifier

__all__ = ["AlphaOptions", "AlphaStatistics", "BatchStatistics", "NoAdaptation"]


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
        self._classifier, self._start = classifier, moving_statistics(classifier, self.name)

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


@dataclass(frozen=True)
class AlphaOptions:
    """Attributes: alpha: share of the batch's statistics, in (0, 1]."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise UsageError(f"alpha-bn: expected a share in (0, 1], found {self.alpha}")


class AlphaStatistics:
    """Batch normalisation with (1−α)(μ_S, σ²_S) + α(μ_B, σ²_B): the prior is the source's for every batch anew.

    α-BN of arXiv 2110.04065, equation 4; for batches of one the mixture of arXiv 2006.16971 with N = 1/α − 1.

    Raises:
        UnsupportedError: the backbone has no batch normalisation whose statistics move.
    """

    name: ClassVar[str] = "alpha-bn"

    def __init__(self, classifier: Classifier, options: AlphaOptions) -> None:
        self._classifier, self.options = classifier, options
        self._source = moving_statistics(classifier, self.name)

    def init(self) -> Nothing:
        """The empty state: every batch stands alone."""
        return Nothing()

    def step(self, frames: Tensor, state: Nothing) -> tuple[Tensor, Nothing]:
        """Logits f[B, C] under the mixture."""
        return self.predict(frames, state), state

    def predict(self, frames: Tensor, state: Nothing) -> Tensor:  # noqa: ARG002
        """Logits f[B, C] under the mixture; they depend on the other frames."""
        with torch.no_grad():
            return self._classifier.moving(frames, self._classifier.theta, self._source, self.options.alpha).logits


def moving_statistics(classifier: Classifier, method: str) -> Tensor:
    """S₀ f[M] of a backbone whose statistics move.

    Raises:
        UnsupportedError: they do not.
    """
    backbone, statistics = classifier.backbone, classifier.statistics()
    if statistics is None:
        raise UnsupportedError(
            f"{method}: '{backbone.name}' has no batch normalisation whose statistics move (norm statistics: "
            f"{backbone.norm_statistics}); leave the method out, or use a backbone with batch normalisation"
        )
    return statistics
