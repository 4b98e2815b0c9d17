"""Statistics of batch normalisation of a clean scene, for bundles in which they move.

A layer normalises with the source's statistics, changed as the scene's have changed since it was clean (the rule is in
`mgg_edge.learn.norm_statistics`). At strength 0 it normalises with the source's whatever moves: so adaptation steps on
clean pictures measure the scene's statistics as they are under the source model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import open_engine
from mgg_edge.state import AdaptState

__all__ = ["CLEAN", "MOVING", "STRENGTH", "with_clean_statistics", "with_site_statistics"]

# As in `mgg_edge.learn.backbone`, which the run time must not import; a test holds the two together.
MOVING = "norm_statistics"
CLEAN, STRENGTH = f"{MOVING}.clean", f"{MOVING}.strength"
SEEN = "moved"  # what a rule saw move that decides itself what is normalised with
# Steps after which what was there at the start is forgotten, (1 − α)^48 < 1 % from α = 0.1 on, and steps that are
# averaged then: with a large α a single one knows few frames.
FORGOTTEN, AVERAGED = 48, 24


def with_site_statistics(
    bundle: Bundle,
    frames: npt.NDArray[np.uint8],
    engine: str,
    threads: int | None,
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> Bundle:
    """The bundle with the statistics of clean pictures u8[n, H, W, 3], n ≥ B, as reference and as initial state.

    A bundle in which none move is returned as it is.

    Raises:
        EngineError: the engine cannot run the adaptation graph.
    """
    if CLEAN not in bundle.weights:
        return bundle
    still = dataclasses.replace(bundle, weights={**bundle.weights, STRENGTH: np.zeros((), np.float32)})
    opened = open_engine(still, engine, threads=threads)
    try:
        rng, batch = np.random.default_rng(0), bundle.manifest.adapt_batch
        total = np.zeros(bundle.weights[CLEAN].shape)
        for number in range(steps := FORGOTTEN + AVERAGED):
            opened.adapt(frames[np.sort(rng.choice(len(frames), batch, replace=False))])
            opened.commit()
            if number >= FORGOTTEN:
                state = opened.state()
                total += state[SEEN if SEEN in state else MOVING].astype(np.float64)
            progress("clean statistics", number + 1, steps)
        clean = (total / AVERAGED).astype(np.float32)
    finally:
        opened.close()
    return dataclasses.replace(
        bundle,
        weights={**bundle.weights, CLEAN: clean},
        initial_state=AdaptState({**bundle.initial_state, MOVING: clean}),
    )


def with_clean_statistics(state: AdaptState, source: AdaptState) -> AdaptState:
    """A state with the statistics that the source's has: clean pictures are to be judged under clean statistics."""
    return AdaptState({**state, MOVING: source[MOVING]}) if MOVING in source else state
