"""Checkpoints that are told apart by a number, made with numpy only."""

from __future__ import annotations

import numpy as np

from mgg_edge.runtime.adaptation.adapter_checkpoint import Checkpoint
from mgg_edge.state import AdaptState

BUNDLE, OTHER_BUNDLE = "a" * 64, "b" * 64


def state(number: float, size: int = 50) -> AdaptState:
    """A state whose every scalar is the number."""
    step = np.array(number, np.float32)
    return AdaptState(
        {"theta": np.full(size, number, np.float32), "m": np.full((2, size), -number, np.float32), "step": step}
    )


def checkpoint(number: int, bundle_id: str = BUNDLE) -> Checkpoint:
    """A checkpoint after `number` updates, with every field in use."""
    return Checkpoint(
        bundle_id=bundle_id,
        state=state(number),
        step=number,
        schedule="burst",
        schedule_numbers={"phase": 2.0, "baseline": 0.1 + number},
        ladder_numbers={"rung": 1, "commits": 3, "verifications": 0, "refused": 2, "frozen_frames": number},
        last_good=state(number),
        older=state(number / 2),
        snapshots=((state(number / 2), 0.25), (state(-number), 0.5)),
        drift_mean=np.linspace(0, 1 / 3, 7) * number,
        drift_frames=32,
        classes=(1, 2, 3, number % 10),
        counters={"frames_inferred": number, "rejected": {"drift": 2}},
    )
