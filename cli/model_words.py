"""Options that commands of the export half share: pictures, what a model returns, which folder is which class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgg_edge.compat import StrEnum
from mgg_edge.errors import UsageError

if TYPE_CHECKING:
    from mgg_edge.learn.model_config import Preparation

__all__ = [
    "BackboneName",
    "ClassOrderName",
    "ClassesFile",
    "Crop",
    "Interpolation",
    "Labels",
    "Mean",
    "OutputsName",
    "Std",
    "preparation",
]


class ClassOrderName(StrEnum):
    """How folders become classes."""

    NAMES = "names"
    SORTED = "sorted"


class OutputsName(StrEnum):
    """What a model returns."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    SIGMOID = "sigmoid"


BackboneName = Annotated[
    str, typer.Option(help="timm NAME or NAME.TAG, local-dir:FOLDER, torchvision/NAME, or your own MODULE:FACTORY.")
]
Labels = Annotated[Path | None, typer.Option(help="Class names: FILE, one a line, or 'imagenet'.")]
ClassesFile = Annotated[
    Path | None, typer.Option(help="Names of the folders: FILE whose line k names class k, or JSON {name: class}.")
]
Mean = Annotated[str | None, typer.Option(help="Of the input scaling, 0–1: one number or R,G,B; the model's own.")]
Std = Annotated[str | None, typer.Option(help="Of the input scaling, 0–1: one number or R,G,B; the model's own.")]
Crop = Annotated[float | None, typer.Option(help="Centre crop's share of the resized picture; the model's own.")]
Interpolation = Annotated[str | None, typer.Option(help="bicubic or bilinear; the model's own.")]


def preparation(mean: str | None, std: str | None, crop: float | None, interpolation: str | None) -> Preparation:
    """What a user says of the preparation of pictures.

    Raises:
        UsageError: not numbers, or numbers out of range.
    """
    from mgg_edge.learn.model_config import Preparation

    return Preparation(_numbers("mean", mean), _numbers("std", std), crop, interpolation)


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(map(float, text.split(",")))
    except ValueError as error:
        raise UsageError(f"{name}: expected one number or three apart by commas, found '{text}'") from error
