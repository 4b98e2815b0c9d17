r"""Meta-training of gradient rules by truncated back-propagation through their own updates.

In a window of K steps from θ_0, δ_i being what the rule takes from θ at step i, h_k the meta-gradient at θ_k,

    θ_k = θ_0 − Σ_{i<k} δ_i       ⇒       ∂/∂φ Σ_k meta-loss(θ_k) = ∂/∂φ ( − Σ_i δ_i · Σ_{k>i} h_k )

where the gradients that enter the rule are taken as given. So the model is differentiated once a step, never through
its own gradient, and the window is differentiated through the rule alone, memory included. The next window goes on
from θ_K and the detached memory; every round starts again from the source model and an empty memory. With K = 1 and one
window without end this is the recipe of arXiv 2412.16901.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.rules.base import GradientRule, UpdateRule
from mgg_edge.learn.rules.plus import Plus
from mgg_edge.learn.training.learner import Learner, Signal
from mgg_edge.learn.training.optimiser import RULE_RATES
from mgg_edge.learn.training.worlds import Drawn, Weather, World

__all__ = ["GradientRecipe", "GradientTrainer", "rule_update"]

SCALE_DOMAINS = 192
SCALE_BATCH = 16
PREPARE_EPISODES = 8


@dataclass(frozen=True)
class GradientRecipe:
    """How gradient rules are trained.

    Attributes:
        horizon: K, steps of a window.
        max_windows: windows of a round, drawn from 1 to this.
        episodes: E, weathers side by side.
        batches: sizes B of the rule's batches, one drawn for each round.
        aim_batch: pictures the meta-loss is taken over, at least B.
    """

    horizon: int = 4
    max_windows: int = 6
    episodes: int = 8
    batches: tuple[int, ...] = (8, 16)
    aim_batch: int = 32

    def __post_init__(self) -> None:
        counts = (self.horizon, self.max_windows, self.episodes, *self.batches)
        if min(counts) < 1 or not self.batches or min(self.batches) < 2 or self.aim_batch < max(self.batches):
            raise UsageError(f"meta-training: expected counts of at least 1 and batches of at least 2, found {self}")


class GradientTrainer:
    """Gradients of the meta-loss on a rule's numbers, one window a call.

    Args:
        rule: its numbers receive the gradients.
        learner: the model that adapts.
        world: where weathers come from.
        rate: α of plain gradient rules.
        recipe: how to train.
    """

    rates: ClassVar[Mapping[str, float]] = RULE_RATES

    def __init__(self, rule: UpdateRule, learner: Learner, world: World, rate: float, recipe: GradientRecipe) -> None:
        self.rule, self.learner, self.world, self.recipe = rule, learner, world, recipe
        self.rate = rate if isinstance(rule, GradientRule) else rule.max_learning_rate
        self._round: _Round | None = None

    def prepare(self, rng: np.random.Generator) -> None:
        """Set ρ and Q of `mgg+` and `adam+` from the gradients of random weathers at θ₀."""
        if not isinstance(self.rule, Plus):
            return
        gradients = []
        theta = self.learner.start(PREPARE_EPISODES)
        for _ in range(SCALE_DOMAINS // PREPARE_EPISODES):
            drawn = _draw([self.world.weather(rng) for _ in range(PREPARE_EPISODES)], SCALE_BATCH, rng)
            gradients.append(self.learner.loss_gradient(theta, drawn.frames)[0])
        found = torch.cat(gradients)  # [192, N]
        scale = found.square().mean(0).sqrt().clamp(min=1e-12)
        principal = principal_directions(found / scale, self.rule.rank)
        with torch.no_grad():
            self.rule.gradient_scale.copy_(scale)
            self.rule.read.copy_(principal)
            self.rule.write.zero_()

    def finish(self, rng: np.random.Generator) -> None:
        """Nothing is left to measure."""

    def backward(self, rng: np.random.Generator) -> float:
        """Leave the meta-gradient of one window in the rule's parameters; returns the mean meta-loss."""
        if self._round is None or self._round.windows_left == 0:
            self._round = self._begin(rng)
        current, recipe, count = self._round, self.recipe, len(self._round.theta)
        state = type(current.state)(*(value.detach() for value in current.state))
        updates: list[Tensor] = []
        ahead: list[Tensor] = []
        losses: list[float] = []
        clean = self._clean(current.batch)
        for _ in range(recipe.horizon):
            ratio = current.signal.discrepancy / clean
            update, state = rule_update(self.rule, current.signal.gradient, ratio, state, self.rate)
            updates.append(update)
            current.theta = current.theta - update.detach()
            current.signal = self._signal(current, rng)
            ahead.append(current.signal.meta_gradient)
            losses.append(current.signal.meta_loss)
        later = torch.stack(ahead).flip(0).cumsum(0).flip(0)  # [K, E, N], Σ_{k>i} h_k
        surrogate = -(torch.stack(updates) * later).sum() / (recipe.horizon * count)
        surrogate.backward()
        current.state = state
        current.windows_left -= 1
        return sum(losses) / len(losses)

    def score(self, weathers: Sequence[Weather], updates: int, batch: int, seed: int) -> float:
        """Agreement with the targets on fresh pictures of weathers after some updates from the source model."""
        rng = np.random.default_rng(seed)
        theta = self.learner.start(len(weathers))
        state = self._state(theta.numel())
        clean = self._clean(batch)
        for _ in range(updates):
            gradient, discrepancy = self.learner.loss_gradient(theta, _draw(weathers, batch, rng).frames)
            with torch.no_grad():
                update, state = rule_update(self.rule, gradient, discrepancy / clean, state, self.rate)
            theta = theta - update
        aim = _draw(weathers, 64, rng, all_classes=True)
        return self.learner.accuracy(theta, aim.frames, aim.targets)

    def _state(self, size: int) -> Any:
        state = self.rule.init(size)
        return type(state)(*(value.to(self.learner.device) for value in state))

    def _clean(self, batch: int) -> Tensor:
        return self.learner.source.clean_at(self.learner.scalar(batch))

    def _begin(self, rng: np.random.Generator) -> _Round:
        recipe = self.recipe
        weathers = [self.world.weather(rng) for _ in range(recipe.episodes)]
        theta = self.learner.start(recipe.episodes)
        batch = int(rng.choice(recipe.batches))
        started = _Round(weathers, batch, theta, self._state(theta.numel()), int(rng.integers(recipe.max_windows)) + 1)
        started.signal = self._signal(started, rng)
        return started

    def _signal(self, current: _Round, rng: np.random.Generator) -> Signal:
        drawn = _draw(current.weathers, max(current.batch, self.recipe.aim_batch), rng)
        return self.learner.signal(current.theta, drawn.frames, drawn.targets, current.batch)


class _Round:
    """Episodes under way."""

    signal: Signal

    def __init__(self, weathers: list[Weather], batch: int, theta: Tensor, state: Any, windows: int) -> None:
        self.weathers, self.batch, self.theta, self.state, self.windows_left = weathers, batch, theta, state, windows


def rule_update(rule: UpdateRule, gradient: Tensor, ratio: Tensor, state: Any, rate: float) -> tuple[Tensor, Any]:
    """What a rule takes from θ f[E, N] of E episodes, and its next state.

    Args:
        rule: a gradient rule, or one of the extended ones.
        gradient: f[E, N].
        ratio: f[E], Δ/Δ_clean.
        state: of E · N scalars.
        rate: α of plain gradient rules, the share of what was learned of others.
    """
    if isinstance(rule, Plus):
        update, state = rule.scaled_update(gradient.flatten(), ratio, state)
        return rate * update.reshape(gradient.shape), state
    if not isinstance(rule, GradientRule):
        raise UsageError(f"meta-training: '{rule.name}' takes no gradient")
    direction, state = rule.update(gradient.flatten(), state)
    return rate * direction.reshape(gradient.shape), state


def principal_directions(rows: Tensor, rank: int) -> Tensor:
    """The first `rank` principal directions f[rank, X] of rows f[n, X], scaled so that their outputs have RMS 1."""
    _, _, directions = torch.linalg.svd(rows.double(), full_matrices=False)
    directions = directions[:rank]
    if len(directions) < rank:
        raise UsageError(f"meta-training: expected at least {rank} random weathers to find directions in")
    outputs = rows.double() @ directions.T  # [n, rank]
    return (directions / outputs.square().mean(0).sqrt().clamp(min=1e-12)[:, None]).float()


def _draw(weathers: Sequence[Weather], count: int, rng: np.random.Generator, *, all_classes: bool = False) -> Drawn:
    """Pictures of each weather: frames u8[E, count, H, W, 3], targets i64[E, count]."""
    parts = [weather.draw(count, rng, all_classes=all_classes) for weather in weathers]
    return Drawn(torch.stack([part.frames for part in parts]), torch.stack([part.targets for part in parts]))
