r"""ROID: certain and diverse images, averaged weights, corrected prior (arXiv 2306.00650, section 4).

    w_div(x)  = 1 − cos(m, p(x)),  scaled to 0 … 1 over the batch; x is left out where w_div is below its mean
    w_cert(x) = −H(x),             scaled to 0 … 1 over the batch
    w(x)      = exp(w_div · w_cert / τ),  τ = 1/3
    L         = (1/B) Σ_x w(x) · [ SLR(x) + SCE(p(x̃), p(x)) ],   x̃ a random view of x
    SLR(x)    = −Σ_c p̄_c log( p̄_c / (1 − p̄_c) ),   p̄ = min(p, 0.99)
    SCE(a, b) = −½ Σ_c ( b log a + a log b )
    average   θ ← 0.99 θ + 0.01 θ₀ after every update
    prior     p(x) · (p̂ + γ)/(1 + γC),   p̂ the batch's mean of p,  γ = max(1/B, 1/C) / max_c p̂_c

m starts uniform and follows the batches' mean p with decay 0.9. Scaling over a batch whose numbers are all equal, such
as a batch of one, divides nothing by nothing: they then count as 0, so that w = 1. The repository (github
mariodoebler/test-time-adaptation, MIT) multiplies logits with the prior, whose sign then matters; here it is the
probabilities. SGD with Nesterov's momentum, α = 2.5e-4, as there for ImageNet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mgg_edge.errors import UsageError
from mgg_edge.learn.methods.augmentation import Augmentation
from mgg_edge.learn.methods.base import Classifier, RateOptions, Weights, descend, entropy
from mgg_edge.learn.methods.randomness import generator_of

__all__ = ["Roid", "RoidOptions", "RoidState", "correct_prior", "roid_weights", "soft_likelihood_ratio"]

DEFAULT_RATE = 2.5e-4
MEAN_DECAY = 0.9
CLIP, EPSILON = 0.99, 1e-5


@dataclass(frozen=True)
class RoidOptions(RateOptions):
    """Settings; the momentum is Nesterov's.

    Attributes:
        keep: share of θ kept at each averaging with θ₀.
        temperature: τ.
        consistency: whether views must agree.
        prior: whether answers are corrected.
        flip: whether views are mirrored.
        seed: of the views.
    """

    nesterov: bool = True
    keep: float = 0.99
    temperature: float = 1 / 3
    consistency: bool = True
    prior: bool = True
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 <= self.keep <= 1.0 and self.temperature > 0.0):
            raise UsageError(f"roid: expected a share to keep in [0, 1] and a positive temperature, found {self}")


class RoidState(NamedTuple):
    """Attributes: weights; mean f[C], m; step: batches seen."""

    weights: Weights
    mean: Tensor
    step: int


class Roid:
    """Weighted soft likelihood ratio with weight averaging.

    Args:
        classifier: the model.
        options: settings.
    """

    name: ClassVar[str] = "roid"

    def __init__(self, classifier: Classifier, options: RoidOptions | None = None) -> None:
        self._classifier, self.options = classifier, options or RoidOptions()
        self._augment = Augmentation(flip=self.options.flip, optics=False, padding="reflect")

    def init(self) -> RoidState:
        """The source model at rest and a uniform mean."""
        classes = self._classifier.backbone.classes
        return RoidState(Weights.of(self._classifier), torch.full((classes,), 1 / classes), 0)

    def step(self, frames: Tensor, state: RoidState) -> tuple[Tensor, RoidState]:
        """Corrected logits f[B, C] before the update, and the next state."""
        weights = state.weights
        generator = generator_of(self.options.seed, state.step)

        def loss(theta: Tensor) -> tuple[Tensor, Any]:
            output = self._classifier.moving(frames, theta, weights.statistics)
            weight = roid_weights(output.logits.detach(), state.mean, self.options.temperature)
            total = (soft_likelihood_ratio(output.logits) * weight).sum()
            kept = weight > 0
            if self.options.consistency and bool(kept.any()):
                views = self._augment(frames[kept], generator)
                viewed = self._classifier.moving(views, theta, weights.statistics).logits
                total = total + (_symmetric_cross_entropy(viewed, output.logits[kept]) * weight[kept]).sum()
            return total / len(frames), output

        gradient, output = self._classifier.gradient(weights.theta, loss)
        logits = output.logits.detach()
        rate = (self.options.learning_rate or DEFAULT_RATE) * self.options.rate_factor
        moved = descend(weights, gradient, rate, self.options)
        theta = self.options.keep * moved.theta + (1 - self.options.keep) * self._classifier.theta
        mean = MEAN_DECAY * state.mean + (1 - MEAN_DECAY) * logits.softmax(1).mean(0)
        after = RoidState(moved._replace(theta=theta, statistics=output.statistics), mean, state.step + 1)
        return correct_prior(logits) if self.options.prior else logits, after

    def predict(self, frames: Tensor, state: RoidState) -> Tensor:
        """Logits f[B, C] of the averaged model, with the prior of these frames."""
        logits = self._classifier.frozen(frames, state.weights.theta, state.weights.statistics)
        return correct_prior(logits) if self.options.prior else logits


def roid_weights(logits: Tensor, mean: Tensor, temperature: float) -> Tensor:
    """w f[B] of logits f[B, C] and m f[C]; 0 for images left out."""
    probability = logits.softmax(1)
    diversity = _scaled(1 - functional.cosine_similarity(mean[None], probability, dim=1))
    certainty = _scaled(-entropy(logits))
    weight = torch.exp(diversity * certainty / temperature)
    return torch.where(diversity < diversity.mean(), torch.zeros_like(weight), weight)


def soft_likelihood_ratio(logits: Tensor) -> Tensor:
    """SLR of logits f[B, C]: f[B]."""
    probability = logits.softmax(1).clamp(max=CLIP)
    return -(probability * torch.log(probability / (1 - probability) + EPSILON)).sum(1)


def correct_prior(logits: Tensor) -> Tensor:
    """Log-probabilities f[B, C] of logits f[B, C] under the batch's own prior."""
    log_probability = logits.log_softmax(1)
    prior = log_probability.exp().mean(0)
    smoothing = max(1 / logits.shape[0], 1 / logits.shape[1]) / prior.amax()
    return (log_probability + torch.log((prior + smoothing) / (1 + smoothing * logits.shape[1]))).log_softmax(1)


def _scaled(values: Tensor) -> Tensor:
    low, high = values.amin(), values.amax()
    return (values - low) / (high - low) if bool(high > low) else torch.zeros_like(values)


def _symmetric_cross_entropy(first: Tensor, second: Tensor) -> Tensor:
    a, b = first.log_softmax(1), second.log_softmax(1)
    return -0.5 * (b.exp() * a + a.exp() * b).sum(1)
