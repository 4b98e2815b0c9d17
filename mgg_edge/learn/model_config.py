"""What lies beside a model's weights, and what a user says over it: timm's `config.json`, preprocessing by hand.

timm and the hub keep a model as a folder of `config.json` and `model.safetensors` (or `pytorch_model.bin`). The
configuration says which architecture it is, with which arguments, how pictures are prepared and what the classes are
called. It is followed wherever it lies beside the weights that are read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgg_edge.errors import UsageError, WeightsError
from mgg_edge.manifest import INTERPOLATIONS, PreprocessInfo

__all__ = ["AS_CONFIGURED", "LOCAL", "Located", "ModelConfig", "Preparation", "check_scaling", "locate", "read_config"]

LOCAL = "local-dir:"
CONFIG = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "pytorch_model.pth")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """A timm configuration.

    Attributes:
        path: the file it was read from.
        architecture: name of the model, without a tag.
        arguments: of the model's factory.
        pretrained: timm's `pretrained_cfg`: preparation of pictures, names of classes.
    """

    path: Path
    architecture: str
    arguments: Mapping[str, Any]
    pretrained: Mapping[str, Any]


@dataclass(frozen=True)
class Preparation:
    """How pictures are prepared, as far as a user says it over the model's own configuration.

    Attributes:
        mean, std: RGB on the 0–1 scale; one number serves all three.
        crop_fraction: side of the centre crop over the side of the resized picture, in (0, 1].
        interpolation: `bicubic` or `bilinear`.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_fraction: float | None = None
    interpolation: str | None = None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, 3):
                raise UsageError(f"{name}: expected one number or three, of red, green and blue, found {len(values)}")
        if self.crop_fraction is not None and not 0.0 < self.crop_fraction <= 1.0:
            raise UsageError(f"crop: expected a fraction in (0, 1], found {self.crop_fraction:g}")
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise UsageError(
                f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, found '{self.interpolation}'"
            )

    def over(self, info: PreprocessInfo) -> PreprocessInfo:
        """The model's own configuration with what is said replaced.

        Raises:
            UsageError: a mean or deviation that belongs to values of 0 to 255.
        """
        said: dict[str, Any] = {key: value for key, value in vars(self).items() if value is not None}
        for name in ("mean", "std"):
            if name in said and len(said[name]) == 1:
                said[name] = said[name] * 3
        return check_scaling(dataclasses.replace(info, **said))


AS_CONFIGURED = Preparation()


def check_scaling(info: PreprocessInfo) -> PreprocessInfo:
    """The same, if its mean and deviation can be those of values from 0 to 1.

    Raises:
        UsageError: they belong to values of 0 to 255, or no picture can be scaled by them.
    """
    if max(*info.mean, *info.std) > 1.0:
        mean, std = (",".join(f"{value / 255:.4g}" for value in values) for values in (info.mean, info.std))
        raise UsageError(
            f"preprocessing: expected mean and std of values from 0 to 1, found {_text(info.mean)} and "
            f"{_text(info.std)}, which belong to 0…255; divide both by 255: --mean {mean} --std {std}"
        )
    if not min(info.std) > 0.0:
        raise UsageError(f"preprocessing: expected std above 0, found {_text(info.std)}")
    return info


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


@dataclass(frozen=True)
class Located:
    """Where a model is.

    Attributes:
        name: of the model, without a place.
        weights: `random`, `pretrained`, `package`, or the path of a file.
        config: what lies beside the file, if anything.
    """

    name: str
    weights: str | Path
    config: ModelConfig | None = None


def locate(backbone: str, weights: str) -> Located:
    """Resolve folders and configurations of what a user named.

    Args:
        backbone: a model name, or `local-dir:FOLDER` as timm writes it.
        weights: `random`, `pretrained`, `package`, a file, or a folder with one.

    Raises:
        UsageError: nothing there, or a configuration of another model.
        WeightsError: a configuration that cannot be read.
    """
    if backbone.startswith(LOCAL):
        folder = Path(backbone.removeprefix(LOCAL))
        config = read_config(folder / CONFIG)
        if config is None:
            raise UsageError(f"backbone: expected a folder with a {CONFIG} of timm, found none in '{folder}'")
        own = (
            weights if weights in ("random", "package") else _weights_in(folder if weights == "pretrained" else weights)
        )
        return Located(config.architecture, own, config)
    if weights in ("random", "pretrained", "package"):
        return Located(backbone, weights)
    file = _weights_in(weights)
    config = read_config(file.with_name(CONFIG))
    if config is not None and ":" not in backbone and config.architecture != backbone.partition(".")[0]:
        if config.architecture in backbone:  # torchvision/NAME: another library's model of this name
            return Located(backbone, file)
        raise UsageError(
            f"backbone: {config.path} beside the weights is of '{config.architecture}', found --backbone {backbone}"
        )
    return Located(backbone, file, None if ":" in backbone else config)


def _weights_in(path: str | Path) -> Path:
    """A weights file, or the one in a folder."""
    place = Path(path)
    if not place.is_dir():
        return place
    found = [place / name for name in WEIGHT_FILES if (place / name).is_file()]
    if not found:
        raise UsageError(f"{place}: expected a folder with one of {', '.join(WEIGHT_FILES)}, found none")
    return found[0]


def read_config(path: Path) -> ModelConfig | None:
    """The configuration at a path; None where there is none, or one that is not timm's.

    Raises:
        WeightsError: it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot read the model's configuration: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        logger.info("%s is not a configuration of timm and is not followed", path)
        return None
    known = ("num_classes", "label_names", "label_descriptions")
    pretrained = {**{key: content[key] for key in known if key in content}, **content.get("pretrained_cfg", {})}
    arguments = {key: value for key, value in content.get("model_args", {}).items() if key != "num_classes"}
    return ModelConfig(path, content["architecture"], arguments, pretrained)
