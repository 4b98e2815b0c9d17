"""The corruptions of ImageNet-C (arXiv 1903.12261): 15 kinds and 4 extra ones at five severities, and `night`.

    corrupt(frames, kind, severity, rng)         frames u8[n, H, W, 3] → u8[n, H, W, 3]

ImageNet-C is defined at 224 pixels. Kinds with a second column in `KINDS` use its constants on pictures of 128 pixels
and more, with lengths in proportion to the side. Small pictures lose legibility at other rates: their constants were
chosen at 32 pixels, so that a reader of small characters keeps 38 to 77 % at severity 5; lengths are in proportion to
the side there, too. Frost is drawn, not cut from photographs. `night`, few photons and little gain, is not of the 19.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mgg_edge.errors import UsageError
from mgg_edge.scenes.filters import (
    Floats,
    convolve,
    disk,
    displace,
    gaussian_blur,
    line,
    luminance,
    plasma,
    resize,
    smooth_noise,
)

__all__ = ["BENCHMARK_KINDS", "EXTRA_KINDS", "KINDS", "SEVERITIES", "corrupt"]

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE, LARGE_SIDE, LARGE_FROM = 32, 224, 128
Rng = np.random.Generator
# Pictures from 0 to 1; the numbers of the severity; pixels for each unit of length; where chance comes from.
Corruption = Callable[[Floats, Any, float, Rng], Floats]


@dataclass(frozen=True)
class Kind:
    """Attributes: apply; small, large: numbers of severities 1 to 5 at 32 and, if they differ, at 224 pixels."""

    apply: Corruption
    small: Sequence[Any]
    large: Sequence[Any] | None = None


def corrupt(frames: NDArray[np.uint8], kind: str, severity: int, rng: Rng) -> NDArray[np.uint8]:
    """Corrupted pictures.

    Args:
        frames: u8[n, H, W, 3], RGB.
        kind: a key of `KINDS`.
        severity: 1 to 5.
        rng: where chance comes from; each picture has its own.

    Returns:
        u8[n, H, W, 3].

    Raises:
        UsageError: no such kind or severity, or an array of another shape or dtype.
    """
    if kind not in KINDS:
        raise UsageError(f"corruption: expected one of {', '.join(KINDS)}, found '{kind}'")
    if severity not in SEVERITIES:
        raise UsageError(f"corruption: expected a severity of 1 to 5, found {severity}")
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise UsageError(f"corruption: expected frames u8[n, H, W, 3], found {frames.dtype}{list(frames.shape)}")
    chosen, side = KINDS[kind], min(frames.shape[1:3])
    large = chosen.large if side >= LARGE_FROM else None
    levels, scale = (chosen.small, side / SMALL_SIDE) if large is None else (large, side / LARGE_SIDE)
    pictures = chosen.apply(frames.astype(np.float32) / 255, levels[severity - 1], scale, rng)
    return np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8)


def _gaussian_noise(x: Floats, sigma: float, _: float, rng: Rng) -> Floats:
    return x + np.float32(sigma) * rng.standard_normal(x.shape, np.float32)


def _shot_noise(x: Floats, photons: float, _: float, rng: Rng) -> Floats:
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def _impulse_noise(x: Floats, share: float, _: float, rng: Rng) -> Floats:
    chance = rng.random(x.shape, np.float32)
    salted: Floats = np.where(chance < share / 2, np.float32(0), np.where(chance > 1 - share / 2, np.float32(1), x))
    return salted


def _speckle_noise(x: Floats, sigma: float, _: float, rng: Rng) -> Floats:
    return x + x * np.float32(sigma) * rng.standard_normal(x.shape, np.float32)


def _defocus_blur(x: Floats, radius: float, scale: float, _: Rng) -> Floats:
    return convolve(x, disk(radius * scale))


def _gaussian_blur(x: Floats, sigma: float, scale: float, _: Rng) -> Floats:
    return gaussian_blur(x, sigma * scale)


def _glass_blur(x: Floats, shift: float, scale: float, rng: Rng) -> Floats:
    down, across = rng.uniform(-shift * scale, shift * scale, (2, *x.shape[:3])).astype(np.float32)
    return gaussian_blur(displace(gaussian_blur(x, 0.4 * scale), down, across), 0.3 * scale)


def _motion_blur(x: Floats, length: float, scale: float, rng: Rng) -> Floats:
    return np.concatenate(
        [convolve(x[[index]], line(length * scale, rng.uniform(-np.pi / 4, np.pi / 4))) for index in range(len(x))]
    )


def _zoom_blur(x: Floats, largest: float, _: float, __: Rng) -> Floats:
    factors = np.linspace(1, largest, 11)
    return sum((_zoom(x, factor) for factor in factors), np.zeros_like(x)) / np.float32(len(factors))


def _zoom(x: Floats, factor: float) -> Floats:
    height, width = x.shape[1:3]
    down = (np.arange(height) - (height - 1) / 2) * (1 / factor - 1)
    across = (np.arange(width) - (width - 1) / 2) * (1 / factor - 1)
    shape = (len(x), height, width)
    return displace(
        x, np.broadcast_to(down[:, None], shape).astype(np.float32), np.broadcast_to(across, shape).astype(np.float32)
    )


def _snow(x: Floats, level: tuple[float, float], scale: float, rng: Rng) -> Floats:
    threshold, mix = level
    flakes = np.maximum(smooth_noise(x.shape[:3], 0.6 * scale, rng) - threshold, 0)
    flakes = convolve(flakes, line(4 * scale, rng.uniform(np.pi / 4, 3 * np.pi / 4)))
    white = np.maximum(x, luminance(x) * 1.5 + 0.5)
    return (1 - mix) * x + mix * white + np.minimum(flakes * 2.5, 1)


def _frost(x: Floats, level: tuple[float, float], _: float, rng: Rng) -> Floats:
    keep, add = level
    clouds = plasma(len(x), max(x.shape[1:3]), 1.5, rng)[:, : x.shape[1], : x.shape[2]]
    crystals = 1 - np.abs(2 * clouds - 1)  # ridges where the field crosses its middle
    return keep * x + add * crystals**2 * np.array([0.85, 0.95, 1.0], np.float32)


def _fog(x: Floats, level: tuple[float, float], _: float, rng: Rng) -> Floats:
    thickness, decay = level
    clouds = plasma(len(x), max(x.shape[1:3]), decay, rng)[:, : x.shape[1], : x.shape[2]]
    most = x.max((1, 2, 3), keepdims=True)
    return (x + thickness * clouds) * most / (most + thickness)


def _brightness(x: Floats, added: float, _: float, __: Rng) -> Floats:
    """The value of HSV raised; hue and saturation stay."""
    value = x.max(3, keepdims=True)
    raised = np.clip(value + added, 0, 1)
    return np.where(value > 0, x * raised / np.maximum(value, 1e-6), raised)


def _saturate(x: Floats, level: tuple[float, float], _: float, __: Rng) -> Floats:
    """The saturation of HSV multiplied and raised; hue and value stay."""
    factor, added = level
    value, least = x.max(3, keepdims=True), x.min(3, keepdims=True)
    saturation = (value - least) / np.maximum(value, 1e-6)
    wanted = np.clip(saturation * factor + added, 0, 1)
    hue = np.where(value > least, (value - x) / np.maximum(value - least, 1e-6), np.array([0, 1, 1], np.float32))
    return value * (1 - wanted * hue)


def _contrast(x: Floats, factor: float, _: float, __: Rng) -> Floats:
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * factor + mean


def _elastic(x: Floats, shift: float, scale: float, rng: Rng) -> Floats:
    fields = [smooth_noise(x.shape[:3], 2.5 * scale, rng)[..., 0] * np.float32(shift * scale / 2) for _ in range(2)]
    return displace(x, fields[0], fields[1])


def _pixelate(x: Floats, share: float, _: float, __: Rng) -> Floats:
    height, width = x.shape[1:3]
    small = resize(x, max(1, int(height * share)), max(1, int(width * share)), Image.Resampling.BOX)
    return resize(small, height, width, Image.Resampling.NEAREST)


def _jpeg(x: Floats, quality: int, _: float, __: Rng) -> Floats:
    pictures = np.empty_like(x)
    for index, picture in enumerate(np.rint(x * 255).astype(np.uint8)):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        pictures[index] = np.asarray(Image.open(file), np.float32) / 255
    return pictures


def _spatter(x: Floats, level: tuple[float, float], scale: float, rng: Rng) -> Floats:
    threshold, mud = level
    drops = np.clip((smooth_noise(x.shape[:3], 1.4 * scale, rng) - threshold) * 2, 0, 1)
    water, earth = np.array([0.69, 0.93, 0.93], np.float32), np.array([0.25, 0.16, 0.08], np.float32)
    return x * (1 - drops) + drops * ((1 - mud) * water + mud * earth)


def _night(x: Floats, level: tuple[float, float], _: float, rng: Rng) -> Floats:
    exposure, photons = level
    dark = (x * exposure) ** np.float32(1.1)
    return (rng.poisson(dark * photons) / photons).astype(np.float32) * np.array([0.9, 0.95, 1.1], np.float32)


KINDS: dict[str, Kind] = {
    "gaussian_noise": Kind(_gaussian_noise, (0.08, 0.14, 0.20, 0.26, 0.32), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Kind(_shot_noise, (60, 28, 16, 10, 6), (60, 25, 12, 5, 3)),
    "impulse_noise": Kind(_impulse_noise, (0.03, 0.06, 0.10, 0.15, 0.22), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": Kind(_defocus_blur, (1.2, 1.8, 2.4, 2.9, 3.4), (3, 4, 6, 8, 10)),
    "glass_blur": Kind(_glass_blur, (0.8, 1.2, 1.6, 2.0, 2.5)),
    "motion_blur": Kind(_motion_blur, (3.0, 4.5, 6.0, 7.5, 9.0), (7, 11, 16, 22, 28)),
    "zoom_blur": Kind(_zoom_blur, (1.2, 1.33, 1.47, 1.6, 1.75), (1.1, 1.15, 1.2, 1.25, 1.3)),
    "snow": Kind(_snow, ((2.2, 0.15), (2.0, 0.24), (1.85, 0.33), (1.7, 0.42), (1.5, 0.5))),
    "frost": Kind(_frost, ((0.9, 0.25), (0.84, 0.34), (0.78, 0.43), (0.72, 0.52), (0.66, 0.6))),
    "fog": Kind(
        _fog,
        ((0.6, 2.0), (0.9, 1.9), (1.3, 1.8), (1.65, 1.7), (2.0, 1.6)),
        ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
    ),
    "brightness": Kind(_brightness, (0.15, 0.25, 0.35, 0.45, 0.55), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Kind(_contrast, (0.55, 0.42, 0.33, 0.26, 0.20), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Kind(_elastic, (0.8, 1.2, 1.6, 2.0, 2.5)),
    "pixelate": Kind(_pixelate, (0.5, 0.42, 0.36, 0.3, 0.25), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Kind(_jpeg, (12, 8, 5, 3, 2), (25, 18, 15, 10, 7)),
    "speckle_noise": Kind(_speckle_noise, (0.12, 0.2, 0.3, 0.4, 0.52), (0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": Kind(_gaussian_blur, (0.8, 1.1, 1.5, 1.8, 2.2), (1, 2, 3, 4, 6)),
    "spatter": Kind(_spatter, ((1.6, 0.0), (1.3, 0.0), (1.0, 0.0), (1.1, 1.0), (0.8, 1.0))),
    "saturate": Kind(_saturate, ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2))),
    "night": Kind(_night, ((0.5, 120), (0.4, 90), (0.3, 70), (0.22, 60), (0.16, 50))),
}
BENCHMARK_KINDS = tuple(KINDS)[:15]
EXTRA_KINDS = tuple(KINDS)[15:19]
