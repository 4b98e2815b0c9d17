"""A small confident transformer, source knowledge, and the same model as an ordinary module, for tests of methods."""

from __future__ import annotations

from functools import cache

import timm
import torch
from torch import nn

from mgg_edge.learn import Backbone, measure_statistics
from mgg_edge.learn.methods import Source
from vit import NAME, OPTIONS, frames

DEPTH = 4
CONFIDENCE = 25.0  # factor on the last layer: random weights are sure of nothing


@cache
def weights() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = timm.create_model(NAME, **{**OPTIONS, "depth": DEPTH})
    state = model.state_dict()
    state["head.weight"] = state["head.weight"] * CONFIDENCE
    return state


@cache
def backbone() -> Backbone:
    return Backbone.create(NAME, weights(), **{**OPTIONS, "depth": DEPTH})


@cache
def source() -> Source:
    pictures = frames(96, seed=99)
    return Source(measure_statistics(backbone(), pictures.split(32)), pictures)


@cache
def convolutional(norm_statistics: str = "batch") -> Backbone:
    return Backbone.create(
        "mobilenetv3_small_050", seed=3, img_size=32, num_classes=10, norm_statistics=norm_statistics
    )


class Reference:
    """The model as published methods take it: a module whose norm parameters require gradients, and its inputs."""

    def __init__(self, names: tuple[str, ...] | None = None) -> None:
        self.model: nn.Module = timm.create_model(NAME, **{**OPTIONS, "depth": DEPTH})
        self.model.load_state_dict(weights())
        self.model.eval().requires_grad_(False)
        chosen = backbone().norms.names if names is None else names
        self.named = {name: value for name, value in self.model.named_parameters() if name in chosen}
        for value in self.named.values():
            value.requires_grad_(True)
        self.parameters = list(self.named.values())

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        info = backbone().preprocess
        mean, std = torch.tensor(info.mean), torch.tensor(info.std)
        return self.model(((pictures / 255 - mean) / std).permute(0, 3, 1, 2))

    def theta(self) -> torch.Tensor:
        return torch.cat(
            [dict(self.model.named_parameters())[name].detach().flatten() for name in backbone().norms.names]
        )


def stream(steps: int, batch: int = 8, seed: int = 0) -> list[torch.Tensor]:
    """Batches u8[B, H, W, 3] of a world darker and noisier than the source."""
    pictures = frames(steps * batch, seed=1000 + seed).float()
    noise = 25 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))
    return list((0.6 * pictures + noise).clamp(0, 255).to(torch.uint8).split(batch))
