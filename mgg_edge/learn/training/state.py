"""The state of an interrupted training as one safetensors file: models, AdamW's moments, counters, recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from mgg_edge.errors import WeightsError
from mgg_edge.files import write_whole
from mgg_edge.learn.checkpoint import assign_weights

__all__ = ["read_training_state", "write_training_state"]

OPTIMISER = "optimiser"


def write_training_state(
    path: Path,
    models: Mapping[str, nn.Module],
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    progress: Mapping[str, Any],
) -> None:
    """Write the state.

    Args:
        path: the file.
        models: modules by the name to keep them under.
        optimiser: over `parameters`.
        parameters: names of what it optimises.
        progress: anything JSON can hold; `recipe` in it is compared when reading.

    Raises:
        SinkError: the file cannot be written.
    """
    tensors = {f"{kind}.{name}": value for kind, model in models.items() for name, value in model.state_dict().items()}
    for name, parameter in parameters.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{OPTIMISER}.{key}.{name}"] = value
    content = save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, {"progress": json.dumps(progress)}
    )
    write_whole(path, content)


def read_training_state(
    path: Path,
    models: Mapping[str, nn.Module],
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """Put the state back and return the progress written with it.

    Raises:
        WeightsError: the file is damaged, was written by another recipe or for another model.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            progress = json.loads((file.metadata() or {})["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise WeightsError(f"{path}: cannot resume: expected a training state: {error}") from error
    if progress.get("recipe") != dict(recipe):
        raise WeightsError(f"{path}: cannot resume: written with another recipe; remove the file or give its recipe")
    for kind, model in models.items():
        prefix = f"{kind}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        assign_weights(model, own, where=f"{path}, {kind}")
    for name, parameter in parameters.items():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{OPTIMISER}.{key}.{name}" in tensors]
        moments = {key: tensors[f"{OPTIMISER}.{key}.{name}"] for key in keys}
        optimiser.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
        }
    return dict(progress)
