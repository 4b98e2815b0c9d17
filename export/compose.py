"""From what a user asks for to a step that can be exported."""

from __future__ import annotations

import dataclasses
import importlib.resources
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from mgg_edge.errors import UsageError, WeightsError
from mgg_edge.export.bundle import Origins, Progress
from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.backbone_outputs import check_outputs
from mgg_edge.learn.checkpoint import read_state_dict
from mgg_edge.learn.class_folders import Naming
from mgg_edge.learn.imagenet import IMAGENET_CLASSES, imagenet_labels
from mgg_edge.learn.images import find_images, load_images, synthetic_frames
from mgg_edge.learn.model_config import AS_CONFIGURED, LOCAL, Located, Preparation, locate
from mgg_edge.learn.norm_layers import ADAPT_ALL
from mgg_edge.learn.norm_statistics import DEFAULT_NORM_STATISTICS
from mgg_edge.learn.objective import Objective
from mgg_edge.learn.packaged_weights import PACKAGED, packaged_weights
from mgg_edge.learn.pictures import open_glyphs
from mgg_edge.learn.rules.base import UpdateRule
from mgg_edge.learn.rules.files import LEARNED_RULES, RULES, learned_name, load_rule, untrained_rule
from mgg_edge.learn.rules.statistics import Statistics
from mgg_edge.learn.statistics import MIN_SOURCE_IMAGES, SourceStatistics, measure_statistics
from mgg_edge.learn.step import AdaptStep
from mgg_edge.learn.training.rules import source_statistics
from mgg_edge.manifest import OUTPUTS
from mgg_edge.scenes.sources import ImageSource

__all__ = ["STILL", "ExportRequest", "class_labels", "compose", "compose_backbone"]

logger = logging.getLogger(__name__)

TABLES = {".csv": ",", ".tsv": "\t"}  # what stands between columns, by the end of the file's name
DEFAULT_RULE = "mgg"
STILL = "source"  # statistics of batch normalisation that do not move
STATISTICS_BATCH = 8
MAX_SOURCE_IMAGES = 256
SYNTHETIC_IMAGES = 64
SYNTHETIC_SEED = 30_000
CHECKED_IMAGES = 8  # pictures that logits are told from probabilities by
# The last layer, whose rows are the classes, as timm's and torchvision's families call it.
_HEAD = re.compile(r"(head|heads\.head|head\.fc|fc|last_linear|(head\.)?classifier(\.\d)?)\.weight")


@dataclass(frozen=True)
class ExportRequest:
    """What to compose.

    Attributes:
        backbone: timm model name with a tag or without, `local-dir:FOLDER`, `torchvision/` and a torchvision model
            name, or `package.module:factory`.
        weights: `random`, `pretrained`, `package` (of an installed package that carries them), or the path of a file or
            of a folder with one; a `config.json` of timm beside it is followed.
        seed: of random weights and of an untrained rule.
        source_data: directory of clean images, a glyph file, or None for a synthetic set.
        rule: `mgg`, `adam` or `sgd`.
        mgg: file of learned numbers, `package` for those that this package has for a backbone, or None for untrained
            ones.
        labels: file with one class name a line, the word `imagenet`, or None for what is known of the weights.
        learning_rate: α, or None for the rule's own.
        objective: weights of the loss.
        image_size: pixels of the square input, or None for the model's own.
        classes: number of classes, or None for what the weights or the model have.
        adapt: which norms adapt: `all`, `last:K` or a regular expression of layer names.
        taps: regular expression of modules the features come from, or None for the rule of the model's family.
        norm_statistics: of batch normalisation: `source`, `batch` or `mix:ALPHA`; None for those a learned rule was
            learned with, else `mix:0.1`.
        outputs: what the model returns (`OUTPUTS`); None for logits, checked.
        preparation: how pictures are prepared, over the model's own configuration.
    """

    backbone: str
    weights: str = "random"
    seed: int = 0
    source_data: Path | None = None
    rule: str | None = None
    mgg: Path | None = None
    labels: Path | None = None
    learning_rate: float | None = None
    objective: Objective = dataclasses.field(default_factory=Objective)
    image_size: int | None = None
    classes: int | None = None
    adapt: str = ADAPT_ALL
    taps: str | None = None
    norm_statistics: str | None = None
    outputs: str | None = None
    preparation: Preparation = AS_CONFIGURED


def compose(
    request: ExportRequest, progress: Progress = lambda _stage, _done, _total: None
) -> tuple[AdaptStep, tuple[str, ...], Origins]:
    """Build the step, its class names and where its numbers came from.

    Args:
        request: what to compose.
        progress: called with a stage's name, and how much of how much of it is done.

    Raises:
        UsageError: an argument that cannot be used.
        WeightsError: weights that do not fit.
        UnsupportedError: a model that cannot be adapted.
        SourceError: an image that cannot be read.
    """
    _check_rule(request)
    backbone = compose_backbone(request)
    rule, rule_origin = _rule(request, backbone)
    labels = class_labels(request, backbone)
    characters = _characters(request, backbone, labels)
    labels = characters.classes if characters and request.labels is None else labels
    statistics, statistics_origin = _statistics(request, backbone, characters, progress)
    rate = rule.default_learning_rate if request.learning_rate is None else request.learning_rate
    largest = min(1.0, rule.max_learning_rate)
    if not 0.0 < rate <= largest:
        learned = ", the rate it was learned for" if largest < 1.0 else ""
        raise UsageError(f"learning rate: '{rule.name}' expected a number in (0, {largest:g}]{learned}, found {rate}")
    weights = f"random:{request.seed}" if request.weights == "random" else _origin(request)
    step = AdaptStep(backbone, request.objective, rule, statistics, rate)
    return step, labels, Origins(weights, rule_origin, statistics_origin)


def _origin(request: ExportRequest) -> str:
    """Where weights came from, for people."""
    if request.backbone.startswith(LOCAL) and request.weights == "pretrained":
        return Path(request.backbone.removeprefix(LOCAL)).name
    return Path(request.weights).name


def _check_rule(request: ExportRequest) -> None:
    if request.rule is not None and request.rule not in RULES:
        raise UsageError(f"rule: expected one of {', '.join(RULES)}, found '{request.rule}'")
    if request.mgg is not None and request.rule is not None and request.rule not in LEARNED_RULES:
        raise UsageError(f"rule: '{request.rule}' takes no file of learned numbers; leave out --mgg")


def _rule(request: ExportRequest, backbone: Backbone) -> tuple[UpdateRule, str]:
    size, features = backbone.norms.size, backbone.features
    if request.mgg is not None:
        file = rule_file(request)
        rule = load_rule(file, size, features)
        if request.rule not in (None, rule.name):
            raise UsageError(f"rule: {request.mgg} holds '{rule.name}', found --rule {request.rule}")
        if rule.name != "mgg" and backbone.statistics is not None:
            raise UsageError(
                f"rule: {request.mgg} was learned with the source's statistics of batch normalisation, found "
                f"--norm-statistics {request.norm_statistics}; use --norm-statistics {STILL}"
            )
        return rule, file.name
    name = request.rule or DEFAULT_RULE
    if name == Statistics.name and backbone.statistics is None:
        raise UsageError(
            f"rule: '{name}' expected batch normalisation whose statistics move (--norm-statistics mix:0.3), found none"
        )
    rule = untrained_rule(name, size, features, request.seed)
    if name not in LEARNED_RULES:
        return rule, ""
    logger.info("no file of learned numbers: the update rule '%s' is untrained", name)
    return rule, f"untrained:{request.seed}"


def compose_backbone(request: ExportRequest) -> Backbone:
    """The classifier of a request.

    Raises:
        UsageError: an argument that cannot be used.
        WeightsError: weights that do not fit.
        UnsupportedError: a model that cannot be adapted.
    """
    place = locate(request.backbone, request.weights)
    options: dict[str, Any] = {
        "adapt": request.adapt,
        "taps": request.taps,
        "norm_statistics": request.norm_statistics or _norm_statistics_of_rule(request),
        "outputs": request.outputs or OUTPUTS[0],
        "config": place.config,
        "preparation": request.preparation,
    }
    if request.image_size is not None:
        options["img_size"] = request.image_size
    if request.classes is not None:
        options["num_classes"] = request.classes
    backbone = _with_weights(place, options, request.seed)
    if request.outputs is None:
        _check_outputs(backbone)
    return backbone


def _with_weights(place: Located, options: dict[str, Any], seed: int) -> Backbone:
    if place.weights == "package":
        return _packaged(place.name, options)
    if isinstance(place.weights, str):
        return Backbone.create(place.name, place.weights, seed, **options)
    weights = read_state_dict(place.weights)
    heads = [value for name, value in weights.items() if _HEAD.fullmatch(name) and value.ndim in (2, 4)]
    if heads:
        options.setdefault("num_classes", heads[-1].shape[0])
    try:
        return Backbone.create(place.name, weights, **options)
    except WeightsError as error:
        raise WeightsError(f"{place.weights}: {error}") from error


def _check_outputs(backbone: Backbone) -> None:
    size = backbone.preprocess
    frames = synthetic_frames(CHECKED_IMAGES, size.height, size.width, SYNTHETIC_SEED)
    with torch.no_grad():
        logits, _ = backbone.forward(frames, backbone.split(backbone.theta()), backbone.constants())
    check_outputs(logits, backbone.name)


def rule_file(request: ExportRequest) -> Path:
    """Where the learned numbers lie.

    Raises:
        UsageError: the package has none for this backbone, or was asked for them with other weights.
    """
    file = Path(str(request.mgg))
    if str(file) != "package":
        return file
    packaged = Path(str(importlib.resources.files("mgg_edge.data") / f"{request.backbone}.safetensors"))
    if request.weights != "package" or not packaged.is_file():
        known = ", ".join(name for name in PACKAGED if packaged.with_name(f"{name}.safetensors").is_file()) or "nothing"
        raise UsageError(
            f"rule: --mgg package has numbers for {known} with --weights package alone, found {request.backbone} with "
            f"--weights {request.weights}; learn some with `mgg-edge train`"
        )
    return packaged


def _norm_statistics_of_rule(request: ExportRequest) -> str:
    """Rules learned for one backbone were learned with the source's statistics."""
    name = request.rule if request.mgg is None else learned_name(rule_file(request))
    return STILL if name in LEARNED_RULES and name != "mgg" else DEFAULT_NORM_STATISTICS


def _packaged(name: str, options: dict[str, Any]) -> Backbone:
    """A backbone with the weights, the input scaling and the classes of an installed package."""
    template = timm.create_model(name).state_dict() if name in PACKAGED else {}
    weights, scale = packaged_weights(name, template)
    said: Preparation = options.pop("preparation")
    prepared = dataclasses.replace(said, mean=said.mean or (scale,), std=said.std or (scale,))
    backbone = Backbone.create(name, weights, preparation=prepared, **options)
    backbone.labels = imagenet_labels()
    return backbone


def class_labels(request: ExportRequest, backbone: Backbone) -> tuple[str, ...]:
    """What the classes are called: as the user says, as is known of the weights, or by their numbers.

    Raises:
        UsageError: a file that cannot be read, or of another number of names.
    """
    if request.labels is None:
        if backbone.labels is None and backbone.classes == IMAGENET_CLASSES and request.weights != "random":
            logger.info("what the classes are called is not known of these weights: name them with --labels FILE, or "
                        "--labels imagenet")  # fmt: skip
        return backbone.labels or tuple(f"class {index}" for index in range(backbone.classes))
    if str(request.labels) == "imagenet" and backbone.classes == IMAGENET_CLASSES:
        return imagenet_labels()
    try:
        lines = request.labels.read_text(encoding="utf-8-sig").splitlines()  # a byte-order mark is no part of a name
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{request.labels}: cannot read the class names: {error}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    delimiter = TABLES.get(request.labels.suffix.lower())
    if delimiter and names and all(delimiter in name for name in names):
        raise UsageError(
            f"{request.labels}: expected class names, one a line, found a table whose first line is '{names[0]}'; "
            "keep the column of names, without a heading"
        )
    if len(names) != backbone.classes:
        raise UsageError(f"{request.labels}: expected {backbone.classes} class names, one a line, found {len(names)}")
    return names


def _characters(request: ExportRequest, backbone: Backbone, labels: tuple[str, ...]) -> ImageSource | None:
    """The source families of a glyph file, if the source data is one."""
    if request.source_data is None or not request.source_data.is_file():
        return None
    return open_glyphs(request.source_data, "source-train", backbone.preprocess, Naming(labels))


def _statistics(
    request: ExportRequest, backbone: Backbone, characters: ImageSource | None, progress: Progress
) -> tuple[SourceStatistics, str]:
    size = backbone.preprocess
    if characters is not None and request.source_data is not None:
        return source_statistics(backbone, characters, request.seed), request.source_data.name
    if request.source_data is None:
        logger.info("no source data: the source statistics come from a seeded synthetic set, not from your images")
        batches: Iterable[Tensor] = synthetic_frames(SYNTHETIC_IMAGES, size.height, size.width, SYNTHETIC_SEED).split(
            STATISTICS_BATCH
        )
        count, origin = SYNTHETIC_IMAGES, f"synthetic:{SYNTHETIC_SEED}"
    else:
        paths = _spread(find_images(request.source_data), MAX_SOURCE_IMAGES)
        if len(paths) < MIN_SOURCE_IMAGES:
            raise UsageError(f"{request.source_data}: expected at least {MIN_SOURCE_IMAGES} images, found {len(paths)}")
        batches = load_images(paths, size, STATISTICS_BATCH)
        count, origin = len(paths), request.source_data.resolve().name
    return measure_statistics(backbone, _counted(batches, count, progress)), origin


def _spread(paths: list[Path], count: int) -> list[Path]:
    """At most `count` paths, evenly over the sorted ones, so that folders by class are all represented."""
    return [paths[index * len(paths) // count] for index in range(count)] if len(paths) > count else paths


def _counted(batches: Iterable[Tensor], total: int, progress: Progress) -> Iterator[Tensor]:
    done = 0
    for batch in batches:
        yield batch
        done += batch.shape[0]
        progress("source statistics", done, total)
