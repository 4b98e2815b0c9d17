"""Classifiers by name: timm's, torchvision's (`torchvision/NAME`), and anybody's (`package.module:factory`).

A factory of one's own is called with `img_size` and `num_classes` where they are asked for and its signature takes
them, else without, and returns an `nn.Module` from images f[B, 3, H, W] to logits f[B, C]. How pictures are prepared it
says as timm's models do, in an attribute `default_cfg` (`input_size`, `mean`, `std`, `crop_pct`, `interpolation`);
without one timm's defaults hold.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import timm
import torch
import torchvision.models
from timm.data import resolve_data_config
from torch import nn

from mgg_edge.errors import UnsupportedError, UsageError, WeightsError
from mgg_edge.learn.imagenet import IMAGENET_CLASSES, imagenet_labels
from mgg_edge.learn.model_config import ModelConfig
from mgg_edge.learn.reader import READER_NAME  # the import registers the default backbone with timm
from mgg_edge.learn.wrappers import unwrapped
from mgg_edge.manifest import INTERPOLATIONS, PreprocessInfo

__all__ = ["TORCHVISION", "Model", "create_model"]

TORCHVISION = "torchvision/"
DEFAULT_INPUT = (3, 224, 224)
_BUILD_ERRORS = (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError)


@dataclass(frozen=True)
class _Library:
    """What differs between the packages models come from."""

    title: str
    names: Callable[[], list[str]]
    tags: Callable[[str], list[str]]
    build: Callable[..., nn.Module]
    preprocess: Callable[[nn.Module, str], PreprocessInfo]
    size_option: str


@dataclass(frozen=True)
class Model:
    """A classifier, ready to be looked at.

    Attributes:
        module: the network.
        preprocess: how its pictures are prepared.
        labels: what its classes are called, where that is known for its weights.
    """

    module: nn.Module
    preprocess: PreprocessInfo
    labels: tuple[str, ...] | None


def create_model(
    name: str, *, pretrained: bool, seed: int, options: Mapping[str, Any], config: ModelConfig | None = None
) -> Model:
    """Build a model and say how its pictures are prepared.

    Args:
        name: timm model name, with a tag or without; `torchvision/` and a torchvision model name; or
            `package.module:factory`.
        pretrained: whether the package shall download its weights.
        seed: of random weights; the global generator is left alone.
        options: arguments of the model; `img_size` also serves models that take any size.
        config: what lies beside the weights of a timm model.

    Raises:
        UsageError: no such model, near matches are suggested; or options it cannot be built with.
        WeightsError: weights that cannot be downloaded.
        UnsupportedError: preprocessing the run time does not have.
    """
    name = name.replace(f"{TORCHVISION[:-1]}:", TORCHVISION, 1) if name.startswith(f"{TORCHVISION[:-1]}:") else name
    if ":" in name:
        return _own_model(name, seed, dict(options))
    library, label = (_TORCHVISION, name.removeprefix(TORCHVISION)) if name.startswith(TORCHVISION) else (_TIMM, name)
    _check_name(library, label)
    followed: dict[str, Any] = {}
    if config is not None:
        followed = {**config.arguments, "pretrained_cfg": dict(config.pretrained)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(library, label, pretrained, {**followed, **options})
    labels = _labels(model) if pretrained or config is not None or label == READER_NAME else None
    return Model(model, _checked(library.preprocess(model, label), options), labels)


def _check_name(library: _Library, label: str) -> None:
    names, (architecture, _, tag) = library.names(), label.partition(".")
    if architecture not in names:
        near = difflib.get_close_matches(label, names, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; see {library.title}.list_models()"
        raise UsageError(f"backbone: {library.title} has no model '{label}'{hint}")
    if tag and label not in (tags := library.tags(architecture)):
        known = f"it has {', '.join(tags)}" if tags else "it has none"
        raise UsageError(f"backbone: {library.title}'s '{architecture}' has no weights '{tag}'; {known}")


def _labels(model: nn.Module) -> tuple[str, ...] | None:
    """Names of the classes of a timm or torchvision model whose weights are those of its configuration."""
    own: Any = getattr(model, "pretrained_cfg", None) or {}
    names, descriptions = own.get("label_names"), own.get("label_descriptions") or {}
    if isinstance(names, (list, tuple)) and names:
        return tuple(str(descriptions.get(name, name)) for name in names)
    return imagenet_labels() if own.get("num_classes", IMAGENET_CLASSES) == IMAGENET_CLASSES else None


def _checked(preprocess: PreprocessInfo, options: Mapping[str, Any]) -> PreprocessInfo:
    if size := options.get("img_size"):
        height, width = (size, size) if isinstance(size, int) else size
        preprocess = PreprocessInfo(**{**vars(preprocess), "height": height, "width": width})
    if preprocess.interpolation not in INTERPOLATIONS or preprocess.resize not in ("shortest-side", "squash"):
        raise UnsupportedError(
            f"backbone: expected {' or '.join(INTERPOLATIONS)} resizing with a centre crop or squash, "
            f"found {preprocess.interpolation} and {preprocess.resize}"
        )
    return preprocess


def _own_model(name: str, seed: int, options: dict[str, Any]) -> Model:
    """What a factory named `package.module:factory` makes; the working directory is a place to import from.

    It is called in the same way whatever the command is: with those options that its signature takes.
    """
    path, _, attribute = name.partition(":")
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(path), attribute, None)
    except ImportError as error:
        raise UsageError(f"backbone: cannot import '{path}' for '{name}': {_reason(error)}") from error
    finally:
        sys.path[:] = before
    if not callable(factory):
        raise UsageError(f"backbone: expected a function '{attribute}' in '{path}', found {type(factory).__name__}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = factory(**_taken(factory, options))
    except _BUILD_ERRORS as error:
        given = f" with options {options}" if options else ""
        raise UsageError(f"backbone: '{name}' cannot build a model{given}: {_reason(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"backbone: expected '{name}' to return a torch.nn.Module, found {type(model).__name__}")
    model = unwrapped(model)
    return Model(model, _checked(_timm_preprocess(model, name), options), None)


def _taken(factory: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a factory's signature takes."""
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(options)
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY}
    return {name: value for name, value in options.items() if name in names}


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
        with quick_when_offline():
            return _build_at_size(library, label, {**options, "pretrained": True})
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{label}: cannot get pretrained weights ({_reason(error)}); give a file with --weights FILE"
        ) from error


@contextmanager
def quick_when_offline(probe_s: float = 5.0) -> Iterator[None]:
    """Within the context, model files come from the local cache alone where their host cannot be reached.

    The hub's client would try again for a minute. Behind a proxy only the client can tell, so nothing is changed.
    """
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname or ""
    offline = False
    if not urllib.request.getproxies():
        try:
            socket.create_connection((host, 443), probe_s).close()
        except OSError:
            offline = True
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _build_at_size(library: _Library, label: str, options: dict[str, Any]) -> nn.Module:
    model: nn.Module = _without_size(functools.partial(library.build, label), library.size_option, options)
    return model


def _without_size(build: Callable[..., Any], size_option: str, options: dict[str, Any]) -> Any:
    """Models that take images of any size refuse the argument; they need none."""
    try:
        return build(**options)
    except TypeError as error:
        if size_option not in options or f"'{size_option}'" not in str(error):
            raise
        return build(**{key: value for key, value in options.items() if key != size_option})


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _timm_preprocess(model: nn.Module, _label: str) -> PreprocessInfo:
    # Before timm 1.0 the attribute was called so, and own models may follow either.
    own: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    config = resolve_data_config({}, pretrained_cfg=own or {"input_size": DEFAULT_INPUT})
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


def _timm_tags(architecture: str) -> list[str]:
    """The names with tags of a model of timm's."""
    return [name for name in timm.list_models(f"{architecture}.*", include_tags=True) if "." in name]


_TIMM = _Library("timm", timm.list_models, _timm_tags, timm.create_model, _timm_preprocess, "img_size")
_TORCHVISION = _Library(
    "torchvision",
    lambda: torchvision.models.list_models(module=torchvision.models),
    lambda _architecture: [],
    _build_torchvision,
    _torchvision_preprocess,
    "image_size",
)
