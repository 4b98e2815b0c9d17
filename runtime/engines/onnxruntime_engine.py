"""ONNX Runtime on the processor.

One copy of the weights. `add_external_initializers` gives the graph optimiser the data without a file, but
alone it copies them into every session; `add_initializer` with the same OrtValue makes the session use our
memory. Both are needed. Measured with 128 MiB of weights and two sessions: 256 MiB more with the first
alone, 10 MiB with both. Small ones are copied, and those that anything but a product reads: the graph optimiser may
turn the axes of one that is broadcast (a layer scale [C, 1, 1], a position embedding) under its old name, and would
then be given our memory with the old shape.

Settings, measured on the step of a ViT-Tiny (22 MiB of weights, infer batch 1, adapt batch 4, one thread):

    weights pre-packed      infer 29.9 ms, 31.9 without; adapt 264 ms, 269 without. A private copy of the weights
                            for each session: worth it for `infer`, which a frame waits for, not for `adapt`.
    constants folded        adapt 267 ms, 264 without: folding only makes private transposed copies of weights
                            (45 MiB). Off for `adapt`; on for `infer`, which stays bit-identical to a plain session.
    step under θ₀           of rules without a gradient: θ₀ is a weight, so both are on for their `adapt`, and all of it
                            goes into the kernels: EfficientNet-Lite0, batch 8, 40 ms, 59 without.
    memory pattern          the adapt session takes 269 MiB with it, 143 without, at the same speed: off. Inference of
                            EfficientNet-Lite0 is 2 % faster with it: on.
    memory arena            on: without it 41 MiB at rest, but 330 ms a step.
    θ folded in             batch normalisation scales and shifts after every convolution: bound as a constant, θ goes
                            into the kernels, and ONNX Runtime keeps its blocked layout from one to the next
                            (`settle`): EfficientNet-Lite0 takes half the time. Norms of tokens stay where they are.
    spinning                threads stop with the run, so that an idle session's do not take the processor from the
                            busy one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgg_edge.container import graph_name
from mgg_edge.errors import EngineError, MissingDependencyError, UsageError
from mgg_edge.runtime.bundle.bundle import DIAGNOSTICS, Bundle, graph_contract
from mgg_edge.runtime.bundle.graphs import declare_weights, read_by
from mgg_edge.runtime.engines.engine import Diagnostics, check_frames
from mgg_edge.runtime.engines.host_states import HostStates
from mgg_edge.runtime.engines.onnxruntime_import import import_onnxruntime, mapped, quiet_options
from mgg_edge.runtime.engines.settling import Run, SettledInference, settled_inference
from mgg_edge.runtime.engines.threads import checked_threads
from mgg_edge.state import AdaptState, TensorSpec

__all__ = ["OnnxRuntimeEngine"]

Arrays = dict[str, npt.NDArray[np.generic]]
LEAST_SHARED_SCALARS = 16_384
SOURCE_THETA = "source_theta"
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Transpose"})  # of a transposed weight, in a backward


@dataclass(frozen=True)
class _Graph:
    """One session with its own input and output buffers, and a binding for each of the two state sets."""

    session: Any
    buffers: Arrays
    bindings: tuple[Any, Any]


class OnnxRuntimeEngine(HostStates):
    """Implements `mgg_edge.runtime.engines.engine.Engine`.

    Args:
        bundle: a verified bundle.
        threads: threads of one graph; None leaves the number to ONNX Runtime (the physical cores).
        with_adapt: False leaves out the adaptation session.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        UsageError: `threads` is not a positive number.
        EngineError: ONNX Runtime refused a graph.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, with_adapt: bool = True) -> None:
        self._threads = checked_threads(threads)
        self._ort, self._bundle = _import_onnxruntime(), bundle
        super().__init__(bundle)
        self._infer_specs = bundle.manifest.infer_specs
        self._closed = False
        self._initialisers = {name: self._value(array) for name, array in bundle.weights.items()}
        self._infer: _Graph | None = self._open("infer")
        self._adapt = self._open("adapt") if with_adapt else None
        self.load_state(bundle.initial_state)

    @property
    def name(self) -> str:
        """Engine, device and version."""
        return f"onnxruntime-cpu {self._ort.__version__}"

    def infer(
        self, frames: npt.NDArray[np.uint8], state: AdaptState | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits f32[b,C] and features f32[b,D] of frames u8[b,H,W,3] under `state`, or under the committed one.

        With a state given it touches none of the engine's buffers: any thread may call it at any time.

        Raises:
            UsageError: frames of another type or shape.
            EngineError: ONNX Runtime failed, or the engine is closed.
        """
        if state is not None:
            return self._infer_under(state, frames)
        buffers = self._run(self._infer, frames)
        return buffers["logits"].astype(np.float32), buffers["features"].astype(np.float32)

    def settle(self, state: AdaptState, *, features: bool = True) -> SettledInference | None:
        """Inference with what it reads of a state folded into the weights, or None where there is nothing to fold.

        Without features it gives an f32[b,0] in their place.

        Raises:
            EngineError: ONNX Runtime refused the graph, or the engine is closed.
        """
        key = ("onnxruntime", self._threads)
        return settled_inference(self._bundle, state, key, features, self._runner)

    def _runner(self, graph: bytes) -> Run:
        session = self._session(graph, "infer")
        names = [output.name for output in session.get_outputs()]

        def run(inputs: dict[str, npt.NDArray[np.uint8]]) -> dict[str, npt.NDArray[np.float32]]:
            with mapped("cannot run the graph"):
                return dict(zip(names, session.run(names, inputs), strict=True))

        return run

    def adapt(self, frames: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], Diagnostics]:
        """One step on frames u8[B,H,W,3]; logits f32[B,C] are those before the update.

        Raises:
            UsageError: frames of another type or shape, or an engine opened without its adaptation graph.
            EngineError: ONNX Runtime failed, or the engine is closed. There is no candidate then.
        """
        if self._adapt is None and not self._closed:
            raise UsageError("adapt: expected an engine opened with its adaptation graph, found one without")
        self._sets.drop()
        buffers = self._run(self._adapt, frames)
        self._sets.propose()
        return buffers["logits"].astype(np.float32), Diagnostics(*(float(buffers[name]) for name in DIAGNOSTICS))

    def close(self) -> None:
        """Release sessions and weights; safe to call twice."""
        self._closed = True
        self._sets.drop()
        self._infer = self._adapt = None
        self._initialisers = {}

    def _infer_under(
        self, state: AdaptState, frames: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        graph = self._infer
        if graph is None:
            raise EngineError("engine: expected an open engine, found a closed one")
        inputs = {spec.name: state[spec.name] for spec in self._infer_specs}
        inputs["frames"] = check_frames(frames, graph.buffers["frames"].shape)
        with mapped("cannot run the graph"):
            logits, features = graph.session.run(["logits", "features"], inputs)
        return logits, features

    def _run(self, graph: _Graph | None, frames: npt.NDArray[np.uint8]) -> Arrays:
        if graph is None:
            raise EngineError("engine: expected an open engine, found a closed one")
        buffers = graph.buffers
        np.copyto(buffers["frames"], check_frames(frames, buffers["frames"].shape))
        with mapped("cannot run the graph"):
            graph.session.run_with_iobinding(graph.bindings[self._sets.place])
        return buffers

    def _open(self, kind: str) -> _Graph:
        session = self._session(self._bundle.graphs[graph_name(kind, "onnxruntime")], kind)
        inputs, outputs = graph_contract(self._bundle.manifest, kind)
        own = [spec for spec in (*inputs, *outputs) if spec.name not in _state_names(self._specs)]
        buffers = _empty(own)
        bindings = [self._bind(session, inputs, outputs, buffers, committed) for committed in (0, 1)]
        return _Graph(session, buffers, (bindings[0], bindings[1]))

    def _session(self, graph: bytes, kind: str) -> Any:
        member = graph_name(kind, "onnxruntime")
        names = self._bundle.references[member]
        if not self._initialisers:
            raise EngineError("engine: expected an open engine, found a closed one")
        where = f"{self._bundle.path}: {member}"
        model, readers = declare_weights(graph, self._bundle.weights, names), read_by(graph, where)
        shared = [name for name in names if readers.get(name, set()) <= PRODUCTS]
        # θ₀ is cut into its parts where the network runs under it; a gradient rule only measures from it.
        folded = kind == "infer" or "Split" in readers.get(SOURCE_THETA, set())
        with mapped(f"{where}: cannot load the graph"):
            return self._ort.InferenceSession(
                model,
                self._options(names, shared, folded),
                providers=["CPUExecutionProvider"],
                disabled_optimizers=None if folded else ["ConstantFolding"],
            )

    def _options(self, names: tuple[str, ...], shared: list[str], folded: bool) -> Any:
        options = quiet_options(self._ort)
        options.enable_mem_pattern = folded
        options.intra_op_num_threads = self._threads or 0
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not folded:
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_external_initializers(list(names), [self._initialisers[name] for name in names])
        for name in shared:
            if self._bundle.weights[name].size >= LEAST_SHARED_SCALARS:
                options.add_initializer(name, self._initialisers[name])
        return options

    def _bind(
        self,
        session: Any,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        own: Arrays,
        committed: int,
    ) -> Any:
        binding = session.io_binding()
        sources = {**own, **self._sets.both[committed]}
        targets = {**own, **{f"{name}_out": array for name, array in self._sets.both[1 - committed].items()}}
        for spec in inputs:
            binding.bind_ortvalue_input(spec.name, self._value(sources[spec.name]))
        for spec in outputs:
            binding.bind_ortvalue_output(spec.name, self._value(targets[spec.name]))
        return binding

    def _value(self, array: npt.NDArray[np.generic]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array)


def _state_names(specs: tuple[TensorSpec, ...]) -> set[str]:
    return {name for spec in specs for name in (spec.name, f"{spec.name}_out")}


def _empty(specs: tuple[TensorSpec, ...] | list[TensorSpec]) -> Arrays:
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in specs}


def _import_onnxruntime() -> Any:
    try:
        return import_onnxruntime()
    except ImportError as error:
        raise MissingDependencyError(
            f"engine 'cpu': the package onnxruntime is missing ({error}); install it with: pip install 'mgg-edge[cpu]'"
        ) from error
