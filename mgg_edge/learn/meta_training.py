r"""Meta-training: learn the MGG's 164 numbers by truncated back-propagation through its own updates.

In a window of K steps from θ_0, with u_i the update made at step i and h_k the gradient of the meta-loss at θ_k,

    θ_k = θ_0 − α Σ_{i<k} u_i       ⇒       ∂/∂φ Σ_k meta-loss(θ_k) = ∂/∂φ ( −α Σ_i u_i · Σ_{k>i} h_k )

where the gradients that enter the MGG are taken as given. So one backward pass of the model a step is enough, and the
window is differentiated through the MGG alone, memory included. The next window goes on from θ_K and the detached
memory; every episode starts again from the source model.

The meta-loss is the adaptation loss itself, which needs no labels, or cross-entropy where images have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mgg_edge.errors import MggEdgeError, UsageError
from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.mgg import MGG, MGGState
from mgg_edge.learn.objective import Objective
from mgg_edge.learn.statistics import SourceStatistics

__all__ = ["Batch", "Domain", "MetaProgress", "MetaRecipe", "meta_train"]

MAX_GRADIENT_NORM = 1.0


class Batch(NamedTuple):
    """Frames u8[B, H, W, 3] and their labels i64[B], or None where there are none."""

    frames: Tensor
    labels: Tensor | None


Domain = Callable[[int, torch.Generator], Batch]
"""Draws a batch of the given size of one shifted domain."""


@dataclass(frozen=True)
class MetaRecipe:
    """How to meta-train.

    Attributes:
        iterations: meta-updates.
        horizon: K, steps of one window; 1 trains each update on the next batch alone.
        windows: windows of one episode; the memory is carried from one to the next without gradient.
        episodes: episodes side by side, each on a domain and a batch size of its own.
        batch_sizes: batch sizes to draw from, each at least 2.
        learning_rate: α of the inner updates; the same as at test time.
        meta_learning_rate: peak rate of Adam on the 164 numbers, with a cosine to zero.
        supervised: cross-entropy as meta-loss; the domains must give labels.
        seed: of everything drawn.
    """

    iterations: int = 300
    horizon: int = 8
    windows: int = 3
    episodes: int = 4
    batch_sizes: tuple[int, ...] = (4, 8, 16)
    learning_rate: float = 1e-3
    meta_learning_rate: float = 1e-2
    supervised: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.iterations, self.horizon, self.windows, self.episodes, *(size - 1 for size in self.batch_sizes))
        if not self.batch_sizes or min(counts) < 1:
            raise UsageError(f"meta-training: expected positive counts and batches of at least 2 frames, found {self}")


class MetaProgress(NamedTuple):
    """Where meta-training stands: meta-updates made, mean meta-loss of the last window, and the MGG so far."""

    iteration: int
    loss: float
    mgg: MGG


class _Episode:
    """One model adapting to one domain; N scalars of the concatenated MGG state belong to it."""

    def __init__(
        self, backbone: Backbone, objective: Objective, statistics: SourceStatistics, recipe: MetaRecipe, theta: Tensor
    ) -> None:
        self._backbone, self._objective, self._supervised = backbone, objective, recipe.supervised
        self._constants = backbone.constants()
        self._source = statistics.constants()
        self.theta = theta

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor, float]:
        """Gradient for the MGG [N], gradient of the meta-loss [N], and the meta-loss."""
        theta = self.theta.detach().requires_grad_()
        logits, features = self._backbone.forward(batch.frames, self._backbone.split(theta), self._constants)
        loss = self._objective(logits, features, self._source["statistics.mean"], self._source["statistics.std"]).loss
        if not self._supervised:
            (gradient,) = torch.autograd.grad(loss, theta)
            return gradient, gradient, float(loss)
        if batch.labels is None:
            raise UsageError("meta-training: the supervised meta-loss needs labels, and the domain gives none")
        meta_loss = functional.cross_entropy(logits, batch.labels)
        (gradient,) = torch.autograd.grad(loss, theta, retain_graph=True)
        (signal,) = torch.autograd.grad(meta_loss, theta)
        return gradient, signal, float(meta_loss)


def meta_train(
    mgg: MGG,
    backbone: Backbone,
    objective: Objective,
    statistics: SourceStatistics,
    domains: Sequence[Domain],
    recipe: MetaRecipe,
) -> Iterator[MetaProgress]:
    """Train the numbers of `mgg` in place; yields after every meta-update.

    Args:
        mgg: where to start; its numbers are changed.
        backbone: the source model; not changed.
        objective: the loss the MGG will see at test time.
        statistics: source statistics.
        domains: shifted domains to draw episodes from.
        recipe: how to train.

    Raises:
        MggEdgeError: a meta-gradient that is not finite, before the numbers are changed.
        UsageError: no domains, or a supervised recipe without labels.
    """
    if not domains:
        raise UsageError("meta-training: expected at least one domain, found none")
    generator = torch.Generator().manual_seed(recipe.seed)
    optimiser = torch.optim.Adam(mgg.parameters(), lr=recipe.meta_learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / recipe.iterations))
    )
    size, iteration = backbone.norms.size, 0
    while True:
        episodes = [_Episode(backbone, objective, statistics, recipe, backbone.theta()) for _ in range(recipe.episodes)]
        chosen = torch.randint(len(domains), (recipe.episodes,), generator=generator).tolist()
        batches = torch.randint(len(recipe.batch_sizes), (recipe.episodes,), generator=generator).tolist()
        draws = [(domains[domain], recipe.batch_sizes[batch]) for domain, batch in zip(chosen, batches, strict=True)]
        state = mgg.init(size * recipe.episodes)
        for _ in range(recipe.windows):
            surrogate, loss, state = _window(mgg, state, episodes, draws, recipe, generator)
            _update(optimiser, surrogate, mgg, iteration)
            schedule.step()
            iteration += 1
            yield MetaProgress(iteration, loss, mgg)
            if iteration == recipe.iterations:
                return


def _window(
    mgg: MGG,
    state: MGGState,
    episodes: Sequence[_Episode],
    draws: Sequence[tuple[Domain, int]],
    recipe: MetaRecipe,
    generator: torch.Generator,
) -> tuple[Tensor, float, MGGState]:
    """Surrogate whose gradient is the meta-gradient, mean meta-loss, and the state detached."""
    updates: list[Tensor] = []
    signals: list[Tensor] = []
    losses: list[float] = []
    state = MGGState(*(value.detach() for value in state))
    for step in range(recipe.horizon + 1):
        found = [
            episode.gradients(domain(size, generator)) for episode, (domain, size) in zip(episodes, draws, strict=True)
        ]
        # Each episode counts the same, however large its gradients.
        signals.append(torch.cat([signal / (signal.abs().mean() + 1e-12) for _, signal, _ in found]))
        losses += [loss for _, _, loss in found]
        if step == recipe.horizon:
            break
        update, state = mgg.update(torch.cat([gradient for gradient, _, _ in found]), state)
        updates.append(update)
        for episode, change in zip(episodes, update.detach().chunk(len(episodes)), strict=True):
            episode.theta = episode.theta - recipe.learning_rate * change
    ahead = torch.stack(signals[1:]).flip(0).cumsum(0).flip(0)  # [K, M·N], Σ_{k>i} h_k
    surrogate = -(torch.stack(updates) * ahead).sum(0).mean() / recipe.horizon
    return surrogate, sum(losses) / len(losses), MGGState(*(value.detach() for value in state))


def _update(optimiser: torch.optim.Optimizer, surrogate: Tensor, mgg: MGG, iteration: int) -> None:
    optimiser.zero_grad()
    surrogate.backward()
    norm = torch.nn.utils.clip_grad_norm_(mgg.parameters(), MAX_GRADIENT_NORM)
    if not bool(torch.isfinite(norm)):
        raise MggEdgeError(
            f"meta-training: the meta-gradient of iteration {iteration} is not finite; nothing was changed"
        )
    optimiser.step()
