"""What the methods' authors set for ImageNet-C, -R, -A and -Sketch, where that is not the default here.

Rates follow `paper_rate`, which is the authors' rule. Sources: the repositories that the methods' modules name; for
ViT-B/16, which their authors did not run, Tent's and EATA's settings are those of SAR's repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["SETTINGS", "published_options"]

# Of an evaluation: online answers alone, in batches under their own statistics.
SETTINGS: Mapping[str, Any] = MappingProxyType(
    {"batch": 64, "norm_statistics": "batch", "held_out": 0, "source_images": 2000}
)

_ALWAYS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "eata": {"redundancy": 0.05},
        "rdumb": {"redundancy": 0.05},
        "sar": {"keep_momentum": True},
        "cotta": {"nesterov": True, "confidence": 0.1},
        "lame": {"affinity": "rbf"},
        "t3a": {"supports": -1},
    }
)
_WITH_BATCH_NORM: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"tent": {"nesterov": True}, "deyo": {"difference": 0.3}, "memo": {"views": 64}}
)
_WITH_LAYER_NORM: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"memo": {"views": 32, "optimiser": "adam", "momentum": 0.9, "learning_rate": 1e-5}}
)


def published_options(method: str, *, layer_norm: bool) -> dict[str, Any]:
    """Options of a method by name, for nets with layer normalisation (ViT-B/16) or with batch's (ResNet-50)."""
    by_norm = _WITH_LAYER_NORM if layer_norm else _WITH_BATCH_NORM
    return {**_ALWAYS.get(method, {}), **by_norm.get(method, {})}
