r"""`statistics+`: a rule of cameras (`scene.py`) that moves the statistics of batch normalisation; no gradient.

    S = C + rate · s · (S_t − C)                                   what every layer normalises with, against C

S_t [M] are the statistics of all layers, moved towards those of each batch under θ₀, and C those of the clean scene.
How much of a change a layer takes over is learned, one strength for each statistic of each channel
(`norm_statistics.py`): early layers see weather, over thousands of pixels; late ones see what is in view, which is no
weather. So different things may pass, and yet blur, fog and noise are undone.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mgg_edge.learn.rules.base import Evidence, Proposal, SourceNumbers
from mgg_edge.learn.rules.scene import SceneRule
from mgg_edge.learn.rules.window import WINDOW_BATCHES, WindowState, WindowStatistics

__all__ = ["StatisticsPlus", "StatisticsPlusState"]

RANK = 12
WEIGHT = 0.5  # of a batch: two make three quarters of what is normalised with


class StatisticsPlusState(NamedTuple):
    """What the rule remembers.

    Attributes:
        window, step: see `WindowState`.
        moved: f[M], S_t.
    """

    window: Tensor
    step: Tensor
    moved: Tensor


class StatisticsPlus(SceneRule):
    """Statistics that follow the weather; θ stays at the source.

    Args:
        size: N, scalars of θ.
        features: D, length of the feature vector.
        statistics: M, numbers of the statistics of batch normalisation.
        rank: r, directions that the gate reads.
        weight: α that the statistics were learned to move with.
        window_batches: W, batches of the sliding window.
        radius: see `WindowRule`.
        seed: of the untrained numbers.
    """

    name = "statistics+"
    moves_statistics: ClassVar[bool] = True

    def __init__(
        self,
        size: int,
        features: int,
        statistics: int,
        rank: int = RANK,
        weight: float = WEIGHT,
        window_batches: int = WINDOW_BATCHES,
        radius: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(size, features, rank, window_batches, radius, torch.Generator().manual_seed(seed))
        self.statistics_size, self.weight = statistics, weight
        self.strength = nn.Parameter(torch.full((statistics,), 0.1))

    def init(self, size: int, dtype: torch.dtype = torch.float32) -> Any:
        """A `StatisticsPlusState`: an empty window; statistics that nobody has measured."""
        empty: WindowState = super().init(size, dtype)
        return StatisticsPlusState(empty.window, empty.step, torch.zeros(self.statistics_size, dtype=dtype))

    def step(self, theta: Tensor, evidence: Evidence, state: Any, source: SourceNumbers, rate: Tensor) -> Proposal:
        """Put the batch into the window; the gate decides how much of what moved is normalised with."""
        if evidence.moved is None or source.norm_statistics is None:
            raise ValueError("statistics+: expected statistics of batch normalisation that move, found none")
        seen, window = self.look(evidence, WindowState(state.window, state.step), source)
        share = rate * self.share(self.read_out(seen), seen.frames)
        clean = source.norm_statistics
        statistics = clean + share * (evidence.moved - clean)
        after = StatisticsPlusState(window.window, window.step, evidence.moved)
        return Proposal(source.theta, theta - source.theta, after, statistics)

    def change(self, window: WindowStatistics, source: SourceNumbers) -> Tensor:  # noqa: ARG002
        """Nothing is taken from θ₀."""
        return torch.zeros_like(source.theta)

    def reach(self) -> float:
        """θ does not move."""
        return 0.0

    def options(self) -> dict[str, float | str]:
        """Sizes, the weight of a batch, and how far it may go."""
        return {**super().options(), "statistics": self.statistics_size, "weight": self.weight}
