"""Feature taps: where in a model the statistics of its features are compared with the source's.

z(x) is the concatenation of the taps' outputs, each pooled to one vector an image. Which modules are tapped:

    prenorm     transformers with `blocks.*.norm1`: the first norm of every block but the first, and the final norm, so
                each block is read after the next norm (arXiv 2412.16901, section 4, and its released code)
    stages      other timm models: what timm itself lists as the model's features (`feature_info`)
    children    torchvision: the children of `features`, `encoder.layers` or `trunk_output`, or `layer1` … `layer4`
    norms       anybody's own model, and families whose stages give several tensors, or rows for parts of an image: its
                normalisation layers that run once, with a row an image, at most 16, spread evenly up to the last

and how the output of one is pooled:

    token       f[B, T, C] of a model that classifies by its CLS token: that token
    tokens      f[B, T, C]: mean over the patch tokens
    maps        f[B, C, H, W]: mean over H and W
    maps-last   f[B, H, W, C]: mean over H and W
    vector      f[B, C]: as it is
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn
from torch.func import functional_call

from mgg_edge.errors import UnsupportedError, UsageError
from mgg_edge.learn.norm_layers import discover_norms
from mgg_edge.learn.wrappers import every_place
from mgg_edge.manifest import TapInfo

__all__ = ["Calls", "choose_taps", "collected", "observe_calls"]

MAX_NORM_TAPS = 16
_CHILDREN_OF = ("features", "encoder.layers", "trunk_output")
_POOLS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "token": lambda output, _prefix: output[:, 0],
    "tokens": lambda output, prefix: output[:, prefix:].mean(1),
    "maps": lambda output, _prefix: output.mean((2, 3)),
    "maps-last": lambda output, _prefix: output.mean((1, 2)),
    "vector": lambda output, _prefix: output,
}


@dataclass(frozen=True)
class Calls:
    """One run of a model without numbers.

    Attributes:
        shapes: output shapes by module name, one for each call, in the order of the modules' first calls.
        output: shape of the model's own output.
    """

    shapes: dict[str, list[tuple[int, ...]]]
    output: tuple[int, ...]


def observe_calls(model: nn.Module, height: int, width: int) -> Calls:
    """Run a model on one image of the given size, shapes alone.

    Raises:
        UsageError: the model cannot take images of that size.
        UnsupportedError: it does not return one tensor, or remembers something from call to call.
    """
    calls, changed = _observe(model, height, width)
    if changed and not set(changed) & set(model.state_dict()):
        # What is not kept with the weights may be computed by the first call for pictures of this size, once.
        with torch.no_grad():
            model(torch.zeros(1, 3, height, width, device=next(model.parameters()).device))
        calls, changed = _observe(model, height, width)
    if changed:
        owner = type(model.get_submodule(changed[0].rpartition(".")[0])).__name__
        raise UnsupportedError(
            f"backbone: {owner} changes its buffer '{changed[0]}' in forward, which a graph cannot remember: compute "
            "without it in evaluation mode"
        )
    return calls


def _observe(model: nn.Module, height: int, width: int) -> tuple[Calls, list[str]]:
    """One run without numbers, and the buffers that it changed."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    running: list[str] = []

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, _inputs: running.append(name)

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            running.pop()
            if isinstance(output, Tensor):
                shapes.setdefault(name, []).append(tuple(output.shape))

        return hook

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    unreal = every_place(model, {name: tensor.to("meta") for name, tensor in tensors.items()})
    before = {name: _identity(tensor) for name, tensor in unreal.items()}
    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    handles += [module.register_forward_pre_hook(enter(name)) for name, module in model.named_modules() if name]
    try:
        output = functional_call(model, unreal, (torch.empty(1, 3, height, width, device="meta"),), tie_weights=False)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = f"{type(model).__name__}, in '{running[-1]}'" if running else type(model).__name__
        if "meta tensors" in reason:  # the only thing that needs values here is a decision by them
            raise UnsupportedError(
                f"backbone: {where}, decides by the values of a picture ({reason}): no graph can; compute both and "
                "choose with torch.where"
            ) from error
        raise UsageError(f"backbone: {where} cannot take images of {width}x{height}: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor):
        raise UnsupportedError(f"backbone: {type(model).__name__} returns {type(output).__name__}; expected logits")
    changed = [name for name, tensor in unreal.items() if _identity(tensor) != before[name]]
    return Calls(shapes, tuple(output.shape)), changed


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Which tensor it is, and how often it has been changed in place."""
    return id(tensor), tensor._version  # noqa: SLF001 (PyTorch counts it nowhere else)


def choose_taps(model: nn.Module, calls: Calls, pattern: str | None) -> tuple[TapInfo, ...]:
    """Taps in the order they run.

    Args:
        model: the classifier.
        calls: of the model at its input size.
        pattern: regular expression that whole names of modules match, or None for the rule of the model's family.

    Raises:
        UsageError: a pattern that cannot be read or matches nothing, or a module that cannot be tapped.
        UnsupportedError: a family without a rule.
    """
    names = _matching(calls, pattern) if pattern is not None else _default_names(model, calls)
    for name in names:
        found = calls.shapes.get(name, [])
        if not _one_output(calls, name):
            raise UsageError(
                f"taps: '{name}' expected one output of rank 2 to 4 with a row an image, found {found} for one; "
                "name others with --taps"
            )
    order = [name for name in calls.shapes if name in set(names)]
    return tuple(_tap(model, name, calls.shapes[name][0]) for name in order)


@contextmanager
def collected(model: nn.Module, taps: tuple[TapInfo, ...]) -> Iterator[list[Tensor]]:
    """Within the context, running the model appends the pooled output f[B, features] of each tap to the list."""
    pooled: list[Tensor] = []
    prefix = int(getattr(model, "num_prefix_tokens", 0))

    def pool(tap: TapInfo) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: pooled.append(_POOLS[tap.pooling](output, prefix))

    handles = [model.get_submodule(tap.name).register_forward_hook(pool(tap)) for tap in taps]
    try:
        yield pooled
    finally:
        for handle in handles:
            handle.remove()


def _matching(calls: Calls, pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"taps: expected a regular expression, found '{pattern}': {error}") from error
    names = [name for name in calls.shapes if compiled.fullmatch(name)]
    if not names:
        last = list(calls.shapes)[-1]
        raise UsageError(f"taps: '{pattern}' matches none of {len(calls.shapes)} modules, such as '{last}'")
    return names


def _one_output(calls: Calls, name: str) -> bool:
    """Whether a module ran once and returned one tensor that can be pooled, with one row an image."""
    found = calls.shapes.get(name, [])
    return len(found) == 1 and 2 <= len(found[0]) <= 4 and found[0][0] == 1


def _default_names(model: nn.Module, calls: Calls) -> list[str]:
    names = _family_names(model)
    # What a family lists may be called several times, or return several tensors: then its norms are read.
    return names if names and all(_one_output(calls, name) for name in names) else _norm_names(model, calls)


def _family_names(model: nn.Module) -> list[str]:
    if names := _prenorm_names(model):
        return names
    information: Any = getattr(model, "feature_info", None)
    if information:
        return [entry["module"] for entry in getattr(information, "info", information)]
    modules = dict(model.named_modules())
    for parent in _CHILDREN_OF:
        if parent in modules:
            return [f"{parent}.{name}" for name, _ in modules[parent].named_children()]
    return [name for name, _ in model.named_children() if re.fullmatch(r"layer\d", name)]


def _norm_names(model: nn.Module, calls: Calls) -> list[str]:
    norms = {name.rpartition(".")[0] for name in discover_norms(model).names}
    once = [name for name in calls.shapes if name in norms and _one_output(calls, name)]
    if not once:
        raise UnsupportedError(f"backbone: no rule says where to tap {type(model).__name__}; name modules with --taps")
    count = min(MAX_NORM_TAPS, len(once))
    return [once[(number + 1) * len(once) // count - 1] for number in range(count)]


def _prenorm_names(model: nn.Module) -> list[str]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not all(hasattr(block, "norm1") for block in blocks):
        return []
    inner = [f"blocks.{index}.norm1" for index in range(1, len(blocks))]
    # Models that average their tokens may normalise after that instead.
    return (
        inner
        + [name for name in ("norm", "fc_norm") if not isinstance(getattr(model, name, nn.Identity()), nn.Identity)][:1]
    )


def _tap(model: nn.Module, name: str, shape: tuple[int, ...]) -> TapInfo:
    if len(shape) == 2:
        pooling = "vector"
    elif len(shape) == 3:
        pooling = "token" if getattr(model, "global_pool", None) == "token" else "tokens"
    else:
        last = _channels_last(model) or type(model.get_submodule(name)) is nn.LayerNorm
        pooling = "maps-last" if last else "maps"
    return TapInfo(name, shape[1] if pooling == "maps" else shape[-1], pooling)


def _channels_last(model: nn.Module) -> bool:
    """Timm says so itself; of torchvision's classifiers only Swin keeps channels last."""
    return getattr(model, "output_fmt", None) == "NHWC" or isinstance(model, torchvision.models.SwinTransformer)
