"""Training of `robust` and `forward+` on cameras that different things pass (`stages.py`).

    robust      things in a weather → network under θ₀ + δ → soft cross-entropy to the frozen model's clear views → ∇ δ
    forward+    window in the weather → z → θ = rule(z) → other things under θ → the same loss → ∇ δ, P, Q, κ, s

Each loss is divided by the frozen model's own on the window, where that is above 1: a weather in which nothing is to be
seen does not drown the others. No label is looked at anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.rules.forward_plus import ForwardPlus
from mgg_edge.learn.rules.window import WINDOWS, WindowStatistics
from mgg_edge.learn.training.gradient import principal_directions
from mgg_edge.learn.training.learner import Learner
from mgg_edge.learn.training.stages import Episode, Stage, clear_shift, draw_episode
from mgg_edge.scenes.domains import draw_domain

__all__ = ["SceneMapTrainer", "SceneRecipe"]

SCALE_EPISODES = 128
SCALE_WINDOW = 16
CLEAR_WINDOWS = 800
CLEAR_SHARE = 0.98  # of clear windows that lie below the thresholds at first
SHRINKAGE = 1.0
RADIUS_MARGIN = 1.1


@dataclass(frozen=True)
class SceneRecipe:
    """How the rules of cameras are trained.

    Attributes:
        episodes: E, cameras and weathers side by side.
        windows: numbers M of frames in a window, one drawn for each update.
        aim: other frames the loss is taken over, an episode.
        clean_share: share of episodes without weather.
        few_share: share of episodes whose windows show few things.
    """

    episodes: int = 1
    windows: tuple[int, ...] = WINDOWS
    aim: int = 16
    clean_share: float = 0.15
    few_share: float = 0.2

    def __post_init__(self) -> None:
        if min(self.episodes, self.aim) < 1 or not self.windows or min(self.windows) < 2:
            raise UsageError(f"meta-training: expected counts of at least 1 and windows of at least 2, found {self}")


class SceneMapTrainer:
    """Gradients of the loss on the numbers of a rule, one update a call.

    Args:
        rule: its numbers receive the gradients.
        learner: the model that adapts; its statistics are not looked at, each camera has its own.
        stages: the cameras.
        recipe: how to train.
    """

    def __init__(self, rule: ForwardPlus, learner: Learner, stages: Sequence[Stage], recipe: SceneRecipe) -> None:
        self.rule, self.learner, self.stages, self.recipe = rule, learner, stages, recipe

    def prepare(self, rng: np.random.Generator) -> None:
        """Set Q and the thresholds by what weather does to the statistics and what passing things do."""
        weathered = torch.cat([self._shift(self._draw(rng, SCALE_WINDOW, 0.0)) for _ in range(SCALE_EPISODES)])
        clear = self._clear_shifts(rng, SCALE_WINDOW)
        with torch.no_grad():
            scale = clear.square().mean(0).sqrt().clamp(min=1e-12)
            self.rule.shift_scale.copy_(scale)
            self.rule.read.copy_(telling_directions(weathered / scale, clear / scale, self.rule.rank))
            self.rule.write.zero_()
            for place, window in enumerate(WINDOWS):
                hidden = (self._clear_shifts(rng, window) / scale) @ self.rule.read.T
                self.rule.log_threshold[place] = hidden.square().mean(1).log().quantile(CLEAR_SHARE)

    def backward(self, rng: np.random.Generator) -> float:
        """Leave the gradient of one update in the rule's parameters; returns the mean loss."""
        window = int(rng.choice(self.recipe.windows))
        episodes = [self._draw(rng, window, self.recipe.clean_share) for _ in range(self.recipe.episodes)]
        total = 0.0
        for episode in episodes:
            statistics, frozen_loss = self._observe(episode)
            theta = episode.source.theta - self.rule.change(statistics, episode.source)
            loss = _distance(self._logits(theta, episode.aim), episode.aim_target) / max(1.0, frozen_loss)
            (loss / len(episodes)).backward()
            total += float(loss.detach()) / len(episodes)
        return total

    def finish(self, rng: np.random.Generator) -> None:
        """Measure how far the weathers lead from θ₀: the rule's radius."""
        with torch.no_grad():
            ways = []
            for _ in range(SCALE_EPISODES):
                episode = self._draw(rng, SCALE_WINDOW, 0.0)
                ways.append(self.rule.change(self._observe(episode)[0], episode.source).norm(dim=-1).max())
        self.rule.radius = float(RADIUS_MARGIN * max(ways))

    def score(self, episodes: Sequence[Episode]) -> float:
        """Agreement of the aim under θ with the frozen model's clear view, over fixed episodes."""
        right = []
        with torch.no_grad():
            for episode in episodes:
                statistics, _ = self._observe(episode)
                theta = (episode.source.theta - self.rule.change(statistics, episode.source)).squeeze(0)
                right.append(self._logits(theta, episode.aim).argmax(1) == episode.aim_target.argmax(1))
        return float(torch.cat(right).double().mean())

    def _draw(self, rng: np.random.Generator, window: int, clean_share: float) -> Episode:
        stage = self.stages[int(rng.integers(len(self.stages)))]
        domain = draw_domain(rng, clean_share)
        few = bool(rng.random() < self.recipe.few_share)
        return draw_episode(stage, domain, self.learner.source.theta, window, self.recipe.aim, rng, few=few)

    def _observe(self, episode: Episode) -> tuple[WindowStatistics, float]:
        """Statistics of the window, and the frozen model's loss on it."""
        logits, features = self.learner.frozen(episode.window)
        difference = (features - episode.source.mean).unsqueeze(0)  # [1, M, D]
        sums = torch.stack([difference.sum(1), difference.square().sum(1)], dim=1)
        frames = self.learner.scalar(len(episode.window))
        statistics = self.rule.statistics(sums, frames, episode.source)
        return statistics, float(_distance(logits, episode.window_target))

    def _shift(self, episode: Episode) -> Tensor:
        return self._observe(episode)[0].shift

    def _clear_shifts(self, rng: np.random.Generator, window: int) -> Tensor:
        """Z f[n, 2D] of cameras in clear weather, half of them with few things in view; nothing is computed anew."""
        stages = [self.stages[int(rng.integers(len(self.stages)))] for _ in range(CLEAR_WINDOWS)]
        return torch.stack(
            [clear_shift(stage, window, rng, few=bool(number % 2)) for number, stage in enumerate(stages)]
        )

    def _logits(self, theta: Tensor, frames: Tensor) -> Tensor:
        backbone = self.learner.backbone
        return backbone.forward(frames, backbone.split(theta.reshape(-1)), self.learner.constants)[0]


def telling_directions(weathered: Tensor, clear: Tensor, rank: int) -> Tensor:
    """Directions f[rank, X] in which rows f[n, X] of one kind vary most where those f[m, X] of another vary least.

    The eigenvectors of the first second moment relative to the second, which is shrunk halfway to the unit matrix;
    scaled so that the outputs of the first have RMS 1.
    """
    near, far = clear.double(), weathered.double()
    moment = near.T @ near / len(near)
    factor = torch.linalg.cholesky((moment + SHRINKAGE * torch.eye(len(moment), dtype=torch.float64)) / (1 + SHRINKAGE))
    white = torch.linalg.solve_triangular(factor, far.T, upper=False).T  # [n, X]
    directions = principal_directions(white, rank).double()
    return torch.linalg.solve_triangular(factor.T, directions.T, upper=True).T.float()


def _distance(logits: Tensor, target: Tensor) -> Tensor:
    """Soft cross-entropy f[] of logits f[n, C] to probabilities f[n, C]."""
    return -(target * logits.log_softmax(1)).sum(1).mean()
