"""A timm vision transformer as a pure function of frames, θ and constants.

    x      = (frames / 255 − mean) / std                      frames u8[B, H, W, 3]
    logits = f(x; θ, constants)                               f[B, C]
    z(x)   = CLS tokens after each block, concatenated        f[B, D]

A block's CLS token is read after the *next* block's first norm, the last one's after the final norm
(arXiv 2412.16901, section 4, and its released code), so every tap is the output of a norm module.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from mgg_edge.errors import UnsupportedError, UsageError, WeightsError
from mgg_edge.learn.checkpoint import assign_weights
from mgg_edge.manifest import INTERPOLATIONS, PreprocessInfo
from mgg_edge.norms import NormLayout, NormParameter

__all__ = ["Backbone", "discover_norms"]

PREFIX = "backbone."
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Backbone:
    """A classifier whose normalisation parameters can be adapted.

    Attributes:
        name: timm model name.
        model: the module, in evaluation mode; never changed by this class.
        norms: the adaptable parameters in θ order.
        taps: names of the norm modules whose CLS token makes up the features.
        preprocess: timm's own data configuration.
        classes: C, number of logits.
        features: D, length of z(x).

    Args:
        model: a timm vision transformer with a CLS token.
        name: what to call it.

    Raises:
        UnsupportedError: another kind of model; the message names what is missing.
        UsageError: an image size below one patch.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        model = _require_cls_transformer(model, name)
        self.name, self.model = name, model.eval().requires_grad_(False)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                # Plain softmax attention differentiates into plain matrix products.
                module.fused_attn = False  # type: ignore[assignment]
        self.norms = discover_norms(model)
        depth = len(model.blocks)
        self.taps = (*(f"blocks.{index}.norm1" for index in range(1, depth)), "norm")
        self.preprocess = _preprocess(model)
        self.classes = int(model.num_classes)
        self.features = depth * int(model.embed_dim)

    @classmethod
    def create(
        cls, name: str, weights: Mapping[str, Tensor] | str = "random", seed: int = 0, **options: Any
    ) -> Backbone:
        """Build a timm model.

        Args:
            name: timm model name.
            weights: a state dict; `random` (initialised from `seed`); or `pretrained` (downloaded by timm).
            seed: seed of random weights.
            options: further arguments of `timm.create_model`, such as `img_size` or `num_classes`.

        Raises:
            UsageError: no such model, near matches are suggested; or options it cannot be built with.
            WeightsError: the weights do not fit, are not finite or cannot be downloaded.
            UnsupportedError: see the constructor.
        """
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else "; see timm.list_models()"
            raise UsageError(f"backbone: timm has no model '{name}'{hint}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _create(name, pretrained=weights == "pretrained", options=options)
        if not isinstance(weights, str):
            assign_weights(model, weights, where=name)
        return cls(model, name)

    def theta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """θ₀ [N], the source values of the norm parameters."""
        tensors = self.model.state_dict()
        return torch.cat([tensors[name].flatten() for name in self.norms.names]).to(dtype)

    def constants(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Every parameter and buffer that does not adapt, and the input scaling, by name."""
        tensors = self.model.state_dict()
        frozen = {f"{PREFIX}{name}": value for name, value in tensors.items() if name not in self.norms.names}
        std = torch.tensor(self.preprocess.std, dtype=torch.float64)
        scaling = {
            "preprocess.scale": 1 / (255 * std),
            "preprocess.shift": -torch.tensor(self.preprocess.mean, dtype=torch.float64) / std,
        }
        return {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in (scaling | frozen).items()
        }

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of θ [N] under parameter names and shapes."""
        parts = theta.split(list(self.norms.sizes))
        return {
            parameter.name: part.reshape(parameter.shape)
            for parameter, part in zip(self.norms.parameters, parts, strict=True)
        }

    def forward(
        self, frames: Tensor, norms: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits and features.

        Args:
            frames: u8[B, H, W, 3], RGB at the model's input size.
            norms: norm parameters by name, as `split` gives them.
            constants: as `constants` gives them, in the dtype to compute in.

        Returns:
            logits f[B, C] and features f[B, D].
        """
        scale, shift = constants["preprocess.scale"], constants["preprocess.shift"]
        inputs = (frames.to(scale.dtype) * scale + shift).permute(0, 3, 1, 2)  # [B, 3, H, W]
        frozen = {name.removeprefix(PREFIX): value for name, value in constants.items() if name.startswith(PREFIX)}
        tapped: list[Tensor] = []
        handles = [
            self.model.get_submodule(tap).register_forward_hook(
                lambda _module, _inputs, output: tapped.append(output[:, 0])
            )
            for tap in self.taps
        ]
        try:
            logits = functional_call(self.model, {**frozen, **norms}, (inputs,), strict=True)
        finally:
            for handle in handles:
                handle.remove()
        return logits, torch.cat(tapped, dim=1)


def discover_norms(model: nn.Module) -> NormLayout:
    """Affine parameters of all LayerNorm- and RMSNorm-like modules, in module order.

    A norm is recognised by its type, or for classes of other packages by a type name that ends in `Norm`
    with one-dimensional parameters of its own.

    Raises:
        UnsupportedError: batch normalisation, whose statistics this version does not adapt, or no norm at all.
    """
    parameters = []
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS):
            raise UnsupportedError(f"backbone: '{name}' is {type(module).__name__}; only LayerNorm and RMSNorm adapt")
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or type(module).__name__.lower().endswith("norm"):
            own = dict(module.named_parameters(recurse=False))
            parameters += [NormParameter(f"{name}.{key}", tuple(value.shape)) for key, value in own.items()]
    if not parameters:
        raise UnsupportedError("backbone: found no LayerNorm or RMSNorm with parameters to adapt")
    return NormLayout(tuple(parameters))


def _create(name: str, *, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    try:
        model = timm.create_model(name, pretrained=False, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"backbone: timm cannot build '{name}' with options {dict(options)}: {reason}") from error
    if not pretrained:
        return model
    try:
        return timm.create_model(name, pretrained=True, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{name}: cannot get pretrained weights ({str(error).splitlines()[0]}); give a file with --weights FILE"
        ) from error


def _require_cls_transformer(model: nn.Module, name: str) -> VisionTransformer:
    if not isinstance(model, VisionTransformer):
        raise UnsupportedError(f"backbone: '{name}' is a {type(model).__name__}; expected a timm VisionTransformer")
    if model.cls_token is None or model.global_pool != "token":
        raise UnsupportedError(f"backbone: '{name}' pools with '{model.global_pool}'; expected a CLS token")
    if model.num_classes < 2:
        raise UnsupportedError(f"backbone: '{name}' has {model.num_classes} classes; expected at least 2")
    if min(model.patch_embed.grid_size) < 1:
        raise UsageError(f"backbone: images of {model.patch_embed.img_size} are smaller than a patch of '{name}'")
    return model


def _preprocess(model: VisionTransformer) -> PreprocessInfo:
    config = resolve_data_config({}, model=model)
    height, width = model.patch_embed.img_size  # not the configuration's: `img_size` may have been given
    if config["interpolation"] not in INTERPOLATIONS or config["crop_mode"] not in ("center", "squash"):
        raise UnsupportedError(
            f"backbone: expected {' or '.join(INTERPOLATIONS)} resizing with a centre crop or squash, "
            f"found {config['interpolation']} and {config['crop_mode']}"
        )
    return PreprocessInfo(
        height=height,
        width=width,
        resize="squash" if config["crop_mode"] == "squash" else "shortest-side",
        crop_fraction=float(config["crop_pct"]),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
