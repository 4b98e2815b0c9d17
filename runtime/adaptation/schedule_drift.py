"""How far what a camera shows is from what the model was trained on, read from features that inference computes anyway.

For features f_t ∈ R^D of frame t and the bundle's source statistics μ_S, σ_S:

    μ_t = μ_{t−1} + (f_t − μ_{t−1}) / min(t, window)         running mean over about `window` frames
    z   = (μ_t − μ_S) / max(σ_S, σ_floor)                     per feature, in standard deviations of the source
    drift = √(mean_d z²)                                      0: as the source; about 1: one standard deviation off

σ_floor is a hundredth of the mean σ_S: a feature that was constant on the source must not decide alone. Two frames'
drift differs also by what they show, so thresholds on it are ratios to a baseline, never absolute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mgg_edge.compat import Self
from mgg_edge.errors import UsageError
from mgg_edge.runtime.bundle.bundle import Bundle

__all__ = ["DriftMeter", "SourceStatistics"]

WINDOW_FRAMES = 32
FLOOR_FRACTION = 1e-2
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SourceStatistics:
    """Mean and standard deviation of the features on the source, f32[D] each; the deviation is positive."""

    mean: Vector
    std: Vector

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """The bundle's statistics, with σ floored.

        Raises:
            UsageError: the bundle has none.
        """
        mean, std = (bundle.weights.get(f"statistics.{name}") for name in ("mean", "std"))
        if mean is None or std is None:
            raise UsageError(f"{bundle.path}: expected source statistics to measure drift by, found none")
        floor = max(FLOOR_FRACTION * float(std.mean(dtype=np.float64)), float(np.finfo(np.float32).tiny))
        return cls(mean.astype(np.float32), np.maximum(std.astype(np.float32), np.float32(floor)))

    def drift(self, mean: npt.NDArray[np.floating]) -> float:
        """√(mean z²) of a mean feature vector [D]; NaN or infinite where the vector is not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = (mean.astype(np.float64) - self.mean) / self.std
            return float(np.sqrt(np.mean(scaled * scaled)))


@dataclass(frozen=True)
class DriftMeter:
    """The running mean of features and its drift; immutable.

    Attributes:
        statistics: what to measure against.
        window: frames the mean reaches back, about.
        mean: μ_t, f64[D], or None before the first frame.
        frames: t, frames seen, counted up to `window`.
    """

    statistics: SourceStatistics
    window: int = WINDOW_FRAMES
    mean: npt.NDArray[np.float64] | None = None
    frames: int = 0

    def observe(self, features: Vector) -> Self:
        """The meter after one frame; features that are not finite are passed over, as one Inf would stay for ever."""
        if not np.isfinite(features).all():
            return self
        mean = features.astype(np.float64)
        frames = min(self.frames + 1, self.window)
        if self.mean is not None:
            mean = self.mean + (mean - self.mean) / frames
        return replace(self, mean=mean, frames=frames)

    @property
    def drift(self) -> float:
        """Drift of the running mean; 0 before the first frame."""
        return 0.0 if self.mean is None else self.statistics.drift(self.mean)

    def restart(self) -> Self:
        """The meter without what it has seen: the features of another θ are not comparable."""
        return replace(self, mean=None, frames=0)
