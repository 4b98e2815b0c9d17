"""Camera-like pictures of glyphs: pose, colours, background texture, light and sensor noise.

    ink(x, y)  = master(P⁻¹(x, y))                              P a projective map: turn, size, aspect, shear, keystone,
                                   shift
    picture    = (background + texture) (1 − ink) + foreground · ink
    light(x,y) = exposure · (1 + slope · (x, y))
    frame      = round(blur(picture · light) + noise)

Everything but the noise is a `Scene`, so that a video may show one scene with small changes from frame to frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mgg_edge.errors import UsageError
from mgg_edge.scenes.glyphs import MASTER_SIZE

__all__ = ["Scene", "draw_scene", "jitter", "render"]

Floats = NDArray[np.floating]

LIGHT, DARK = (190.0, 242.0), (13.0, 77.0)  # ranges of luminance of paper and ink
INVERTED = 0.4  # share of scenes with light glyphs on dark ground
TINT = 22.0  # standard deviation of a colour channel around the luminance
GRIDS = (4, 9)  # knots across of the two scales of background texture
SUPERSAMPLING = 2  # samples across one pixel: masters are sharper than 32 pixels can show
MIN_SIZE, MAX_SIZE = 16, 256


@dataclass(frozen=True)
class Scene:
    """What n pictures show, but for the sensor's noise.

    Attributes:
        pose: f32[n, 8]: angle, shear (radians), size, aspect (ratios), keystone across and down, shift across and
            down (all of the picture's side).
        foreground: f32[n, 3], colour of the glyph, 0 to 255.
        background: f32[n, 3], colour of the paper, 0 to 255.
        texture: f32[n, 4·4 + 9·9], knots of the two scales of the paper's texture, in grey levels.
        light: f32[n, 3]: exposure (ratio), slope across, slope down (share of it from middle to edge).
        blur: f32[n], standard deviation of the lens's blur in pixels of a picture of 32.
        noise: f32[n], standard deviation of the sensor's noise in grey levels.
    """

    pose: Floats
    foreground: Floats
    background: Floats
    texture: Floats
    light: Floats
    blur: Floats
    noise: Floats

    def __len__(self) -> int:
        return len(self.noise)


def draw_scene(count: int, rng: np.random.Generator) -> Scene:
    """Draw n scenes: everyday views, no weather."""
    uniform = rng.uniform
    pose = np.stack(
        [
            uniform(-0.175, 0.175, count),
            uniform(-0.12, 0.12, count),
            uniform(0.85, 1.15, count),
            uniform(0.88, 1.13, count),
            uniform(-0.1, 0.1, count),
            uniform(-0.1, 0.1, count),
            uniform(-0.06, 0.06, count),
            uniform(-0.06, 0.06, count),
        ],
        1,
    )
    foreground, background = _colours(count, rng)
    strength = uniform(0, 9, (count, len(GRIDS)))
    texture = np.concatenate(
        [rng.normal(0, 1, (count, grid * grid)) * strength[:, [scale]] for scale, grid in enumerate(GRIDS)], 1
    )
    light = np.stack([uniform(0.85, 1.05, count), uniform(-0.15, 0.15, count), uniform(-0.15, 0.15, count)], 1)
    parts = (pose, foreground, background, texture, light, uniform(0.2, 0.6, count), uniform(1.3, 5.1, count))
    return Scene(*(part.astype(np.float32) for part in parts))


def jitter(scene: Scene, rng: np.random.Generator, amount: float = 1.0) -> Scene:
    """The same scenes a frame later: camera shake of about half a pixel of 32, a breath of light.

    Args:
        scene: as the frame before showed it.
        rng: where the shake is drawn from.
        amount: 0 for none, 1 for a hand-held camera.
    """
    shake = np.array([0.015, 0.008, 0.01, 0.004, 0.006, 0.006, 0.012, 0.012], np.float32)
    flicker = np.array([0.01, 0.01, 0.01], np.float32)
    pose = scene.pose + (amount * shake) * rng.standard_normal(scene.pose.shape, np.float32)
    light = scene.light + (amount * flicker) * rng.standard_normal(scene.light.shape, np.float32)
    return replace(scene, pose=pose, light=light)


def render(masters: NDArray[np.uint8], scene: Scene, size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Render masters.

    Args:
        masters: u8[n, 48, 48], coverage of one glyph each.
        scene: n scenes.
        size: width and height of the pictures in pixels, 16 to 256.
        rng: where the sensor's noise is drawn from.

    Returns:
        u8[n, size, size, 3], RGB.

    Raises:
        UsageError: masters of another shape or number, or a size out of range.
    """
    if masters.shape != (len(scene), MASTER_SIZE, MASTER_SIZE) or masters.dtype != np.uint8:
        expected = [len(scene), MASTER_SIZE, MASTER_SIZE]
        raise UsageError(f"render: expected masters u8{expected}, found {masters.dtype}{list(masters.shape)}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UsageError(f"render: expected a size of {MIN_SIZE} to {MAX_SIZE} pixels, found {size}")
    ink = _warp(masters, scene.pose, size)[..., None]
    paper = scene.background[:, None, None] + _texture(scene.texture, size)[..., None]
    picture: Floats = paper + (scene.foreground[:, None, None] - paper) * ink
    across = np.linspace(-1, 1, size, dtype=np.float32)
    exposure, right, down = (scene.light[:, index, None, None] for index in range(3))
    picture *= (exposure * (1 + right * across + down * across[:, None]))[..., None]
    picture = _blur(picture, scene.blur * np.float32(size / 32))
    picture += scene.noise[:, None, None, None] * rng.standard_normal(picture.shape, np.float32)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _colours(count: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Colours [n, 3] of glyphs and of what they stand on."""
    light, dark = (rng.uniform(*bounds, (count, 1)) + rng.normal(0, TINT, (count, 3)) for bounds in (LIGHT, DARK))
    inverted = rng.random((count, 1)) < INVERTED
    return np.where(inverted, light, dark), np.where(inverted, dark, light)


def _blur(picture: Floats, sigma: Floats) -> Floats:
    """Pictures f32[n, H, W, 3] seen through a lens: a Gaussian of each picture's own width, cut at three of it."""
    reach = max(1, math.ceil(3 * float(sigma.max(initial=0.0))))
    places = np.arange(-reach, reach + 1)
    kernels = np.exp(-0.5 * (places / np.maximum(sigma, 1e-3)[:, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdims=True)).astype(np.float32)  # [n, taps]
    for axis in (1, 2):
        padding = [(0, 0)] * 4
        padding[axis] = (reach, reach)
        padded, extent = np.pad(picture, padding, "edge"), picture.shape[axis]
        picture = np.zeros_like(picture)
        for tap in range(len(places)):
            part = padded[:, tap : tap + extent] if axis == 1 else padded[:, :, tap : tap + extent]
            picture += kernels[:, tap, None, None, None] * part
    return picture


def _texture(knots: Floats, size: int) -> Floats:
    """Smooth fields through the knots of both scales: f32[n, size, size]."""
    fields = np.zeros((len(knots), size, size), np.float32)
    start = 0
    for grid in GRIDS:
        weights = _interpolation(grid, size)  # [size, grid]
        part = knots[:, start : start + grid * grid].reshape(-1, grid, grid)
        fields += weights @ part @ weights.T
        start += grid * grid
    return fields


def _interpolation(knots: int, size: int) -> Floats:
    """Weights [size, knots] of linear interpolation between evenly spaced knots, the outer ones on the edges."""
    places = np.linspace(0, knots - 1, size)[:, None]
    weights: Floats = np.maximum(0, 1 - np.abs(places - np.arange(knots))).astype(np.float32)
    return weights


def _warp(masters: NDArray[np.uint8], pose: Floats, size: int) -> Floats:
    """Coverage of the posed glyphs, f32[n, size, size] in 0 … 1."""
    fine = size * SUPERSAMPLING
    ink = np.empty((len(masters), fine, fine), np.uint8)
    for index, coefficients in enumerate(_inverse_maps(pose, fine)):
        posed = Image.fromarray(masters[index]).transform(
            (fine, fine), Image.Transform.PERSPECTIVE, coefficients.tolist(), Image.Resampling.BILINEAR
        )
        ink[index] = np.asarray(posed)
    blocks = ink.reshape(len(masters), size, SUPERSAMPLING, size, SUPERSAMPLING)
    coverage: Floats = blocks.mean((2, 4), dtype=np.float32) / np.float32(255)
    return coverage


def _inverse_maps(pose: Floats, size: int) -> NDArray[np.float64]:
    """Pillow's eight coefficients [n, 8] of the maps from picture to master coordinates."""
    angle, shear, scale, aspect, keystone_x, keystone_y, shift_x, shift_y = pose.astype(np.float64).T
    n = len(pose)
    one, zero = np.ones(n), np.zeros(n)
    turn = _matrices(np.cos(angle), -np.sin(angle), zero, np.sin(angle), np.cos(angle), zero, zero, zero, one)
    lean = _matrices(one, np.tan(shear), zero, zero, one, zero, zero, zero, one)
    root = np.sqrt(aspect)
    stretch = _matrices(scale * root, zero, zero, zero, scale / root, zero, zero, zero, one)
    view = _matrices(one, zero, 2 * shift_x, zero, one, 2 * shift_y, keystone_x, keystone_y, one)
    forward = view @ turn @ lean @ stretch  # master to picture, both in coordinates from −1 to 1
    # The pixel grids: Pillow adds the half pixel of the picture itself and maps edges to edges.
    to_unit = np.array([[2 / size, 0, -1], [0, 2 / size, -1], [0, 0, 1]])
    half = MASTER_SIZE / 2
    from_unit = np.array([[half, 0, half], [0, half, half], [0, 0, 1]])
    maps = from_unit @ np.linalg.inv(forward) @ to_unit
    coefficients: NDArray[np.float64] = (maps / maps[:, 2:, 2:]).reshape(n, 9)[:, :8]
    return coefficients


def _matrices(*entries: NDArray[np.float64]) -> NDArray[np.float64]:
    side = math.isqrt(len(entries))
    return np.stack(entries, 1).reshape(-1, side, side)
