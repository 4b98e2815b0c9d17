"""A thumbnail of a frame, and how far two frames are apart: what gate and buffer look at instead of pixels.

A thumbnail is the luma averaged over a grid of at most 16 × 16 cells; the difference of two frames is

    d = mean |thumbnail − thumbnail'|        grey levels, 0 to 255

Averaging takes sensor noise out: noise of σ = 8 grey levels moves a cell of 14 × 14 pixels by 0.6 and d of two noisy
copies of a picture by about 0.6.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

__all__ = ["THUMBNAIL_CELLS", "difference_levels", "thumbnail"]

THUMBNAIL_CELLS = 16
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def thumbnail(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Luma of a frame u8[H,W,3], averaged over at most 16 × 16 cells; f32, grey levels 0–255."""
    rows, columns, areas = _cells(*frame.shape[:2])
    # Summed in integers before anything is multiplied: exact, and no float copy of the frame.
    sums = np.add.reduceat(np.add.reduceat(frame, rows, axis=0, dtype=np.uint32), columns, axis=1)
    luma: npt.NDArray[np.float32] = (sums.astype(np.float32) @ _LUMA) / areas
    return luma


def difference_levels(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
    """d of two thumbnails, grey levels; infinite where their shapes differ."""
    return float(np.abs(first - second).mean()) if first.shape == second.shape else float("inf")


@lru_cache(maxsize=64)
def _cells(height: int, width: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Where the cells of a frame begin, by rows and columns, and their areas; kept for the sizes of all cameras."""
    rows, columns = _cell_starts(height), _cell_starts(width)
    areas = np.outer(np.diff(rows, append=height), np.diff(columns, append=width)).astype(np.float32)
    for array in (rows, columns, areas):
        array.setflags(write=False)
    return rows, columns, areas


def _cell_starts(extent: int) -> npt.NDArray[np.intp]:
    cells = min(THUMBNAIL_CELLS, extent)
    return np.arange(cells) * extent // cells
