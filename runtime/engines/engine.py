"""What every inference engine offers, and the choice of one.

An engine owns two sets of state buffers and alternates between them: a step reads the committed set and
writes the other, so that a state output never shares memory with its input and a refused step leaves
the committed set untouched. To commit is to swap two references.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import EngineError, MissingDependencyError, SinkError, StateError, UsageError
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.state import AdaptState, TensorSpec

__all__ = [
    "ENGINES",
    "Diagnostics",
    "Engine",
    "Inference",
    "Progress",
    "check_frames",
    "check_state",
    "has_gpu",
    "open_engine",
]

logger = logging.getLogger(__name__)

ENGINES = ("auto", "cpu", "cuda", "tensorrt", "openvino")
Progress = Callable[[str, int, int], None]
# Logits f32[b,C] and features f32[b,D] of frames u8[b,H,W,3], under one state.
Inference = Callable[[npt.NDArray[np.uint8]], tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


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

    def settle(self, state: AdaptState, *, features: bool = True) -> Inference | None:
        """Inference under one state alone, faster than `infer`, or None where that would gain nothing.

        Without features it is faster still, and gives an f32[b,0] in their place.

        Takes a while, may run on any thread beside all others, and holds memory as long as what it returns is kept.
        The numbers are those of `infer` up to the rounding of float32.
        """

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


def open_engine(
    bundle: Bundle,
    name: str = "auto",
    *,
    threads: int | None = None,
    with_adapt: bool = True,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Engine:
    """Start an engine for a bundle.

    Args:
        bundle: a verified bundle.
        name: `tensorrt`, `cuda` (ONNX Runtime on the GPU) or `cpu` (ONNX Runtime on the processor); `auto` takes the
            first of them that works here, and says what kept those before it from working where there is a GPU.
            `openvino` is another engine on the processor, taken where it is asked for.
        threads: processor threads of one graph; None leaves the number to the engine.
        with_adapt: False leaves out the adaptation graph and its memory.
        progress: called with a stage of building an engine, and how much of how much of it is done.

    Raises:
        UsageError: an unknown engine name or an impossible number of threads.
        MissingDependencyError: the engine's package is not installed, or there is no device for it.
        EngineError: the engine refused a graph.
    """
    if name not in ENGINES:
        raise UsageError(f"engine: expected one of {', '.join(ENGINES)}, found '{name}'")
    for tried in ("tensorrt", "cuda") if name == "auto" and has_gpu() else ():
        try:
            return _open(tried, bundle, threads, with_adapt, progress)
        except (MissingDependencyError, EngineError, SinkError) as error:
            logger.warning("engine '%s' cannot be used here: %s", tried, error)
    return _open("cpu" if name == "auto" else name, bundle, threads, with_adapt, progress)


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether the kernel's driver shows an NVIDIA GPU: of a server or workstation, of a Jetson, or through WSL."""
    return any(next(devices.glob(pattern), None) for pattern in ("nvidia[0-9]*", "nvhost-ctrl-gpu", "nvgpu", "dxg"))


def _open(name: str, bundle: Bundle, threads: int | None, with_adapt: bool, progress: Progress) -> Engine:
    # Imported here: each takes time, and may be absent.
    if name == "tensorrt":
        from mgg_edge.runtime.engines.tensorrt_engine import open_tensorrt

        return open_tensorrt(bundle, with_adapt, progress=progress)
    if name == "cuda":
        from mgg_edge.runtime.engines.onnxruntime_cuda import open_onnxruntime_cuda

        return open_onnxruntime_cuda(bundle, with_adapt)
    if name == "openvino":
        from mgg_edge.runtime.engines.openvino_engine import open_openvino

        return open_openvino(bundle, threads, with_adapt)
    from mgg_edge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

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
