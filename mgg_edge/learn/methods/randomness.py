"""Random numbers of pure functions: what is drawn at a step follows from the seed and the number of the step."""

from __future__ import annotations

import torch

__all__ = ["generator_of"]

_STRIDE = 1_000_003  # a prime: seeds close to each other share no generator within a million steps


def generator_of(seed: int, step: int) -> torch.Generator:
    """A fresh generator for one step."""
    return torch.Generator().manual_seed(seed * _STRIDE + step)
