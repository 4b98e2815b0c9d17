"""The default backbone, a small reader of characters: timm model `mgg_reader_32`.

32 × 32 RGB → three 3 × 3 convolutions of stride 2 (24, 48, 96 channels) → 16 tokens and CLS → six transformer blocks of
width 96 with three heads → 36 classes. No batch normalisation: the stem has no norm, the blocks have LayerNorm, so that
every image is computed alone. Importing this module registers the model.
"""

from __future__ import annotations

import itertools
from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mgg_edge.scenes.glyphs import CHARACTERS

__all__ = ["READER_NAME", "READER_SIZE", "ConvolutionalStem", "mgg_reader_32"]

READER_NAME = "mgg_reader_32"
READER_SIZE = 32
STRIDE = 8


class ConvolutionalStem(nn.Module):
    """Three convolutions of stride 2 in the place of timm's patch embedding.

    Attributes:
        img_size, patch_size, grid_size, num_patches: what VisionTransformer reads of a patch embedding.

    Args:
        img_size: height and width in pixels, a multiple of 8.
        patch_size: 8, the stride of the three convolutions together.
        in_chans: channels of the image.
        embed_dim: width of a token, a multiple of 4.
        bias: for the signature; the convolutions always have one.

    Raises:
        ValueError: another patch size, or an image that is not a multiple of it.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = READER_SIZE,
        patch_size: int = STRIDE,
        in_chans: int = 3,
        embed_dim: int = 96,
        bias: bool = True,  # noqa: ARG002
        dynamic_img_pad: bool = False,  # noqa: ARG002
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
        if patch_size != STRIDE or any(side % STRIDE for side in self.img_size):
            raise ValueError(
                f"expected patches of {STRIDE} and images of a multiple of it, found {patch_size}, {img_size}"
            )
        self.patch_size = (STRIDE, STRIDE)
        self.grid_size = (self.img_size[0] // STRIDE, self.img_size[1] // STRIDE)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = (in_chans, embed_dim // 4, embed_dim // 2, embed_dim)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, device=device, dtype=dtype), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.constant_(cast(Tensor, layer.bias), 0.0)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens f[B, patches, width] of images f[B, C, H, W]."""
        tokens: Tensor = self.layers(images).flatten(2).transpose(1, 2)
        return tokens


default_cfgs = generate_default_cfgs(
    {
        f"{READER_NAME}.untrained": {
            "num_classes": 36,
            "input_size": (3, READER_SIZE, READER_SIZE),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.layers.0",
            "classifier": "head",
            "label_names": list(CHARACTERS),
        }
    }
)


@register_model
def mgg_reader_32(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """The reader with random weights; `options` are VisionTransformer's."""
    arguments: dict[str, Any] = {
        "img_size": READER_SIZE,
        "patch_size": STRIDE,
        "embed_dim": 96,
        "depth": 6,
        "num_heads": 3,
        "embed_layer": ConvolutionalStem,
    }
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, READER_NAME, pretrained, **(arguments | {"num_classes": 36} | options)
    )
    # With positions of the usual 0.02 beside tokens of about 1, training stays at chance for thousands of steps.
    nn.init.trunc_normal_(cast(Tensor, model.pos_embed), std=0.2)
    return model
