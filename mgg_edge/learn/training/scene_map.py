"""Training of `robust` and `forward+` on what cameras see that different things pass.

    robust      pictures in a weather → network under θ₀ + δ → divergence from the frozen model's clear view → ∇ δ
    forward+    window in the weather → h; others under θ₀ + δ + P tanh h → cross-entropy → ∇ θ, regressed on tanh h

Pictures of `robust` are drawn anew for every update, whatever the frozen model calls them; `forward+` needs cameras
that stay (`stages.py`). Each loss is divided by the frozen model's own, where that is above 1: a weather in which
nothing is to be seen does not drown the others. No label is looked at anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.rules.forward_plus import ForwardPlus
from mgg_edge.learn.rules.window import WINDOWS, WindowRule, WindowStatistics
from mgg_edge.learn.training.gradient import principal_directions
from mgg_edge.learn.training.learner import Learner
from mgg_edge.learn.training.optimiser import RULE_RATES
from mgg_edge.learn.training.stages import Episode, Stage, clear_shift, draw_episode
from mgg_edge.scenes.domains import Domain, draw_domain
from mgg_edge.scenes.objects import CutOut, Scene, place

__all__ = [
    "RobustTrainer",
    "SceneMapTrainer",
    "SceneRecipe",
    "agreement",
    "distance",
    "divergence",
    "logits_under",
    "observe",
    "theta_of",
]

SCALE_EPISODES = 128
SCALE_WINDOW = 16
CLEAR_WINDOWS = 800
CLEAR_SHARE = 0.98  # of clear windows that lie below
# Above that, in log d: on validation cameras s of windows with few things in view falls from 0.23 to 0.05 by it, in
# weather from 0.96 to 0.89.
THRESHOLD_MARGIN = 1.0
SHRINKAGE = 1.0
RADIUS_MARGIN = 1.1
RIDGE, RIDGE_OF_MEAN = 0.015, 0.1
# How far to go along the mean of the descent and along what h foretells of it.
STEP_LENGTHS = ((0.0, 0.01), (0.005, 0.01), (0.01, 0.02), (0.01, 0.04), (0.02, 0.04))
ROBUST_WEATHERS, ROBUST_PICTURES = 4, 4
SPARE_PICTURES = 4  # drawn beyond those looked at: the frozen model is least sure of these
SINGLE_SHARE = 0.5  # of weathers that are one operation for certain


@dataclass(frozen=True)
class SceneRecipe:
    """How the rules of cameras are trained.

    Attributes:
        episodes: of a round of the regression.
        windows: numbers M of frames in a window, one drawn for each episode.
        aim: other frames the loss is taken over, an episode.
        clean_share: share of clear weather among those of `robust` that may have several operations.
        few_share: share of episodes whose windows show few things.
    """

    episodes: int = 260
    windows: tuple[int, ...] = WINDOWS[:-1]
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
        scenes: what is in the pictures.
        cut_outs: what stands before it.
        recipe: how to train.
        start: δ f[N] to go on from, at half the rate; None begins at θ₀.
    """

    def __init__(
        self,
        rule: ForwardPlus,
        learner: Learner,
        scenes: Sequence[Scene],
        cut_outs: Sequence[CutOut],
        recipe: SceneRecipe,
        start: Tensor | None = None,
    ) -> None:
        self.rule, self.learner, self.recipe, self.start = rule, learner, recipe, start
        self.scenes, self.cut_outs = scenes, cut_outs
        self.rates = RULE_RATES if start is None else {**RULE_RATES, "robust": RULE_RATES["robust"] / 2}

    def prepare(self, rng: np.random.Generator) -> None:  # noqa: ARG002 (nothing is drawn)
        """Begin where an earlier training ended, or at θ₀."""
        with torch.no_grad():
            self.rule.robust.copy_(torch.zeros_like(self.rule.robust) if self.start is None else self.start)
            self.rule.write.zero_()

    def backward(self, rng: np.random.Generator) -> float:
        """Leave the gradient of one update in δ: four pictures in each of four weathers."""
        clear, target = self._pictures(rng, ROBUST_WEATHERS * ROBUST_PICTURES)
        frames = torch.from_numpy(
            np.concatenate([self._weather(rng)(part, rng) for part in np.split(clear, ROBUST_WEATHERS)])
        )
        frozen = divergence(self.learner.frozen(frames)[0], target)
        usual = frozen.view(ROBUST_WEATHERS, -1).mean(1).clamp(min=1.0).repeat_interleave(ROBUST_PICTURES)
        theta = self.learner.source.theta + self.rule.robust
        loss = (divergence(logits_under(self.learner, theta, frames), target) / usual).mean()
        loss.backward()
        return float(loss.detach())

    def _pictures(self, rng: np.random.Generator, count: int) -> tuple[NDArray[np.uint8], Tensor]:
        """Clear views u8[n, H, W, 3] and their class probabilities f[n, C], in no order."""
        drawn = []
        for _ in range(count + SPARE_PICTURES):
            scene = self.scenes[int(rng.integers(len(self.scenes)))]
            drawn.append(place(scene, self.cut_outs[int(rng.integers(len(self.cut_outs)))], rng))
        frames = np.stack(drawn)
        probabilities = self.learner.frozen(torch.from_numpy(frames))[0].softmax(1)
        surest = probabilities.max(1).values.topk(count).indices.cpu()
        kept = surest[torch.from_numpy(rng.permutation(count))]
        return frames[kept.numpy()], probabilities[kept.to(probabilities.device)]

    def _weather(self, rng: np.random.Generator) -> Domain:
        if rng.random() < SINGLE_SHARE:
            return draw_domain(rng, 0.0, most=1)
        return draw_domain(rng, self.recipe.clean_share)

    def finish(self, rng: np.random.Generator) -> None:
        """Nothing is left to measure."""

    def score(self, episodes: Sequence[Episode]) -> float:
        """Agreement of the aim under θ₀ + δ with the frozen model's clear view."""
        theta = self.learner.source.theta + self.rule.robust.detach()
        return agreement(self.learner, [(theta, episode) for episode in episodes])


class SceneMapTrainer:
    """P from the gradients of many episodes at once, δ a little further by their mean.

    Updates one episode at a time were tried and lose to chance: what one weather asks of 42,000 scalars is mostly
    noise, and Adam makes as long a step of it as of anything (docs/LOG.md). So the gradients g of many episodes at
    θ₀ + δ + P tanh h are regressed on what the rule knows of each, (1, tanh h), and one step is made down what the
    regression foretells, every scalar by the size its gradient usually has. How long it is held-out cameras say.

    Args:
        rule: its numbers are changed.
        learner: the model that adapts; its statistics are not looked at, each camera has its own.
        stages: the cameras.
        recipe: how to train.
    """

    def __init__(self, rule: ForwardPlus, learner: Learner, stages: Sequence[Stage], recipe: SceneRecipe) -> None:
        self.rule, self.learner, self.stages, self.recipe = rule, learner, stages, recipe

    def prepare(self, rng: np.random.Generator) -> None:
        """Set Q and the thresholds by what weather does to the statistics and what passing things do."""
        weathered = torch.cat([self._shift(self._draw(rng, SCALE_WINDOW)) for _ in range(SCALE_EPISODES)])
        clear = self._clear_shifts(rng, SCALE_WINDOW)
        with torch.no_grad():
            scale = clear.square().mean(0).sqrt().clamp(min=1e-12)
            self.rule.shift_scale.copy_(scale)
            self.rule.read.copy_(telling_directions(weathered / scale, clear / scale, self.rule.rank))
            self.rule.write.zero_()
            for place, window in enumerate(WINDOWS):
                hidden = (self._clear_shifts(rng, window) / scale) @ self.rule.read.cpu().T
                near = hidden.square().mean(1).log().quantile(CLEAR_SHARE)
                self.rule.log_threshold[place] = near + THRESHOLD_MARGIN

    def round(self, seed: Sequence[int]) -> Iterator[float]:
        """Gather the gradients of one round, yielding the loss of each episode; `step` uses them."""
        self._hidden: list[Tensor] = []
        self._gradients: list[Tensor] = []
        for number in range(self.recipe.episodes):
            rng = np.random.default_rng([*seed, number])
            episode = self._draw(rng, int(rng.choice(self.recipe.windows)))
            hidden, frozen_loss = self._look(episode)
            theta = self._theta(episode, hidden).requires_grad_()
            loss = distance(logits_under(self.learner, theta, episode.aim), episode.aim_target) / max(1.0, frozen_loss)
            (gradient,) = torch.autograd.grad(loss, theta)
            self._hidden.append(hidden)
            self._gradients.append(gradient.half())
            yield float(loss.detach())

    def step(self, held_out: Sequence[Episode]) -> float:
        """Make the step that serves held-out episodes best, or none; returns their mean loss after it."""
        way = descent(torch.stack(self._hidden), torch.stack(self._gradients).float())  # [N, 1 + r]
        looks = [(episode, self._look(episode)[0]) for episode in held_out]
        losses = {(0.0, 0.0): self._loss(looks, None, 0.0, 0.0)}
        losses |= {(mean, bend): self._loss(looks, way, mean, bend) for mean, bend in STEP_LENGTHS}
        mean, bend = min(losses, key=lambda lengths: losses[lengths])
        with torch.no_grad():
            self.rule.robust.add_(mean * way[:, 0])
            self.rule.write.add_(bend * way[:, 1:])
        return losses[mean, bend]

    def finish(self, rng: np.random.Generator) -> None:
        """Measure how far the weathers lead from θ₀: the rule's radius."""
        episodes = [self._draw(rng, SCALE_WINDOW) for _ in range(SCALE_EPISODES)]
        ways = [theta_of(self.rule, self.learner, one) - one.source.theta for one in episodes]
        self.rule.radius = float(RADIUS_MARGIN * max(way.norm() for way in ways))

    def score(self, episodes: Sequence[Episode]) -> float:
        """Agreement of the aim under θ with the frozen model's clear view, over fixed episodes."""
        return agreement(self.learner, [(theta_of(self.rule, self.learner, one), one) for one in episodes])

    def _draw(self, rng: np.random.Generator, window: int) -> Episode:
        stage = self.stages[int(rng.integers(len(self.stages)))]
        few = bool(rng.random() < self.recipe.few_share)
        return draw_episode(
            stage, draw_domain(rng, 0.0), self.learner.source.theta, window, self.recipe.aim, rng, few=few
        )

    def _look(self, episode: Episode) -> tuple[Tensor, float]:
        """Tanh h f[r] of the window, and the frozen model's loss on it."""
        with torch.no_grad():
            statistics, frozen_loss = observe(self.rule, self.learner, episode)
            return torch.tanh(self.rule.read_out(statistics))[0], frozen_loss

    def _theta(self, episode: Episode, hidden: Tensor) -> Tensor:
        """θ f[N] all the way, before the share s."""
        with torch.no_grad():
            return episode.source.theta + self.rule.robust + self.rule.write @ hidden

    def _loss(self, looks: Sequence[tuple[Episode, Tensor]], way: Tensor | None, mean: float, bend: float) -> float:
        found = []
        with torch.no_grad():
            for episode, hidden in looks:
                theta = self._theta(episode, hidden)
                if way is not None:
                    theta = theta + mean * way[:, 0] + bend * (way[:, 1:] @ hidden)
                found.append(float(distance(logits_under(self.learner, theta, episode.aim), episode.aim_target)))
        return float(np.mean(found))

    def _shift(self, episode: Episode) -> Tensor:
        return observe(self.rule, self.learner, episode)[0].shift.cpu()

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


def descent(hidden: Tensor, gradients: Tensor) -> Tensor:
    """−B ⊘ RMS(g) f[N, 1 + r], B the ridge regression of gradients f[n, N] on (1, hidden f[n, r])."""
    known = torch.cat([torch.ones(len(hidden), 1, dtype=torch.float64, device=hidden.device), hidden.double()], 1)
    ridge = RIDGE * len(hidden) * hidden.double().square().mean()
    penalty = torch.diag(torch.cat([known.new_full((1,), RIDGE_OF_MEAN), ridge.expand(hidden.shape[1])]))
    weights = torch.linalg.solve(known.T @ known + penalty, known.T).to(gradients.dtype)  # [1 + r, n]
    size = gradients.square().mean(0).sqrt() + 1e-7
    return -(weights @ gradients).T / size[:, None]


def observe(rule: WindowRule, learner: Learner, episode: Episode) -> tuple[WindowStatistics, float]:
    """Statistics of the window under θ₀, and the frozen model's loss on it."""
    logits, features = learner.frozen(episode.window)
    difference = (features - episode.source.mean).unsqueeze(0)  # [1, M, D]
    sums = torch.stack([difference.sum(1), difference.square().sum(1)], dim=1)
    statistics = rule.statistics(sums, learner.scalar(len(episode.window)), episode.source)
    return statistics, float(distance(logits, episode.window_target))


def theta_of(rule: WindowRule, learner: Learner, episode: Episode) -> Tensor:
    """θ f[1, N] that a rule makes of an episode's window; without gradients."""
    with torch.no_grad():
        return episode.source.theta - rule.change(observe(rule, learner, episode)[0], episode.source)


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


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(p ‖ softmax) f[n] of logits f[n, C] from probabilities p f[n, C]."""
    return (torch.special.xlogy(target, target) - target * logits.log_softmax(1)).sum(1)


def distance(logits: Tensor, target: Tensor) -> Tensor:
    """Soft cross-entropy f[] of logits f[n, C] to probabilities f[n, C]."""
    return -(target.to(logits.device) * logits.log_softmax(1)).sum(1).mean()
