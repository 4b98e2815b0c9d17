r"""`forward`: θ straight from feature statistics, without a gradient.

    θ = θ₀ − rate · gate · κ(M) · P tanh(Q (z ⊘ ρ)),     z and Δ of a window of M frames (`window.py`)
    gate = e / (e + k),   e = max(0, Δ(M)/Δ_clean(M) − 1)

P [N, r], Q [r, 2D], κ (knots in log M, at the windows of the training) and k are learned on random domains; ρ [2D] is
the root mean square of z over such domains. One forward pass under θ₀ and two matrix products; no backward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mgg_edge.learn.rules.base import SourceNumbers, knot_weights
from mgg_edge.learn.rules.window import WINDOW_BATCHES, WINDOWS, WindowRule, WindowStatistics

__all__ = ["Forward"]

RANK = 64
UNTRAINED_SCALE = 1e-3


class Forward(WindowRule):
    """The map from feature statistics to θ.

    Args:
        size: N, scalars of θ.
        features: D, length of the feature vector.
        rank: r, columns of P.
        window_batches: W, batches of the sliding window.
        radius: see `WindowRule`.
        seed: of the untrained numbers, which are small, not zero.
    """

    name = "forward"

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
        self.read = nn.Parameter(torch.randn(rank, 2 * features, generator=generator) / math.sqrt(2 * features))
        self.write = nn.Parameter(UNTRAINED_SCALE * torch.randn(size, rank, generator=generator))
        self.log_scale = nn.Parameter(torch.zeros(len(WINDOWS)))
        self.log_gate = nn.Parameter(torch.tensor(math.log(0.05)))
        self.shift_scale = nn.Parameter(torch.ones(2 * features), requires_grad=False)

    def change(self, window: WindowStatistics, source: SourceNumbers) -> Tensor:
        """gate · κ · P tanh(Q (z ⊘ ρ)) f[…, N], what is taken from θ₀."""
        excess = torch.relu(window.discrepancy / source.clean_at(window.frames) - 1)
        gate = excess / (excess + self._number("log_gate", excess).exp())
        scale = (knot_weights(window.frames, WINDOWS) * self._number("log_scale", excess)).sum().exp()
        hidden = torch.tanh((window.shift / self._number("shift_scale", excess)) @ self._number("read", excess).T)
        return (gate * scale).unsqueeze(-1) * (hidden @ self._number("write", excess).T)

    def reach(self) -> float:
        """Every hidden unit at its extreme."""
        return float(self.write.detach().abs().sum(dim=1).max() * self.log_scale.detach().max().exp())
