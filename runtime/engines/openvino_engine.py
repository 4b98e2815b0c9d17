"""OpenVINO on the processor: a step in half to two thirds of ONNX Runtime's time, for one more package.

It fuses chains of operators between products of matrices, of which a step has hundreds, into kernels made while the
graph is compiled (0.5 to 1.2 s a graph for EfficientNet-Lite0 and ViT-Tiny). The graphs are those for ONNX Runtime with
the weights in them, one copy for each graph. Threads are not pinned, so that several engines share the cores.

Arithmetic is float32, also where the processor could do less, unless the bundle was exported with `--precision
bfloat16` and the processor has products of that type: then the graphs are those for GPUs, whose products alone are
cast, and the name says so. All else would become bfloat16 if OpenVINO were asked for it itself, norms and rule too, for
nothing: the products are where the time is.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mgg_edge.container import graph_name
from mgg_edge.errors import EngineError, MissingDependencyError, UsageError
from mgg_edge.runtime.bundle.bundle import DIAGNOSTICS, Bundle, graph_contract
from mgg_edge.runtime.bundle.graphs import embed_weights, part_transposed
from mgg_edge.runtime.engines.engine import Diagnostics, check_frames
from mgg_edge.runtime.engines.host_states import HostStates
from mgg_edge.runtime.engines.onnxruntime_import import mapped
from mgg_edge.runtime.engines.self_test import require_agreement
from mgg_edge.runtime.engines.settling import Run, SettledInference, settled_inference
from mgg_edge.runtime.engines.threads import checked_threads
from mgg_edge.state import AdaptState

__all__ = ["OpenVinoEngine", "open_openvino"]

BFLOAT16, BF16 = "bfloat16", "BF16"  # as bundles call it, and OpenVINO


def open_openvino(bundle: Bundle, threads: int | None, with_adapt: bool) -> OpenVinoEngine:
    """Start the engine and compare its numbers with the bundle's: its compiler has mistaken weights before.

    Raises:
        MissingDependencyError, UsageError: see `OpenVinoEngine`.
        EngineError: OpenVINO refused a graph, or computes something else.
    """
    engine = OpenVinoEngine(bundle, threads, with_adapt)
    try:
        require_agreement(bundle, engine, with_adapt=with_adapt)
    except EngineError:
        engine.close()
        raise
    return engine


class OpenVinoEngine(HostStates):
    """Implements `mgg_edge.runtime.engines.engine.Engine`.

    Args:
        bundle: a verified bundle.
        threads: threads of one graph; None leaves the number to OpenVINO (the physical cores).
        with_adapt: False leaves out the adaptation graph.

    Raises:
        MissingDependencyError: openvino is not installed.
        UsageError: `threads` is not a positive number.
        EngineError: OpenVINO refused a graph.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, with_adapt: bool = True) -> None:
        self._bundle, self._threads = bundle, checked_threads(threads)
        self._openvino = _import_openvino()
        self._core = self._openvino.Core()
        self._half = bundle.manifest.precision == BFLOAT16 and BF16 in self._core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        )
        self._lowering = "tensorrt" if self._half else "onnxruntime"
        super().__init__(bundle)
        self._infer_specs = bundle.manifest.infer_specs
        self._shapes = {kind: graph_contract(bundle.manifest, kind)[0][0].shape for kind in ("infer", "adapt")}
        self._infer: _Graph | None = self._open("infer")
        self._adapt = self._open("adapt") if with_adapt else None
        self._opened_to_adapt = with_adapt
        self.load_state(bundle.initial_state)

    @property
    def name(self) -> str:
        """Engine, device, version, and the precision of the products where it is not float32."""
        version = self._openvino.__version__.partition("-")[0]
        return f"openvino-cpu {version} {BFLOAT16}" if self._half else f"openvino-cpu {version}"

    def infer(
        self, frames: npt.NDArray[np.uint8], state: AdaptState | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits f32[b,C] and features f32[b,D] of frames u8[b,H,W,3] under `state`, or under the committed one.

        Raises:
            UsageError: frames of another type or shape.
            EngineError: OpenVINO failed, or the engine is closed.
        """
        read = self._sets.committed if state is None else state
        inputs = {spec.name: read[spec.name] for spec in self._infer_specs}
        outputs = _opened(self._infer)({"frames": check_frames(frames, self._shapes["infer"]), **inputs})
        return outputs["logits"], outputs["features"]

    def settle(self, state: AdaptState, *, features: bool = True) -> SettledInference | None:
        """Inference with what it reads of a state folded into the weights, or None where there is nothing to fold.

        Without features it gives an f32[b,0] in their place.

        Raises:
            EngineError: OpenVINO refused the graph, or the engine is closed.
        """
        _opened(self._infer)

        def make(graph: bytes) -> Run:
            return self._compile(graph, "infer")

        return settled_inference(
            self._bundle, state, ("openvino", self._threads), features, make, lowering=self._lowering
        )

    def adapt(self, frames: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], Diagnostics]:
        """One step on frames u8[B,H,W,3]; logits f32[B,C] are those before the update.

        Raises:
            UsageError: frames of another type or shape, or an engine opened without its adaptation graph.
            EngineError: OpenVINO failed, or the engine is closed. There is no candidate then.
        """
        if not self._opened_to_adapt:
            raise UsageError("adapt: expected an engine opened with its adaptation graph, found one without")
        self._sets.drop()
        graph = _opened(self._adapt)
        outputs = graph({"frames": check_frames(frames, self._shapes["adapt"]), **self._sets.committed})
        for name, array in self._sets.both[1 - self._sets.place].items():
            np.copyto(array, outputs[f"{name}_out"])
        self._sets.propose()
        return outputs["logits"], Diagnostics(*(float(outputs[name]) for name in DIAGNOSTICS))

    def close(self) -> None:
        """Release graphs and weights; safe to call twice."""
        self._sets.drop()
        self._infer = self._adapt = None

    def _open(self, kind: str) -> _Graph:
        return self._compile(self._bundle.graphs[graph_name(kind, self._lowering)], kind)

    def _compile(self, graph: bytes, kind: str) -> _Graph:
        member = graph_name(kind, self._lowering)
        where, names = f"{self._bundle.path}: {member}", self._bundle.references[member]
        # Of a square weight that is read both ways OpenVINO 2026.4 gives one way for the other.
        graph, aliases = part_transposed(graph, {name for name in names if self._bundle.weights[name].ndim == 2}, where)
        weights = {**self._bundle.weights, **{alias: self._bundle.weights[name] for alias, name in aliases.items()}}
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        if self._threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self._threads
        with mapped(f"{where}: cannot load the graph"):
            model = self._core.read_model(embed_weights(graph, weights, [*names, *aliases]))
            compiled = self._core.compile_model(model, "CPU", settings)
        return _Graph(compiled, [spec.name for spec in graph_contract(self._bundle.manifest, kind)[1]])


class _Graph:
    """A compiled graph; every thread runs it by a request of its own.

    Args:
        compiled: by OpenVINO.
        outputs: names, of which it may lack some.
    """

    def __init__(self, compiled: Any, outputs: Iterable[str]) -> None:
        self._compiled, self._own = compiled, threading.local()
        known = {name for output in compiled.outputs for name in output.names}
        self._outputs = [name for name in outputs if name in known]

    def __call__(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.float32]]:
        """Outputs by name, in memory of their own."""
        with mapped("cannot run the graph"):
            if not hasattr(self._own, "request"):
                self._own.request = self._compiled.create_infer_request()
            request = self._own.request
            request.infer(dict(inputs), share_inputs=True)
            return {name: np.array(request.get_tensor(name).data, np.float32) for name in self._outputs}


def _opened(graph: _Graph | None) -> _Graph:
    if graph is None:
        raise EngineError("engine: expected an open engine, found a closed one")
    return graph


def _import_openvino() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise MissingDependencyError(
            f"engine 'openvino': the package openvino is missing ({error}); install it with: "
            "pip install 'mgg-edge[openvino]'"
        ) from error
