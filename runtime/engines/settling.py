"""Inference under one state, shared by the cameras of one model that stand at the same one."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from mgg_edge.container import graph_name
from mgg_edge.runtime.bundle.bundle import Bundle, graph_contract
from mgg_edge.runtime.bundle.graphs import bind_inputs
from mgg_edge.runtime.engines.engine import check_frames
from mgg_edge.state import AdaptState

__all__ = ["Run", "SettledInference", "has_batch_norm", "settled_inference"]

# Buffers of batch normalisation, among the weights where they stand still and in the state where they move.
STATISTICS, MOVING_STATISTICS = "running_var", "norm_statistics"
# Outputs by name, of inputs by name; from any thread.
Run = Callable[[dict[str, npt.NDArray[np.uint8]]], Mapping[str, npt.NDArray[np.float32]]]


class SettledInference:
    """Inference under one state, which is part of the graph; safe to call from several threads.

    Args:
        run: outputs by name of the infer graph with nothing but frames left to feed; from any thread.
        shape: of the frames, [b,H,W,3].
    """

    def __init__(self, run: Run, shape: tuple[int, ...]) -> None:
        self._run, self._shape = run, shape
        self._no_features = np.zeros((shape[0], 0), np.float32)

    def __call__(self, frames: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Logits f32[b,C] and features f32[b,D] of frames u8[b,H,W,3].

        Raises:
            UsageError: frames of another type or shape.
            EngineError: the engine failed.
        """
        outputs = self._run({"frames": check_frames(frames, self._shape)})
        return outputs["logits"], outputs.get("features", self._no_features)


_kept: weakref.WeakValueDictionary[tuple[object, ...], SettledInference] = weakref.WeakValueDictionary()
_making = threading.Lock()


def has_batch_norm(bundle: Bundle) -> bool:
    """Whether there is batch normalisation, which folds into the convolution before it."""
    names = bundle.references[graph_name("infer", "onnxruntime")]
    return MOVING_STATISTICS in bundle.manifest.infer_state or any(name.endswith(STATISTICS) for name in names)


def settled_inference(
    bundle: Bundle,
    state: AdaptState,
    key: tuple[object, ...],
    features: bool,
    make: Callable[[bytes], Run],
    lowering: str = "onnxruntime",
) -> SettledInference | None:
    """Inference with what it reads of a state bound as constants; None where there is nothing to fold them into.

    Args:
        bundle: whose infer graph.
        state: to bind.
        key: what else decides about the inference: engine, threads.
        features: False leaves out that output.
        make: how to run the graph with nothing but frames left to feed.
        lowering: of the bundle's graphs.

    Returns:
        What is shared as long as anybody keeps it.
    """
    if not has_batch_norm(bundle):
        return None
    read = {spec.name: state[spec.name] for spec in bundle.manifest.infer_specs}
    digest = hashlib.sha256(b"".join(array.tobytes() for array in read.values())).digest()
    whole = (bundle.id, digest, features, *key)
    with _making:
        found = _kept.get(whole)
        if found is None:
            member = graph_name("infer", lowering)
            without = () if features else ("features",)
            run = make(bind_inputs(bundle.graphs[member], read, f"{bundle.path}: {member}", without=without))
            shape = graph_contract(bundle.manifest, "infer")[0][0].shape
            found = _kept[whole] = SettledInference(run, shape)
    return found
