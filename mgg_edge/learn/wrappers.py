"""What training wraps around a module, taken off again."""

from __future__ import annotations

from torch import nn

__all__ = ["unwrapped"]


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


def _inner(module: nn.Module) -> nn.Module | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    return dict(module.named_children()).get("_orig_mod")  # of torch.compile
