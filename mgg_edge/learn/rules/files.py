"""Update rules by name, and the files of learned ones.

A file is safetensors: the rule's tensors by their names in the module, and as metadata

    format          "mgg-edge.rule 1"
    name            mgg, mgg+, adam+, forward or forward+
    options         JSON of the constructor's arguments
    learning_rate   the rate it was learned for, which is also the largest it may be used with
    report          JSON of how it was learned, for people

The 164 numbers of the MGG fit every backbone; the other rules fit the backbone they were learned for, by N and D.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save

from mgg_edge.errors import UsageError, WeightsError
from mgg_edge.files import write_whole
from mgg_edge.learn.checkpoint import read_state_dict
from mgg_edge.learn.rules.base import UpdateRule
from mgg_edge.learn.rules.classic import Adam, Sgd
from mgg_edge.learn.rules.forward import Forward
from mgg_edge.learn.rules.forward_plus import ForwardPlus
from mgg_edge.learn.rules.mgg import FORMAT as MGG_FORMAT
from mgg_edge.learn.rules.mgg import MGG
from mgg_edge.learn.rules.plus import Plus
from mgg_edge.learn.rules.statistics import Statistics

__all__ = ["LEARNED_RULES", "RULES", "learned_name", "load_rule", "make_rule", "save_rule", "untrained_rule"]

FORMAT = "mgg-edge.rule 1"
_MAKE: dict[str, Callable[..., UpdateRule]] = {
    "mgg": MGG,
    "mgg+": Plus,
    "adam+": Plus,
    "forward": Forward,
    "forward+": ForwardPlus,
    "adam": Adam,
    "sgd": Sgd,
    "statistics": Statistics,
}
RULES = tuple(_MAKE)
LEARNED_RULES = ("mgg", "mgg+", "adam+", "forward", "forward+")


def make_rule(name: str, options: Mapping[str, Any]) -> UpdateRule:
    """The rule of a name with its constructor's arguments.

    Raises:
        UsageError: no such rule.
        WeightsError: arguments it does not take.
    """
    if name not in _MAKE:
        raise UsageError(f"rule: expected one of {', '.join(RULES)}, found '{name}'")
    try:
        return _MAKE[name](**options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"rule '{name}': cannot be built with options {dict(options)}: {error}") from error


def untrained_rule(name: str, size: int, features: int, seed: int = 0) -> UpdateRule:
    """A rule for N = `size` scalars and D = `features`, with small seeded numbers where it has learned ones.

    Raises:
        UsageError: no such rule.
    """
    arguments: dict[str, dict[str, Any]] = {
        "mgg": {"seed": seed},
        "mgg+": {"base": "mgg", "size": size, "seed": seed},
        "adam+": {"base": "adam", "size": size, "seed": seed},
        "forward": {"size": size, "features": features, "seed": seed},
        "forward+": {"size": size, "features": features, "seed": seed},
    }
    return make_rule(name, arguments.get(name, {}))


def save_rule(
    path: str | os.PathLike[str],
    rule: UpdateRule,
    report: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a learned rule, whole or not at all; in float16 it takes half the room.

    Raises:
        SinkError: the file cannot be written.
    """
    header = {
        "format": FORMAT,
        "name": rule.name,
        "options": json.dumps(rule.options()),
        "learning_rate": repr(rule.default_learning_rate),
        "report": json.dumps(report or {}),
    }
    tensors = {name: value.detach().cpu().to(dtype).contiguous() for name, value in rule.state_dict().items()}
    write_whole(Path(path), save(tensors, header))


def load_rule(path: Path, size: int, features: int) -> UpdateRule:
    """Read a learned rule for a backbone of N = `size` scalars and D = `features`.

    Files of the method's released code (.pth) and of `MGG.save` are read as well.

    Raises:
        UsageError: no such file.
        WeightsError: another kind of file, numbers that do not fit or are not finite, or a rule of another backbone.
    """
    if path.suffix != ".safetensors":
        return MGG.from_released(read_state_dict(path))
    if not path.is_file():
        raise UsageError(f"{path}: no such file of a learned rule")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if header.get("format") == MGG_FORMAT:
            return MGG.load(path)
        name, options, rate = header["name"], json.loads(header["options"]), float(header["learning_rate"])
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: expected a rule of format '{FORMAT}': {error}") from error
    if header.get("format") != FORMAT or name not in LEARNED_RULES or not isinstance(options, dict):
        raise WeightsError(f"{path}: expected a learned rule of format '{FORMAT}', found {header.get('format')!r}")
    found = options.get("size", size), options.get("features", features)
    if found != (size, features):
        raise WeightsError(
            f"{path}: this '{name}' was learned for N = {found[0]} scalars and D = {found[1]} features; the backbone "
            f"has {size} and {features}: learn one for it with `mgg-edge train`"
        )
    rule = make_rule(name, options)
    _assign(rule, tensors, path)
    rule.default_learning_rate = rule.max_learning_rate = rate
    return rule


def learned_name(path: Path) -> str:
    """Which rule a file holds, as far as its head tells; `mgg` for released files and those of other kinds.

    What is wrong with a file `load_rule` says.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return str((file.metadata() or {}).get("name", "mgg"))
    except (OSError, safetensors.SafetensorError):
        return "mgg"


def _assign(rule: UpdateRule, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    expected = rule.state_dict()
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))
        raise WeightsError(f"{path}: expected the tensors of '{rule.name}', missing or unexpected: {', '.join(odd)}")
    for name, value in tensors.items():
        if value.shape != expected[name].shape or not value.is_floating_point():
            raise WeightsError(
                f"{path}: '{name}' expected float {list(expected[name].shape)}, found {list(value.shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise WeightsError(f"{path}: '{name}' holds NaN or Inf")
    rule.load_state_dict(dict(tensors))
