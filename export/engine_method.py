"""A bundle's exported step as an adaptation method, run by the run time's own engine.

Every frame is answered by the infer graph, as on the device. A batch of the size the graph was exported for is one
step; smaller ones, if that size is a multiple of theirs, are collected. A step that the engine refuses or that does not
pass the run time's guard is not committed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.guard import check_step, default_limits
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Engine
from mgg_edge.state import AdaptState

__all__ = ["EngineMethod", "EngineState"]


class EngineState(NamedTuple):
    """Attributes: arrays: of the engine; waiting: u8[n, H, W, 3], frames collected for the next step."""

    arrays: AdaptState
    waiting: Tensor


class EngineMethod:
    """The exported step, or with `adapt` off the exported inference alone.

    Attributes:
        name: of the bundle's rule, or `none`.

    Args:
        bundle: a verified bundle.
        engine: an engine of that bundle; the method loads its state before every call.
        adapt: whether steps are made.
    """

    def __init__(self, bundle: Bundle, engine: Engine, *, adapt: bool = True) -> None:
        self._manifest, self._initial, self._engine, self._adapt = bundle.manifest, bundle.initial_state, engine, adapt
        self._limits = default_limits(bundle.manifest.rule)
        self.name = bundle.manifest.rule.name if adapt else "none"

    def init(self) -> EngineState:
        """The bundle's initial state."""
        size = self._manifest.preprocess
        return EngineState(self._initial, torch.zeros(0, size.height, size.width, 3, dtype=torch.uint8))

    def step(self, frames: Tensor, state: EngineState) -> tuple[Tensor, EngineState]:
        """Logits f32[B, C] of the infer graph before the update, and the next state.

        Raises:
            UsageError: batches that do not make up the step's.
        """
        answer = self.predict(frames, state)
        if not self._adapt:
            return answer, state
        size, batch = self._manifest.adapt_batch, torch.cat([state.waiting, frames])
        if size % len(frames) or len(batch) > size:
            raise UsageError(
                f"batch: expected {size} frames, as the step was exported for, or a part of them, found {len(frames)}"
            )
        if len(batch) < size:
            return answer, EngineState(state.arrays, batch)
        _, diagnostics = self._engine.adapt(np.ascontiguousarray(batch.numpy()))
        if check_step(self._engine.state(), self._engine.candidate, diagnostics, self._limits) is None:
            self._engine.commit()
        return answer, EngineState(self._engine.state(), batch[:0])

    def predict(self, frames: Tensor, state: EngineState) -> Tensor:
        """Logits f32[B, C] of the infer graph under the state."""
        self._engine.load_state(state.arrays)
        count, answers = self._manifest.infer_batch, []
        for part in frames.split(count):
            padded = part.numpy()[np.arange(count) % len(part)]  # the graph's batch is fixed
            answers.append(self._engine.infer(padded)[0][: len(part)])
        return torch.from_numpy(np.concatenate(answers))
