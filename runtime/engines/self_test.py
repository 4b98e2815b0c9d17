"""A bundle's recorded results against those of an engine on this machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import EngineError
from mgg_edge.manifest import Manifest
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Engine

__all__ = [
    "LOGITS_LIMIT",
    "UPDATE_LIMIT",
    "SelfTest",
    "half_limits",
    "require_agreement",
    "self_test",
    "update_distance",
]

LOGITS_LIMIT = 1e-3  # largest |difference|; the same that an export must hold
# Relative L2 of one update, without the thousandth part of θ that strays most: Adam's first update is g/|g|, and where
# g is near 0 its sign is chance on any processor. A wrong gradient of one layer is more than that.
UPDATE_LIMIT, LEFT_TO_CHANCE = 1e-2, 1e-3
HALF_FACTOR = 4.0  # in half precision: times what the export found, which was other pictures' and PyTorch's
HALF_UPDATE_LIMIT = (
    0.2  # there a gate that opens halfway makes the same way 14 % longer; a wrong gradient is another way
)


@dataclass(frozen=True)
class SelfTest:
    """A bundle's recorded results against this machine's.

    Attributes:
        engine: name and version of the engine.
        infer_logits: largest |difference| of the logits of plain inference.
        settled_logits: the same with θ folded in, or None where the engine does not fold.
        adapt_logits: largest |difference| of the logits of an adaptation step.
        update: relative L2 distance of θ's first update from the recorded one, but for what is left to chance.
        logits_limit: what is allowed of the logits.
        update_limit: what is allowed of the update.
    """

    engine: str
    infer_logits: float
    settled_logits: float | None
    adapt_logits: float
    update: float
    logits_limit: float = LOGITS_LIMIT
    update_limit: float = UPDATE_LIMIT

    @property
    def passed(self) -> bool:
        """Every difference is within its limit; NaN is not."""
        return all(found <= limit for _, found, limit in self.rows)

    @property
    def rows(self) -> tuple[tuple[str, float, float], ...]:
        """What was compared, how far it differs, and what is allowed."""
        settled = () if self.settled_logits is None else (("with θ folded in, largest", self.settled_logits),)
        logits = (
            ("inference logits, largest", self.infer_logits),
            *settled,
            ("adaptation logits, largest", self.adapt_logits),
        )
        return (
            *((name, found, self.logits_limit) for name, found in logits),
            ("first update, relative L2", self.update, self.update_limit),
        )


def self_test(bundle: Bundle, engine: Engine) -> SelfTest:
    """Run a bundle's recorded frames through an engine that holds the initial state.

    Args:
        bundle: its self-test has `frames` u8[B,H,W,3], `infer.logits` f32[b,C], `adapt.logits` f32[B,C], `adapt.theta`.
        engine: freshly opened on this bundle; nothing is committed to it.

    Raises:
        EngineError: the engine cannot run the graphs.
    """
    recorded = bundle.self_test
    frames = np.asarray(recorded["frames"], np.uint8)
    shown = frames[: bundle.manifest.infer_batch]
    infer_difference = _largest(engine.infer(shown)[0], recorded["infer.logits"])
    settled = engine.settle(bundle.initial_state)
    settled_difference = None if settled is None else _largest(settled(shown)[0], recorded["infer.logits"])
    adapt_logits, _ = engine.adapt(frames)
    source = np.asarray(bundle.initial_state["theta"], np.float64)
    update, expected = (
        np.asarray(theta, np.float64) - source for theta in (engine.candidate["theta"], recorded["adapt.theta"])
    )
    return SelfTest(
        engine=engine.name,
        infer_logits=infer_difference,
        settled_logits=settled_difference,
        adapt_logits=_largest(adapt_logits, recorded["adapt.logits"]),
        update=update_distance(update, expected),
        **half_limits(bundle.manifest, engine.name),
    )


def require_agreement(bundle: Bundle, engine: Engine, *, with_adapt: bool) -> None:
    """Refuse an engine that computes something else than the bundle has recorded.

    Raises:
        EngineError: it does, or cannot run the graphs.
    """
    if with_adapt:
        rows, initial = self_test(bundle, engine).rows, bundle.initial_state
        engine.load_state(initial)  # the step made here is no candidate
    else:
        shown = np.asarray(bundle.self_test["frames"][: bundle.manifest.infer_batch], np.uint8)
        difference = _largest(engine.infer(shown)[0], bundle.self_test["infer.logits"])
        allowed = half_limits(bundle.manifest, engine.name).get("logits_limit", LOGITS_LIMIT)
        rows = (("inference logits, largest", difference, allowed),)
    for name, found, allowed in rows:
        if not found <= allowed:
            raise EngineError(
                f"{bundle.path}: {engine.name} computes something else than the bundle has recorded: {name} difference "
                f"{found:.1e}, allowed {allowed:.0e}; use another engine"
            )


def update_distance(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    """Relative L2 distance of updates f64[N], without the `LEFT_TO_CHANCE` of them that stray most.

    The length of the update itself where none is expected; NaN where a number is not finite.
    """
    strays = np.sort(np.abs(found - expected))
    if not np.isfinite(strays).all():
        return float("nan")
    kept = strays[: len(strays) - int(LEFT_TO_CHANCE * len(strays))]
    return float(np.linalg.norm(kept) / (np.linalg.norm(expected) or 1.0))


def half_limits(manifest: Manifest, engine: str) -> dict[str, float]:
    """`logits_limit` and `update_limit` where the engine multiplies in half precision; nothing where it does not.

    Args:
        manifest: of the bundle.
        engine: its name, which says so on a processor.
    """
    half = manifest.half_parity
    if half is None or ("-cpu " in engine and not engine.endswith(manifest.precision)):
        return {}
    update = max(row.engine for row in half.rows if row.quantity == "update")
    return {
        "logits_limit": max(LOGITS_LIMIT, HALF_FACTOR * half.logits_max),
        "update_limit": max(HALF_UPDATE_LIMIT, HALF_FACTOR * update),
    }


def _largest(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> float:
    return float(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max())
