r"""`forward+`: a rule of cameras (`scene.py`), from a robust θ to the weather's own; no gradient.

    θ = θ₀ + rate · s · (δ + κ(M) · P tanh h)

δ [N] is the way to the one θ that serves all weathers best; P [N, r] bends it to what the window shows of the weather.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mgg_edge.learn.rules.base import SourceNumbers, knot_weights
from mgg_edge.learn.rules.forward import UNTRAINED_SCALE
from mgg_edge.learn.rules.scene import SceneRule
from mgg_edge.learn.rules.window import WINDOW_BATCHES, WINDOWS, WindowStatistics

__all__ = ["ForwardPlus"]

RANK = 12


class ForwardPlus(SceneRule):
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

    def __init__(
        self,
        size: int,
        features: int,
        rank: int = RANK,
        window_batches: int = WINDOW_BATCHES,
        radius: float = 0.0,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(size, features, rank, window_batches, radius, generator)
        self.robust = nn.Parameter(UNTRAINED_SCALE * torch.randn(size, generator=generator))
        self.write = nn.Parameter(UNTRAINED_SCALE * torch.randn(size, rank, generator=generator))
        self.log_scale = nn.Parameter(torch.zeros(len(WINDOWS)))

    def change(self, window: WindowStatistics, source: SourceNumbers) -> Tensor:  # noqa: ARG002
        """−s · (δ + κ · P tanh h) f[…, N], what is taken from θ₀."""
        hidden = self.read_out(window)
        scale = (knot_weights(window.frames, WINDOWS) * self._number("log_scale", hidden)).sum().exp()
        bend = scale * (torch.tanh(hidden) @ self._number("write", hidden).T)
        return -self.share(hidden, window.frames).unsqueeze(-1) * (self._number("robust", hidden) + bend)

    def reach(self) -> float:
        """The robust way and every hidden unit at its extreme."""
        bend = self.write.detach().abs().sum(dim=1) * self.log_scale.detach().max().exp()
        return float((self.robust.detach().abs() + bend).max())
