"""Tent: minimise the entropy of the predictions (arXiv 2006.10726, equation 1; github DequanWang/tent, MIT).

L = mean_x H(f(x; θ)),   θ ← θ − α·SGD(∂L/∂θ),   momentum 0.9, one update a batch, logits before the update
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from mgg_edge.learn.methods.base import Classifier, RateOptions, Weights, descend, entropy, paper_rate

__all__ = ["Tent"]


class Tent:
    """Entropy minimisation.

    Args:
        classifier: the model.
        options: learning rate and momentum.
    """

    name: ClassVar[str] = "tent"

    def __init__(self, classifier: Classifier, options: RateOptions | None = None) -> None:
        self._classifier, self.options = classifier, options or RateOptions()

    def init(self) -> Weights:
        """The source model at rest."""
        return Weights.of(self._classifier)

    def step(self, frames: Tensor, state: Weights) -> tuple[Tensor, Weights]:
        """Logits f[B, C] before the update, and the updated weights."""

        def loss(theta: Tensor) -> tuple[Tensor, Any]:
            output = self._classifier.moving(frames, theta, state.statistics)
            return entropy(output.logits).mean(), output

        gradient, output = self._classifier.gradient(state.theta, loss)
        rate = paper_rate(self._classifier, self.options, len(frames))
        moved = descend(state, gradient, rate, self.options)
        return output.logits.detach(), moved._replace(statistics=output.statistics)

    def predict(self, frames: Tensor, state: Weights) -> Tensor:
        """Logits f[B, C] of the adapted model."""
        return self._classifier.frozen(frames, state.theta, state.statistics)
