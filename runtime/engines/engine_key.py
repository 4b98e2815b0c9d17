"""What a built engine depends on: its name in the cache, and why it was built again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

__all__ = ["ANY", "EngineKey"]

ANY = "any"


@dataclass(frozen=True)
class EngineKey:
    """Everything a built engine depends on.

    Attributes:
        graph: `infer` or `adapt`.
        graph_sha256: of the graph without weights; it fixes operators, shapes and the types of all numbers.
        weights_sha256: of the weights: two bundles of equal graphs never share an engine.
        library: such as `tensorrt 10.3.0`.
        device: name of the GPU; `any` for engines that are compiled for a class of devices.
        capability: compute capability, such as `sm86`.
        driver: version of the GPU's driver, `any` as above.
        options: choices of the build, in words.
    """

    graph: str
    graph_sha256: str
    weights_sha256: str
    library: str
    device: str
    capability: str
    driver: str
    options: str

    @property
    def digest(self) -> str:
        """64 hex digits that name the engine."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def words(self) -> str:
        """For people: `adapt, tensorrt 10.3.0, sm87 Orin`."""
        return f"{self.graph}, {self.library}, {self.capability}" + ("" if self.device == ANY else f" {self.device}")

    def differences(self, other: EngineKey) -> tuple[str, ...]:
        """What differs in the other key, in words: `driver: 550.54 → 560.35`."""
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        return tuple(
            f"{name.replace('_sha256', '')}: {_short(mine[name])} → {_short(others[name])}"
            for name in mine
            if mine[name] != others[name]
        )


def _short(value: str) -> str:
    return f"{value[:12]}…" if len(value) == 64 else value
