"""In which order the labels of a stream come.

An order gives the labels of a whole stream at once, or None where each batch draws its own, independently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["AtRandom", "Correlated", "InRuns", "LabelOrder", "Shifting"]

Labels = NDArray[np.int64]
RUN_FRAMES = 128  # of one class after the other


class LabelOrder(Protocol):
    """Draws the labels of a stream."""

    def draw(self, available: Labels, count: int, rng: np.random.Generator) -> Labels | None:
        """Labels i64[count] among those available, or None for independent draws."""
        ...


@dataclass(frozen=True)
class AtRandom:
    """Every frame by itself, all classes alike."""

    def draw(self, available: Labels, count: int, rng: np.random.Generator) -> Labels | None:  # noqa: ARG002, D102
        return None


@dataclass(frozen=True)
class InRuns:
    """Runs of one class; classes in random order, none again before all were there."""

    def draw(self, available: Labels, count: int, rng: np.random.Generator) -> Labels | None:  # noqa: D102
        runs = -(-count // RUN_FRAMES)
        rounds = [rng.permutation(available) for _ in range(-(-runs // len(available)))]
        return np.repeat(np.concatenate(rounds), RUN_FRAMES)[:count]


@dataclass(frozen=True)
class Correlated:
    """Each class is spread over as many slots of time as there are classes, by shares ~ Dirichlet(γ, …, γ).

    Attributes:
        gamma: γ > 0; the less, the fewer slots hold most of a class.
    """

    gamma: float

    def draw(self, available: Labels, count: int, rng: np.random.Generator) -> Labels | None:  # noqa: D102
        classes = len(available)
        sizes = np.full(classes, count // classes) + (np.arange(classes) < count % classes)
        shares = rng.dirichlet(np.full(classes, self.gamma), classes)  # [class, slot]
        counts = np.stack([rng.multinomial(size, share) for size, share in zip(sizes, shares, strict=True)])
        slots = [rng.permutation(np.repeat(available, counts[:, slot])) for slot in range(classes)]
        return np.concatenate(slots)


@dataclass(frozen=True)
class Shifting:
    """One class after the other is more likely than the others, in random order (arXiv 2302.12400, section 5).

    Attributes:
        ratio: how many times as likely as each other class, above 1.
    """

    ratio: float

    def draw(self, available: Labels, count: int, rng: np.random.Generator) -> Labels | None:  # noqa: D102
        order, classes = rng.permutation(available), len(available)
        foremost = np.arange(count) * classes // max(count, 1)  # place of the likely class in the order
        kept = rng.random(count) < (self.ratio - 1) / (self.ratio - 1 + classes)
        return np.where(kept, order[foremost], rng.choice(available, count))
