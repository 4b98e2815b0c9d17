"""What fixed cameras see while all is well: views of scenes with things before them, and what the frozen model says.

A `Stage` is one camera: clean views of one scene, each with the class probabilities and the features that the frozen
model gives it. Things that it names after the scene behind them, and views that it is not sure of, teach nothing and
are left out. An `Episode` is what a rule is meta-trained on: the camera's clean statistics from some things, a window
in a weather with other things, and yet others in the same weather to aim at.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.rules.base import CLEAN_WINDOWS, SourceNumbers
from mgg_edge.scenes.domains import Domain
from mgg_edge.scenes.objects import CutOut, Scene, place

__all__ = [
    "Episode",
    "Stage",
    "build_stages",
    "clear_shift",
    "draw_episode",
    "recognised",
]

LEAST_SURE = 0.3  # largest probability of a view that is kept
LEAST_VIEWS, LEAST_THINGS = 40, 8
TRIAL_SCENES, ALIKE = 6, 0.65  # scenes things are tried before, and the share of them that agree
FEW_OBJECTS = 3  # things in view in the windows of a busy gate or an empty street
VARIANCE_FLOOR = 1e-12
CLEAN_DRAWS = 6  # windows the largest clean discrepancy is taken over
Rng = np.random.Generator
Frozen = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Stage:
    """One camera.

    Attributes:
        name: of the scene.
        frames: u8[n, H, W, 3], clean views.
        objects: i64[n], which thing stands in each.
        probabilities: f16[n, C], of the frozen model.
        features: f32[n, D], likewise.
    """

    name: str
    frames: NDArray[np.uint8]
    objects: NDArray[np.int64]
    probabilities: Tensor
    features: Tensor

    def source(self, theta: Tensor, views: NDArray[np.int64], rng: Rng) -> SourceNumbers:
        """What a calibration on some views would know; the clean discrepancy is that of the others."""
        known = self.features[views].double()
        mean, std = known.mean(0), (known.var(0, unbiased=True) + VARIANCE_FLOOR).sqrt()
        discrepancy = torch.tensor([self._discrepancy(mean, std, window, rng) for window in CLEAN_WINDOWS])
        own = [part.float().to(theta.device) for part in (mean, std, discrepancy)]
        return SourceNumbers(theta, *own)

    def _discrepancy(self, mean: Tensor, std: Tensor, window: int, rng: Rng) -> float:
        found = []
        for _ in range(CLEAN_DRAWS):
            part = self.features[rng.choice(len(self.frames), window)].double()
            spread = (part.var(0, unbiased=True) + VARIANCE_FLOOR).sqrt()
            found.append(float((part.mean(0) - mean).square().mean() + (spread - std).square().mean()))
        return max(found)


@dataclass(frozen=True)
class Episode:
    """One camera in one weather.

    Attributes:
        source: θ₀ and the clean statistics of the camera.
        window: u8[M, H, W, 3], what the rule sees.
        window_target, aim_target: f[·, C], what the frozen model says of the same views in clear weather.
        aim: u8[Q, H, W, 3], other views in the same weather.
        domain: name of the weather.
    """

    source: SourceNumbers
    window: Tensor
    window_target: Tensor
    aim: Tensor
    aim_target: Tensor
    domain: str


def build_stages(
    scenes: Sequence[Scene],
    cut_outs: Sequence[CutOut],
    frozen: Frozen,
    views: int,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> list[Stage]:
    """Cameras before which things are recognised.

    Args:
        scenes: what the cameras look at.
        cut_outs: what passes.
        frozen: logits f[n, C] and features f[n, D] of frames u8[n, H, W, 3] under θ₀.
        views: of each scene, before those the model is not sure of are left out.
        seed: of what is drawn.
        progress: called with a stage's name, and how much of how much of it is done.

    Raises:
        UsageError: few things are recognised, or before no scene enough.
    """
    known = recognised(cut_outs, scenes, frozen, seed)
    things = [thing for thing in cut_outs if thing.name in known]
    if len(things) < LEAST_THINGS:
        raise UsageError(
            f"objects: expected at least {LEAST_THINGS} that the model names alike before most scenes, found "
            f"{len(things)} of {len(cut_outs)}"
        )
    found = []
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng([seed, number])
        objects = np.resize(rng.permutation(len(things)), views)
        frames = np.stack([place(scene, things[int(index)], rng) for index in objects])
        logits, features = (part.cpu() for part in frozen(torch.from_numpy(frames)))
        probabilities = logits.softmax(1)
        named = np.array([known[things[int(index)].name] for index in objects])
        sure = (
            (probabilities.max(1).values >= LEAST_SURE) & (probabilities.argmax(1) == torch.from_numpy(named))
        ).numpy()
        if sure.sum() >= LEAST_VIEWS and len(np.unique(objects[sure])) >= LEAST_VIEWS // 4:
            kept = torch.from_numpy(sure)
            found.append(
                Stage(scene.name, frames[sure], objects[sure], probabilities[kept].half(), features[kept].float())
            )
        progress("scenes", number + 1, len(scenes))
    if not found:
        raise UsageError(
            f"scenes: expected scenes before which the model recognises at least {LEAST_VIEWS} of {views} views, found "
            f"none among {len(scenes)}"
        )
    return found


def recognised(things: Sequence[CutOut], scenes: Sequence[Scene], frozen: Frozen, seed: int) -> dict[str, int]:
    """Classes, by name, of things that the model names alike and surely before most of some scenes.

    The others are named after the scene behind them, and a rule that learned from them would learn to see that again.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(scenes), min(TRIAL_SCENES, len(scenes)), replace=False)
    votes: list[Counter[int]] = [Counter() for _ in things]
    for index in chosen:
        frames = np.stack([place(scenes[int(index)], thing, rng) for thing in things])
        sure, classes = frozen(torch.from_numpy(frames))[0].cpu().softmax(1).max(1)
        for vote, label, probability in zip(votes, classes.tolist(), sure.tolist(), strict=True):
            if probability >= LEAST_SURE:
                vote[label] += 1
    least = math.ceil(ALIKE * len(chosen))
    best = [vote.most_common(1)[0] if vote else (-1, 0) for vote in votes]
    return {thing.name: label for thing, (label, count) in zip(things, best, strict=True) if count >= least}


def clear_shift(stage: Stage, window: int, rng: Rng, *, few: bool) -> Tensor:
    """Z f[2D] of a window of clear views of some things against the statistics of others: what content alone does."""
    things = rng.permutation(np.unique(stage.objects))
    known, seen = np.array_split(things, 2)
    seen = seen[:FEW_OBJECTS] if few else seen
    reference, places = (np.flatnonzero(np.isin(stage.objects, part)) for part in (known, seen))
    now, then = stage.features[rng.choice(places, window)], stage.features[reference]
    return torch.cat([now.mean(0) - then.mean(0), now.std(0) - then.std(0)])


def draw_episode(
    stage: Stage, domain: Domain, theta: Tensor, window: int, aim: int, rng: Rng, *, few: bool = False
) -> Episode:
    """Views of three sets of things that share none: known when clean, seen in the weather, aimed at.

    Args:
        stage: the camera.
        domain: the weather.
        theta: θ₀ f[N].
        window: M, views the rule sees.
        aim: Q, views the loss is taken over.
        rng: where chance comes from.
        few: whether the window shows only a few different things.
    """
    things = rng.permutation(np.unique(stage.objects))
    known, seen, aimed = np.array_split(things, [len(things) // 2, 3 * len(things) // 4])
    seen = seen[:FEW_OBJECTS] if few else seen
    places = [np.flatnonzero(np.isin(stage.objects, part)) for part in (known, seen, aimed)]
    chosen = [rng.choice(part, count) for part, count in zip(places[1:], (window, aim), strict=True)]
    frames = domain(stage.frames[np.concatenate(chosen)], rng)
    targets = stage.probabilities[np.concatenate(chosen)].float()
    return Episode(
        stage.source(theta, places[0], rng),
        torch.from_numpy(frames[:window]),
        targets[:window],
        torch.from_numpy(frames[window:]),
        targets[window:],
        domain.name,
    )
