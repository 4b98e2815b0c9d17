"""`statistics`: θ stays; what adapts are the statistics of batch normalisation (see `norm_statistics`).

No gradient and nothing learned. Each step moves the statistics towards those of its batch, and what is remembered
fades, so that a clean scene leads back by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mgg_edge.learn.rules.base import Evidence, Proposal, SourceNumbers, UpdateRule

__all__ = ["Statistics", "StatisticsState"]


class StatisticsState(NamedTuple):
    """Attributes: step: f[], batches seen."""

    step: Tensor


class Statistics(UpdateRule):
    """Leaves θ at the source."""

    name = "statistics"
    default_learning_rate = 1.0
    max_learning_rate = 1.0
    needs_gradient = False
    schedule = "window"

    def init(self, size: int, dtype: torch.dtype = torch.float32) -> StatisticsState:  # noqa: ARG002
        """No batch seen."""
        return StatisticsState(torch.zeros((), dtype=dtype))

    def step(
        self, theta: Tensor, evidence: Evidence, state: StatisticsState, source: SourceNumbers, rate: Tensor  # noqa: ARG002
    ) -> Proposal:  # fmt: skip
        """θ as it is, and one batch more."""
        return Proposal(theta, torch.zeros_like(theta), StatisticsState(state.step + 1))

    def largest_update(self, rate: float) -> float:  # noqa: ARG002
        """None at all."""
        return 0.0
