r"""`forward`: θ straight from feature statistics, without a gradient.

    μ, σ  mean and unbiased deviation of the features, under θ₀, of the last M frames
    z = [μ − μ_S, σ − σ_S] ∈ R^{2D}
    θ = θ₀ − rate · gate · κ(M) · P tanh(Q (z ⊘ ρ))
    gate = e / (e + k),   e = max(0, Δ(M)/Δ_clean(M) − 1)

P [N, r], Q [r, 2D], κ (knots in log M, at the windows of the training) and k are learned on random domains; ρ [2D] is
the root mean square of z over such domains. The map is memoryless: what it gives depends on the frames in the window
alone, so nothing can add up and a clean stream leads back to θ₀ by itself. One forward pass under θ₀ and two matrix
products; no backward pass.

The state is the window: for each of its last W batches the sums Σx and Σx² of x = features − μ_S, which are small where
nothing has changed, so that single precision suffices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mgg_edge.learn.objective import VARIANCE_FLOOR
from mgg_edge.learn.rules.base import Evidence, Proposal, SourceNumbers, UpdateRule, knot_weights

__all__ = ["Forward", "ForwardState", "WindowStatistics"]

RANK = 64
WINDOW_BATCHES = 8
SCALE_KNOTS = (4, 8, 16, 32, 64)  # the windows it is trained on: beyond them κ stays as at the last
UNTRAINED_SCALE = 1e-3


class ForwardState(NamedTuple):
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


class Forward(UpdateRule):
    """The map from feature statistics to θ.

    Args:
        size: N, scalars of θ.
        features: D, length of the feature vector.
        rank: r, columns of P.
        window_batches: W, batches of the sliding window.
        radius: largest ‖θ − θ₀‖ that the weathers it was trained on have led to, with a margin; 0 if not measured.
        seed: of the untrained numbers, which are small, not zero.
    """

    name = "forward"
    default_learning_rate = 1.0
    max_learning_rate = 1.0
    needs_gradient = False
    schedule = "window"

    def __init__(
        self,
        size: int,
        features: int,
        rank: int = RANK,
        window_batches: int = WINDOW_BATCHES,
        radius: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.radius = radius
        self.size, self.features, self.rank, self.window_batches = size, features, rank, window_batches
        generator = torch.Generator().manual_seed(seed)
        self.read = nn.Parameter(torch.randn(rank, 2 * features, generator=generator) / math.sqrt(2 * features))
        self.write = nn.Parameter(UNTRAINED_SCALE * torch.randn(size, rank, generator=generator))
        self.log_scale = nn.Parameter(torch.zeros(len(SCALE_KNOTS)))
        self.log_gate = nn.Parameter(torch.tensor(math.log(0.05)))
        self.shift_scale = nn.Parameter(torch.ones(2 * features), requires_grad=False)

    def init(self, size: int, dtype: torch.dtype = torch.float32) -> ForwardState:  # noqa: ARG002
        """An empty window."""
        window = torch.zeros(self.window_batches, 2, self.features, dtype=dtype)
        return ForwardState(window, torch.zeros((), dtype=dtype))

    def step(
        self, theta: Tensor, evidence: Evidence, state: ForwardState, source: SourceNumbers, rate: Tensor
    ) -> Proposal:
        """Put the batch into the window and map its statistics to θ."""
        batch = evidence.features - source.mean  # [B, D]
        sums = torch.stack([batch.sum(dim=0), batch.square().sum(dim=0)])  # [2, D]
        window = torch.cat([state.window[1:], sums.unsqueeze(0)])  # [W, 2, D]
        step = state.step + 1
        frames = step.clamp(max=self.window_batches) * batch.shape[0]
        proposed = source.theta - rate * self.change(self.statistics(window.sum(dim=0), frames, source), source)
        return Proposal(proposed, theta - proposed, ForwardState(window, step))

    def statistics(self, sums: Tensor, frames: Tensor, source: SourceNumbers) -> WindowStatistics:
        """z and Δ of Σx and Σx² f[…, 2, D] over `frames` f[] frames."""
        total, squares = sums.unbind(dim=-2)
        mean = total / frames
        variance = ((squares - total * mean) / (frames - 1)).clamp(min=0)
        spread = torch.sqrt(variance + VARIANCE_FLOOR) - source.std
        discrepancy = mean.square().mean(dim=-1) + spread.square().mean(dim=-1)
        return WindowStatistics(torch.cat([mean, spread], dim=-1), discrepancy, frames)

    def change(self, window: WindowStatistics, source: SourceNumbers) -> Tensor:
        """gate · κ · P tanh(Q (z ⊘ ρ)) f[…, N], what is taken from θ₀."""
        excess = torch.relu(window.discrepancy / source.clean_at(window.frames) - 1)
        gate = excess / (excess + self._number("log_gate", excess).exp())
        scale = (knot_weights(window.frames, SCALE_KNOTS) * self._number("log_scale", excess)).sum().exp()
        hidden = torch.tanh((window.shift / self._number("shift_scale", excess)) @ self._number("read", excess).T)
        return (gate * scale).unsqueeze(-1) * (hidden @ self._number("write", excess).T)

    def options(self) -> dict[str, float | str]:
        """Sizes."""
        return {
            "size": self.size,
            "features": self.features,
            "rank": self.rank,
            "window_batches": self.window_batches,
            "radius": self.radius,
        }

    def largest_update(self, rate: float) -> float:
        """Twice the longest way from θ₀: a window may change from one extreme to the other."""
        reach = float(self.write.detach().abs().sum(dim=1).max() * self.log_scale.detach().max().exp())
        return 2 * rate * reach

    def largest_drift(self, rate: float) -> float | None:
        """The radius: further away lies what it has never been shown."""
        return rate * self.radius or None

    def _number(self, name: str, like: Tensor) -> Tensor:
        value: Tensor = getattr(self, name)
        return value.to(like.dtype)
