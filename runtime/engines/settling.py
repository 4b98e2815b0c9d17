"""Inference under one state, shared by the cameras of one model that stand at the same one."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

from mgg_edge.container import graph_name
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.bundle.graphs import bind_inputs
from mgg_edge.state import AdaptState

__all__ = ["has_batch_norm", "settled_inference"]

# Buffers of batch normalisation, among the weights where they stand still and in the state where they move.
STATISTICS, MOVING_STATISTICS = "running_var", "norm_statistics"
InferenceT = TypeVar("InferenceT")
_kept: weakref.WeakValueDictionary[tuple[object, ...], object] = weakref.WeakValueDictionary()
_making = threading.Lock()


def has_batch_norm(bundle: Bundle) -> bool:
    """Whether there is batch normalisation, which folds into the convolution before it."""
    names = bundle.references[graph_name("infer", "onnxruntime")]
    return MOVING_STATISTICS in bundle.manifest.infer_state or any(name.endswith(STATISTICS) for name in names)


def settled_inference(
    bundle: Bundle, state: AdaptState, key: tuple[object, ...], features: bool, make: Callable[[bytes], InferenceT]
) -> InferenceT | None:
    """Inference with what it reads of a state bound as constants; None where there is nothing to fold them into.

    Args:
        bundle: whose infer graph.
        state: to bind.
        key: what else decides about the inference: engine, threads.
        features: False leaves out that output.
        make: of the graph with nothing but frames left to feed; what it gives is shared as long as anybody keeps it.
    """
    if not has_batch_norm(bundle):
        return None
    read = {spec.name: state[spec.name] for spec in bundle.manifest.infer_specs}
    digest = hashlib.sha256(b"".join(array.tobytes() for array in read.values())).digest()
    whole = (bundle.id, digest, features, *key)
    with _making:
        found = _kept.get(whole)
        if found is None:
            member = graph_name("infer", "onnxruntime")
            without = () if features else ("features",)
            found = make(bind_inputs(bundle.graphs[member], read, f"{bundle.path}: {member}", without=without))
            _kept[whole] = found
    return found  # type: ignore[return-value] # made by `make` of the same key
