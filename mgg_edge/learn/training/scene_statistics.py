"""Training of `statistics+` on cameras that different things pass (`stages.py`).

    window in a weather → S_t, aligned layer by layer
    others normalised with S_t → soft cross-entropy to the frozen model's clear views → ∇ strength

A layer's strengths are one number for its means and one for its variances: so few can hardly learn what passes in place
of the weather.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mgg_edge.learn.backbone import NORM_STATISTICS, STRENGTH, Backbone
from mgg_edge.learn.rules.statistics_plus import StatisticsPlus
from mgg_edge.learn.training.learner import Learner
from mgg_edge.learn.training.optimiser import RULE_RATES
from mgg_edge.learn.training.scene_map import Adapted, SceneRecipe, SceneTrainer, answers, distance, moved_by
from mgg_edge.learn.training.stages import STATISTICS_BATCH, Moments, Stage
from mgg_edge.scenes.domains import Domain, draw_domain

__all__ = ["StrengthTrainer", "measure_moments"]

FIRST_STRENGTH = 0.6  # of the first layer at the start, falling to none at the last
SINGLE_SHARE = 0.6  # of weathers that are one operation alone


class StrengthTrainer(SceneTrainer[StatisticsPlus]):
    """Gradients of the loss on the strengths, the gate open.

    Args:
        rule: its numbers are changed.
        learner: the model that adapts; its batch normalisation moves.
        stages: the cameras, looked at with their moments.
        recipe: how to train.
    """

    rates: ClassVar[Mapping[str, float]] = {**RULE_RATES, "strength": 1e-2}

    def __init__(self, rule: StatisticsPlus, learner: Learner, stages: Sequence[Stage], recipe: SceneRecipe) -> None:
        super().__init__(rule, learner, stages, recipe)
        self._windows = [window for window in recipe.windows if window >= STATISTICS_BATCH]
        for parameter in (rule.read, rule.log_threshold, rule.log_slope):
            parameter.requires_grad_(False)  # measured

    def prepare(self, rng: np.random.Generator) -> None:
        """Measure the gate; begin with strengths that fall from the first layer to the last."""
        super().prepare(rng)
        sizes = self._sizes
        falling = FIRST_STRENGTH * (1 - torch.arange(len(sizes) // 2) / max(1, len(sizes) // 2 - 1)).repeat_interleave(
            2
        )
        with torch.no_grad():
            self.rule.strength.copy_(falling.repeat_interleave(torch.tensor(sizes)))

    def backward(self, rng: np.random.Generator) -> float:
        """Leave the gradient of one episode in the strengths, the same for all channels of a layer."""
        episode = self._draw(rng, int(rng.choice(self._windows)))
        moved = moved_by(self.rule, self.learner, episode)
        logits = answers(self.learner, Adapted(episode.source.theta, moved, self.rule.strength), episode)
        loss = distance(logits, episode.aim_target)
        loss.backward()
        gradient = self.rule.strength.grad
        if gradient is not None:
            parts = gradient.split(self._sizes)
            self.rule.strength.grad = torch.cat([part.mean().expand_as(part) for part in parts])
        return float(loss.detach())

    def finish(self, rng: np.random.Generator) -> None:
        """Nothing is left to measure: θ does not move."""

    @property
    def _sizes(self) -> list[int]:
        layout = self.learner.backbone.statistics
        return [] if layout is None else list(layout.sizes)

    def _weather(self, rng: np.random.Generator) -> Domain:
        return draw_domain(rng, 0.0, most=1) if rng.random() < SINGLE_SHARE else super()._weather(rng)


def measure_moments(learner: Learner, frames: Tensor) -> Moments:
    """Statistics of batch normalisation of single frames u8[n, H, W, 3] under the source model.

    Raises:
        ValueError: none move in this backbone.
    """
    backbone: Backbone = learner.backbone
    if backbone.statistics is None:
        raise ValueError("backbone: expected batch normalisation whose statistics move, found none")
    norms = backbone.split(learner.source.theta)
    still = learner.constants | {STRENGTH: torch.zeros((), device=learner.device)}
    with torch.no_grad():
        each = [
            backbone.forward_moving(frame, norms, still, weight=1.0).moved[NORM_STATISTICS].cpu()
            for frame in frames.to(learner.device).split(1)
        ]
    return Moments(torch.stack(each).half(), tuple(backbone.statistics.sizes))
