"""Batch normalisation with statistics that are an input, not a side effect.

    y = γ ⊙ (x − μ) / √(σ² + ε) + β,      (μ, σ²) ← (1 − α)·(μ, σ²) + α·(μ_B, σ²_B)

μ_B, σ²_B are the mean and the biased variance of each channel over batch and space. α says how much the statistics of a
batch count: 0 keeps the source's, 1 takes the batch's alone, between them a mixture in which the source and earlier
batches fade as (1 − α)^t. An adaptation step normalises with the moved statistics and hands them on as state; inference
normalises with the state, so that it needs no batch: one frame is enough, and it runs under the statistics the latest
step was made with.

Statistics are about content as much as about weather: those of one scene are not the source's even when all is well.
So what a layer normalises with is the source's, changed as the scene's have changed since it was clean,

    μ = μ_S + s (μ_t − μ_C),     σ² + ε = (σ²_S + ε) ((σ²_t + ε) / (σ²_C + ε))^s

with the moved statistics μ_t, σ²_t, the clean scene's μ_C, σ²_C and a strength s. A clean scene is left alone whatever
it shows. Before a calibration C is S and s is 1: μ = μ_t, σ² = σ²_t.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mgg_edge.errors import UnsupportedError, UsageError

__all__ = [
    "DEFAULT_NORM_STATISTICS",
    "MovedStatistics",
    "Reference",
    "StatisticsNorm",
    "parse_norm_statistics",
    "replace_batch_norms",
]

DEFAULT_NORM_STATISTICS = "mix:0.1"
_MIXTURE = re.compile(r"mix:(0?\.[0-9]+)")
# Subclasses of nn.BatchNorm* with a forward of their own are taken only when it is known to be norm, drop, act.
_KNOWN = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "BatchNormAct2d", "SyncBatchNormAct")
_FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")


def parse_norm_statistics(text: str) -> float:
    """α of `source`, `batch` or `mix:ALPHA`, a number in [0, 1].

    Raises:
        UsageError: anything else.
    """
    match = _MIXTURE.fullmatch(text)
    weight = {"source": 0.0, "batch": 1.0}.get(text, float(match[1]) if match else None)
    if weight is None or (match and not 0.0 < weight < 1.0):
        raise UsageError(f"norm statistics: expected source, batch or mix:ALPHA with 0 < ALPHA < 1, found '{text}'")
    return weight


@dataclass(frozen=True)
class Reference:
    """What moved statistics are measured against.

    Attributes:
        source, clean: statistics by buffer name, of the source and of the clean scene.
        strength: s f[].
    """

    source: Mapping[str, Tensor]
    clean: Mapping[str, Tensor]
    strength: Tensor

    def align(self, name: str, mean: Tensor, variance: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """μ and σ² + ε of the layer `name` for its moved statistics."""
        (source_mean, source_variance), (clean_mean, clean_variance) = (
            (one[f"{name}.running_mean"], one[f"{name}.running_var"]) for one in (self.source, self.clean)
        )
        aligned = source_mean + self.strength * (mean - clean_mean)
        change = (variance + epsilon).log() - (clean_variance + epsilon).log()
        return aligned, (source_variance + epsilon) * (self.strength * change).exp()


@dataclass
class MovedStatistics:
    """What the layers of one model share during one call.

    Attributes:
        weight: α of this call; 0 leaves the statistics as they are.
        reference: what they are measured against; None where nothing ever moves.
        tensors: moved statistics by buffer name, filled as the layers run.
    """

    weight: float = 0.0
    reference: Reference | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


class StatisticsNorm(nn.Module):
    """Batch normalisation over all axes but the second, spelled out.

    Spelled out, because exporters take the operator in training mode for its inference form, another function.

    Attributes:
        weight, bias: γ and β, f[C]; absent where the layer has none.
        running_mean, running_var: μ and σ², f[C].
        moves: False for frozen layers, whose statistics stay the source's.

    Args:
        name: of the layer in its model.
        source: the layer to take the place of.
        moved: shared by all layers of the model.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, name: str, source: nn.Module, moved: MovedStatistics) -> None:
        super().__init__()
        tensors = {**dict(source.named_parameters(recurse=False)), **dict(source.named_buffers(recurse=False))}
        for key in ("weight", "bias"):
            tensor = tensors.get(key)
            self.register_parameter(key, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False))
        self.register_buffer("running_mean", tensors["running_mean"])
        self.register_buffer("running_var", tensors["running_var"])
        self.name, self.epsilon = name, float(source.eps)  # type: ignore[arg-type]
        self.moves = type(source).__name__ not in _FROZEN
        self.drop, self.act = getattr(source, "drop", nn.Identity()), getattr(source, "act", nn.Identity())
        self._moved = [moved]  # in a list: shared by the model's layers, not a part of this one

    def forward(self, x: Tensor) -> Tensor:
        """Normalise f[B, C, ...]; moves the shared statistics if they have a weight in this call."""
        channels = [1, -1] + [1] * (x.ndim - 2)
        mean, variance, shared = self.running_mean, self.running_var, self._moved[0]
        if self.moves and shared.weight:
            mean, variance = self._move(x, mean, variance, shared.weight)
        if self.moves and shared.reference is not None:
            mean, floored = shared.reference.align(self.name, mean, variance, self.epsilon)
        else:
            floored = variance + self.epsilon
        inverse = torch.rsqrt(floored)
        scale = inverse if self.weight is None else inverse * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return self.act(self.drop(x * scale.reshape(channels) + shift.reshape(channels)))

    def as_batch_norm(self) -> nn.Module:
        """The layer whole again, with these statistics, followed by what it was followed by."""
        channels = len(self.running_mean)
        norm = nn.BatchNorm2d(channels, self.epsilon, affine=self.weight is not None)
        tensors = {"weight": self.weight, "bias": self.bias, "running_mean": self.running_mean}
        tensors["running_var"] = self.running_var
        norm.load_state_dict({name: tensor for name, tensor in tensors.items() if tensor is not None}, strict=False)
        return nn.Sequential(norm, self.drop, self.act)

    def _move(self, x: Tensor, mean: Tensor, variance: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        batch_mean = x.mean(axes, keepdim=True)
        batch_variance = (x - batch_mean).square().mean(axes)
        mean = torch.lerp(mean, batch_mean.flatten(), weight) if weight < 1.0 else batch_mean.flatten()
        variance = torch.lerp(variance, batch_variance, weight) if weight < 1.0 else batch_variance
        self._moved[0].tensors |= {f"{self.name}.running_mean": mean, f"{self.name}.running_var": variance}
        return mean, variance


def replace_batch_norms(model: nn.Module) -> MovedStatistics:
    """Put a `StatisticsNorm` in the place of every batch normalisation of a model.

    Returns:
        What the new layers share.

    Raises:
        UnsupportedError: batch normalisation without running statistics, which one frame cannot replace.
    """
    moved = MovedStatistics()
    for name, module in list(model.named_modules()):
        if type(module).__name__ not in (*_KNOWN, *_FROZEN):
            continue
        if getattr(module, "running_mean", None) is None:
            raise UnsupportedError(f"backbone: '{name}' is {type(module).__name__} without running statistics")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, StatisticsNorm(name, module, moved))
    return moved
