r"""`forward+`: from a robust θ to the weather's own, as far as the scene has changed; no gradient.

    h = Q (z ⊘ ρ),   d = mean h²                                   z of a window of M frames (`window.py`)
    θ = θ₀ + rate · s · (δ + κ(M) · P tanh h)
    s = σ( w · log(d / d_M) )                                      how much of it: none while the scene is calm

δ [N] is the way to the one θ that serves all weathers best; P [N, r] bends it to the weather that is seen. z is the
change since the camera's scene was clean, so at a calibrated site what stands there all the time says nothing. What
passes there does: three things in view move the features as far as fog. But they move them elsewhere, and Q [r, 2D]
begins as the directions in which weather moves z most where what is in view moves it least: the eigenvectors of the
first covariance relative to the second. ρ [2D] is the root mean square of z in clear weather. d_M is a threshold for
each window M (knots in log M): of few frames the statistics vary more. All of it is learned on cameras that different
things pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mgg_edge.learn.rules.base import SourceNumbers, knot_weights
from mgg_edge.learn.rules.forward import UNTRAINED_SCALE
from mgg_edge.learn.rules.window import WINDOW_BATCHES, WINDOWS, WindowRule, WindowStatistics

__all__ = ["ForwardPlus"]

RANK = 12
FLOOR = 1e-12


class ForwardPlus(WindowRule):
    """The map from what has changed in a scene to θ.

    Args:
        size: N, scalars of θ.
        features: D, length of the feature vector.
        rank: r, columns of P.
        window_batches: W, batches of the sliding window.
        radius: see `WindowRule`.
        seed: of the untrained numbers, which are small, not zero.
    """

    name = "forward+"
    knows_calm = True

    def __init__(
        self,
        size: int,
        features: int,
        rank: int = RANK,
        window_batches: int = WINDOW_BATCHES,
        radius: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(size, features, rank, window_batches, radius)
        generator = torch.Generator().manual_seed(seed)
        self.robust = nn.Parameter(UNTRAINED_SCALE * torch.randn(size, generator=generator))
        self.read = nn.Parameter(torch.randn(rank, 2 * features, generator=generator) / math.sqrt(2 * features))
        self.write = nn.Parameter(UNTRAINED_SCALE * torch.randn(size, rank, generator=generator))
        self.log_scale = nn.Parameter(torch.zeros(len(WINDOWS)))
        self.log_threshold = nn.Parameter(torch.zeros(len(WINDOWS)))
        self.log_slope = nn.Parameter(torch.tensor(math.log(2.0)))
        self.shift_scale = nn.Parameter(torch.ones(2 * features), requires_grad=False)

    def change(self, window: WindowStatistics, source: SourceNumbers) -> Tensor:  # noqa: ARG002
        """−s · (δ + κ · P tanh h) f[…, N], what is taken from θ₀."""
        hidden = self.read_out(window)
        scale = (knot_weights(window.frames, WINDOWS) * self._number("log_scale", hidden)).sum().exp()
        bend = scale * (torch.tanh(hidden) @ self._number("write", hidden).T)
        return -self.share(hidden, window.frames).unsqueeze(-1) * (self._number("robust", hidden) + bend)

    def read_out(self, window: WindowStatistics) -> Tensor:
        """H f[…, r], what of the change is weather."""
        shift = window.shift
        return (shift / self._number("shift_scale", shift)) @ self._number("read", shift).T

    def share(self, hidden: Tensor, frames: Tensor) -> Tensor:
        """S f[…] of h f[…, r] and M f[]: how much of the way is gone."""
        distance = (hidden.square().mean(dim=-1) + FLOOR).log()
        threshold = (knot_weights(frames, WINDOWS) * self._number("log_threshold", hidden)).sum()
        return torch.sigmoid(self._number("log_slope", hidden).exp() * (distance - threshold))

    def reach(self) -> float:
        """The robust way and every hidden unit at its extreme."""
        bend = self.write.detach().abs().sum(dim=1) * self.log_scale.detach().max().exp()
        return float((self.robust.detach().abs() + bend).max())
