r"""SAR: sharpness-aware entropy minimisation on reliable images, with recovery (arXiv 2302.12400).

    reliable    H(x) < E₀ = 0.4 ln C                                                          equation 2
    ascend      e = ρ · g / ‖g‖₂,   g = ∂/∂θ mean H(x) over the reliable,   ρ = 0.05          equation 4
    descend     θ ← θ − α·SGD( ∂/∂θ mean H(x) at θ + e, over those of the reliable that still are )
    recover     m ← 0.9 m + 0.1 · that mean;  if m < 0.2: θ and momentum go back to the source

The norms of the last quarter of the blocks, or of the last of four stages, and those after them stay as they are (the
paper's blocks 9 to 11 of ViT-B and `layer4` of ResNet-50), see `lower_norms`. As in github mr-eggplant/SAR (BSD-3), a
batch without a reliable image gives the gradient 0, so that momentum carries on, and m is not reset with the model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.methods.base import Classifier, Output, RateOptions, Weights, descend, entropy, paper_rate

__all__ = ["Sar", "SarOptions", "SarState", "lower_norms"]

MEAN_DECAY = 0.9
ALONE_FACTOR = 2.0  # on the learning rate for single images, as in the repository
TOP_SHARE = 4  # one in four blocks or stages
_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(frozen=True)
class SarOptions(RateOptions):
    """Settings.

    Attributes:
        margin: E₀ as a share of ln C.
        radius: ρ.
        recovery: bound on m below which the model is reset.
        freeze_top: whether the last norms stay as they are.
        keep_momentum: whether momentum survives a reset, as it does in the authors' code.
    """

    margin: float = 0.4
    radius: float = 0.05
    recovery: float = 0.2
    freeze_top: bool = True
    keep_momentum: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.margin > 0.0 and self.radius >= 0.0 and self.recovery >= 0.0):
            raise UsageError(f"sar: expected a positive margin, radius and recovery of at least 0, found {self}")


class SarState(NamedTuple):
    """Attributes: weights; mean: m, or None before the first reliable image."""

    weights: Weights
    mean: float | None


class Sar:
    """Sharpness-aware and reliable entropy minimisation.

    Args:
        classifier: the model.
        options: settings.
    """

    name: ClassVar[str] = "sar"

    def __init__(self, classifier: Classifier, options: SarOptions | None = None) -> None:
        self._classifier, self.options = classifier, options or SarOptions()
        self._margin = self.options.margin * math.log(classifier.backbone.classes)
        self._mask = lower_norms(classifier) if self.options.freeze_top else torch.ones_like(classifier.theta)

    def init(self) -> SarState:
        """The source model at rest."""
        return SarState(Weights.of(self._classifier), None)

    def step(self, frames: Tensor, state: SarState) -> tuple[Tensor, SarState]:
        """Logits f[B, C] before the update, and the next state."""
        weights, everything = state.weights, torch.ones(len(frames), dtype=torch.bool)
        first, (output, reliable, _) = self._gradient(frames, weights.theta, weights.statistics, everything)
        scale = self.options.radius / (first.norm() + 1e-12)
        second, (_, _, value) = self._gradient(frames, weights.theta + scale * first, weights.statistics, reliable)
        rate = paper_rate(self._classifier, self.options, len(frames), alone=ALONE_FACTOR)
        moved = descend(weights, second, rate, self.options)._replace(statistics=output.statistics)
        mean = state.mean
        if value is not None:
            mean = value if mean is None else MEAN_DECAY * mean + (1 - MEAN_DECAY) * value
        if mean is not None and mean < self.options.recovery:
            source = Weights.of(self._classifier)
            moved = source._replace(momentum=moved.momentum) if self.options.keep_momentum else source
        return output.logits.detach(), SarState(moved, mean)

    def predict(self, frames: Tensor, state: SarState) -> Tensor:
        """Logits f[B, C] of the adapted model."""
        return self._classifier.frozen(frames, state.weights.theta, state.weights.statistics)

    def _gradient(
        self, frames: Tensor, theta: Tensor, statistics: Tensor | None, among: Tensor
    ) -> tuple[Tensor, tuple[Output, Tensor, float | None]]:
        """Gradient f[N] of the mean entropy over the reliable images among some; those, and the mean itself."""

        def loss(leaf: Tensor) -> tuple[Tensor, Any]:
            output = self._classifier.moving(frames, leaf, statistics)
            entropies = entropy(output.logits)
            reliable = among & (entropies.detach() < self._margin)
            # A sum over nothing, unlike a mean, is 0 with gradient 0.
            value = (entropies * reliable).sum() / max(int(reliable.sum()), 1)
            return value, (output, reliable, float(value.detach()) if bool(reliable.any()) else None)

        gradient, kept = self._classifier.gradient(theta, loss)
        return gradient * self._mask, kept


def lower_norms(classifier: Classifier) -> Tensor:
    """1 for the scalars of θ that SAR and DeYO adapt, 0 for those of the top layers: f[N].

    A net's outermost numbered modules (`blocks.11`, `layer4`, `stages.3`, `encoder.layers.encoder_layer_11`) are its
    blocks or stages, those of the most common name. The last quarter of them is the top, and whatever stands behind.
    Where that would leave nothing, everything adapts.
    """
    parameters = classifier.backbone.norms.parameters
    stages = [_stage(parameter.name) for parameter in parameters]
    families = Counter(family for family, _ in dict.fromkeys(filter(None, stages)))
    if not families:
        return torch.ones_like(classifier.theta)
    ((family, count),) = families.most_common(1)
    numbers = list(dict.fromkeys(stage for stage in stages if stage is not None and stage[0] == family))
    top = set(numbers[count - count // TOP_SHARE :])
    last = max(place for place, stage in enumerate(stages) if stage in numbers)
    first_frozen = next((place for place, stage in enumerate(stages) if stage in top), last + 1)
    parts = [torch.full((parameter.size,), float(place < first_frozen)) for place, parameter in enumerate(parameters)]
    mask = torch.cat(parts)
    return mask if bool(mask.any()) else torch.ones_like(mask)


def _stage(name: str) -> tuple[str, int] | None:
    """The outermost numbered module that a parameter's layer stands in: what it is called, and its number."""
    modules = name.split(".")[:-2]  # without the layer and its parameter
    for depth, module in enumerate(modules):
        if numbered := _NUMBERED.fullmatch(module):
            return ".".join((*modules[:depth], numbered[1])), int(numbered[2])
    return None
