"""The unsupervised loss of one batch.

    H = mean_x Σ_c −p_c log p_c,   p = softmax(logits)
    Δ = mean_d (σ_B − σ_S)² + mean_d (μ_B − μ_S)²        over the D features
    L = w_H · H + λ · Δ

σ_B, μ_B are the unbiased standard deviation and the mean over the batch, σ_S, μ_S the same on source images.
Source: arXiv 2412.16901, equation 5. The released code sums over features and divides by 64 with λ = 0.4; on
ViT-B/16 (D = 9,216) that is λ = 0.4 · 9,216 / 64 = 57.6 on the mean, and on the mean λ does not depend on D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RELEASED_DIVISOR", "VARIANCE_FLOOR", "Objective", "ObjectiveTerms", "feature_statistics"]

RELEASED_DIVISOR = 64
RELEASED_WEIGHT = 0.4
VIT_BASE_FEATURES = 9_216
DEFAULT_DISCREPANCY_WEIGHT = RELEASED_WEIGHT * VIT_BASE_FEATURES / RELEASED_DIVISOR

# √(variance + this): changes σ by less than 1e-9 where σ > 1e-3 and keeps the gradient finite at σ = 0.
VARIANCE_FLOOR = 1e-12


class ObjectiveTerms(NamedTuple):
    """Scalars: L, H in nats, and Δ before its weight."""

    loss: Tensor
    entropy: Tensor
    discrepancy: Tensor


@dataclass(frozen=True)
class Objective:
    """Weights of the two terms.

    Attributes:
        entropy_weight: w_H, at least 0.
        discrepancy_weight: λ on the mean squared difference, at least 0.
    """

    entropy_weight: float = 1.0
    discrepancy_weight: float = DEFAULT_DISCREPANCY_WEIGHT

    def __call__(self, logits: Tensor, features: Tensor, source_mean: Tensor, source_std: Tensor) -> ObjectiveTerms:
        """Loss of a batch.

        Args:
            logits: f[B, C].
            features: f[B, D].
            source_mean: f[D], μ_S.
            source_std: f[D], σ_S.

        Raises:
            ValueError: B < 2, for which the unbiased deviation does not exist.
        """
        if features.shape[0] < 2:
            raise ValueError(f"objective: expected a batch of at least 2 frames, found {features.shape[0]}")
        entropy = _entropy(logits).mean()
        mean, std = feature_statistics(features)
        discrepancy = (std - source_std).square().mean() + (mean - source_mean).square().mean()
        return ObjectiveTerms(
            self.entropy_weight * entropy + self.discrepancy_weight * discrepancy, entropy, discrepancy
        )


def _entropy(logits: Tensor) -> Tensor:
    """Entropies f[B] of logits z f[B, C], differentiated by hand: ∂H/∂z_c = −p_c (z_c − Σ_k p_k z_k).

    By the chain rule it would be −p_c (log p_c + H): where the classes are nearly equally likely these two numbers
    cancel, three digits and more are lost, and an optimiser that normalises gradients makes them the update.
    """
    fixed = logits.detach()
    log_probability = fixed.log_softmax(dim=1)
    probability = log_probability.exp()
    mean = (probability * fixed).sum(dim=1, keepdim=True)
    linear = -(probability * (fixed - mean) * logits).sum(dim=1)  # has the gradient
    return -(probability * log_probability).sum(dim=1) + (linear - linear.detach())


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """μ_B f[…, D] and unbiased σ_B f[…, D] of features f[…, B, D], B ≥ 2."""
    mean = features.mean(dim=-2)
    variance = (features - mean.unsqueeze(-2)).square().sum(dim=-2) / (features.shape[-2] - 1)
    return mean, torch.sqrt(variance + VARIANCE_FLOOR)
