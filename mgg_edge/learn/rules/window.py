"""What rules without a gradient look at: the statistics of the features, under θ₀, over a sliding window of frames.

    μ, σ  mean and unbiased deviation of the features of the last M frames
    z = [μ − μ_S, σ − σ_S] ∈ R^{2D}
    Δ = mean (μ − μ_S)² + mean (σ − σ_S)²

The state is the window: for each of its last W batches the sums Σx and Σx² of x = features − μ_S, which are small where
nothing has changed, so that single precision suffices. Nothing else is remembered: what a rule gives depends on the
frames in the window alone, so nothing can add up, and a clean stream leads back to θ₀ by itself.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mgg_edge.learn.objective import VARIANCE_FLOOR
from mgg_edge.learn.rules.base import Evidence, Proposal, SourceNumbers, UpdateRule

__all__ = ["WINDOWS", "WindowRule", "WindowState", "WindowStatistics"]

WINDOW_BATCHES = 8
WINDOWS = (4, 8, 16, 32, 64)  # frames M that rules are trained on


class WindowState(NamedTuple):
    """What the rule remembers.

    Attributes:
        window: f[W, 2, D], Σx and Σx² of each of the last W batches, the newest last; zero where there was none.
        step: f[], batches seen.
    """

    window: Tensor
    step: Tensor


class WindowStatistics(NamedTuple):
    """Statistics of a window: z f[…, 2D], Δ f[…] and its number of frames f[…] or f[]."""

    shift: Tensor
    discrepancy: Tensor
    frames: Tensor


class WindowRule(UpdateRule):
    """A map from the statistics of a window to θ.

    Args:
        size: N, scalars of θ.
        features: D, length of the feature vector.
        rank: r, directions of the features that are looked at.
        window_batches: W, batches of the sliding window.
        radius: largest ‖θ − θ₀‖ that the weathers it was trained on have led to, with a margin; 0 if not measured.
    """

    default_learning_rate = 1.0
    max_learning_rate = 1.0
    needs_gradient: ClassVar[bool] = False
    schedule: ClassVar[str] = "window"

    def __init__(self, size: int, features: int, rank: int, window_batches: int, radius: float) -> None:
        super().__init__()
        self.size, self.features, self.rank = size, features, rank
        self.window_batches, self.radius = window_batches, radius

    @abstractmethod
    def change(self, window: WindowStatistics, source: SourceNumbers) -> Tensor:
        """What is taken from θ₀, f[…, N]."""

    @abstractmethod
    def reach(self) -> float:
        """Bound on |θ − θ₀| of every scalar at rate 1."""

    def init(self, size: int, dtype: torch.dtype = torch.float32) -> WindowState:  # noqa: ARG002
        """An empty window."""
        window = torch.zeros(self.window_batches, 2, self.features, dtype=dtype)
        return WindowState(window, torch.zeros((), dtype=dtype))

    def step(
        self, theta: Tensor, evidence: Evidence, state: WindowState, source: SourceNumbers, rate: Tensor
    ) -> Proposal:
        """Put the batch into the window and map its statistics to θ."""
        batch = evidence.features - source.mean  # [B, D]
        sums = torch.stack([batch.sum(dim=0), batch.square().sum(dim=0)])  # [2, D]
        window = torch.cat([state.window[1:], sums.unsqueeze(0)])  # [W, 2, D]
        step = state.step + 1
        frames = step.clamp(max=self.window_batches) * batch.shape[0]
        proposed = source.theta - rate * self.change(self.statistics(window.sum(dim=0), frames, source), source)
        return Proposal(proposed, theta - proposed, WindowState(window, step))

    def statistics(self, sums: Tensor, frames: Tensor, source: SourceNumbers) -> WindowStatistics:
        """z and Δ of Σx and Σx² f[…, 2, D] over `frames` f[] frames."""
        total, squares = sums.unbind(dim=-2)
        mean = total / frames
        variance = ((squares - total * mean) / (frames - 1)).clamp(min=0)
        spread = torch.sqrt(variance + VARIANCE_FLOOR) - source.std
        discrepancy = mean.square().mean(dim=-1) + spread.square().mean(dim=-1)
        return WindowStatistics(torch.cat([mean, spread], dim=-1), discrepancy, frames)

    def options(self) -> dict[str, float | str]:
        """Sizes, and how far it may go."""
        return {
            "size": self.size,
            "features": self.features,
            "rank": self.rank,
            "window_batches": self.window_batches,
            "radius": self.radius,
        }

    def largest_update(self, rate: float) -> float:
        """Twice the longest way from θ₀: a window may change from one extreme to the other."""
        return 2 * rate * self.reach()

    def largest_drift(self, rate: float) -> float | None:
        """The radius: further away lies what it has never been shown."""
        return rate * self.radius or None

    def _number(self, name: str, like: Tensor) -> Tensor:
        value: Tensor = getattr(self, name)
        return value.to(like.dtype)
