"""A micro-buffer of B distinct frames: the batch of one adaptation step.

Neighbouring frames of a video are nearly equal, and the discrepancy term needs spread within the batch. A
frame is taken only if it differs from every frame already held:

    mean |thumbnail − thumbnail'| ≥ 2 grey levels

where a thumbnail is the luma averaged over a grid of 16 × 16 cells. Averaging takes sensor noise out: noise
of σ = 8 grey levels moves a cell of 14 × 14 pixels by 0.6 and the mean difference of two noisy copies of a
picture by about 0.6, well below the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import UsageError

__all__ = ["MIN_DIFFERENCE_LEVELS", "FrameBuffer", "thumbnail"]

MIN_DIFFERENCE_LEVELS = 2.0
THUMBNAIL_CELLS = 16
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclass(frozen=True)
class FrameBuffer:
    """Immutable; `add` returns the next buffer.

    Attributes:
        capacity: B, frames that fill it.
        frames: distinct frames u8[H,W,3] in order of arrival, at most B.
        thumbnails: f32[cells, cells] of each frame.
    """

    capacity: int
    frames: tuple[npt.NDArray[np.uint8], ...] = ()
    thumbnails: tuple[npt.NDArray[np.float32], ...] = ()

    @property
    def is_full(self) -> bool:
        """Whether B distinct frames are held."""
        return len(self.frames) >= self.capacity

    def add(self, frame: npt.NDArray[np.uint8]) -> FrameBuffer:
        """The buffer with a copy of `frame` u8[H,W,3], or this buffer if it is full or holds a near-duplicate."""
        if self.is_full:
            return self
        small = thumbnail(frame)
        if not all(_difference_levels(small, other) >= MIN_DIFFERENCE_LEVELS for other in self.thumbnails):
            return self
        return replace(self, frames=(*self.frames, frame.copy()), thumbnails=(*self.thumbnails, small))

    def batch(self) -> npt.NDArray[np.uint8]:
        """The frames as u8[B,H,W,3].

        Raises:
            UsageError: the buffer is not full.
        """
        if not self.is_full:
            raise UsageError(f"buffer: expected {self.capacity} frames, found {len(self.frames)}")
        return np.stack(self.frames)

    def clear(self) -> FrameBuffer:
        """An empty buffer of the same capacity."""
        return FrameBuffer(self.capacity)


def thumbnail(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Luma of a frame u8[H,W,3], averaged over at most 16 × 16 cells; f32, grey levels 0–255."""
    height, width, _ = frame.shape
    rows, columns = _cell_starts(height), _cell_starts(width)
    # Summed in integers before anything is multiplied: exact, and no float copy of the frame.
    sums = np.add.reduceat(np.add.reduceat(frame, rows, axis=0, dtype=np.uint32), columns, axis=1)
    areas = np.outer(np.diff(rows, append=height), np.diff(columns, append=width)).astype(np.float32)
    luma: npt.NDArray[np.float32] = (sums.astype(np.float32) @ _LUMA) / areas
    return luma


def _cell_starts(extent: int) -> npt.NDArray[np.intp]:
    cells = min(THUMBNAIL_CELLS, extent)
    return np.arange(cells) * extent // cells


def _difference_levels(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> float:
    return float(np.abs(first - second).mean()) if first.shape == second.shape else float("inf")
