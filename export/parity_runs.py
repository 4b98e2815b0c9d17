"""What the three implementations of a step say, from a state that is given or along trajectories of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mgg_edge.export.trace import TracedGraph
from mgg_edge.learn.step import AdaptStep
from mgg_edge.runtime.engines.engine import Engine
from mgg_edge.state import AdaptState

__all__ = ["EngineRun", "Said", "TorchRun", "TracedRun", "rounded"]

Array = npt.NDArray[np.floating]
State = Mapping[str, Array]


@dataclass(frozen=True)
class Said:
    """What an implementation says of one batch, in float64.

    Attributes:
        logits: f64[B, C] of the step.
        loss: what it differentiates.
        state: the next one, by name.
    """

    logits: Array
    loss: float
    state: State


class TorchRun:
    """The step in PyTorch, in one dtype."""

    def __init__(self, step: AdaptStep, dtype: torch.dtype) -> None:
        self._step, self._dtype, self._constants = step, dtype, step.constants(dtype)

    def initial(self) -> State:
        """The step's first state."""
        return {name: value.double().numpy() for name, value in self._step.initial_state(self._dtype).items()}

    def step(self, frames: Tensor, state: State) -> Said:
        """One step from a state."""
        output = self._step.adapt(frames, self._tensors(state), self._constants)
        after = {name: value.detach().double().numpy() for name, value in output.state.items()}
        return Said(output.logits.detach().double().numpy(), float(output.loss.detach()), after)

    def infer(self, frames: Tensor, state: State) -> tuple[Array, Array]:
        """Logits and features of inference under a state."""
        with torch.no_grad():
            logits, features = self._step.infer(frames, self._tensors(state), self._constants)
        return logits.double().numpy(), features.double().numpy()

    def _tensors(self, state: State) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.array(value)).to(self._dtype) for name, value in state.items()}


class EngineRun:
    """The exported graphs in an engine, whose own state is changed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def step(self, frames: Tensor, state: State) -> Said:
        """One step from a state; nothing is committed."""
        self._load(state)
        logits, diagnostics = self._engine.adapt(frames.numpy())
        after = {name: np.array(value, np.float64) for name, value in self._engine.candidate.items()}
        return Said(logits.astype(np.float64), float(diagnostics.loss), after)

    def infer(self, frames: Tensor, state: State) -> tuple[Array, Array]:
        """Logits and features of inference under a state."""
        self._load(state)
        logits, features = self._engine.infer(frames.numpy())
        return logits.astype(np.float64), features.astype(np.float64)

    def _load(self, state: State) -> None:
        self._engine.load_state(AdaptState({name: value.astype(np.float32) for name, value in state.items()}))


class TracedRun:
    """A traced adapt graph, PyTorch computing its operators."""

    def __init__(self, step: AdaptStep, traced: TracedGraph) -> None:
        self._traced, self._constants = traced, step.constants()

    def step(self, frames: Tensor, state: State) -> Said:
        """One step from a state."""
        tensors = {name: torch.from_numpy(value.astype(np.float32)) for name, value in state.items()}
        values = {"frames": frames, **tensors, **self._constants}
        with torch.no_grad():
            results = self._traced.module(*(values[name] for name in self._traced.inputs))
        found = dict(zip(self._traced.outputs, results, strict=True))
        after = {name: found[f"{name}_out"].double().numpy() for name in state}
        return Said(found["logits"].double().numpy(), float(found["loss"]), after)


def rounded(state: State) -> State:
    """A state as float32 holds it, so that every implementation can begin at the very same numbers."""
    return {name: value.astype(np.float32).astype(np.float64) for name, value in state.items()}
