"""Training of `forward`: from the statistics of M frames of a weather to a θ that reads other frames of it.

    M frames → frozen network → z → θ = rule(z) → network under θ → cross-entropy of other frames → ∇ of P, Q, κ, k

The gradient is exact: nothing is unrolled, as the rule remembers nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mgg_edge.errors import UsageError
from mgg_edge.learn.rules.forward import Forward
from mgg_edge.learn.rules.window import WINDOWS, WindowStatistics
from mgg_edge.learn.training.gradient import principal_directions
from mgg_edge.learn.training.learner import Learner
from mgg_edge.learn.training.optimiser import RULE_RATES
from mgg_edge.learn.training.worlds import Weather, World

__all__ = ["StatisticsMapTrainer", "StatisticsRecipe"]

SCALE_DOMAINS = 192
SCALE_WINDOW = 32
RADIUS_MARGIN = 1.1


@dataclass(frozen=True)
class StatisticsRecipe:
    """How `forward` is trained.

    Attributes:
        episodes: E, weathers side by side.
        windows: numbers M of frames in a window, one drawn for each update.
        aim_batch: other frames the loss is taken over.
    """

    episodes: int = 8
    windows: tuple[int, ...] = WINDOWS
    aim_batch: int = 16

    def __post_init__(self) -> None:
        if min(self.episodes, self.aim_batch) < 1 or not self.windows or min(self.windows) < 2:
            raise UsageError(f"meta-training: expected counts of at least 1 and windows of at least 2, found {self}")


class StatisticsMapTrainer:
    """Gradients of the loss on the numbers of `forward`, one update a call.

    Args:
        rule: its numbers receive the gradients.
        learner: the model that adapts.
        world: where weathers come from.
        recipe: how to train.
    """

    rates: ClassVar[Mapping[str, float]] = RULE_RATES

    def __init__(self, rule: Forward, learner: Learner, world: World, recipe: StatisticsRecipe) -> None:
        self.rule, self.learner, self.world, self.recipe = rule, learner, world, recipe

    def prepare(self, rng: np.random.Generator) -> None:
        """Set ρ and Q from the statistics of random weathers."""
        weathers = [self.world.weather(rng) for _ in range(SCALE_DOMAINS)]
        shifts = torch.cat([self._observe([weather], SCALE_WINDOW, rng).shift for weather in weathers])
        scale = shifts.square().mean(0).sqrt().clamp(min=1e-12)
        with torch.no_grad():
            self.rule.shift_scale.copy_(scale)
            self.rule.read.copy_(principal_directions(shifts / scale, self.rule.rank))
            self.rule.write.zero_()

    def finish(self, rng: np.random.Generator) -> None:
        """Measure how far the weathers lead from θ₀: the rule's radius."""
        with torch.no_grad():
            weathers = [self.world.weather(rng) for _ in range(SCALE_DOMAINS)]
            thetas = torch.cat([self._theta(self._observe([weather], SCALE_WINDOW, rng)) for weather in weathers])
            largest = (thetas - self.learner.source.theta).norm(dim=1).max()
        self.rule.radius = float(RADIUS_MARGIN * largest)

    def backward(self, rng: np.random.Generator) -> float:
        """Leave the gradient of one update in the rule's parameters; returns the mean cross-entropy."""
        recipe = self.recipe
        weathers = [self.world.weather(rng) for _ in range(recipe.episodes)]
        theta = self._theta(self._observe(weathers, int(rng.choice(recipe.windows)), rng))
        parts = [weather.draw(recipe.aim_batch, rng) for weather in weathers]
        frames, targets = (torch.stack([part[index] for part in parts]) for index in range(2))
        logits, _ = self.learner.forward(theta, frames)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten().to(self.learner.device))
        loss.backward()
        return float(loss.detach())

    def score(self, weathers: Sequence[Weather], frames: int, seed: int) -> float:
        """Agreement with the targets on other pictures of weathers, from a window of some frames."""
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            theta = self._theta(self._observe(weathers, frames, rng))
        parts = [weather.draw(64, rng, all_classes=True) for weather in weathers]
        return self.learner.accuracy(
            theta, torch.stack([part.frames for part in parts]), torch.stack([part.targets for part in parts])
        )

    def _observe(self, weathers: Sequence[Weather], frames: int, rng: np.random.Generator) -> WindowStatistics:
        source = self.learner.source
        pictures = torch.stack([weather.frames(frames, rng) for weather in weathers])
        features = self.learner.features(pictures) - source.mean  # [E, M, D]
        sums = torch.stack([features.sum(1), features.square().sum(1)], dim=1)  # [E, 2, D]
        return self.rule.statistics(sums, self.learner.scalar(frames), source)

    def _theta(self, window: WindowStatistics) -> Tensor:
        source = self.learner.source
        return source.theta - self.rule.change(window, source)
