"""The adaptation step of a bundle, back in PyTorch: the numbers of the file in a model built by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mgg_edge.errors import UnsupportedError
from mgg_edge.learn.backbone import PREFIX, Backbone
from mgg_edge.learn.objective import Objective
from mgg_edge.learn.rules.base import UpdateRule
from mgg_edge.learn.rules.files import make_rule
from mgg_edge.learn.statistics import SourceStatistics
from mgg_edge.learn.step import RULE_PREFIX, AdaptStep
from mgg_edge.manifest import Manifest
from mgg_edge.runtime.bundle.bundle import Bundle

__all__ = ["restore_step"]


def restore_step(bundle: Bundle) -> AdaptStep:
    """Backbone, objective, rule, statistics and learning rate of a bundle.

    Raises:
        UnsupportedError: the bundle leaves open how its statistics move, or names a model that is built otherwise.
        UsageError: a model name that is not known here.
        WeightsError: the model needs weights that the graphs, and so the bundle, do without.
    """
    manifest = bundle.manifest
    if len(manifest.infer_state) > 1:
        raise UnsupportedError(
            f"{bundle.path}: its batch normalisation moves, and a bundle does not say how: name the model with "
            "--backbone and --weights, or use --engine onnxruntime"
        )
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in bundle.weights.items()}
    mean, std, clean = (tensors[f"statistics.{name}"].double() for name in ("mean", "std", "clean_discrepancy"))
    statistics = SourceStatistics(mean, std, manifest.statistics.images, clean)
    objective = Objective(manifest.objective.entropy_weight, manifest.objective.discrepancy_weight)
    rate = manifest.rule.learning_rate
    return AdaptStep(_backbone(bundle, tensors), objective, _rule(manifest, tensors), statistics, rate)


def _backbone(bundle: Bundle, tensors: Mapping[str, Tensor]) -> Backbone:
    manifest = bundle.manifest
    theta = torch.from_numpy(np.array(bundle.initial_state["theta"]))
    sizes = [parameter.size for parameter in manifest.norms]
    parts = theta.split(sizes)
    weights = {
        parameter.name: part.reshape(parameter.shape) for parameter, part in zip(manifest.norms, parts, strict=True)
    }
    weights |= {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    layers = dict.fromkeys(parameter.name.rpartition(".")[0] for parameter in manifest.norms)
    size = manifest.preprocess
    backbone = Backbone.create(
        manifest.backbone.name,
        weights,
        adapt="^(" + "|".join(map(re.escape, layers)) + ")$",
        taps="|".join(re.escape(tap.name) for tap in manifest.taps),
        norm_statistics="source",
        outputs=manifest.backbone.outputs,
        img_size=size.height if size.height == size.width else (size.height, size.width),
        num_classes=manifest.backbone.classes,
    )
    backbone.preprocess = size
    if backbone.norms.parameters != manifest.norms or backbone.taps != manifest.taps:
        raise UnsupportedError(
            f"{bundle.path}: expected '{manifest.backbone.name}' with its norms and taps at export, found others"
        )
    return backbone


def _rule(manifest: Manifest, tensors: Mapping[str, Tensor]) -> UpdateRule:
    rule = make_rule(manifest.rule.name, manifest.rule.options)
    rule.load_state_dict({name: tensors[f"{RULE_PREFIX}{name}"] for name in rule.state_dict()})
    return rule
