"""The normalisation layers of a model: which there are, and which of them adapt.

A layer counts by its type, or for classes of other packages by a type name that says it is a norm, and only with
parameters of its own. θ holds the parameters of the chosen layers in module order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from mgg_edge.errors import UnsupportedError, UsageError
from mgg_edge.learn.norm_statistics import StatisticsNorm
from mgg_edge.norms import NormLayout, NormParameter

__all__ = ["ADAPT_ALL", "choose_norms", "discover_norms"]

ADAPT_ALL = "all"
NORM_TYPES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _InstanceNorm, StatisticsNorm)
# Such as RmsNorm2d, GroupNorm1Act, LayerNormAct2dFp32, EvoNorm2dS0a or ConvNeXt V2's GlobalResponseNorm.
_NORM_NAME = re.compile(r"norm1?(tlu|act)?([123]d)?([bs][012]a?)?(fp32)?$", re.IGNORECASE)
_LAST = re.compile(r"last:([1-9][0-9]*)")


def discover_norms(model: nn.Module) -> NormLayout:
    """Affine parameters of all normalisation layers, in module order.

    Args:
        model: its batch normalisation must have been replaced, see `replace_batch_norms`.

    Raises:
        UnsupportedError: a layer whose statistics cannot be handled, or no norm at all.
    """
    parameters = []
    for name, module in model.named_modules():
        _refuse_unknown_statistics(name, module)
        if isinstance(module, NORM_TYPES) or _NORM_NAME.search(type(module).__name__):
            own = dict(module.named_parameters(recurse=False))
            parameters += [NormParameter(f"{name}.{key}", tuple(value.shape)) for key, value in own.items()]
    if not parameters:
        raise UnsupportedError("backbone: found no normalisation layer with parameters to adapt")
    return NormLayout(tuple(parameters))


def choose_norms(norms: NormLayout, order: Sequence[str], choice: str) -> NormLayout:
    """The parameters of the layers that adapt.

    Args:
        norms: of all layers that could.
        order: names of modules in the order they run; layers that never run are left out.
        choice: `all`, `last:K` for the K layers that run last, or a regular expression found in layer names.

    Raises:
        UsageError: a choice that cannot be read or that leaves nothing.
    """
    owners = {parameter.name: parameter.name.rpartition(".")[0] for parameter in norms.parameters}
    layers = [name for name in order if name in set(owners.values())]
    if match := _LAST.fullmatch(choice):
        chosen = set(layers[-int(match[1]) :])
    elif choice == ADAPT_ALL:
        chosen = set(layers)
    else:
        chosen = _matching(layers, choice)
    return NormLayout(tuple(parameter for parameter in norms.parameters if owners[parameter.name] in chosen))


def _matching(layers: Sequence[str], choice: str) -> set[str]:
    try:
        pattern = re.compile(choice)
    except re.error as error:
        raise UsageError(f"adapt: expected all, last:K or a regular expression, found '{choice}': {error}") from error
    chosen = {name for name in layers if pattern.search(name)}
    if not chosen:
        raise UsageError(f"adapt: '{choice}' is found in none of {len(layers)} layers, such as '{layers[0]}'")
    return chosen


def _refuse_unknown_statistics(name: str, module: nn.Module) -> None:
    if isinstance(module, _NormBase) and not isinstance(module, _InstanceNorm):
        raise UnsupportedError(f"backbone: '{name}' is {type(module).__name__}, batch normalisation of an unknown kind")
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        raise UnsupportedError(f"backbone: '{name}' is {type(module).__name__} with running statistics")
