"""Meta-training of `robust` and `forward+` for one backbone, on cameras that different things pass.

First the way δ to one robust θ is distilled, then, for `forward+`, what bends it to the weather that is seen. Both are
scored on cameras and things that are not trained on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from mgg_edge.errors import UsageError, WeightsError
from mgg_edge.files import write_whole
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

__all__ = ["CAMERA_RULES", "CameraRecipe", "CameraTraining", "learner_of", "report"]

CAMERA_RULES = ("robust", "forward+")
HELD_OUT_SEED = 77
HELD_OUT_EPISODES = 48
HELD_OUT_WINDOW, HELD_OUT_AIM = 16, 16
SCENE_VIEWS = 96
MOST_SCENES = 240  # that cameras of their own are made of


@dataclass(frozen=True)
class CameraRecipe:
    """How to train.

    Attributes:
        rule: `robust` or `forward+`.
        robust_updates: meta-updates of δ.
        rounds: of the regression after them; none for `robust`.
        episodes: of a round.
        seed: of everything drawn.
        score_every: updates between two scores.

    Raises:
        UsageError: another rule.
    """

    rule: str = "forward+"
    robust_updates: int = 1000
    rounds: int = 3
    episodes: int = 260
    seed: int = 0
    score_every: int = 100

    def __post_init__(self) -> None:
        if self.rule not in CAMERA_RULES:
            raise UsageError(f"rule: expected one of cameras, {', '.join(CAMERA_RULES)}, found '{self.rule}'")

    @property
    def total(self) -> int:
        """Meta-updates and episodes of both parts."""
        return self.robust_updates + (self.rounds * self.episodes if self.rule == "forward+" else 0)


class CameraTraining:
    """A training, ready to run.

    Args:
        backbone: the source model; moved to `device`.
        scenes, cut_outs: what cameras look at and what passes, to train on.
        held_out_scenes, held_out_cut_outs: others, to choose the best numbers by.
        recipe: how to train.
        device: where to compute.
        progress: told of the scenes as they are looked at.
        start: δ f[N] of an earlier training to go on from; None begins at θ₀.

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
        start: Tensor | None = None,
    ) -> None:
        self.recipe, place = recipe, torch.device(device)
        backbone.model.to(place)
        self.learner = learner = learner_of(backbone, place)
        some = scenes[0][:: math.ceil(len(scenes[0]) / MOST_SCENES)]
        self.stages = build_stages(some, scenes[1], learner.frozen, SCENE_VIEWS, recipe.seed, progress)
        self.held_out = build_stages(*held_out_scenes, learner.frozen, SCENE_VIEWS, recipe.seed, progress)
        self.rule = ForwardPlus(backbone.norms.size, backbone.features, seed=recipe.seed).to(place)
        self._robust = RobustTrainer(self.rule, learner, *scenes, SceneRecipe(), start)
        self._map = SceneMapTrainer(self.rule, learner, self.stages, SceneRecipe(recipe.episodes))
        self._episodes = _held_out_episodes(self.held_out, learner.source.theta, 0.15)
        self._steps = _held_out_episodes(self.held_out, learner.source.theta, 0.0)
        self._facts = {**asdict(recipe), "backbone": _digest(backbone, self.stages, start)}

    def run(self, resume: Path | None = None) -> Iterator[Progress]:
        """Train; yields after each update. At the end the rule holds the numbers of the best score.

        Raises:
            WeightsError: numbers that are not finite, or a resume file of another training.
            SinkError: the resume file cannot be written.
        """
        recipe = self.recipe
        first, second = (None if resume is None else resume.with_name(f"{resume.name}.{part}") for part in range(2))
        last = Progress(0, 0.0, None, 0.0)
        if second is None or not second.exists():
            loop = LoopRecipe(recipe.robust_updates, recipe.seed, recipe.score_every)
            for last in meta_train(self._robust, partial(self._robust.score, self._episodes), loop, first, self._facts):
                yield last
            self._map.prepare(np.random.default_rng([recipe.seed, 0]))
            self._save(second, 0)
        done = self._load(second)
        if done or last.made == 0:
            last = Progress(recipe.robust_updates + done * recipe.episodes, 0.0, None, 0.0)
            yield last
        if recipe.rule == "forward+":
            yield from self._bend(last, done, second)
        self._map.finish(np.random.default_rng([recipe.seed, 0]))
        if second is not None:
            second.unlink(missing_ok=True)
        self.rule.to("cpu")

    def _bend(self, last: Progress, done: int, resume: Path | None) -> Iterator[Progress]:
        """The rounds of the regression that are not done; after each one the numbers are kept."""
        recipe = self.recipe
        for number in range(done, recipe.rounds):
            made = recipe.robust_updates + number * recipe.episodes
            for loss in self._map.round([recipe.seed, 1, number]):
                made += 1
                last = Progress(made, 0.95 * last.loss + 0.05 * loss if last.loss else loss, None, last.best)
                yield last
            self._map.step(self._steps)
            score = self._map.score(self._episodes)
            last = last._replace(score=score, best=score)
            self._save(resume, number + 1)
            yield last

    def _save(self, path: Path | None, rounds: int) -> None:
        if path is not None:
            tensors = {name: value.detach().cpu().contiguous() for name, value in self.rule.state_dict().items()}
            write_whole(path, save(tensors, {"key": self._key, "rounds": str(rounds)}))

    def _load(self, path: Path | None) -> int:
        """Rounds that a file has the numbers of; 0 without one.

        Raises:
            WeightsError: it belongs to another training, or is damaged.
        """
        if path is None or not path.exists():
            return 0
        try:
            with safetensors.safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if header.get("key") != self._key:
                raise WeightsError(f"{path}: cannot resume: it belongs to another training; remove it")
            self.rule.load_state_dict(tensors)
            return int(header["rounds"])
        except (OSError, safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise WeightsError(f"{path}: cannot resume: expected the numbers of a round: {error}") from error

    @property
    def _key(self) -> str:
        return hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()


def learner_of(backbone: Backbone, device: torch.device | str = "cpu") -> Learner:
    """A learner whose statistics are not looked at: cameras have their own."""
    nothing = torch.zeros(backbone.features, dtype=torch.float64)
    statistics = SourceStatistics(nothing, nothing + 1, 1, torch.ones(len(CLEAN_WINDOWS), dtype=torch.float64))
    return Learner(backbone, Objective(), statistics, torch.device(device))


def _held_out_episodes(stages: Sequence[Stage], theta: Tensor, clean_share: float) -> list[Episode]:
    rng = np.random.default_rng(HELD_OUT_SEED)
    return [
        draw_episode(
            stages[number % len(stages)], draw_domain(rng, clean_share), theta, HELD_OUT_WINDOW, HELD_OUT_AIM, rng,
            few=number % 5 == 0,
        )
        for number in range(HELD_OUT_EPISODES)
    ]  # fmt: skip


def _digest(backbone: Backbone, stages: Sequence[Stage], start: Tensor | None) -> str:
    """What a resumed training must agree in."""
    hasher = hashlib.sha256(repr((backbone.name, [stage.name for stage in stages])).encode())
    for numbers in (backbone.theta(), start):
        hasher.update(b"" if numbers is None else numbers.cpu().numpy().tobytes())
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
