"""`mgg-edge train --rule forward+`: rules of cameras, learned on photographs and on what passes before them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.export.compose import ExportRequest, compose_backbone, rule_file
from mgg_edge.export.training import check_output, run_training
from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.rules.files import load_rule, save_rule
from mgg_edge.learn.rules.forward_plus import ForwardPlus
from mgg_edge.learn.training.cameras import CameraRecipe, CameraTraining, report
from mgg_edge.learn.training.cameras_judge import WeatherRow, judge_rule
from mgg_edge.learn.training.loop import Progress
from mgg_edge.scenes.objects import TEST, TRAINING, VALIDATION, CutOut, Scene, load_cut_outs, load_scenes

__all__ = ["CameraRequest", "train_cameras"]

VIEWS = 8  # parts of each photograph that are looked at in training


@dataclass(frozen=True)
class CameraRequest:
    """What to train, for what, on what.

    Attributes:
        model: backbone and weights, as for an export; its learned numbers are where δ begins, none at θ₀.
        data: folder of photographs: what cameras look at.
        objects: folder of cut-outs: what passes; None takes the photographs themselves, held before the camera.
        out: file of learned numbers to write.
        recipe: how to train.
        device: where to compute.
    """

    model: ExportRequest
    data: Path
    objects: Path | None
    out: Path
    recipe: CameraRecipe
    device: str = "cpu"


def train_cameras(
    request: CameraRequest,
    progress: Callable[[Progress, int], None] = lambda _now, _total: None,
    looking: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> tuple[dict[str, Any], list[WeatherRow]]:
    """Train a rule and write it; interrupted, the same request goes on from the last score.

    Args:
        request: what to train.
        progress: told of each update, and of how many there are.
        looking: told of the scenes as they are looked at.

    Returns:
        How it was learned, and what it is worth on photographs and things that were kept back.

    Raises:
        MggEdgeError: see `compose_backbone`, `load_rule`, `load_scenes`, `load_cut_outs` and `CameraTraining`.
    """
    check_output(request.out)
    started = time.monotonic()
    backbone = compose_backbone(request.model)
    train, held_out = _parts(request, backbone, TRAINING, VIEWS), _parts(request, backbone, VALIDATION, 1)
    start = _start(request.model, backbone)
    training = CameraTraining(backbone, train, held_out, request.recipe, request.device, looking, start)
    last = run_training(training, request.out, lambda now: progress(now, request.recipe.total))
    facts = {
        "backbone": backbone.name,
        "weights": request.model.weights,
        "start": str(request.model.mgg or "source"),
        "data": str(request.data),
        **report(training, last, time.monotonic() - started),
    }
    save_rule(request.out, training.rule, facts)
    rows = judge_rule(training.rule, training.learner, *_parts(request, backbone, TEST, 1), looking)
    return {"out": str(request.out), **facts}, rows


def _start(model: ExportRequest, backbone: Backbone) -> Tensor | None:
    """The δ f[N] to begin from.

    Raises:
        UsageError: a rule that has none.
        WeightsError: see `load_rule`.
    """
    if model.mgg is None:
        return None
    rule = load_rule(rule_file(model), backbone.norms.size, backbone.features)
    if not isinstance(rule, ForwardPlus):
        raise UsageError(f"{model.mgg}: expected the numbers of forward+ or robust to start from, found '{rule.name}'")
    return rule.robust.detach()


def _parts(
    request: CameraRequest, backbone: Backbone, parts: tuple[int, ...], views: int
) -> tuple[tuple[Scene, ...], tuple[CutOut, ...]]:
    size = backbone.preprocess
    scenes = load_scenes(request.data, size.height, size.width, parts, views)
    things = load_cut_outs(request.objects or request.data, parts, whole=request.objects is None)
    if not scenes:
        raise UsageError(
            f"{request.data}: expected photographs enough for training, choosing and judging, a few dozen at least; "
            f"found none whose name falls into part {'/'.join(map(str, parts))} of 4"
        )
    return scenes, things
