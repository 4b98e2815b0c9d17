"""Meta-training of any learned rule for one backbone: which trainer, which score, which defaults."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgg_edge.errors import UsageError
from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.objective import Objective
from mgg_edge.learn.rules.base import UpdateRule
from mgg_edge.learn.rules.files import LEARNED_RULES, untrained_rule
from mgg_edge.learn.rules.forward import Forward
from mgg_edge.learn.statistics import SourceStatistics, measure_statistics
from mgg_edge.learn.training.gradient import GradientRecipe, GradientTrainer
from mgg_edge.learn.training.learner import Learner
from mgg_edge.learn.training.loop import LoopRecipe, Progress, RuleTrainer, meta_train
from mgg_edge.learn.training.statistics_map import StatisticsMapTrainer, StatisticsRecipe
from mgg_edge.learn.training.worlds import Weather, World
from mgg_edge.scenes.sources import ImageSource

__all__ = ["DEFAULT_UPDATES", "RuleRecipe", "RuleTraining", "report", "source_statistics"]

# At most a quarter of an hour each for the default backbone on two cores.
DEFAULT_UPDATES = {"mgg": 200, "mgg+": 400, "adam+": 400, "forward": 3000}
HELD_OUT_WEATHERS = 24
HELD_OUT_SEED = 77
SCORE_SEED = 99
SCORE_UPDATES, SCORE_FRAMES = 8, 16
STATISTICS_FRAMES, STATISTICS_BATCH = 512, 64


@dataclass(frozen=True)
class RuleRecipe:
    """How to meta-train a rule.

    Attributes:
        rule: one of the learned rules.
        target: `labels` of the source, or `predictions` of the frozen model on clean pictures.
        updates: meta-updates; 0 takes the rule's default.
        learning_rate: α of the plain MGG, in training and at test time.
        seed: of everything drawn.
        sorted_share: share of weathers whose windows show three classes only.
        score_every: updates between two scores on held-out weathers.

    Raises:
        UsageError: another rule, or a rate that is not in (0, 1].
    """

    rule: str = "forward"
    target: str = "labels"
    updates: int = 0
    learning_rate: float = 1e-2
    seed: int = 0
    sorted_share: float = 0.2
    score_every: int = 50

    def __post_init__(self) -> None:
        if self.rule not in LEARNED_RULES:
            raise UsageError(f"rule: expected one that learns, {', '.join(LEARNED_RULES)}, found '{self.rule}'")
        if not 0 < self.learning_rate <= 1:
            raise UsageError(f"learning rate: expected a number in (0, 1], found {self.learning_rate}")

    @property
    def loop(self) -> LoopRecipe:
        """Length and seed."""
        return LoopRecipe(self.updates or DEFAULT_UPDATES[self.rule], self.seed, self.score_every)


class RuleTraining:
    """A training of a rule, ready to run.

    Args:
        backbone: the source model; moved to `device`.
        source: pictures to train on.
        held_out: other pictures, to choose the best numbers by.
        recipe: how to train.
        statistics: of the source; measured on 512 pictures if None.
        device: where to compute.

    Attributes:
        rule: what is trained, in place.
        statistics: source statistics.

    Raises:
        UsageError: labels that the backbone has no classes for, or statistics that cannot be measured.
    """

    def __init__(
        self,
        backbone: Backbone,
        source: ImageSource,
        held_out: ImageSource,
        recipe: RuleRecipe,
        statistics: SourceStatistics | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if recipe.target == "labels" and not 2 <= len(source.available) <= backbone.classes:
            raise UsageError(
                f"meta-training: expected pictures of 2 to {backbone.classes} classes for labels as targets, found "
                f"{len(source.available)}; or use the target 'predictions'"
            )
        self.recipe, self._device = recipe, torch.device(device)
        self.statistics = statistics or source_statistics(backbone, source, recipe.seed)
        backbone.model.to(self._device)
        self.rule = untrained_rule(recipe.rule, backbone.norms.size, backbone.features, recipe.seed)
        if recipe.rule == "mgg":
            self.rule.default_learning_rate = recipe.learning_rate
        self.rule.to(self._device)
        learner = Learner(backbone, Objective(), self.statistics, self._device)
        world = World(source, learner.predictions, recipe.target, recipe.sorted_share)
        unlabelled = World(held_out, learner.predictions, "predictions", sorted_share=0.0)
        rng = np.random.default_rng(HELD_OUT_SEED)
        weathers = [unlabelled.weather(rng, clean_share=0.0) for _ in range(HELD_OUT_WEATHERS)]
        self._trainer, self._score = _trainer(self.rule, learner, world, weathers, recipe)
        self._digest = _digest(backbone, source)

    def run(self, resume: Path | None = None) -> Iterator[Progress]:
        """Train; yields after each update. At the end the rule holds the numbers of the best score.

        Raises:
            WeightsError: numbers that are not finite, or a resume file of another training.
            SinkError: the resume file cannot be written.
        """
        facts = {**asdict(self.recipe), "backbone": self._digest}
        yield from meta_train(self._trainer, self._score, self.recipe.loop, resume, facts)
        self.rule.to("cpu")


def source_statistics(backbone: Backbone, source: ImageSource, seed: int) -> SourceStatistics:
    """Statistics over 512 random clean pictures."""
    rng = np.random.default_rng([seed, STATISTICS_FRAMES])
    counts = [STATISTICS_BATCH] * (STATISTICS_FRAMES // STATISTICS_BATCH)
    draws = (source.draw(rng.choice(source.available, count), rng) for count in counts)
    return measure_statistics(backbone, map(torch.from_numpy, draws))


def _trainer(
    rule: UpdateRule, learner: Learner, world: World, weathers: list[Weather], recipe: RuleRecipe
) -> tuple[RuleTrainer, Callable[[], float]]:
    if isinstance(rule, Forward):
        maps = StatisticsMapTrainer(rule, learner, world, StatisticsRecipe())
        return maps, lambda: maps.score(weathers, SCORE_FRAMES, SCORE_SEED)
    steps = GradientTrainer(rule, learner, world, recipe.learning_rate, GradientRecipe())
    return steps, lambda: steps.score(weathers, SCORE_UPDATES, SCORE_FRAMES, SCORE_SEED)


def _digest(backbone: Backbone, source: ImageSource) -> str:
    """What a resumed training must agree in."""
    hasher = hashlib.sha256(repr((backbone.name, source.classes)).encode())
    for name, value in sorted(backbone.constants().items()):
        hasher.update(name.encode())
        hasher.update(value.cpu().numpy().tobytes())
    hasher.update(backbone.theta().cpu().numpy().tobytes())
    return hasher.hexdigest()


def report(training: RuleTraining, last: Progress, seconds: float) -> dict[str, Any]:
    """How a rule was learned, for its file."""
    return {
        **asdict(training.recipe),
        "updates": last.made,
        "loss": round(last.loss, 4),
        "held_out_score": round(last.best, 4),
        "seconds": round(seconds, 1),
    }
