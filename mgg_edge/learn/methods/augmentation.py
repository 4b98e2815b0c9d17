"""Random views of a batch, as CoTTA's and ROID's repositories draw them: one set of numbers for the whole batch.

colour      brightness 0.6–1.4, contrast 0.7–1.3, saturation 0.5–1.5, hue ±0.06, gamma 0.7–1.3, in random order
geometry    rotation ±15°, shift ±1/16 of the side, scale 0.9–1.1, over edges continued outwards; mirrored half the time
optics      Gaussian blur of 5 pixels, σ up to 0.5, and noise of 0.005; CoTTA alone
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

__all__ = ["Augmentation"]

BRIGHTNESS, CONTRAST, SATURATION, HUE, GAMMA = (0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (-0.06, 0.06), (0.7, 1.3)
ROTATION, SHIFT, SCALE = (-15.0, 15.0), 1 / 16, (0.9, 1.1)
BLUR_SIZE, BLUR, NOISE = 5, (0.001, 0.5), 0.005


@dataclass(frozen=True)
class Augmentation:
    """What to draw.

    Attributes:
        flip: mirror half of the time; wrong where the mirror image is another class, as with characters.
        optics: blur and noise.
        padding: how edges continue, `edge` or `reflect`.
    """

    flip: bool = True
    optics: bool = True
    padding: str = "edge"

    def __call__(self, frames: Tensor, generator: torch.Generator) -> Tensor:
        """A view of frames u8 or f[B, H, W, 3]: f32[B, H, W, 3] in 0 … 255."""

        def draw(bounds: tuple[float, float]) -> float:
            return float(torch.empty(()).uniform_(*bounds, generator=generator))

        images = _colour(frames.permute(0, 3, 1, 2).float() / 255, draw, generator)
        height, width = images.shape[-2:]
        margin = [width // 2, height // 2]
        images = functional.pad(images, margin, padding_mode=self.padding)
        shift = [round(draw((-SHIFT, SHIFT)) * side) for side in (images.shape[-1], images.shape[-2])]
        images = functional.affine(
            images, draw(ROTATION), shift, draw(SCALE), [0.0, 0.0], interpolation=InterpolationMode.BILINEAR
        )
        if self.optics:
            images = functional.gaussian_blur(images, [BLUR_SIZE, BLUR_SIZE], [draw(BLUR)] * 2)
        images = functional.center_crop(images, [height, width])
        if self.flip and draw((0.0, 1.0)) < 0.5:
            images = images.flip(-1)
        if self.optics:
            images = images + NOISE * torch.randn(images.shape, generator=generator)
        return (images.clamp(0, 1) * 255).permute(0, 2, 3, 1)


def _colour(images: Tensor, draw, generator: torch.Generator) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
    changes = (
        lambda x: functional.adjust_brightness(x, draw(BRIGHTNESS)),
        lambda x: functional.adjust_contrast(x, draw(CONTRAST)),
        lambda x: functional.adjust_saturation(x, draw(SATURATION)),
        lambda x: functional.adjust_hue(x, draw(HUE)),
        lambda x: functional.adjust_gamma(x.clamp(1e-8, 1.0), draw(GAMMA)),  # the power of 0 has no gradient
    )
    for index in torch.randperm(len(changes), generator=generator).tolist():
        images = changes[index](images)
    return images
