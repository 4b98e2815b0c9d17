"""What every inference engine offers, and the choice of one.

An engine owns two sets of state buffers and alternates between them: a step reads the committed set and
writes the other, so that a state output never shares memory with its input and a refused step leaves
the committed set untouched. To commit is to swap two references.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import StateError, UsageError
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.state import AdaptState, TensorSpec

__all__ = ["ENGINES", "Diagnostics", "Engine", "check_frames", "check_state", "open_engine"]

ENGINES = ("auto", "cpu")


class Diagnostics(NamedTuple):
    """Scalars of one adaptation step, before the update.

    Attributes:
        entropy: mean entropy of the predictions, nats.
        discrepancy: mean squared distance of the batch's feature statistics from the source's.
        loss: what the gradient was taken of.
        gradient_norm: ‖∂loss/∂θ‖₂.
        update_norm: ‖αu‖₂, the length of the step in θ.
    """

    entropy: float
    discrepancy: float
    loss: float
    gradient_norm: float
    update_norm: float


class Engine(Protocol):
    """Runs the two graphs of a bundle.

    `infer` with a state given may be called by any thread at any time, also while another thread is in `adapt`; it
    neither reads nor changes what the other methods work on. Those are for one thread at a time.
    """

    @property
    def name(self) -> str:
        """Engine, device and version, such as `onnxruntime-cpu 1.32.0`."""

    def infer(
        self, frames: npt.NDArray[np.uint8], state: AdaptState | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits f32[b,C] and features f32[b,D] of frames u8[b,H,W,3] under `state`, or under the committed one."""

    def adapt(self, frames: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], Diagnostics]:
        """One step on frames u8[B,H,W,3]: logits f32[B,C] before the update; commits nothing."""

    @property
    def candidate(self) -> AdaptState:
        """Result of the last `adapt`: views, valid until the next `adapt` or `commit`."""

    def commit(self) -> None:
        """Make the candidate the committed state."""

    def state(self) -> AdaptState:
        """Copy of the committed state."""

    def load_state(self, state: AdaptState) -> None:
        """Replace the committed state; drops a candidate."""

    def close(self) -> None:
        """Release the engine's memory; safe to call twice."""


def open_engine(bundle: Bundle, name: str = "auto", *, threads: int | None = None, with_adapt: bool = True) -> Engine:
    """Start an engine for a bundle.

    Args:
        bundle: a verified bundle.
        name: `auto` takes the best engine present; `cpu` is ONNX Runtime on the processor.
        threads: processor threads of one graph; None leaves the number to the engine.
        with_adapt: False leaves out the adaptation graph and its memory.

    Raises:
        UsageError: an unknown engine name or an impossible number of threads.
        MissingDependencyError: the engine's package is not installed.
        EngineError: the engine refused a graph.
    """
    if name not in ENGINES:
        raise UsageError(f"engine: expected one of {', '.join(ENGINES)}, found '{name}'")
    from mgg_edge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine  # here: importing onnxruntime takes time

    return OnnxRuntimeEngine(bundle, threads=threads, with_adapt=with_adapt)


def check_frames(frames: Any, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Frames as an engine takes them.

    Raises:
        UsageError: not u8 of exactly `shape`.
    """
    if not isinstance(frames, np.ndarray):
        raise UsageError(f"frames: expected a numpy array uint8{list(shape)}, found {type(frames).__name__}")
    if frames.dtype != np.uint8 or frames.shape != shape:
        raise UsageError(f"frames: expected uint8{list(shape)}, found {frames.dtype}{list(frames.shape)}")
    return frames


def check_state(state: AdaptState, specs: tuple[TensorSpec, ...]) -> None:
    """A state as an engine takes it.

    Raises:
        StateError: other names, types or shapes, or numbers that are not finite.
    """
    state.check(specs)
    if name := state.non_finite():
        raise StateError(f"state: '{name}' expected finite numbers, found NaN or Inf")
