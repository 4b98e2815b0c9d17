"""A small but complete vision transformer for tests of the learn and export halves."""

from __future__ import annotations

from functools import cache

import torch

from mgg_edge.learn import AdaptStep, Backbone, Objective, Sgd, measure_statistics
from mgg_edge.learn.images import synthetic_frames
from mgg_edge.learn.rules.files import untrained_rule

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
    made = Sgd(0.0) if rule == "sgd0" else untrained_rule(rule, backbone.norms.size, backbone.features, seed)
    statistics = measure_statistics(backbone, frames(32, seed=99).split(8))
    rate = 1e-3 if made.max_learning_rate > 1 else made.default_learning_rate
    return AdaptStep(backbone, Objective(), made, statistics, rate)
