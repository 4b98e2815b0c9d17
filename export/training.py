"""`mgg-edge train`: from what a user asked for to a file of learned numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mgg_edge.errors import UsageError
from mgg_edge.export.compose import ExportRequest, class_labels, compose_backbone
from mgg_edge.files import output_target
from mgg_edge.learn.class_folders import ClassOrder, Naming
from mgg_edge.learn.pictures import open_training_data
from mgg_edge.learn.rules.files import save_rule
from mgg_edge.learn.training.loop import Progress
from mgg_edge.learn.training.rules import RuleRecipe, RuleTraining, report

__all__ = ["TrainRequest", "check_output", "run_training", "train"]

RESUME_SUFFIX = ".resume"


@dataclass(frozen=True)
class TrainRequest:
    """What to train, for what, on what.

    Attributes:
        model: backbone and weights, as for an export.
        data: glyph file, or a directory of images: one folder a class, or any images for the target `predictions`.
        out: file of learned numbers to write.
        recipe: how to train.
        device: where to compute.
        classes_file: names that folders have instead of the labels.
        class_order: how folders become classes.
    """

    model: ExportRequest
    data: Path
    out: Path
    recipe: RuleRecipe
    device: str = "cpu"
    classes_file: Path | None = None
    class_order: ClassOrder = ClassOrder.NAMES


def train(
    request: TrainRequest, progress: Callable[[Progress, int], None] = lambda _now, _total: None
) -> dict[str, Any]:
    """Train a rule and write it; interrupted, the same request goes on from the last score.

    Args:
        request: what to train.
        progress: told of each update, and of how many there are.

    Returns:
        How it was learned.

    Raises:
        MggEdgeError: see `compose_backbone`, `open_training_data` and `RuleTraining`.
    """
    check_output(request.out)
    started = time.monotonic()
    backbone = compose_backbone(request.model)
    naming = Naming(class_labels(request.model, backbone), request.classes_file, request.class_order)
    source, held_out = open_training_data(
        request.data, backbone.preprocess, naming, labelled=request.recipe.target == "labels"
    )
    training = RuleTraining(backbone, source, held_out, request.recipe, device=request.device)
    last = run_training(training, request.out, lambda now: progress(now, training.recipe.loop.updates))
    facts = {
        "backbone": backbone.name,
        "weights": request.model.weights,
        "data": str(request.data),
        **report(training, last, time.monotonic() - started),
    }
    save_rule(request.out, training.rule, facts)
    return {"out": str(request.out), **facts}


class Training(Protocol):
    """What is run: its updates one after the other, from a file where it was interrupted."""

    def run(self, resume: Path | None = None) -> Iterator[Progress]: ...


def check_output(out: Path) -> None:
    """Refuse what no rule can be written to, before the work.

    Raises:
        UsageError: another suffix, or no file.
        SinkError: it cannot be written.
    """
    output_target(out)
    if out.suffix != ".safetensors":
        raise UsageError(f"{out}: expected a name that ends in .safetensors")


def run_training(training: Training, out: Path, progress: Callable[[Progress], None]) -> Progress:
    """Run to the end, going on from the file beside `out`; returns the last progress.

    Raises:
        UsageError: the training that the file holds is complete.
    """
    last: Progress | None = None
    for last in training.run(out.with_name(out.name + RESUME_SUFFIX)):
        progress(last)
    if last is None:
        raise UsageError(f"{out}{RESUME_SUFFIX}: the training it holds is complete; remove it to train again")
    return last
