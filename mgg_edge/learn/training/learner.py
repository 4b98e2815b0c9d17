"""The model that adapts, for several weathers side by side: one θ for each of E episodes.

All frames go through the network in one pass; only the normalisation parameters differ between episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.objective import Objective
from mgg_edge.learn.rules.base import SourceNumbers
from mgg_edge.learn.statistics import SourceStatistics

__all__ = ["Learner", "Signal"]

FROZEN_BATCH = 16


class Signal(NamedTuple):
    """What one batch of each episode says, all E in a row.

    Attributes:
        gradient: f[E, N], of the loss that is adapted to.
        discrepancy: f[E], Δ.
        meta_gradient: f[E, N], of the meta-loss.
        meta_loss: mean over the episodes.
    """

    gradient: Tensor
    discrepancy: Tensor
    meta_gradient: Tensor
    meta_loss: float


@dataclass(frozen=True)
class Learner:
    """The source model and what it adapts to.

    Attributes:
        backbone: the source model.
        objective: the loss at test time.
        statistics: source statistics.
        device: where to compute.
    """

    backbone: Backbone
    objective: Objective
    statistics: SourceStatistics
    device: torch.device

    @cached_property
    def constants(self) -> dict[str, Tensor]:
        """The backbone's numbers in float32."""
        return {name: value.to(self.device) for name, value in self.backbone.constants().items()}

    @cached_property
    def source(self) -> SourceNumbers:
        """θ₀ and the statistics in float32."""
        parts = (self.backbone.theta(), *self.statistics.constants().values())
        return SourceNumbers(*(part.to(self.device) for part in parts))

    def start(self, episodes: int) -> Tensor:
        """θ₀ for each episode: f[E, N]."""
        return self.source.theta.expand(episodes, -1)

    def scalar(self, value: float) -> Tensor:
        """A number f[]."""
        return torch.tensor(float(value), device=self.device)

    def forward(self, theta: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits f[E, B, C] and features f[E, B, D] of frames u8[E, B, H, W, 3] under θ f[E, N]."""
        backbone, constants = self.backbone, self.constants
        return torch.vmap(lambda own, part: backbone.forward(part, backbone.split(own), constants))(
            theta, frames.to(self.device)
        )

    def features(self, frames: Tensor) -> Tensor:
        """Features f[…, D] of frames u8[…, H, W, 3] under θ₀, without gradients."""
        return self.frozen(frames.flatten(0, -4))[1].reshape(*frames.shape[:-3], -1)

    def predictions(self, frames: Tensor) -> Tensor:
        """Classes i64[B], on the processor, that the frozen model sees in frames u8[B, H, W, 3]."""
        return self.frozen(frames)[0].argmax(1).cpu()

    def signal(self, theta: Tensor, frames: Tensor, targets: Tensor, count: int) -> Signal:
        """Gradients at θ f[E, N]: of the loss on the first `count` frames, of the cross-entropy on all of them.

        Args:
            theta: of each episode.
            frames: u8[E, B, H, W, 3].
            targets: i64[E, B].
            count: at most B, at least 2.
        """
        theta = theta.detach().requires_grad_()
        logits, features = self.forward(theta, frames)
        losses, discrepancies = self._losses(logits[:, :count], features[:, :count])
        (gradient,) = torch.autograd.grad(losses.sum(), theta, retain_graph=True)
        aims = targets.flatten().to(self.device)
        meta_losses = functional.cross_entropy(logits.flatten(0, 1), aims, reduction="none")
        (meta_gradient,) = torch.autograd.grad(meta_losses.sum() / targets.shape[1], theta)
        return Signal(gradient, discrepancies.detach(), meta_gradient, float(meta_losses.mean().detach()))

    def loss_gradient(self, theta: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient f[E, N] of the loss and Δ f[E] at θ f[E, N] of frames u8[E, B, H, W, 3]."""
        theta = theta.detach().requires_grad_()
        losses, discrepancies = self._losses(*self.forward(theta, frames))
        (gradient,) = torch.autograd.grad(losses.sum(), theta)
        return gradient, discrepancies.detach()

    def accuracy(self, theta: Tensor, frames: Tensor, targets: Tensor) -> float:
        """Share of frames u8[E, B, H, W, 3] whose target i64[E, B] is named under θ f[E, N]."""
        with torch.no_grad():
            logits, _ = self.forward(theta, frames)
        return float((logits.argmax(2).cpu() == targets).double().mean())

    def frozen(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features under θ₀, without gradients; in parts whose activations stay in the caches."""
        norms = self.backbone.split(self.source.theta)
        with torch.no_grad():
            parts = [
                self.backbone.forward(part.to(self.device), norms, self.constants)
                for part in frames.split(FROZEN_BATCH)
            ]
        logits, features = zip(*parts, strict=True)
        return torch.cat(logits), torch.cat(features)

    def _losses(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and Δ f[E] of logits f[E, B, C] and features f[E, B, D]; see `Objective`."""
        mean, std = self.source.mean, self.source.std
        terms = torch.vmap(lambda own, seen: self.objective(own, seen, mean, std))(logits, features)
        return terms.loss, terms.discrepancy
