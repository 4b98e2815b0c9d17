"""An image classifier as a pure function of frames, θ, statistics and constants.

    x      = (frames / 255 − mean) / std                      frames u8[B, H, W, 3]
    logits = f(x; θ, S, constants)                            f[B, C]
    z(x)   = pooled feature taps, concatenated                f[B, D]

θ holds the affine parameters of the normalisation layers that adapt, S the statistics of batch normalisation where they
move (`norm_statistics`). Together they are what inference reads of the adaptation state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.func import functional_call

from mgg_edge.errors import UnsupportedError, UsageError
from mgg_edge.learn.backbone_models import create_model
from mgg_edge.learn.backbone_outputs import as_logits
from mgg_edge.learn.checkpoint import assign_weights
from mgg_edge.learn.model_config import AS_CONFIGURED, ModelConfig, Preparation, check_scaling
from mgg_edge.learn.norm_layers import ADAPT_ALL, choose_norms, discover_norms
from mgg_edge.learn.norm_statistics import (
    DEFAULT_NORM_STATISTICS,
    Reference,
    StatisticsNorm,
    parse_norm_statistics,
    replace_batch_norms,
)
from mgg_edge.learn.taps import choose_taps, collected, observe_calls
from mgg_edge.learn.wrappers import every_place, forgetful, unwrapped
from mgg_edge.manifest import OUTPUTS, PreprocessInfo
from mgg_edge.norms import NormLayout, NormParameter

__all__ = ["NORM_STATISTICS", "Backbone", "BackboneOutput", "discover_norms"]

PREFIX = "backbone."
NORM_STATISTICS = "norm_statistics"
# Constants beside them, as packed; `mgg_edge.runtime.adaptation.site_statistics` replaces the last two.
SOURCE, CLEAN, STRENGTH = (f"{NORM_STATISTICS}.{name}" for name in ("source", "clean", "strength"))


class BackboneOutput(NamedTuple):
    """Attributes: logits f[B, C], features f[B, D], and state that the forward moved, by name."""

    logits: Tensor
    features: Tensor
    moved: dict[str, Tensor]


class Backbone:
    """A classifier whose normalisation parameters can be adapted.

    Attributes:
        name: model name.
        model: the module, in evaluation mode, with batch normalisation spelled out.
        norms: the parameters that adapt, in θ order.
        statistics: the statistics that move, in the order of their vector; None if none do.
        taps: where the features come from, in the order of z(x).
        preprocess: the model's own data configuration.
        classes: C, number of logits.
        labels: what the classes are called, where that is known of the weights; else None.
        outputs: what the module returns, see `mgg_edge.manifest.OUTPUTS`.
        features: D, length of z(x).

    Args:
        model: an image classifier; its batch normalisation layers are replaced.
        name: what to call it.
        preprocess: how pictures become its inputs.
        adapt: which norms adapt, see `choose_norms`.
        taps: regular expression of module names, or None for the rule of the model's family.
        norm_statistics: of batch normalisation: `source`, `batch` or `mix:ALPHA`.
        labels: what its classes are called; names of another number of classes are dropped.
        outputs: what the module returns; the backbone returns logits always.

    Raises:
        UnsupportedError: a model that cannot adapt; the message names what is missing.
        UsageError: an image size it cannot take, or a choice that leaves nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        preprocess: PreprocessInfo,
        *,
        adapt: str = ADAPT_ALL,
        taps: str | None = None,
        norm_statistics: str = DEFAULT_NORM_STATISTICS,
        labels: tuple[str, ...] | None = None,
        outputs: str = OUTPUTS[0],
    ) -> None:
        self.name, self.preprocess, self.outputs = name, check_scaling(preprocess), outputs
        model = unwrapped(model)
        forgetful(model)
        self.model = model.eval().requires_grad_(False)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                # Plain softmax attention differentiates into plain matrix products.
                module.fused_attn = False  # type: ignore[assignment]
        self._moved = replace_batch_norms(model)
        layout = discover_norms(model)
        calls = observe_calls(model, preprocess.height, preprocess.width)
        if len(calls.output) != 2 or calls.output[1] < 2:
            raise UnsupportedError(f"backbone: '{name}' returns {calls.output}; expected logits of at least 2 classes")
        self.classes = calls.output[1]
        self.labels = labels if labels is not None and len(labels) == self.classes else None
        self.norms = choose_norms(layout, list(calls.shapes), adapt)
        self.taps = choose_taps(model, calls, taps)
        self.features = sum(tap.features for tap in self.taps)
        self.norm_statistics = norm_statistics
        self._weight = parse_norm_statistics(norm_statistics)
        self.statistics = _moving_statistics(model) if self._weight else None

    @classmethod
    def create(
        cls,
        name: str,
        weights: Mapping[str, Tensor] | str = "random",
        seed: int = 0,
        *,
        adapt: str = ADAPT_ALL,
        taps: str | None = None,
        norm_statistics: str = DEFAULT_NORM_STATISTICS,
        outputs: str = OUTPUTS[0],
        config: ModelConfig | None = None,
        preparation: Preparation = AS_CONFIGURED,
        **options: Any,
    ) -> Backbone:
        """Build a model of timm, of torchvision (`torchvision/NAME`) or of one's own (`package.module:factory`).

        Args:
            name: model name.
            weights: a state dict; `random` (initialised from `seed`); or `pretrained` (downloaded by the package).
            seed: seed of random weights.
            adapt: which norms adapt.
            taps: regular expression of modules to tap.
            norm_statistics: how the statistics of batch normalisation move.
            outputs: what the model returns.
            config: what lies beside the weights.
            preparation: of pictures, over the model's own configuration.
            options: further arguments of the model, such as `img_size` or `num_classes`.

        Raises:
            UsageError: no such model, near matches are suggested; or options it cannot be built with.
            WeightsError: the weights do not fit, are not finite or cannot be downloaded.
            UnsupportedError: see the constructor.
        """
        pretrained = isinstance(weights, str) and weights == "pretrained"
        found = create_model(name, pretrained=pretrained, seed=seed, options=options, config=config)
        if not isinstance(weights, str):
            assign_weights(found.module, weights, where=name)
        backbone = cls(
            found.module, name, preparation.over(found.preprocess), adapt=adapt, taps=taps,
            norm_statistics=norm_statistics, labels=found.labels, outputs=outputs,
        )  # fmt: skip
        if backbone.classes != (asked := options.get("num_classes", backbone.classes)):
            raise UsageError(
                f"backbone: expected '{name}' to make a model of {asked} classes, found {backbone.classes}"
            )
        return backbone

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        input_size: int | tuple[int, int],
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        name: str | None = None,
        resize: str = "shortest-side",
        crop_fraction: float = 1.0,
        interpolation: str = "bilinear",
        adapt: str = ADAPT_ALL,
        taps: str | None = None,
        norm_statistics: str = DEFAULT_NORM_STATISTICS,
        labels: tuple[str, ...] | None = None,
        outputs: str = OUTPUTS[0],
    ) -> Backbone:
        """Take a module of one's own, with the weights it has; it is changed (see the constructor).

        Args:
            module: from images f[B, 3, H, W], scaled by mean and deviation, to logits f[B, C].
            input_size: H and W, or the side of a square, pixels.
            mean: of the scaling, RGB on the 0–1 scale; ImageNet's by default.
            std: likewise.
            name: what to call it; the class by default.
            resize: `shortest-side` keeps the aspect ratio of a picture, `squash` does not.
            crop_fraction: side of the centre crop over the side of the resized picture, in (0, 1].
            interpolation: `bicubic` or `bilinear`.
            adapt: which norms adapt.
            taps: regular expression of modules to tap.
            norm_statistics: how the statistics of batch normalisation move.
            labels: what the classes are called.
            outputs: what the module returns.

        Raises:
            UnsupportedError, UsageError: see the constructor.
        """
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        preprocess = PreprocessInfo(height, width, resize, crop_fraction, interpolation, tuple(mean), tuple(std))
        called = type(module).__name__ if name is None else name
        return cls(
            module, called, preprocess, adapt=adapt, taps=taps, norm_statistics=norm_statistics, labels=labels,
            outputs=outputs,
        )  # fmt: skip

    @property
    def infer_state(self) -> tuple[str, ...]:
        """Names of the state tensors that inference reads, `theta` first."""
        return ("theta",) if self.statistics is None else ("theta", NORM_STATISTICS)

    def theta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """θ₀ [N], the source values of the norm parameters."""
        return self._pack(self.norms).to(dtype)

    def initial_state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """What inference reads of the state, at the source: θ₀ [N] and, where statistics move, S₀ [M]."""
        moving = {} if self.statistics is None else {NORM_STATISTICS: self._pack(self.statistics).to(dtype)}
        return {"theta": self.theta(dtype), **moving}

    def constants(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Every parameter and buffer that is no state, the input scaling, and what moved statistics are measured by."""
        state = {*self.norms.names, *(self.statistics.names if self.statistics else ())}
        frozen = {f"{PREFIX}{name}": value for name, value in self._tensors().items() if name not in state}
        std = torch.tensor(self.preprocess.std, dtype=torch.float64)
        scaling = {
            "preprocess.scale": 1 / (255 * std),
            "preprocess.shift": -torch.tensor(self.preprocess.mean, dtype=torch.float64) / std,
        }
        reference = {}
        if self.statistics is not None:
            source = self._pack(self.statistics)
            reference = {SOURCE: source, CLEAN: source.clone(), STRENGTH: torch.ones(())}
        return {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in (scaling | frozen | reference).items()
        }

    def split(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of θ [N] under parameter names and shapes."""
        return _unpack(theta, self.norms)

    def forward(
        self,
        frames: Tensor,
        norms: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        statistics: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits and features; nothing moves.

        Args:
            frames: u8[B, H, W, 3], RGB at the model's input size.
            norms: norm parameters by name, as `split` gives them.
            constants: as `constants` gives them, in the dtype to compute in.
            statistics: S f[M]; None takes the source's.

        Returns:
            logits f[B, C] and features f[B, D].
        """
        output = self._run(frames, norms, constants, statistics, weight=0.0)
        return output.logits, output.features

    def forward_moving(
        self,
        frames: Tensor,
        norms: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        statistics: Tensor | None = None,
        weight: float | None = None,
    ) -> BackboneOutput:
        """As `forward`, under the statistics moved towards those of the frames, which are returned as well.

        How far is `norm_statistics`, or `weight` in [0, 1] where that is given and statistics move at all.
        """
        moves = self._weight if weight is None or not self._weight else weight
        return self._run(frames, norms, constants, statistics, weight=moves)

    def _run(
        self,
        frames: Tensor,
        norms: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        statistics: Tensor | None,
        weight: float,
    ) -> BackboneOutput:
        scale, shift = constants["preprocess.scale"], constants["preprocess.shift"]
        # Channels first before scaling: engines are slow where only the innermost three numbers broadcast.
        pixels = frames.to(scale.dtype).permute(0, 3, 1, 2)  # [B, 3, H, W]
        inputs = pixels * scale.reshape(3, 1, 1) + shift.reshape(3, 1, 1)
        tensors = {name.removeprefix(PREFIX): value for name, value in constants.items() if name.startswith(PREFIX)}
        if self.statistics is not None:
            tensors |= _unpack(constants[CLEAN] if statistics is None else statistics, self.statistics)
            source, clean = (_unpack(constants[name], self.statistics) for name in (SOURCE, CLEAN))
            self._moved.reference = Reference(source, clean, constants[STRENGTH])
        self._moved.weight, self._moved.tensors = weight, {}
        try:
            with collected(self.model, self.taps) as pooled:
                given = every_place(self.model, {**tensors, **norms})
                raw = functional_call(self.model, given, (inputs,), tie_weights=False)
            logits = as_logits(raw, self.outputs)
            moved = {**tensors, **self._moved.tensors}  # a layer that did not run moves nothing
        finally:
            self._moved.weight, self._moved.reference, self._moved.tensors = 0.0, None, {}
        features = torch.cat(pooled, dim=1)
        if self.statistics is None or not weight:
            return BackboneOutput(logits, features, {})
        vector = torch.cat([moved[name].flatten() for name in self.statistics.names])  # [M]
        return BackboneOutput(logits, features, {NORM_STATISTICS: vector})

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, also those a state dict leaves out, such as tables of positions."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _pack(self, layout: NormLayout) -> Tensor:
        tensors = self._tensors()
        return torch.cat([tensors[name].detach().flatten() for name in layout.names])


def _unpack(vector: Tensor, layout: NormLayout) -> dict[str, Tensor]:
    parts = vector.split(list(layout.sizes))
    return {
        parameter.name: part.reshape(parameter.shape) for parameter, part in zip(layout.parameters, parts, strict=True)
    }


def _moving_statistics(model: nn.Module) -> NormLayout | None:
    parameters = [
        NormParameter(f"{name}.{key}", tuple(value.shape))
        for name, module in model.named_modules()
        if isinstance(module, StatisticsNorm) and module.moves
        for key, value in module.named_buffers(recurse=False)
    ]
    return NormLayout(tuple(parameters)) if parameters else None
