"""Model weights, read from safetensors or from PyTorch files restricted to tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mgg_edge.errors import UsageError, WeightsError

__all__ = ["assign_weights", "read_state_dict"]

# Moving averages first: where both are there, timm takes them.
NESTED_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
# DataParallel, Lightning, torch.compile.
PREFIXES = ("module.", "model.", "_orig_mod.")
AVERAGE_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel
BATCH_COUNTER = "num_batches_tracked"
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_GLOBAL = re.compile(r"(?:GLOBAL|global:?|Unsupported class) ([A-Za-z_][\w.]*\.[\w.]+)")
MAX_NAMED = 3

logger = logging.getLogger(__name__)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file, or of a PyTorch file (`SUFFIXES`) loaded with `weights_only`.

    A state dict nested under a usual key is found; of several the moving average is taken, as timm does, and the log
    says so. Prefixes that wrappers put before every name (`PREFIXES`) are removed, several if there are several.

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
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: expected a .safetensors, {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises is not documented
        raise WeightsError(f"{path}: {_refusal(path, error)}") from error
    return _strip_prefixes(_find_tensors(content, path))


def _refusal(path: Path, error: Exception) -> str:
    """Why a PyTorch file is not read, and what to do."""
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "expected a PyTorch file, found a web page; download the file itself"
    if found := _GLOBAL.search(str(error)):
        return (
            f"expected tensors alone, found a pickled '{found[1]}', which would be run as code; where you trust it, "
            "save the tensors: torch.save(model.state_dict(), 'weights.pth')"
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"expected a PyTorch file, found a damaged one or another kind: {reason.partition(' Please ')[0][:200]}"


def assign_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy a state dict into a model.

    Names may have a common prefix, with names of others beside them, as a training's own module has them (`model.…`,
    `criterion.…`); the log says what is left out. Counters of batches (`num_batches_tracked`), which nothing computes
    with, may be absent.

    Raises:
        WeightsError: names that are missing or unexpected, shapes that differ, or numbers that are not finite.
    """
    expected = model.state_dict()
    counters = {name: value for name, value in expected.items() if name.endswith(BATCH_COUNTER)}
    weights = {**counters, **_of_the_model(weights, set(expected) - set(counters), where)}
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


def _of_the_model(weights: Mapping[str, Tensor], needed: set[str], where: str) -> dict[str, Tensor]:
    """The weights below the prefix under which all that a model needs is found; as they are where there is none."""
    if not needed or needed <= set(weights):
        return dict(weights)
    longest = max(needed, key=len)
    prefixes = {name.removesuffix(longest) for name in weights if name.endswith(f".{longest}")}
    whole = [prefix for prefix in sorted(prefixes) if all(prefix + name in weights for name in needed)]
    if len(whole) != 1:
        return dict(weights)
    others = sorted(name for name in weights if not name.startswith(whole[0]))
    logger.info("%s: taking the weights below '%s'; left out are %s", where, whole[0], _some(others) or "none")
    return {name.removeprefix(whole[0]): value for name, value in weights.items() if name.startswith(whole[0])}


def _find_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
        present = [key for key in NESTED_KEYS if isinstance(content.get(key), Mapping)]
        if not present:
            break
        if len(present) > 1:
            logger.info("%s: of %s taking '%s'", path, ", ".join(f"'{key}'" for key in present), present[0])
        content = content[present[0]]
    raise WeightsError(f"{path}: expected a state dict of tensors, found {type(content).__name__}")


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: value for name, value in tensors.items() if name != AVERAGE_COUNTER}
    while prefix := next((one for one in PREFIXES if tensors and all(name.startswith(one) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:MAX_NAMED]) + rest
