r"""Rules of cameras: they go as far as the scene has changed; no gradient.

    h = Q (z ⊘ ρ),   d = mean h²                                   z of a window of M frames (`window.py`)
    s = σ( w · log(d / d_M) )                                      share: none while the scene is calm

What is multiplied by s each rule says. z is the change since the camera's scene was clean, so at a
calibrated site what stands there all the time says nothing. What passes there does: three things in view move the
features as far as fog. But they move them elsewhere, and the rows of Q [r, 2D] are the directions in which weather
moves z most where what is in view moves it least: the eigenvectors of the first covariance relative to the second.
ρ [2D] is the root mean square of z in clear weather. d_M is a threshold for each window M (knots in log M): of few
frames the statistics vary more. All of it is learned on cameras that different things pass.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from mgg_edge.learn.rules.base import knot_weights
from mgg_edge.learn.rules.window import WINDOWS, WindowRule, WindowStatistics

__all__ = ["SceneRule"]

FLOOR = 1e-12


class SceneRule(WindowRule):
    """The gate that says how much.

    Args:
        size: N, scalars of θ.
        features: D, length of the feature vector.
        rank: r, directions that are read.
        window_batches: W, batches of the sliding window.
        radius: see `WindowRule`.
        generator: of the untrained numbers.
    """

    knows_calm: ClassVar[bool] = True

    def __init__(
        self, size: int, features: int, rank: int, window_batches: int, radius: float, generator: torch.Generator
    ) -> None:
        super().__init__(size, features, rank, window_batches, radius)
        self.read = nn.Parameter(torch.randn(rank, 2 * features, generator=generator) / math.sqrt(2 * features))
        self.log_threshold = nn.Parameter(torch.zeros(len(WINDOWS)))
        self.log_slope = nn.Parameter(torch.tensor(math.log(2.0)))
        self.shift_scale = nn.Parameter(torch.ones(2 * features), requires_grad=False)

    def read_out(self, window: WindowStatistics) -> Tensor:
        """H f[…, r], what of the change is weather."""
        shift = window.shift
        return (shift / self._number("shift_scale", shift)) @ self._number("read", shift).T

    def share(self, hidden: Tensor, frames: Tensor) -> Tensor:
        """S f[…] of h f[…, r] and M f[]: how much of the way is gone."""
        distance = (hidden.square().mean(dim=-1) + FLOOR).log()
        threshold = (knot_weights(frames, WINDOWS) * self._number("log_threshold", hidden)).sum()
        return torch.sigmoid(self._number("log_slope", hidden).exp() * (distance - threshold))
