"""Frames to measure and check with: a directory of images, or a seeded synthetic set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

from mgg_edge.manifest import PreprocessInfo
from mgg_edge.scenes.picture_file import find_images, read_picture

__all__ = ["find_images", "fit_image", "load_images", "synthetic_frames"]


def load_images(paths: list[Path], info: PreprocessInfo, batch: int) -> Iterator[Tensor]:
    """Batches u8[≤ batch, H, W, 3] of images at the model's input size.

    Raises:
        SourceError: a file cannot be read as an image.
    """
    for start in range(0, len(paths), batch):
        pictures = (Image.fromarray(read_picture(path)) for path in paths[start : start + batch])
        yield torch.stack([fit_image(picture, info) for picture in pictures])


def fit_image(image: Image.Image, info: PreprocessInfo) -> Tensor:
    """Resize and crop by the rule of the run time, which is timm's evaluation transform: u8[H, W, 3]."""
    size = info.resized_size(image.height, image.width)
    resized = functional.resize(image, list(size), InterpolationMode(info.interpolation))
    return torch.from_numpy(np.array(functional.center_crop(resized, [info.height, info.width])))


def synthetic_frames(count: int, height: int, width: int, seed: int) -> Tensor:
    """Coloured noise with the 1/f spectrum of photographs, with varying contrast and brightness.

    Returns:
        u8[count, height, width, 3], the same for the same arguments.
    """
    generator = torch.Generator().manual_seed(seed)
    vertical = torch.fft.fftfreq(height)[:, None] * height
    horizontal = torch.fft.rfftfreq(width)[None] * width
    amplitude = 1 / (vertical.square() + horizontal.square()).sqrt().clamp(min=1.0)  # [H, W/2+1]
    noise = torch.randn(count, 3, height, width, generator=generator)
    fields = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(height, width))
    fields = fields / fields.std(dim=(1, 2, 3), keepdim=True)
    contrast = 25 + 50 * torch.rand(count, 1, 1, 1, generator=generator)
    brightness = 80 + 96 * torch.rand(count, 3, 1, 1, generator=generator)
    return (brightness + contrast * fields).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
