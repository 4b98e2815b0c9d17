"""Cameras for the benchmark `objects`: scenes, the things that are recognised before them, clean and seen pictures.

Scenes and things come in parts by their names (`mgg_edge.scenes.objects.part_of`). Things are kept that the frozen
model names alike before most of a few scenes, scenes before which it names the things: both by clean pictures alone.
Half of the things are there while the camera is calibrated, the other half passes afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgg_edge.runtime.sources.source import Frame
from mgg_edge.scenes.objects import CutOut, Scene, load_cut_outs, load_scenes, number_of, place

TRIAL_SCENES, ALIKE, LEAST_SURE = 6, 5, 0.3
LEAST_RECOGNISED = 0.85
CALIBRATION_FRAMES = 128
Classes = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Clip:
    """Clean pictures u8[n, H, W, 3] as a source for `calibrate`."""

    live = False

    def __init__(self, name: str, frames: np.ndarray) -> None:
        self.name, self.frames, self.frames_expected = name, frames, len(frames)

    def __iter__(self) -> Iterator[Frame]:
        return (Frame(number, number / 25, frame) for number, frame in enumerate(self.frames))


@dataclass(frozen=True)
class Camera:
    """One scene with things before it.

    Attributes:
        name: of the scene.
        clean: u8[n, H, W, 3], to calibrate with.
        seen: u8[m, H, W, 3], things that were not there then.
        few: u8[m, H, W, 3], three of them only.
        elsewhere: u8[m, H, W, 3], all of them before another scene, as after the camera has been turned.
        truth: i64[m], what the frozen model says of `seen`; few_truth and elsewhere_truth likewise.
        names: i64[m], what a person would call the thing, −1 where nobody said.
    """

    name: str
    clean: np.ndarray
    seen: np.ndarray
    truth: np.ndarray
    few: np.ndarray
    few_truth: np.ndarray
    elsewhere: np.ndarray
    elsewhere_truth: np.ndarray
    names: np.ndarray


def recognised(things: Sequence[CutOut], scenes: Sequence[Scene], classes: Classes, seed: int = 0) -> dict[str, int]:
    """Things that the model names alike and surely before at least five of six scenes, with that class."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(scenes), min(TRIAL_SCENES, len(scenes)), replace=False)
    votes: list[Counter[int]] = [Counter() for _ in things]
    for index in chosen:
        found, sure = classes(np.stack([place(scenes[index], thing, rng) for thing in things]))
        for vote, label, probability in zip(votes, found, sure, strict=True):
            if probability >= LEAST_SURE:
                vote[int(label)] += 1
    best = [vote.most_common(1)[0] if vote else (-1, 0) for vote in votes]
    return {thing.name: label for thing, (label, count) in zip(things, best, strict=True) if count >= ALIKE}


def cameras_of(
    folder: Path, parts: Sequence[int], classes: Classes, side: int, frames: int, seed: int, most: int,
    people: dict[str, int] | None = None,
) -> list[Camera]:  # fmt: skip
    """The first `most` cameras before which the known things are recognised, in an order that names alone decide."""
    scenes = sorted(load_scenes(folder / "scenes", side, side, parts), key=lambda scene: number_of(scene.name))
    things = load_cut_outs(folder / "stamps", parts)
    known = recognised(things, scenes, classes)
    kept = [thing for thing in things if thing.name in known]
    found: list[Scene] = []
    for scene in scenes:
        rng = np.random.default_rng([seed, 1])
        named, _ = classes(np.stack([place(scene, thing, rng) for thing in kept]))
        if np.mean([label == known[thing.name] for label, thing in zip(named, kept, strict=True)]) >= LEAST_RECOGNISED:
            found.append(scene)
        if len(found) == most:
            break
    others = [*found[1:], *found[:1]]
    return [
        _camera(scene, other, kept, classes, frames, np.random.default_rng([seed, 2]), people or {})
        for scene, other in zip(found, others, strict=True)
    ]


def _camera(
    scene: Scene, other: Scene, things: Sequence[CutOut], classes: Classes, frames: int, rng: np.random.Generator,
    people: dict[str, int],
) -> Camera:  # fmt: skip
    order = rng.permutation(len(things))
    before, after = order[: len(order) // 2], order[len(order) // 2 :]

    def pass_by(chosen: np.ndarray, count: int, scene: Scene = scene) -> tuple[np.ndarray, np.ndarray]:
        drawn = rng.permutation(np.resize(chosen, count))
        return np.stack([place(scene, things[index], rng) for index in drawn]), drawn

    clean, _ = pass_by(before, CALIBRATION_FRAMES)
    seen, drawn = pass_by(after, frames)
    few, _ = pass_by(after[:3], frames)
    elsewhere, _ = pass_by(after, frames, other)
    names = np.array([people.get(things[index].name, -1) for index in drawn])
    truths = [classes(pictures)[0] for pictures in (seen, few, elsewhere)]
    return Camera(scene.name, clean, seen, truths[0], few, truths[1], elsewhere, truths[2], names)
