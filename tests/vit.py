"""A small but complete vision transformer for tests of the learn and export halves."""

from __future__ import annotations

from functools import cache

import torch

from mgg_edge.learn import MGG, Adam, AdaptStep, Backbone, Objective, Sgd, measure_statistics
from mgg_edge.learn.images import synthetic_frames

SIZE = 32
OPTIONS = {"img_size": SIZE, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
NAME = "vit_tiny_patch16_224"


@cache
def small_backbone(seed: int = 0) -> Backbone:
    return Backbone.create(NAME, seed=seed, **OPTIONS)


def frames(count: int, seed: int = 0) -> torch.Tensor:
    return synthetic_frames(count, SIZE, SIZE, seed)


def small_step(rule: str = "mgg", seed: int = 0) -> AdaptStep:
    backbone = small_backbone(seed)
    rules = {"mgg": lambda: MGG(seed), "adam": Adam, "sgd": Sgd, "sgd0": lambda: Sgd(0.0)}
    statistics = measure_statistics(backbone, frames(32, seed=99).split(8))
    return AdaptStep(backbone, Objective(), rules[rule](), statistics, 1e-3)
