"""What training wraps around a module, taken off again, and what a module keeps between calls."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["forgetful", "unwrapped"]

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


def _inner(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    return dict(module.named_children()).get("_orig_mod")  # of torch.compile
