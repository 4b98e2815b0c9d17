"""Meta-training of `robust` and `forward+` for one backbone, on cameras that different things pass.

First the way δ to one robust θ is distilled, then, for `forward+`, what bends it to the weather that is seen. Both are
scored on cameras and things that are not trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.objective import Objective
from mgg_edge.learn.rules.base import CLEAN_WINDOWS
from mgg_edge.learn.rules.forward_plus import ForwardPlus
from mgg_edge.learn.statistics import SourceStatistics
from mgg_edge.learn.training.learner import Learner
from mgg_edge.learn.training.loop import LoopRecipe, Progress, meta_train
from mgg_edge.learn.training.scene_map import RobustTrainer, SceneMapTrainer, SceneRecipe
from mgg_edge.learn.training.stages import Episode, Stage, build_stages, draw_episode
from mgg_edge.scenes.domains import draw_domain
from mgg_edge.scenes.objects import CutOut, Scene

__all__ = ["CAMERA_RULES", "CameraRecipe", "CameraTraining", "report"]

CAMERA_RULES = ("robust", "forward+")
HELD_OUT_SEED = 77
HELD_OUT_EPISODES = 24
HELD_OUT_WINDOW, HELD_OUT_AIM = 16, 16
SCENE_VIEWS = 96


@dataclass(frozen=True)
class CameraRecipe:
    """How to train.

    Attributes:
        rule: `robust` or `forward+`.
        robust_updates: meta-updates of δ.
        updates: meta-updates of the map after them; none for `robust`.
        seed: of everything drawn.
        score_every: updates between two scores.

    Raises:
        UsageError: another rule.
    """

    rule: str = "forward+"
    robust_updates: int = 500
    updates: int = 2500
    seed: int = 0
    score_every: int = 100

    def __post_init__(self) -> None:
        if self.rule not in CAMERA_RULES:
            raise UsageError(f"rule: expected one of cameras, {', '.join(CAMERA_RULES)}, found '{self.rule}'")

    @property
    def total(self) -> int:
        """Meta-updates of both parts."""
        return self.robust_updates + (self.updates if self.rule == "forward+" else 0)


class CameraTraining:
    """A training, ready to run.

    Args:
        backbone: the source model; moved to `device`.
        scenes, cut_outs: what cameras look at and what passes, to train on.
        held_out_scenes, held_out_cut_outs: others, to choose the best numbers by.
        recipe: how to train.
        device: where to compute.
        progress: told of the scenes as they are looked at.

    Attributes:
        rule: what is trained, in place.
        learner: the model that adapts.
        stages, held_out: cameras before which things are recognised.

    Raises:
        UsageError: before no scene enough is recognised.
    """

    def __init__(
        self,
        backbone: Backbone,
        scenes: tuple[Sequence[Scene], Sequence[CutOut]],
        held_out_scenes: tuple[Sequence[Scene], Sequence[CutOut]],
        recipe: CameraRecipe,
        device: torch.device | str = "cpu",
        progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
    ) -> None:
        self.recipe, place = recipe, torch.device(device)
        backbone.model.to(place)
        self.learner = learner = Learner(backbone, Objective(), _no_statistics(backbone.features), place)
        self.stages = build_stages(*scenes, _on_processor(learner), SCENE_VIEWS, recipe.seed, progress)
        self.held_out = build_stages(*held_out_scenes, _on_processor(learner), SCENE_VIEWS, recipe.seed, progress)
        self.rule = ForwardPlus(backbone.norms.size, backbone.features, seed=recipe.seed).to(place)
        self._robust = RobustTrainer(self.rule, learner, self.stages, SceneRecipe())
        self._map = SceneMapTrainer(self.rule, learner, self.stages, SceneRecipe())
        self._episodes = _held_out_episodes(self.held_out, learner.source.theta)
        self._facts = {**asdict(recipe), "backbone": _digest(backbone, self.stages)}

    def run(self, resume: Path | None = None) -> Iterator[Progress]:
        """Train; yields after each update. At the end the rule holds the numbers of the best score.

        Raises:
            WeightsError: numbers that are not finite, or a resume file of another training.
            SinkError: the resume file cannot be written.
        """
        recipe, done = self.recipe, 0
        parts: list[tuple[RobustTrainer | SceneMapTrainer, int]] = [(self._robust, recipe.robust_updates)]
        if recipe.rule == "forward+":
            parts.append((self._map, recipe.updates))
        files = [
            None if resume is None else resume.with_name(f"{resume.name}.{number}") for number in range(len(parts))
        ]
        for number, ((trainer, updates), own) in enumerate(zip(parts, files, strict=True)):
            if any(later is not None and later.exists() for later in files[number + 1 :]):
                done += updates  # what a later part has begun with holds what this one has learned
                continue
            loop = LoopRecipe(updates, recipe.seed, recipe.score_every)
            facts = {**self._facts, "part": number}
            for now in meta_train(trainer, partial(trainer.score, self._episodes), loop, own, facts):
                yield now._replace(made=done + now.made)
            done += updates
        self.rule.to("cpu")


def _no_statistics(features: int) -> SourceStatistics:
    """Cameras have statistics of their own; the learner's are not looked at."""
    nothing = torch.zeros(features, dtype=torch.float64)
    return SourceStatistics(nothing, nothing + 1, 1, torch.ones(len(CLEAN_WINDOWS), dtype=torch.float64))


def _on_processor(learner: Learner) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def frozen(frames: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = learner.frozen(frames)
        return logits.cpu(), features.cpu()

    return frozen


def _held_out_episodes(stages: Sequence[Stage], theta: Tensor) -> list[Episode]:
    rng = np.random.default_rng(HELD_OUT_SEED)
    return [
        draw_episode(
            stages[number % len(stages)], draw_domain(rng, 0.15), theta, HELD_OUT_WINDOW, HELD_OUT_AIM, rng,
            few=number % 5 == 0,
        )
        for number in range(HELD_OUT_EPISODES)
    ]  # fmt: skip


def _digest(backbone: Backbone, stages: Sequence[Stage]) -> str:
    """What a resumed training must agree in."""
    hasher = hashlib.sha256(repr((backbone.name, [stage.name for stage in stages])).encode())
    hasher.update(backbone.theta().cpu().numpy().tobytes())
    for stage in stages:
        hasher.update(stage.frames.tobytes())
    return hasher.hexdigest()


def report(training: CameraTraining, last: Progress, seconds: float) -> dict[str, Any]:
    """How a rule was learned, for its file."""
    return {
        **asdict(training.recipe),
        "cameras": len(training.stages),
        "updates": last.made,
        "loss": round(last.loss, 4),
        "held_out_score": round(last.best, 4),
        "seconds": round(seconds, 1),
    }
