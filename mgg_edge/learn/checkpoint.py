"""Files of numbers: model weights read from safetensors or PyTorch files restricted to tensors; files written whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mgg_edge.errors import SinkError, UsageError, WeightsError

__all__ = ["assign_weights", "read_state_dict", "write_file"]

NESTED_KEYS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema")
PREFIXES = ("module.", "model.")
MAX_NAMED = 3


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of a `.pth`, `.pt` or `.bin` file loaded with `weights_only`.

    A state dict nested under a usual key is found; the prefixes `module.` and `model.` are removed when every
    name has them.

    Raises:
        UsageError: no such file, or another suffix.
        WeightsError: the file is damaged or holds anything but tensors.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        try:
            return _strip_prefixes(load_file(path))
        except (safetensors.SafetensorError, OSError) as error:
            raise WeightsError(f"{path}: expected safetensors: {error}") from error
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise UsageError(f"{path}: expected a .safetensors, .pth, .pt or .bin file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises is not documented; all of it means the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path}: expected a PyTorch file of tensors alone: {reason}") from error
    return _strip_prefixes(_find_tensors(content, path))


def assign_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy a state dict into a model.

    Raises:
        WeightsError: names that are missing or unexpected, shapes that differ, or numbers that are not finite.
    """
    expected = model.state_dict()
    problems = []
    if missing := sorted(set(expected) - set(weights)):
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(set(weights) - set(expected)):
        problems.append(f"unexpected {_some(unexpected)}")
    for name in sorted(set(expected) & set(weights)):
        if expected[name].shape != weights[name].shape:
            problems.append(f"'{name}' expected {list(expected[name].shape)}, found {list(weights[name].shape)}")
        elif weights[name].is_floating_point() and not bool(torch.isfinite(weights[name]).all()):
            problems.append(f"'{name}' holds NaN or Inf")
    if problems:
        raise WeightsError(f"{where}: the weights do not fit: {'; '.join(problems[:MAX_NAMED])}")
    model.load_state_dict(dict(weights))


def _find_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
        nested = next((key for key in NESTED_KEYS if isinstance(content.get(key), Mapping)), None)
        if nested is None:
            break
        content = content[nested]
    raise WeightsError(f"{path}: expected a state dict of tensors, found {type(content).__name__}")


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:MAX_NAMED]) + rest


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        SinkError: it cannot be written.
    """
    draft = path.with_name(f"{path.name}.part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise SinkError(f"{path}: cannot write: {error.strerror or error}") from error
