"""What training wraps around a module, what a module keeps between calls, and where its tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["every_place", "forgetful", "unwrapped"]

BIAS_CACHE = "attention_bias_cache"


def unwrapped(module: nn.Module) -> nn.Module:
    """The module without `torch.compile` and `DataParallel` around it or any module within it.

    A compiled module runs code of its own that cannot be traced; what it was made from computes the same.
    """
    while (inner := _inner(module)) is not None:
        module = inner
    for name, child in module.named_children():
        if (plain := unwrapped(child)) is not child:
            setattr(module, name, plain)
    return module


def forgetful(model: nn.Module) -> None:
    """Let no module keep tensors from one call for the next, as timm's attention does with its biases.

    What was computed in one call belongs to that call: to other numbers, another device, another trace.
    """
    for module in model.modules():
        if isinstance(getattr(module, BIAS_CACHE, None), dict):
            setattr(module, BIAS_CACHE, _Forgetful())


class _Forgetful(dict[Any, Any]):
    """Holds what was put in last, and never says so."""

    def __contains__(self, _key: object) -> bool:
        return False


def every_place(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `functional_call` puts where: tensors by the name of each place they belong in, each place once.

    A parameter may be in several modules, and a module in several others. PyTorch's own untying names a place by every
    way that leads to it, and afterwards puts back what it has itself put there.

    Args:
        model: the module.
        tensors: one for each parameter and buffer, by any of its names.

    Raises:
        KeyError: one is missing, or belongs nowhere.
    """
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    values = {id(own[name]): value for name, value in tensors.items()}
    return {
        f"{name}.{key}" if name else key: values[id(tensor)]
        for name, module in model.named_modules()
        for part in (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        for key, tensor in part
    }


def _inner(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    return dict(module.named_children()).get("_orig_mod")  # of torch.compile
