"""Source statistics: mean and unbiased standard deviation of the features over clean images.

Batches are merged with Chan, Golub and LeVeque's update of Welford's sums, in float64:

    n = n_a + n_b,  d = μ_b − μ_a,  μ = μ_a + d·n_b/n,  M = M_a + M_b + d²·n_a·n_b/n,  σ = √(M / (n − 1))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.objective import feature_statistics
from mgg_edge.learn.rules.base import CLEAN_WINDOWS

__all__ = ["MIN_SOURCE_IMAGES", "FeatureMoments", "SourceStatistics", "measure_statistics"]

MIN_SOURCE_IMAGES = 32
MAX_CLEAN_IMAGES = 512  # features kept to draw windows from
CLEAN_DRAWS = 64


@dataclass(frozen=True)
class SourceStatistics:
    """What is known of the source.

    Attributes:
        mean, std: f64[D], μ_S and σ_S.
        images: how many they were taken over.
        clean_discrepancy: f64[7], Δ_clean at M of `CLEAN_WINDOWS`.
    """

    mean: Tensor
    std: Tensor
    images: int
    clean_discrepancy: Tensor

    def constants(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The vectors by the names they have in graphs and files."""
        return {
            "statistics.mean": self.mean.to(dtype),
            "statistics.std": self.std.to(dtype),
            "statistics.clean_discrepancy": self.clean_discrepancy.to(dtype),
        }


@dataclass(frozen=True)
class FeatureMoments:
    """Running sums: n, μ f64[D] and M f64[D], the sum of squared deviations."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, features: Tensor) -> FeatureMoments:
        """Moments of one batch f[B, D]."""
        values = features.double()
        mean = values.mean(dim=0)
        return cls(values.shape[0], mean, (values - mean).square().sum(dim=0))

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """Moments of both sets together."""
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        squares = self.squares + other.squares + difference.square() * (self.count * other.count / count)
        return FeatureMoments(count, mean, squares)


def measure_statistics(backbone: Backbone, batches: Iterable[Tensor]) -> SourceStatistics:
    """Statistics of a backbone's features at θ₀.

    Args:
        backbone: the classifier.
        batches: u8[B, H, W, 3] each, at the model's input size; B may vary.

    Raises:
        UsageError: fewer than 32 images in all, or features that are not finite.
    """
    constants, norms = backbone.constants(), backbone.split(backbone.theta())
    moments: FeatureMoments | None = None
    kept: list[Tensor] = []
    with torch.no_grad():
        for frames in batches:
            features = backbone.forward(frames, norms, constants)[1]
            batch = FeatureMoments.of(features)
            moments = batch if moments is None else moments.merge(batch)
            if sum(map(len, kept)) < MAX_CLEAN_IMAGES:
                kept.append(features.double())
    if moments is None or moments.count < MIN_SOURCE_IMAGES:
        found = 0 if moments is None else moments.count
        raise UsageError(f"source statistics: expected at least {MIN_SOURCE_IMAGES} images, found {found}")
    std = (moments.squares / (moments.count - 1)).sqrt()
    if not bool(torch.isfinite(std).all() and torch.isfinite(moments.mean).all()):
        raise UsageError(f"source statistics: the features of '{backbone.name}' are not finite on these images")
    clean = clean_discrepancy(torch.cat(kept), moments.mean, std)
    return SourceStatistics(moments.mean, std, moments.count, clean)


def clean_discrepancy(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Δ_clean f64[7] at `CLEAN_WINDOWS`, from features f64[n, D] of clean images, n ≥ 4, and their statistics."""
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    for window in CLEAN_WINDOWS:
        if 2 * window > len(features):
            found.append(found[-1] / 2)
            continue
        chosen = torch.stack([torch.randperm(len(features), generator=generator)[:window] for _ in range(CLEAN_DRAWS)])
        means, stds = zip(*(feature_statistics(features[rows]) for rows in chosen), strict=True)
        shift, spread = torch.stack(means) - mean, torch.stack(stds) - std
        found.append(shift.square().mean() + spread.square().mean())
    return torch.stack(found)
