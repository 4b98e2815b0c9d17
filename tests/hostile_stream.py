"""A stream of a toy camera with a known truth, and frames mixed in that should never have been learned from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import toy
from mgg_edge.runtime import Adapter

KINDS = ("black", "white", "frozen", "torn", "noise")
RUN = 8  # hostile frames come in runs, as a hand before the lens does


def prototypes() -> list[np.ndarray]:
    """For each class u8[3,8,8,3], the frames of a pool that the source model is surest of."""
    pool = toy.frames(4000, seed=11)
    logits = toy.reference_infer(pool, toy.initial_state()["theta"], toy.weights())[0].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return [pool[np.argsort(-shares[:, index])[:3]] for index in range(toy.CLASSES)]


def stream(share: float, kinds: tuple[str, ...] = KINDS, count: int = 4000, seed: int = 0) -> Iterator[tuple]:
    """Frames and their class; None for the hostile ones, which make up about `share` of all from frame 200 on."""
    random, known = np.random.default_rng(seed), prototypes()
    last, left, kind = known[0][0], 0, ""
    for number in range(count):
        if number >= 200 and not left and random.random() < share / (1 - share) / RUN:
            left, kind = RUN, kinds[random.integers(len(kinds))]
        if left:
            left -= 1
            yield hostile(kind, last, random), None
            continue
        index = int(random.integers(toy.CLASSES))
        picture = known[index][random.integers(3)] + random.normal(0, 25, last.shape)
        last = np.clip(picture, 0, 255).astype(np.uint8)
        yield last, index


def hostile(kind: str, last: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One hostile frame; black and white ones carry a sensor's noise, so that no two are equal."""
    if kind == "frozen":
        return last
    if kind == "torn":
        return np.concatenate([last[:4], np.full((4, 8, 3), 128, np.uint8)])
    if kind == "noise":
        return random.integers(0, 256, last.shape, np.uint8)
    level = {"black": 4, "white": 251}[kind]
    return np.clip(level + random.normal(0, 3, last.shape), 0, 255).astype(np.uint8)


def accuracy(adapter: Adapter, share: float, **options) -> tuple[float, float]:
    """Percent of clean frames named rightly: of all, and of those in the last quarter."""
    right = [
        adapter(frame).index == truth
        for frame, truth in stream(share, **options)
        # a hostile frame is shown as well, its prediction does not count
        if truth is not None or adapter(frame) is None
    ]
    return 100 * float(np.mean(right)), 100 * float(np.mean(right[-len(right) // 4 :]))
