"""Classifiers by name: timm's, and torchvision's behind the prefix `torchvision/`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision.models
from timm.data import resolve_data_config
from torch import nn

import mgg_edge.learn.reader  # noqa: F401 - registers the default backbone with timm
from mgg_edge.errors import UnsupportedError, UsageError, WeightsError
from mgg_edge.manifest import INTERPOLATIONS, PreprocessInfo

__all__ = ["TORCHVISION", "create_model"]

TORCHVISION = "torchvision/"
_BUILD_ERRORS = (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError)


@dataclass(frozen=True)
class _Library:
    """What differs between the packages models come from."""

    title: str
    names: Callable[[], list[str]]
    build: Callable[..., nn.Module]
    preprocess: Callable[[nn.Module, str], PreprocessInfo]
    size_option: str


def create_model(
    name: str, *, pretrained: bool, seed: int, options: Mapping[str, Any]
) -> tuple[nn.Module, PreprocessInfo]:
    """Build a model and say how its pictures are prepared.

    Args:
        name: timm model name, or `torchvision/` and a torchvision model name.
        pretrained: whether the package shall download its weights.
        seed: of random weights; the global generator is left alone.
        options: arguments of the model; `img_size` also serves models that take any size.

    Raises:
        UsageError: no such model, near matches are suggested; or options it cannot be built with.
        WeightsError: weights that cannot be downloaded.
        UnsupportedError: preprocessing the run time does not have.
    """
    library, label = (_TORCHVISION, name.removeprefix(TORCHVISION)) if name.startswith(TORCHVISION) else (_TIMM, name)
    names = library.names()
    if label not in names:
        near = difflib.get_close_matches(label, names, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; see {library.title}.list_models()"
        raise UsageError(f"backbone: {library.title} has no model '{label}'{hint}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(library, label, pretrained, dict(options))
    preprocess = library.preprocess(model, label)
    if size := options.get("img_size"):
        height, width = (size, size) if isinstance(size, int) else size
        preprocess = PreprocessInfo(**{**vars(preprocess), "height": height, "width": width})
    if preprocess.interpolation not in INTERPOLATIONS or preprocess.resize not in ("shortest-side", "squash"):
        raise UnsupportedError(
            f"backbone: expected {' or '.join(INTERPOLATIONS)} resizing with a centre crop or squash, "
            f"found {preprocess.interpolation} and {preprocess.resize}"
        )
    return model, preprocess


def _build(library: _Library, label: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if "img_size" in options:
        options[library.size_option] = options.pop("img_size")
    try:
        model = _build_at_size(library, label, options)
    except _BUILD_ERRORS as error:
        raise UsageError(
            f"backbone: {library.title} cannot build '{label}' with options {options}: {_reason(error)}"
        ) from error
    if not pretrained:
        return model
    try:
        return _build_at_size(library, label, {**options, "pretrained": True})
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{label}: cannot get pretrained weights ({_reason(error)}); give a file with --weights FILE"
        ) from error


def _build_at_size(library: _Library, label: str, options: dict[str, Any]) -> nn.Module:
    """Models that take images of any size refuse the argument; they need none."""
    try:
        return library.build(label, **options)
    except TypeError as error:
        if library.size_option not in options or f"'{library.size_option}'" not in str(error):
            raise
        return library.build(label, **{key: value for key, value in options.items() if key != library.size_option})


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _timm_preprocess(model: nn.Module, _label: str) -> PreprocessInfo:
    config = resolve_data_config({}, model=model)
    resize = {"center": "shortest-side", "squash": "squash"}.get(config["crop_mode"], config["crop_mode"])
    _, height, width = config["input_size"]
    return PreprocessInfo(
        height=height,
        width=width,
        resize=resize,
        crop_fraction=float(config["crop_pct"]),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _torchvision_preprocess(_model: nn.Module, label: str) -> PreprocessInfo:
    transform = torchvision.models.get_model_weights(label).DEFAULT.transforms()
    crop, resize = transform.crop_size[0], transform.resize_size[0]
    return PreprocessInfo(
        height=crop,
        width=crop,
        resize="shortest-side",
        crop_fraction=crop / resize,
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )


def _build_torchvision(label: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    weights = torchvision.models.get_model_weights(label).DEFAULT if pretrained else None
    return torchvision.models.get_model(label, weights=weights, **options)


_TIMM = _Library("timm", timm.list_models, timm.create_model, _timm_preprocess, "img_size")
_TORCHVISION = _Library(
    "torchvision",
    lambda: torchvision.models.list_models(module=torchvision.models),
    _build_torchvision,
    _torchvision_preprocess,
    "image_size",
)
