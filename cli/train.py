"""`mgg-edge train`: learn the numbers of an update rule for a backbone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgg_edge.cli.model_words import (
    BackboneName,
    ClassesFile,
    ClassOrderName,
    Crop,
    Interpolation,
    Labels,
    Mean,
    Std,
    preparation,
)
from mgg_edge.compat import StrEnum
from mgg_edge.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mgg_edge.export.compose import ExportRequest
    from mgg_edge.learn.training.loop import Progress

__all__ = ["LearnedRule", "Target", "train"]


class LearnedRule(StrEnum):
    """Rules that learn."""

    FORWARD = "forward"
    MGG = "mgg"
    FORWARD_PLUS = "forward+"
    ROBUST = "robust"
    MGG_PLUS = "mgg+"
    ADAM_PLUS = "adam+"


class Target(StrEnum):
    """What adapted predictions are held against in training."""

    LABELS = "labels"
    PREDICTIONS = "predictions"


def train(
    backbone: BackboneName,
    data: Annotated[
        Path,
        typer.Option(help="Clean pictures: a folder a class, any images, or a glyph file; photographs for forward+."),
    ],
    out: Annotated[Path, typer.Option(help="File of learned numbers to write, .safetensors.")],
    weights: Annotated[
        str, typer.Option(help="FILE (.safetensors, .pth) or its folder, 'pretrained', 'package' or 'random'.")
    ] = "pretrained",
    objects: Annotated[
        Path | None,
        typer.Option(
            help="forward+, robust: cut-outs with an alpha channel that pass the camera; else pictures of --data."
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="forward+, robust: learned numbers to go on from, FILE or 'package'; else the source's θ."),
    ] = None,
    rule: Annotated[LearnedRule, typer.Option(help="What to learn.")] = LearnedRule.FORWARD,
    target: Annotated[
        Target, typer.Option(help="labels of the pictures, or what the frozen model says of the clean ones.")
    ] = Target.LABELS,
    updates: Annotated[int, typer.Option(min=0, help="Meta-updates; 0 for the rule's own number.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="α of mgg, in training and ever after.")] = 1e-2,
    image_size: Annotated[int | None, typer.Option(min=8, help="Square input, pixels; the model's by default.")] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Number of classes; the weights' by default.")] = None,
    adapt: Annotated[str, typer.Option(help="Norms that adapt: all, last:K or a regular expression.")] = "all",
    taps: Annotated[str | None, typer.Option(help="Modules the features come from, a regular expression.")] = None,
    labels: Labels = None,
    classes_file: ClassesFile = None,
    class_order: Annotated[
        ClassOrderName, typer.Option(help="Folders are classes by their names, or sorted as classes 0, 1, ….")
    ] = ClassOrderName.NAMES,
    mean: Mean = None,
    std: Std = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Learn an update rule on random weathers over clean pictures.

    Interrupted, the same command goes on where it was. The file is written at the end: give it to `export --mgg`. Batch
    normalisation keeps the source's statistics while a rule is learned; export it so, with --norm-statistics source.

    forward+ is for cameras: it learns, without labels, on scenes that different things pass, and says at the end what
    it is worth on those it has not seen. robust is its start alone: one θ for all weathers, and when to use it.
    """
    from mgg_edge.cli.display import TrainingDisplay, log_to_terminal, print_facts
    from mgg_edge.export.compose import STILL, ExportRequest
    from mgg_edge.export.training import TrainRequest
    from mgg_edge.export.training import train as train_rule
    from mgg_edge.learn.class_folders import ClassOrder
    from mgg_edge.learn.training.rules import RuleRecipe

    console = log_to_terminal()
    model = ExportRequest(
        backbone, weights, seed, labels=labels, image_size=image_size, classes=classes, adapt=adapt, taps=taps,
        norm_statistics=STILL, preparation=preparation(mean, std, crop, interpolation), mgg=start,
    )  # fmt: skip
    if rule in (LearnedRule.FORWARD_PLUS, LearnedRule.ROBUST):
        _train_cameras(console, model, data, objects, out, rule, updates, seed, device, as_json=as_json)
        return
    for name, given in (("objects", objects), ("start", start)):
        if given is not None:
            raise UsageError(f"{name}: for rules of cameras alone (forward+, robust), found --rule {rule.value}")
    recipe = RuleRecipe(rule.value, target.value, updates, learning_rate, seed)
    with TrainingDisplay(console) as display:

        def tell(now: Progress, total: int) -> None:
            display(now.made, total, now.loss, now.score, now.best)

        order = ClassOrder(class_order.value)
        facts = train_rule(TrainRequest(model, data, out, recipe, device, classes_file, order), tell)
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        print_facts({name.replace("_", " "): str(value) for name, value in facts.items()})


def _train_cameras(
    console: Console,
    model: ExportRequest,
    data: Path,
    objects: Path | None,
    out: Path,
    rule: LearnedRule,
    updates: int,
    seed: int,
    device: str,
    *,
    as_json: bool,
) -> None:
    from mgg_edge.cli.display import Stages, TrainingDisplay, print_facts, print_table
    from mgg_edge.export.training_cameras import CameraRequest, train_cameras
    from mgg_edge.learn.training.cameras import CameraRecipe
    from mgg_edge.learn.training.cameras_judge import verdict

    recipe = CameraRecipe(rule.value, seed=seed)
    if updates:
        recipe = CameraRecipe(rule.value, updates, episodes=max(2, updates // 2), seed=seed)
    with Stages(console) as looking, TrainingDisplay(console) as display:

        def tell(now: Progress, total: int) -> None:
            display(now.made, total, now.loss, now.score, now.best)

        facts, rows = train_cameras(CameraRequest(model, data, objects, out, recipe, device), tell, looking)
    if as_json:
        sys.stdout.write(
            json.dumps({**facts, "weathers": [vars(row) for row in rows], "verdict": verdict(rows)}) + "\n"
        )
        return
    print_facts({name.replace("_", " "): str(value) for name, value in facts.items()})
    cells = [(row.weather, *(f"{value:.1%}" for value in (row.frozen, row.robust, row.adapted))) for row in rows]
    print_table(("named as in clear weather", "frozen", "robust", "adapted"), cells)
    sys.stdout.write(f"{verdict(rows)}\n")
