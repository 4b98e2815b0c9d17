r"""MEMO: adapt to each image alone by what random views of it agree on (arXiv 2110.09506, algorithm 1).

    p̄(x) = (1/V) Σ_v softmax f(x̃_v; θ₀),   x̃_v random views of x
    θ    = θ₀ − α ∂/∂θ H(p̄(x)),   one update from the source for every image;   answer f(x; θ)

Statistics of batch normalisation mix those of the views, and of the image when it is answered, with the source's by
N = 16: α = 1/17 (as github zhangmarvin/memo, MIT, sets it). Views are that repository's: a random part of the image,
mirrored half the time, and AugMix without its colour operations, here torchvision's. Every weight adapts in the paper;
here θ, as with every other method. SGD without momentum at 2.5e-4, the paper's for ResNet-50.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from mgg_edge.errors import UsageError
from mgg_edge.learn.methods.base import Classifier, RateOptions, Weights, descend
from mgg_edge.learn.methods.randomness import generator_of

__all__ = ["Memo", "MemoOptions", "MemoState", "marginal_entropy", "random_views"]

DEFAULT_RATE = 2.5e-4
AUGMIX_SEVERITY = 1


@dataclass(frozen=True)
class MemoOptions(RateOptions):
    """Settings; there is one update an image, so that momentum moves nothing.

    Attributes:
        views: V, random views of an image.
        prior: N, how many images the source's statistics of batch normalisation count as.
        flip: whether views are mirrored.
        seed: of the views.
    """

    momentum: float = 0.0
    views: int = 32
    prior: float = 16.0
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.views >= 1 and self.prior >= 0.0):
            raise UsageError(f"memo: expected at least one view and a prior of at least 0, found {self}")


class MemoState(NamedTuple):
    """Attributes: step: images seen."""

    step: int


class Memo:
    """Marginal entropy minimisation with one test point.

    Args:
        classifier: the model.
        options: settings.
    """

    name: ClassVar[str] = "memo"

    def __init__(self, classifier: Classifier, options: MemoOptions | None = None) -> None:
        self._classifier, self.options = classifier, options or MemoOptions()
        self._share = 1 / (1 + self.options.prior)

    def init(self) -> MemoState:
        """No image seen."""
        return MemoState(0)

    def step(self, frames: Tensor, state: MemoState) -> tuple[Tensor, MemoState]:
        """Logits f[B, C], each image's after an update of its own, and the next state."""
        answers = [self._answer(frame, state.step + place) for place, frame in enumerate(frames)]
        return torch.stack(answers), MemoState(state.step + len(frames))

    def predict(self, frames: Tensor, state: MemoState) -> Tensor:
        """Logits f[B, C] as `step` gives them: adapting to an image is part of answering it."""
        return self.step(frames, state)[0]

    def _answer(self, frame: Tensor, number: int) -> Tensor:
        source = Weights.of(self._classifier)
        views = random_views(frame, self.options.views, number, self.options.seed, flip=self.options.flip)

        def loss(theta: Tensor) -> tuple[Tensor, Any]:
            return marginal_entropy(self._moving(views, theta, source.statistics)), None

        gradient, _ = self._classifier.gradient(source.theta, loss)
        rate = (self.options.learning_rate or DEFAULT_RATE) * self.options.rate_factor
        with torch.no_grad():
            moved = descend(source, gradient, rate, self.options)
            return self._moving(frame[None], moved.theta, source.statistics)[0]

    def _moving(self, frames: Tensor, theta: Tensor, statistics: Tensor | None) -> Tensor:
        return self._classifier.moving(frames, theta, statistics, self._share).logits


def marginal_entropy(logits: Tensor) -> Tensor:
    """H(p̄) in nats of the mean p̄ of softmax(logits), logits f[V, C]."""
    mean = logits.log_softmax(1).logsumexp(0) - torch.log(torch.tensor(float(len(logits))))
    return -(mean.exp() * mean).sum()


def random_views(frame: Tensor, count: int, number: int, seed: int, *, flip: bool = True) -> Tensor:
    """Views u8[V, H, W, 3] of an image u8[H, W, 3]; the same for the same numbers."""
    height, width = frame.shape[:2]
    crop = v2.RandomResizedCrop([height, width], antialias=True)
    mix = v2.AugMix(severity=AUGMIX_SEVERITY, all_ops=False)
    mirror = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
    image = frame.permute(2, 0, 1)
    start = int(torch.randint(1 << 31, (), generator=generator_of(seed, number)))
    with torch.random.fork_rng(devices=[]):  # these draw from PyTorch's own generator
        torch.manual_seed(start)
        return torch.stack([mix(mirror(crop(image))) for _ in range(count)]).permute(0, 2, 3, 1)
