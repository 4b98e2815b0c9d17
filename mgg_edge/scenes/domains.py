"""Domains for meta-training: random compositions of generic operations, none of them a kind of the benchmark.

    x ← f_k ∘ … ∘ f_1 (x),   k ∈ {1, 2, 3} of 18 operations, each with strengths of its own;  12 % are clean

What is drawn with a domain is its weather: it stays the same for all pictures. Each picture still has its own noise.
A rule that learns to undo these is tested on `corruptions`, which it has never seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mgg_edge.scenes.filters import Floats, convolve, displace, gaussian_blur, rank_filter, resize, smooth_noise

__all__ = ["OPERATIONS", "Domain", "draw_domain"]

CLEAN_SHARE = 0.12
MAX_OPERATIONS = 3
REFERENCE_SIDE = 32
Rng = np.random.Generator
# Pictures 0 … 1, pixels for each unit of length, chance of the single picture.
Operation: TypeAlias = Callable[[Floats, float, Rng], Floats]


@dataclass(frozen=True)
class Domain:
    """One weather.

    Attributes:
        name: its operations joined by `+`, or `clean`.
        operations: what is done to a picture, in order.
    """

    name: str
    operations: tuple[Operation, ...]

    def __call__(self, frames: NDArray[np.uint8], rng: Rng) -> NDArray[np.uint8]:
        """Pictures u8[n, H, W, 3] in this weather."""
        if not self.operations:
            return frames
        scale = min(frames.shape[1:3]) / REFERENCE_SIDE
        pictures = frames.astype(np.float32) / 255
        for operation in self.operations:
            pictures = np.clip(operation(pictures, scale, rng), 0, 1).astype(np.float32)
        return np.rint(pictures * 255).astype(np.uint8)


def draw_domain(rng: Rng, clean_share: float = CLEAN_SHARE, most: int = MAX_OPERATIONS) -> Domain:
    """A random domain, of at most `most` operations."""
    if rng.random() < clean_share:
        return Domain("clean", ())
    names = rng.choice(sorted(OPERATIONS), rng.integers(1, most + 1), replace=False)
    return Domain("+".join(names), tuple(OPERATIONS[name](rng) for name in names))


def _gamma(rng: Rng) -> Operation:
    exponent = np.exp(rng.uniform(-1.1, 1.1))
    return lambda x, _, __: x ** np.float32(exponent)


def _colour_matrix(rng: Rng) -> Operation:
    mixing = (np.eye(3) * rng.uniform(0.5, 1.3, 3) + rng.normal(0, 0.18, (3, 3))).astype(np.float32)
    shift = rng.normal(0, 0.08, 3).astype(np.float32)
    return lambda x, _, __: x @ mixing + shift


def _vignette(rng: Rng) -> Operation:
    strength, centre = rng.uniform(0.3, 1.1), rng.uniform(-0.5, 0.5, 2)

    def apply(x: Floats, _: float, __: Rng) -> Floats:
        down, across = (np.linspace(-1, 1, x.shape[axis + 1]) - centre[axis] for axis in range(2))
        fall = np.exp(-strength * (down[:, None] ** 2 + across**2)).astype(np.float32)
        return x * fall[..., None]

    return apply


def _random_kernel(rng: Rng) -> Operation:
    kernel = rng.exponential(1, (5, 5)) * (rng.random((5, 5)) < rng.uniform(0.2, 0.8))
    kernel[2, 2] += rng.uniform(0.5, 4)
    kernel /= kernel.sum()
    return lambda x, _, __: convolve(x, kernel.astype(np.float32))


def _anisotropic_blur(rng: Rng) -> Operation:
    angle, wide, narrow = rng.uniform(0, np.pi), rng.uniform(0.8, 2.6), rng.uniform(0.3, 1.2)

    def apply(x: Floats, scale: float, __: Rng) -> Floats:
        reach = max(2, round(4 * scale))
        down, across = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        along = (across * np.cos(angle) + down * np.sin(angle)) / (wide * scale)
        beside = (down * np.cos(angle) - across * np.sin(angle)) / (narrow * scale)
        kernel = np.exp(-0.5 * (along**2 + beside**2))
        return convolve(x, (kernel / kernel.sum()).astype(np.float32))

    return apply


def _correlated_noise(rng: Rng) -> Operation:
    strength, width, coloured = rng.uniform(0.05, 0.25), rng.uniform(0.5, 1.5), rng.random() < 0.5

    def apply(x: Floats, scale: float, own: Rng) -> Floats:
        fields = [smooth_noise(x.shape[:3], width * scale, own) for _ in range(3 if coloured else 1)]
        return x + np.float32(strength) * np.concatenate(fields, 3)

    return apply


def _row_noise(rng: Rng) -> Operation:
    strength, axis = rng.uniform(0.04, 0.2), int(rng.integers(1, 3))

    def apply(x: Floats, _: float, own: Rng) -> Floats:
        shape = [len(x), 1, 1, 1]
        shape[axis] = x.shape[axis]
        return x + np.float32(strength) * own.standard_normal(shape, np.float32)

    return apply


def _uniform_noise(rng: Rng) -> Operation:
    strength, grey = rng.uniform(0.1, 0.5), rng.random() < 0.3

    def apply(x: Floats, _: float, own: Rng) -> Floats:
        return x + np.float32(strength) * (2 * own.random((*x.shape[:3], 1 if grey else 3), np.float32) - 1)

    return apply


def _low_frequency_field(rng: Rng) -> Operation:
    strength, width = rng.uniform(0.1, 0.35), rng.uniform(4, 8)
    return lambda x, scale, own: x + np.float32(strength) * smooth_noise(x.shape[:3], width * scale, own)


def _posterise(rng: Rng) -> Operation:
    levels = int(rng.integers(2, 6))
    return lambda x, _, __: np.rint(x * (levels - 1)) / np.float32(levels - 1)


def _chromatic_shift(rng: Rng) -> Operation:
    shifts = rng.uniform(-2.2, 2.2, (3, 2))

    def apply(x: Floats, scale: float, __: Rng) -> Floats:
        ones = np.ones(x.shape[:3], np.float32)
        channels = [
            displace(x[..., [index]], ones * np.float32(down * scale), ones * np.float32(across * scale))
            for index, (down, across) in enumerate(shifts)
        ]
        return np.concatenate(channels, 3)

    return apply


def _affine(rng: Rng) -> Operation:
    matrix, shift = rng.normal(0, 0.13, (2, 2)), rng.uniform(-2, 2, 2)

    def apply(x: Floats, scale: float, __: Rng) -> Floats:
        down = np.arange(x.shape[1])[:, None] - (x.shape[1] - 1) / 2 + np.zeros(x.shape[:3])
        across = np.arange(x.shape[2]) - (x.shape[2] - 1) / 2 + np.zeros(x.shape[:3])
        moved = [matrix[i, 0] * down + matrix[i, 1] * across + shift[i] * scale for i in range(2)]
        return displace(x, moved[0].astype(np.float32), moved[1].astype(np.float32))

    return apply


def _sharpen(rng: Rng) -> Operation:
    strength, sigma = rng.uniform(1, 4), rng.uniform(0.6, 1.5)
    return lambda x, scale, _: x + np.float32(strength) * (x - gaussian_blur(x, sigma * scale))


def _rank_filter(rng: Rng) -> Operation:
    rank = int(rng.integers(0, 3))

    def apply(x: Floats, scale: float, __: Rng) -> Floats:
        return rank_filter(x, max(1, round(scale)), ("least", "median", "greatest")[rank])

    return apply


def _low_resolution(rng: Rng) -> Operation:
    share = rng.uniform(0.3, 0.6)

    def apply(x: Floats, _: float, __: Rng) -> Floats:
        height, width = x.shape[1:3]
        small = resize(x, max(2, int(height * share)), max(2, int(width * share)), Image.Resampling.BILINEAR)
        return resize(small, height, width, Image.Resampling.BICUBIC)

    return apply


def _veil(rng: Rng) -> Operation:
    opacity, colour = rng.uniform(0.2, 0.75), rng.uniform(0, 1, 3).astype(np.float32)
    return lambda x, _, __: x * np.float32(1 - opacity) + np.float32(opacity) * colour


def _banding(rng: Rng) -> Operation:
    strength, period, angle = rng.uniform(0.08, 0.3), rng.uniform(3, 12), rng.uniform(0, np.pi)

    def apply(x: Floats, scale: float, own: Rng) -> Floats:
        down, across = np.mgrid[: x.shape[1], : x.shape[2]]
        phase = own.uniform(0, 2 * np.pi, (len(x), 1, 1))
        wave = np.sin(2 * np.pi * (down * np.sin(angle) + across * np.cos(angle)) / (period * scale) + phase)
        return x + (strength * wave[..., None]).astype(np.float32)

    return apply


def _wave(rng: Rng) -> Operation:
    shift, period = rng.uniform(0.5, 1.8), rng.uniform(8, 20)

    def apply(x: Floats, scale: float, own: Rng) -> Floats:
        phase = own.uniform(0, 2 * np.pi, (len(x), 1, 1))
        rows = np.sin(2 * np.pi * np.arange(x.shape[1])[:, None] / (period * scale) + phase)
        across = (shift * scale * rows + np.zeros(x.shape[:3])).astype(np.float32)
        return displace(x, np.zeros_like(across), across)

    return apply


OPERATIONS: dict[str, Callable[[Rng], Operation]] = {
    "gamma": _gamma,
    "colour-matrix": _colour_matrix,
    "vignette": _vignette,
    "random-kernel": _random_kernel,
    "anisotropic-blur": _anisotropic_blur,
    "correlated-noise": _correlated_noise,
    "row-noise": _row_noise,
    "uniform-noise": _uniform_noise,
    "low-frequency-field": _low_frequency_field,
    "posterise": _posterise,
    "chromatic-shift": _chromatic_shift,
    "affine": _affine,
    "sharpen": _sharpen,
    "rank-filter": _rank_filter,
    "low-resolution": _low_resolution,
    "veil": _veil,
    "banding": _banding,
    "wave": _wave,
}
