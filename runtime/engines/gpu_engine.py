"""What every engine on a GPU has in common; how kernels are found and launched is its `Kernels`.

    infer   own stream and buffers, under a lock: any thread may ask, also while a step runs
    adapt   own stream; reads one of two sets of state on the device and writes the other
    commit  swaps the two sets: no state is copied

Each set has its own recorded CUDA graph: upload of the frames, all kernels, download of the results in one launch. The
host keeps page-locked mirrors of both sets, because every candidate is checked there before it may be committed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import EngineError, UsageError
from mgg_edge.runtime.bundle.bundle import DIAGNOSTICS, Bundle, graph_contract
from mgg_edge.runtime.engines.cuda import Cuda, DeviceArray
from mgg_edge.runtime.engines.engine import Diagnostics, check_state
from mgg_edge.runtime.engines.gpu_graph import GpuGraph, Kernels
from mgg_edge.runtime.engines.state_sets import StateSets
from mgg_edge.state import AdaptState, TensorSpec

__all__ = ["GpuEngine"]

Buffers = dict[str, DeviceArray]


class GpuEngine:
    """Implements `mgg_edge.runtime.engines.engine.Engine`.

    Args:
        bundle: a verified bundle.
        name: engine and version.
        cuda: the device.
        load: the kernels of the graph `infer` or `adapt`, given the stream they will be launched in.
        with_adapt: False leaves out the adaptation graph and its memory.

    Raises:
        EngineError: the device has too little memory.
    """

    def __init__(
        self, bundle: Bundle, name: str, cuda: Cuda, load: Callable[[str, int], Kernels], with_adapt: bool = True
    ) -> None:
        self._name, self._cuda = name, cuda
        self._specs, self._infer_specs = bundle.manifest.state, bundle.manifest.infer_specs
        self._lock, self._closed = threading.Lock(), False
        self._sets = StateSets[Buffers]({}, {})
        self._served: AdaptState | None = None
        self._allocated: list[DeviceArray] = []
        self._graphs: list[GpuGraph] = []

        def graph(kind: str) -> GpuGraph:
            made = GpuGraph(cuda)
            self._graphs.append(made)
            inputs, outputs = graph_contract(bundle.manifest, kind)
            made.load(load(kind, made.stream), inputs, outputs, own={"frames", "logits", "features", *DIAGNOSTICS})
            return made

        try:
            self._sets = StateSets(self._buffers(self._specs), self._buffers(self._specs))
            self._infer, self._infer_state = graph("infer"), self._buffers(self._infer_specs)
            self._run_infer = self._infer.runner(self._infer_state, {})
            self._adapt = graph("adapt") if with_adapt else None
            self._run_adapt = [self._stepper(self._adapt, committed) for committed in (0, 1) if self._adapt]
            self.load_state(bundle.initial_state)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Engine, device and version."""
        return f"{self._name} on {self._cuda.device.name}"

    def infer(
        self, frames: npt.NDArray[np.uint8], state: AdaptState | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits f32[b,C] and features f32[b,D] of frames u8[b,H,W,3] under `state`, or under the committed one.

        Raises:
            UsageError: frames of another type or shape.
            EngineError: the device failed, or the engine is closed.
        """
        with self._lock:
            self._expect_open()
            self._serve(self.state() if state is None else state)
            outputs = self._infer.run(self._run_infer, frames)
            return outputs["logits"].copy(), outputs["features"].copy()

    def settle(self, state: AdaptState, *, features: bool = True) -> None:
        """Nothing: no engine is built anew while a camera runs."""

    def adapt(self, frames: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], Diagnostics]:
        """One step on frames u8[B,H,W,3]; logits f32[B,C] are those before the update.

        Raises:
            UsageError: frames of another type or shape, or an engine opened without its adaptation graph.
            EngineError: the device failed, or the engine is closed. There is no candidate then.
        """
        self._expect_open()
        if self._adapt is None:
            raise UsageError("adapt: expected an engine opened with its adaptation graph, found one without")
        self._sets.drop()
        outputs = self._adapt.run(self._run_adapt[self._sets.place], frames)
        self._sets.propose()
        return outputs["logits"].copy(), Diagnostics(*(float(outputs[name]) for name in DIAGNOSTICS))

    @property
    def candidate(self) -> AdaptState:
        """Result of the last `adapt`: views, valid until the next `adapt` or `commit`.

        Raises:
            StateError: no step was made since the last commit.
        """
        return AdaptState({name: array.host for name, array in self._sets.candidate.items()})

    def commit(self) -> None:
        """Make the candidate the committed state.

        Raises:
            StateError: no step was made since the last commit.
        """
        self._sets.commit()

    def state(self) -> AdaptState:
        """Copy of the committed state."""
        self._expect_open()
        return AdaptState({name: array.host.copy() for name, array in self._sets.committed.items()})

    def load_state(self, state: AdaptState) -> None:
        """Replace the committed state; drops a candidate.

        Raises:
            StateError: other names, types or shapes than the bundle's, or numbers that are not finite.
        """
        self._expect_open()
        check_state(state, self._specs)
        stream = self._infer.stream if self._adapt is None else self._adapt.stream
        for name, array in self._sets.committed.items():
            np.copyto(array.host, state[name])
            self._cuda.upload(array, stream)
        self._cuda.wait(stream)
        self._sets.drop()

    def close(self) -> None:
        """Release the device's memory; safe to call twice."""
        with self._lock:
            self._closed = True
            self._sets.drop()
            for graph in self._graphs:
                graph.close()
            while self._allocated:
                self._cuda.free(self._allocated.pop())

    def _serve(self, state: AdaptState) -> None:
        """Bring what inference reads of a state to the device, unless it is there already."""
        if state is self._served:
            return
        self._served = None
        for spec in self._infer_specs:
            np.copyto(self._infer_state[spec.name].host, state[spec.name])
            self._cuda.upload(self._infer_state[spec.name], self._infer.stream)
        self._served = state

    def _stepper(self, graph: GpuGraph, committed: int) -> Callable[[], None]:
        """What makes a step from one set to the other."""
        targets = {f"{name}_out": array for name, array in self._sets.both[1 - committed].items()}
        return graph.runner(self._sets.both[committed], targets)

    def _buffers(self, specs: tuple[TensorSpec, ...]) -> Buffers:
        made = {spec.name: self._cuda.empty(spec.shape, spec.dtype) for spec in specs}
        self._allocated += made.values()
        return made

    def _expect_open(self) -> None:
        if self._closed:
            raise EngineError("engine: expected an open engine, found a closed one")
