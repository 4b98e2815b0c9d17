r"""CoTTA, on the norm parameters alone: learn from a slow teacher, forget a little (arXiv 2203.13591).

    teacher      q(x) = softmax f(x; θ′), or of the mean logits over 32 random views of x        equations 3, 4
                 where the source model's mean confidence on the batch is below p_th
    student      L = mean_x −½ Σ_c (q log p + p log q),   θ ← θ − α·SGD(∂L/∂θ)                   equation 1
    average      θ′ ← 0.999 θ′ + 0.001 θ                                                         equation 2
    restore      each scalar of θ returns to θ₀ with probability 0.001                           equations 7, 8

The answers are the teacher's. p_th is the 5 % quantile of the source model's confidence on source images (supplement of
the paper; 0.1 on ImageNet). The paper adapts every weight; here θ, as every other method does. The symmetric loss
and the numbers are those of github qinenergy/cotta (MIT) for ImageNet, the learning rate is not scaled with the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.methods.augmentation import Augmentation
from mgg_edge.learn.methods.base import Classifier, RateOptions, SourceKnowledge, Weights, descend
from mgg_edge.learn.methods.randomness import generator_of

__all__ = ["Cotta", "CottaOptions", "CottaState"]

DEFAULT_RATE = 0.01
CONFIDENCE_QUANTILE = 0.05
CHUNK = 64


@dataclass(frozen=True)
class CottaOptions(RateOptions):
    """Settings.

    Attributes:
        decay: of the teacher.
        restore: probability for a scalar to return.
        views: random views of a batch the source model is unsure about.
        confidence: p_th; None measures it on source images, 0 never draws views.
        flip: whether views are mirrored.
        seed: of views and restoration.
    """

    decay: float = 0.999
    restore: float = 0.001
    views: int = 32
    confidence: float | None = None
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 <= self.decay <= 1.0 and 0.0 <= self.restore <= 1.0 and self.views >= 1):
            raise UsageError(f"cotta: expected shares in [0, 1] and at least one view, found {self}")


class CottaState(NamedTuple):
    """Attributes: weights of the student; teacher: θ′ f[N]; step: batches seen."""

    weights: Weights
    teacher: Tensor
    step: int


class Cotta:
    """Teacher, student and restoration.

    Args:
        classifier: the model.
        options: settings.
        source: clean images p_th is measured on.
    """

    name: ClassVar[str] = "cotta"

    def __init__(self, classifier: Classifier, options: CottaOptions, source: SourceKnowledge) -> None:
        self._classifier, self.options, self._source = classifier, options, source
        self._augment = Augmentation(flip=options.flip)

    @cached_property
    def confidence(self) -> float:
        """p_th."""
        if self.options.confidence is not None:
            return self.options.confidence
        found = [self._source_confidence(frames) for frames in self._source.frames.split(CHUNK)]
        return float(torch.cat(found).quantile(CONFIDENCE_QUANTILE))

    def init(self) -> CottaState:
        """Teacher and student are the source model."""
        return CottaState(Weights.of(self._classifier), self._classifier.theta, 0)

    def step(self, frames: Tensor, state: CottaState) -> tuple[Tensor, CottaState]:
        """The teacher's logits f[B, C] before the update, and the next state."""
        generator, weights = generator_of(self.options.seed, state.step), state.weights
        answer = self._teach(frames, state, generator)

        def loss(theta: Tensor) -> tuple[Tensor, Any]:
            output = self._classifier.moving(frames, theta, weights.statistics)
            student, teacher = output.logits.log_softmax(1), answer.log_softmax(1)
            return -0.5 * (teacher.exp() * student + student.exp() * teacher).sum(1).mean(), output

        gradient, output = self._classifier.gradient(weights.theta, loss)
        rate = (self.options.learning_rate or DEFAULT_RATE) * self.options.rate_factor
        moved = descend(weights, gradient, rate, self.options)._replace(statistics=output.statistics)
        teacher = self.options.decay * state.teacher + (1 - self.options.decay) * moved.theta
        returning = torch.rand(moved.theta.shape, generator=generator) < self.options.restore
        theta = torch.where(returning, self._classifier.theta, moved.theta)
        return answer, CottaState(moved._replace(theta=theta), teacher, state.step + 1)

    def predict(self, frames: Tensor, state: CottaState) -> Tensor:
        """The teacher's logits f[B, C], without views."""
        return self._classifier.frozen(frames, state.teacher, state.weights.statistics)

    def _teach(self, frames: Tensor, state: CottaState, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            if not self._source_confidence(frames).mean() < self.confidence:
                return self._classifier.moving(frames, state.teacher, state.weights.statistics).logits
            views = [
                self._classifier.moving(
                    self._augment(frames, generator), state.teacher, state.weights.statistics
                ).logits
                for _ in range(self.options.views)
            ]
            return torch.stack(views).mean(0)

    def _source_confidence(self, frames: Tensor) -> Tensor:
        """Largest probability of the source model f[B]."""
        with torch.no_grad():
            output = self._classifier.moving(frames, self._classifier.theta, self._classifier.statistics())
            return output.logits.softmax(1).amax(1)
