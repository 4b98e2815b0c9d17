"""A bundle back in PyTorch: the numbers of the file in a model built by name, adapting or as it was before."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mgg_edge.errors import UnsupportedError
from mgg_edge.learn.backbone import NORM_STATISTICS, PREFIX, Backbone
from mgg_edge.learn.checkpoint import assign_weights
from mgg_edge.learn.norm_statistics import StatisticsNorm
from mgg_edge.learn.objective import Objective
from mgg_edge.learn.rules.base import UpdateRule
from mgg_edge.learn.rules.files import make_rule
from mgg_edge.learn.statistics import SourceStatistics
from mgg_edge.learn.step import RULE_PREFIX, AdaptStep
from mgg_edge.manifest import Manifest
from mgg_edge.norms import NormLayout, NormParameter
from mgg_edge.runtime.bundle.bundle import Bundle

__all__ = ["restore_backbone", "restore_plain", "restore_step"]

# A bundle does not say how far its statistics move in a step; what is restored of it must not depend on that.
ANY_MOVEMENT = "mix:0.5"


def restore_step(bundle: Bundle, *, any_movement: bool = False) -> AdaptStep:
    """Backbone, objective, rule, statistics and learning rate of a bundle.

    Args:
        bundle: what to restore.
        any_movement: the step's numbers do not matter, only what it computes; moving statistics may then move anyhow.

    Raises:
        UnsupportedError: the bundle leaves open how its statistics move, or names a model that is built otherwise.
        UsageError: a model name that is not known here.
        WeightsError: the model needs weights that the graphs, and so the bundle, do without.
    """
    manifest = bundle.manifest
    if len(manifest.infer_state) > 1 and not any_movement:
        raise UnsupportedError(
            f"{bundle.path}: its batch normalisation moves, and a bundle does not say how: name the model with "
            "--backbone and --weights, or use --engine onnxruntime"
        )
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in bundle.weights.items()}
    known = [f"statistics.{name}" for name in ("mean", "std", "clean_discrepancy")]
    if absent := [name for name in known if name not in tensors]:
        raise UnsupportedError(f"{bundle.path}: expected '{absent[0]}' among its weights, found none; export it again")
    mean, std, clean = (tensors[name].double() for name in known)
    statistics = SourceStatistics(mean, std, manifest.statistics.images, clean)
    objective = Objective(manifest.objective.entropy_weight, manifest.objective.discrepancy_weight)
    rate = manifest.rule.learning_rate
    return AdaptStep(restore_backbone(bundle), objective, _rule(manifest, tensors), statistics, rate)


def restore_backbone(bundle: Bundle) -> Backbone:
    """The backbone with its numbers at the source; how its statistics move is anyone's guess.

    Raises:
        UnsupportedError: the bundle names a model that is built otherwise.
        UsageError: a model name that is not known here.
        WeightsError: the model needs weights that the graphs, and so the bundle, do without.
    """
    manifest, size = bundle.manifest, bundle.manifest.preprocess
    layers = dict.fromkeys(parameter.name.rpartition(".")[0] for parameter in manifest.norms)
    backbone = Backbone.create(
        manifest.backbone.name,
        adapt="^(" + "|".join(map(re.escape, layers)) + ")$",
        taps="|".join(re.escape(tap.name) for tap in manifest.taps),
        norm_statistics=ANY_MOVEMENT if NORM_STATISTICS in manifest.infer_state else "source",
        outputs=manifest.backbone.outputs,
        img_size=size.height if size.height == size.width else (size.height, size.width),
        num_classes=manifest.backbone.classes,
    )
    backbone.preprocess = size
    if backbone.norms.parameters != manifest.norms or backbone.taps != manifest.taps:
        raise UnsupportedError(
            f"{bundle.path}: expected '{manifest.backbone.name}' with its norms and taps at export, found others"
        )
    weights = {name.removeprefix(PREFIX): array for name, array in bundle.weights.items() if name.startswith(PREFIX)}
    for name, layout in (("theta", backbone.norms), (NORM_STATISTICS, backbone.statistics)):
        if layout is not None:
            weights |= {part.name: array for part, array in _parts(bundle.initial_state[name], layout)}
    kept = backbone.model.state_dict()  # tables of positions are the model's own
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in weights.items() if name in kept}
    assign_weights(backbone.model, tensors, where=str(bundle.path))
    return backbone


def restore_plain(bundle: Bundle) -> nn.Module:
    """The classifier as its user had it: from images f[b,3,H,W], scaled; batch normalisation is whole again."""
    model = restore_backbone(bundle).model
    for name, module in list(model.named_modules()):
        if isinstance(module, StatisticsNorm):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.as_batch_norm())
    return model.eval()


def _parts(vector: np.ndarray, layout: NormLayout) -> list[tuple[NormParameter, np.ndarray]]:
    ends = np.cumsum(layout.sizes)[:-1]
    return [
        (parameter, part.reshape(parameter.shape))
        for parameter, part in zip(layout.parameters, np.split(vector, ends), strict=True)
    ]


def _rule(manifest: Manifest, tensors: Mapping[str, Tensor]) -> UpdateRule:
    rule = make_rule(manifest.rule.name, manifest.rule.options)
    rule.load_state_dict({name: tensors[f"{RULE_PREFIX}{name}"] for name in rule.state_dict()})
    return rule
