"""Inference of any number of frames by a graph of a fixed batch size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mgg_edge.runtime.engines.engine import Engine, Inference
from mgg_edge.state import AdaptState

__all__ = ["infer_all"]

Array = npt.NDArray[np.float32]


def infer_all(
    engine: Engine, frames: npt.NDArray[np.uint8], state: AdaptState, batch: int, settled: Inference | None = None
) -> tuple[Array, Array]:
    """Logits f32[n,C] and features f32[n,D] of frames u8[n,H,W,3], n ≥ 1, under `state`.

    The last call of the graph is filled up with copies of the last frame.

    Args:
        engine: runs the graph.
        frames: at model size.
        state: what to infer under; the engine's own is left alone.
        batch: frames per call of the graph.
        settled: the engine's inference under that very state, where there is one.
    """
    parts = []
    for start in range(0, len(frames), batch):
        chunk = frames[start : start + batch]
        missing = batch - len(chunk)
        filled = chunk if not missing else np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)])
        logits, features = engine.infer(filled, state) if settled is None else settled(filled)
        parts.append((logits[: len(chunk)], features[: len(chunk)]))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([logits for logits, _ in parts]), np.concatenate([features for _, features in parts])
