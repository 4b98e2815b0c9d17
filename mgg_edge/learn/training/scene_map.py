"""Training of `robust` and `forward+` on cameras that different things pass (`stages.py`).

    robust      things in a weather → network under θ₀ + δ → soft cross-entropy to the frozen model's clear views → ∇ δ
    forward+    window in the weather → z → θ = rule(z) → other things under θ → the same loss → ∇ δ, P, Q, κ, s

Each loss is divided by the frozen model's own on the window, where that is above 1: a weather in which nothing is to be
seen does not drown the others. No label is looked at anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.rules.forward_plus import ForwardPlus
from mgg_edge.learn.rules.window import WINDOWS, WindowRule, WindowStatistics
from mgg_edge.learn.training.gradient import principal_directions
from mgg_edge.learn.training.learner import Learner
from mgg_edge.learn.training.optimiser import RULE_RATES
from mgg_edge.learn.training.stages import Episode, Stage, clear_shift, draw_episode
from mgg_edge.scenes.domains import draw_domain

__all__ = ["RobustTrainer", "SceneMapTrainer", "SceneRecipe", "agreement", "distance", "logits_under", "observe"]

SCALE_EPISODES = 128
SCALE_WINDOW = 16
CLEAR_WINDOWS = 800
CLEAR_SHARE = 0.98  # of clear windows that lie below the thresholds at first
SHRINKAGE = 1.0
RADIUS_MARGIN = 1.1
ROBUST_CAMERAS, ROBUST_PICTURES = 4, 4


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


class RobustTrainer:
    """Gradients of the loss on δ alone, every picture of it under θ₀ + δ.

    Args:
        rule: its δ receives the gradients.
        learner: the model that adapts.
        stages: the cameras.
        recipe: how to train.
    """

    rates: ClassVar[Mapping[str, float]] = RULE_RATES

    def __init__(self, rule: ForwardPlus, learner: Learner, stages: Sequence[Stage], recipe: SceneRecipe) -> None:
        self.rule, self.learner, self.stages, self.recipe = rule, learner, stages, recipe

    def prepare(self, rng: np.random.Generator) -> None:  # noqa: ARG002 (nothing is drawn)
        """Begin at θ₀."""
        with torch.no_grad():
            self.rule.robust.zero_()
            self.rule.write.zero_()

    def backward(self, rng: np.random.Generator) -> float:
        """Leave the gradient of one update in δ: four pictures each of four cameras, each in a weather of its own."""
        frames, targets = [], []
        for _ in range(ROBUST_CAMERAS):
            stage = self.stages[int(rng.integers(len(self.stages)))]
            chosen = rng.choice(len(stage.frames), ROBUST_PICTURES)
            frames.append(draw_domain(rng, self.recipe.clean_share)(stage.frames[chosen], rng))
            targets.append(stage.probabilities[chosen].float())
        theta = self.learner.source.theta + self.rule.robust
        loss = distance(logits_under(self.learner, theta, torch.from_numpy(np.concatenate(frames))), torch.cat(targets))
        loss.backward()
        return float(loss.detach())

    def finish(self, rng: np.random.Generator) -> None:
        """Nothing is left to measure."""

    def score(self, episodes: Sequence[Episode]) -> float:
        """Agreement of the aim under θ₀ + δ with the frozen model's clear view."""
        theta = self.learner.source.theta + self.rule.robust.detach()
        return agreement(self.learner, [(theta, episode) for episode in episodes])


class SceneMapTrainer:
    """Gradients of the loss on the numbers of a rule, one update a call.

    Args:
        rule: its numbers receive the gradients.
        learner: the model that adapts; its statistics are not looked at, each camera has its own.
        stages: the cameras.
        recipe: how to train.
    """

    # Gentler than from nothing: the robust way is there already.
    rates: ClassVar[Mapping[str, float]] = {**RULE_RATES, "write": 3e-4, "read": 3e-4, "robust": 5e-4}

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
            statistics, frozen_loss = observe(self.rule, self.learner, episode)
            theta = episode.source.theta - self.rule.change(statistics, episode.source)
            loss = distance(logits_under(self.learner, theta, episode.aim), episode.aim_target) / max(1.0, frozen_loss)
            (loss / len(episodes)).backward()
            total += float(loss.detach()) / len(episodes)
        return total

    def finish(self, rng: np.random.Generator) -> None:
        """Measure how far the weathers lead from θ₀: the rule's radius."""
        with torch.no_grad():
            ways = []
            for _ in range(SCALE_EPISODES):
                episode = self._draw(rng, SCALE_WINDOW, 0.0)
                ways.append(
                    self.rule.change(observe(self.rule, self.learner, episode)[0], episode.source).norm(dim=-1).max()
                )
        self.rule.radius = float(RADIUS_MARGIN * max(ways))

    def score(self, episodes: Sequence[Episode]) -> float:
        """Agreement of the aim under θ with the frozen model's clear view, over fixed episodes."""
        with torch.no_grad():
            changes = [
                self.rule.change(observe(self.rule, self.learner, episode)[0], episode.source) for episode in episodes
            ]
        pairs = zip(changes, episodes, strict=True)
        return agreement(self.learner, [(episode.source.theta - change, episode) for change, episode in pairs])

    def _draw(self, rng: np.random.Generator, window: int, clean_share: float) -> Episode:
        stage = self.stages[int(rng.integers(len(self.stages)))]
        domain = draw_domain(rng, clean_share)
        few = bool(rng.random() < self.recipe.few_share)
        return draw_episode(stage, domain, self.learner.source.theta, window, self.recipe.aim, rng, few=few)

    def _shift(self, episode: Episode) -> Tensor:
        return observe(self.rule, self.learner, episode)[0].shift

    def _clear_shifts(self, rng: np.random.Generator, window: int) -> Tensor:
        """Z f[n, 2D] of cameras in clear weather, half of them with few things in view; nothing is computed anew."""
        stages = [self.stages[int(rng.integers(len(self.stages)))] for _ in range(CLEAR_WINDOWS)]
        return torch.stack(
            [clear_shift(stage, window, rng, few=bool(number % 2)) for number, stage in enumerate(stages)]
        )


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


def observe(rule: WindowRule, learner: Learner, episode: Episode) -> tuple[WindowStatistics, float]:
    """Statistics of the window under θ₀, and the frozen model's loss on it."""
    logits, features = learner.frozen(episode.window)
    difference = (features - episode.source.mean.to(features.device)).unsqueeze(0)  # [1, M, D]
    sums = torch.stack([difference.sum(1), difference.square().sum(1)], dim=1)
    statistics = rule.statistics(sums, learner.scalar(len(episode.window)), episode.source)
    return statistics, float(distance(logits, episode.window_target))


def logits_under(learner: Learner, theta: Tensor, frames: Tensor) -> Tensor:
    """Logits f[n, C] of frames u8[n, H, W, 3] under θ f[N] or f[1, N]."""
    backbone = learner.backbone
    return backbone.forward(frames.to(learner.device), backbone.split(theta.reshape(-1)), learner.constants)[0]


def agreement(learner: Learner, pairs: Sequence[tuple[Tensor, Episode]]) -> float:
    """Share of aimed-at frames that θ names as the frozen model names the clear view, each under its own θ."""
    with torch.no_grad():
        right = [
            logits_under(learner, theta, episode.aim).argmax(1).cpu() == episode.aim_target.argmax(1)
            for theta, episode in pairs
        ]
    return float(torch.cat(right).double().mean())


def distance(logits: Tensor, target: Tensor) -> Tensor:
    """Soft cross-entropy f[] of logits f[n, C] to probabilities f[n, C]."""
    return -(target.to(logits.device) * logits.log_softmax(1)).sum(1).mean()
