"""An engine in numpy for the toy classifier, whose steps a test writes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

import toy
from mgg_edge.errors import StateError
from mgg_edge.runtime import Bundle
from mgg_edge.runtime.engines.engine import Diagnostics
from mgg_edge.state import AdaptState

SOUND = Diagnostics(0.5, 0.1, 0.6, 1.0, 0.1)
Propose = Callable[[toy.Arrays, np.ndarray], toy.Arrays]


class ScriptedEngine:
    """Implements `mgg_edge.runtime.engines.engine.Engine`; infers as the toy does.

    Args:
        bundle: the toy bundle.
        propose: (state, frames) → the candidate's arrays.

    Attributes:
        gate: `adapt` waits for it; set unless a test clears it.
        begun: set when an `adapt` has begun.
        adapted: frames of every step, in order.
        probes: frames inferred, those of other states than the committed one included.
    """

    name = "scripted 1.0"

    def __init__(self, bundle: Bundle, propose: Propose) -> None:
        self._weights = {name: np.asarray(array) for name, array in bundle.weights.items()}
        self._state, self._candidate = bundle.initial_state, None
        self.propose = propose
        self.gate, self.begun = threading.Event(), threading.Event()
        self.gate.set()
        self.adapted: list[np.ndarray] = []
        self.probes = 0

    def infer(self, frames, state=None):
        self.probes += len(frames)
        theta = (state or self._state)["theta"]
        with np.errstate(over="ignore", invalid="ignore"):
            logits, features, _ = toy.reference_infer(frames, theta, self._weights)
        return logits.astype(np.float32), features.astype(np.float32)

    def settle(self, state, *, features=True):
        return None

    def adapt(self, frames):
        self.begun.set()
        assert self.gate.wait(20)
        self.adapted.append(frames.copy())
        logits, _ = self.infer(frames)
        arrays = {name: np.array(array) for name, array in self._state.items()}
        self._candidate = AdaptState(
            {name: np.asarray(a, np.float32) for name, a in self.propose(arrays, frames).items()}
        )
        return logits, SOUND

    @property
    def candidate(self):
        if self._candidate is None:
            raise StateError("state: expected a candidate, found none")
        return self._candidate

    def commit(self):
        self._state, self._candidate = self.candidate, None

    def state(self):
        return self._state

    def load_state(self, state):
        self._state, self._candidate = state, None

    def close(self):
        pass


def moved(by: float = 0.01) -> Propose:
    """A step that adds the same to every scalar of θ."""

    def propose(state, frames):
        return {**state, "theta": state["theta"] + np.float32(by), "step": state["step"] + 1}

    return propose


def healing(bundle: Bundle, rate: float = 0.5, most: float = 0.09) -> Propose:
    """A step that moves β so that the mean features of the batch come closer to the source's."""
    weights = {name: np.asarray(array) for name, array in bundle.weights.items()}

    def propose(state, frames):
        _, features, _ = toy.reference_infer(frames, state["theta"], weights)
        gap = np.clip(rate * (weights["statistics.mean"] - features.mean(0)), -most, most)
        theta = state["theta"].copy()
        theta[toy.FEATURES :] += gap
        return {**state, "theta": theta, "step": state["step"] + 1}

    return propose


def misled(bundle: Bundle) -> Propose:
    """A step that very dark and very bright frames push towards one class, and that slowly forgets."""
    towards = np.asarray(bundle.weights["backbone.head"])[:, 0]
    towards = towards / np.abs(towards).max()

    def propose(state, frames):
        extreme = (np.abs(frames.mean(axis=(1, 2, 3)) - 127.5) > 100).mean()
        theta = state["theta"].copy()
        theta[toy.FEATURES :] = 0.995 * theta[toy.FEATURES :] + 0.09 * extreme * towards
        return {**state, "theta": theta, "step": state["step"] + 1}

    return propose
