r"""DeYO: entropy is not enough; keep images whose answer depends on shape (arXiv 2403.07366).

    confident    H(x) < τ_H = 0.5 ln C
    shape        PLPD(x) = p_ŷ(x) − p_ŷ(x′) > τ = 0.2,   ŷ = argmax p(x),   x′ = patches of x shuffled    equation 8
    weight       a(x) = exp(E₀ − H(x)) + exp(PLPD(x)),   E₀ = 0.4 ln C                                    equation 10
    L = mean over the images kept of a(x) · H(x)

x′ cuts the image into 4 × 4 patches and permutes them, each image in its own way; x is resized to a multiple of 4 and
back where needed. Patches keep the local texture and destroy the object. A batch without an image left changes nothing.
The top norms stay as they are, see `sar.py`. SourceKnowledge: github Jhyun17/DeYO (MIT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mgg_edge.errors import UsageError
from mgg_edge.learn.methods.base import Classifier, RateOptions, Weights, descend, entropy, paper_rate
from mgg_edge.learn.methods.randomness import generator_of
from mgg_edge.learn.methods.sar import ALONE_FACTOR, lower_norms

__all__ = ["Deyo", "DeyoOptions", "DeyoState", "shuffle_patches"]


@dataclass(frozen=True)
class DeyoOptions(RateOptions):
    """Settings.

    Attributes:
        margin: τ_H as a share of ln C.
        weight_margin: E₀ as a share of ln C.
        difference: τ, least PLPD.
        patches: patches a side.
        freeze_top: whether the last norms stay as they are.
        seed: of the permutations.
    """

    margin: float = 0.5
    weight_margin: float = 0.4
    difference: float = 0.2
    patches: int = 4
    freeze_top: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.margin > 0.0 and self.weight_margin > 0.0 and self.difference >= -1.0 and self.patches >= 2):
            raise UsageError(f"deyo: expected positive margins and at least 2 patches a side, found {self}")


class DeyoState(NamedTuple):
    """Attributes: weights; step: batches seen."""

    weights: Weights
    step: int


class Deyo:
    """Entropy minimisation on images whose label depends on their shape.

    Args:
        classifier: the model.
        options: settings.
    """

    name: ClassVar[str] = "deyo"

    def __init__(self, classifier: Classifier, options: DeyoOptions | None = None) -> None:
        self._classifier, self.options = classifier, options or DeyoOptions()
        scale = math.log(classifier.backbone.classes)
        self._margin, self._weight_margin = self.options.margin * scale, self.options.weight_margin * scale
        self._mask = lower_norms(classifier) if self.options.freeze_top else torch.ones_like(classifier.theta)

    def init(self) -> DeyoState:
        """The source model at rest."""
        return DeyoState(Weights.of(self._classifier), 0)

    def step(self, frames: Tensor, state: DeyoState) -> tuple[Tensor, DeyoState]:
        """Logits f[B, C] before the update, and the next state."""
        weights = state.weights

        def loss(theta: Tensor) -> tuple[Tensor, Any]:
            output = self._classifier.moving(frames, theta, weights.statistics)
            entropies = entropy(output.logits)
            weight = self._weigh(frames, output.logits.detach(), state)
            return (weight * entropies).sum() / max(int((weight > 0).sum()), 1), (output, weight)

        gradient, (output, weight) = self._classifier.gradient(weights.theta, loss)
        moved = weights._replace(statistics=output.statistics)
        if bool((weight > 0).any()):
            rate = paper_rate(self._classifier, self.options, len(frames), alone=ALONE_FACTOR)
            moved = descend(moved, gradient * self._mask, rate, self.options)
        return output.logits.detach(), DeyoState(moved, state.step + 1)

    def predict(self, frames: Tensor, state: DeyoState) -> Tensor:
        """Logits f[B, C] of the adapted model."""
        return self._classifier.frozen(frames, state.weights.theta, state.weights.statistics)

    def _weigh(self, frames: Tensor, logits: Tensor, state: DeyoState) -> Tensor:
        """a(x) f[B], 0 for images left out."""
        entropies, weights = entropy(logits), torch.zeros(len(logits))
        kept = torch.nonzero(entropies < self._margin).flatten()
        if not len(kept):
            return weights
        shuffled = shuffle_patches(frames[kept], self.options.patches, generator_of(self.options.seed, state.step))
        with torch.no_grad():
            theta, statistics = state.weights.theta, state.weights.statistics
            destroyed = self._classifier.moving(shuffled, theta, statistics).logits.softmax(1)
        answer = logits[kept].argmax(1, keepdim=True)
        difference = (logits[kept].softmax(1).gather(1, answer) - destroyed.gather(1, answer))[:, 0]
        weight = torch.exp(self._weight_margin - entropies[kept]) + torch.exp(difference)
        weights[kept] = torch.where(difference > self.options.difference, weight, torch.zeros_like(weight))
        return weights


def shuffle_patches(frames: Tensor, patches: int, generator: torch.Generator) -> Tensor:
    """Permute the patches of each image in its own way.

    Args:
        frames: u8 or f[B, H, W, 3], H and W at least `patches`.
        patches: n, patches a side.
        generator: of the permutations.

    Returns:
        f32[B, H, W, 3].
    """
    count, height, width, channels = frames.shape
    rows, columns = height // patches, width // patches
    images = _resize(frames.permute(0, 3, 1, 2).float(), rows * patches, columns * patches)
    parts = images.reshape(count, channels, patches, rows, patches, columns)
    parts = parts.permute(0, 2, 4, 1, 3, 5).reshape(count, patches * patches, channels, rows, columns)
    order = torch.rand(count, patches * patches, generator=generator).argsort(1)  # [B, n²]
    parts = parts[torch.arange(count)[:, None], order].reshape(count, patches, patches, channels, rows, columns)
    images = parts.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, rows * patches, columns * patches)
    return _resize(images, height, width).permute(0, 2, 3, 1)


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    return functional.interpolate(images, (height, width), mode="bilinear", antialias=True)
