"""Operations on batches of pictures that corruptions and domains are made of. All take and give f32[n, H, W, C]."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

__all__ = [
    "Floats",
    "convolve",
    "disk",
    "displace",
    "gaussian",
    "gaussian_blur",
    "line",
    "luminance",
    "plasma",
    "rank_filter",
    "resize",
    "smooth_noise",
]

# Pictures are float32; what is made of them in passing may be wider.
Floats: TypeAlias = NDArray[np.floating[Any]]

MOST_SUMMED = 24  # elements of a kernel; above, a Fourier transform is faster
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


def luminance(pictures: Floats) -> Floats:
    """Luminance f32[n, H, W, 1] of RGB pictures (ITU-R BT.601)."""
    grey: Floats = (pictures @ LUMINANCE)[..., None]
    return grey


def gaussian(sigma: float) -> Floats:
    """One-dimensional Gaussian, cut at four σ; sums to 1."""
    reach = max(1, math.ceil(4 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-6)) ** 2)
    kernel: Floats = (weights / weights.sum()).astype(np.float32)
    return kernel


def gaussian_blur(pictures: Floats, sigma: float) -> Floats:
    """Pictures under a Gaussian of σ pixels."""
    kernel = gaussian(sigma)
    return convolve(convolve(pictures, kernel[:, None]), kernel[None])


def disk(radius: float) -> Floats:
    """The disc of an unfocused lens, its edge smoothed over one pixel; radius in pixels."""
    reach = max(1, math.ceil(radius))
    places = np.arange(-reach, reach + 1)
    inside = np.clip(radius + 0.5 - np.hypot(places[:, None], places), 0, 1)
    kernel: Floats = (inside / inside.sum()).astype(np.float32)
    return kernel


def line(length: float, angle: float) -> Floats:
    """The trace of a moving point: `length` pixels at `angle` radians, spread over the pixels beside it."""
    reach = max(1, math.ceil(length / 2))
    kernel = np.zeros((2 * reach + 3, 2 * reach + 3))
    for along in np.linspace(-length / 2, length / 2, 8 * reach + 1):
        row, column = reach + 1 + along * math.sin(angle), reach + 1 + along * math.cos(angle)
        top, left = math.floor(row), math.floor(column)
        for y, weight_y in ((top, 1 - row + top), (top + 1, row - top)):
            for x, weight_x in ((left, 1 - column + left), (left + 1, column - left)):
                kernel[y, x] += weight_y * weight_x
    trace: Floats = (kernel / kernel.sum()).astype(np.float32)
    return trace


def convolve(pictures: Floats, kernel: Floats) -> Floats:
    """Pictures under one kernel f32[h, w] of odd sides; the border is mirrored.

    The kernel is not turned round (a correlation).
    """
    up, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    height, width = pictures.shape[1:3]
    padded = _mirror(pictures, up, left)
    if np.count_nonzero(kernel) > MOST_SUMMED:
        return _correlate(padded, kernel)[:, :height, :width]
    total = np.zeros_like(pictures)
    for y, x in np.argwhere(kernel):
        total += kernel[y, x] * padded[:, y : y + height, x : x + width]
    return total


def _correlate(pictures: Floats, kernel: Floats) -> Floats:
    """A cyclic correlation by Fourier transforms: right where the kernel does not reach over the end."""
    size = pictures.shape[1:3]
    response = np.fft.rfft2(kernel, size).conj()[None, :, :, None]
    found: Floats = np.fft.irfft2(np.fft.rfft2(pictures, axes=(1, 2)) * response, size, axes=(1, 2))
    return found.astype(pictures.dtype)


def displace(pictures: Floats, down: Floats, across: Floats) -> Floats:
    """Pictures sampled (bilinear) where `down` and `across` f32[n, H, W] pixels lead; the border is repeated."""
    count, height, width, _ = pictures.shape
    rows = np.clip(np.arange(height)[:, None] + down, 0, height - 1).astype(np.float32)
    columns = np.clip(np.arange(width) + across, 0, width - 1).astype(np.float32)
    top, left = np.minimum(rows.astype(np.int64), height - 2), np.minimum(columns.astype(np.int64), width - 2)
    y, x = (rows - top)[..., None], (columns - left)[..., None]
    each = np.arange(count)[:, None, None]
    above = pictures[each, top, left] * (1 - x) + pictures[each, top, left + 1] * x
    below = pictures[each, top + 1, left] * (1 - x) + pictures[each, top + 1, left + 1] * x
    sampled: Floats = above * (1 - y) + below * y
    return sampled


def rank_filter(pictures: Floats, reach: int, rank: str) -> Floats:
    """The `least`, `median` or `greatest` of the (2·reach + 1)² values around every one; the border is mirrored.

    The median is Pillow's, of values 0 … 1 rounded to 8 bits.
    """
    padded = _mirror(pictures, reach, reach)
    if rank == "median":
        height, width = pictures.shape[1:3]
        found = np.empty_like(pictures)
        for index, picture in enumerate(np.rint(padded.clip(0, 1) * 255).astype(np.uint8)):
            filtered = Image.fromarray(picture).filter(ImageFilter.MedianFilter(2 * reach + 1))
            found[index] = np.asarray(filtered)[reach : reach + height, reach : reach + width] / np.float32(255)
        return found
    choose = np.minimum if rank == "least" else np.maximum
    for axis in (1, 2):
        size = padded.shape[axis] - 2 * reach
        shifted = (padded.take(range(start, start + size), axis) for start in range(2 * reach + 1))
        padded = functools.reduce(choose, shifted)
    return padded


def resize(pictures: Floats, height: int, width: int, filter_: Image.Resampling) -> Floats:
    """Pictures f32[n, H, W, 3] resized by Pillow, each channel in float32."""
    resized = np.empty((len(pictures), height, width, pictures.shape[3]), np.float32)
    for index, picture in enumerate(pictures):
        for channel in range(pictures.shape[3]):
            image = Image.fromarray(np.ascontiguousarray(picture[..., channel]))
            resized[index, ..., channel] = np.asarray(image.resize((width, height), filter_))
    return resized


def smooth_noise(shape: tuple[int, int, int], sigma: float, rng: np.random.Generator) -> Floats:
    """Gaussian noise f32[n, H, W, 1] blurred with σ pixels and scaled back to mean 0, deviation 1."""
    field = gaussian_blur(rng.standard_normal((*shape, 1), np.float32), sigma)
    return (field - field.mean()) / np.float32(max(float(field.std()), 1e-6))


def plasma(count: int, size: int, decay: float, rng: np.random.Generator) -> Floats:
    """Fractal clouds f32[n, size, size, 1] from 0 to 1: midpoint displacement whose roughness falls by `decay`."""
    side = 1 << max(1, math.ceil(math.log2(size)))
    field = rng.uniform(-1, 1, (count, 2, 2)).astype(np.float32)
    amplitude = 1.0
    while field.shape[1] <= side:
        amplitude /= decay
        finer = np.empty((count, 2 * field.shape[1] - 1, 2 * field.shape[2] - 1), np.float32)
        finer[:, ::2, ::2] = field
        finer[:, 1::2, ::2] = (field[:, 1:] + field[:, :-1]) / 2
        finer[:, :, 1::2] = (finer[:, :, :-1:2] + finer[:, :, 2::2]) / 2
        finer += np.float32(amplitude) * (2 * rng.random(finer.shape, np.float32) - 1)
        field = finer
    field = field[:, :size, :size]
    low, high = field.min((1, 2), keepdims=True), field.max((1, 2), keepdims=True)
    clouds: Floats = ((field - low) / np.maximum(high - low, 1e-6))[..., None]
    return clouds


def _mirror(pictures: Floats, up: int, left: int) -> Floats:
    """Mirrored borders of any width."""
    height, width = pictures.shape[1:3]
    rows = np.pad(np.arange(height), up, "symmetric")
    columns = np.pad(np.arange(width), left, "symmetric")
    mirrored: Floats = pictures[:, rows][:, :, columns]
    return mirrored
