"""What is measured of answers.

    accuracy            share of frames named right; an answer with NaN or Inf is wrong
    calibration error   Σ_b n_b/n · |accuracy_b − confidence_b| over 15 equal bins of the largest probability
                        (arXiv 1706.04599, equation 3)
    worst window        least accuracy of any 500 consecutive frames

All of it is numpy on the answers of a whole stream.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["calibration_error", "confidences", "correct", "timeline", "worst_window"]

BINS = 15
WINDOW_FRAMES = 500
TIMELINE_POINTS = 100


def correct(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each frame is named right: logits f[n, C], labels i64[n] to bool[n]."""
    return (logits.argmax(1) == labels) & np.isfinite(logits).all(1)


def confidences(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Largest probability of each frame f64[n]; 1/C where logits f[n, C] are not finite."""
    finite = np.isfinite(logits).all(1, keepdims=True)
    values = np.where(finite, logits, 0.0).astype(np.float64)
    weights = np.exp(values - values.max(1, keepdims=True))
    largest: NDArray[np.float64] = weights.max(1) / weights.sum(1)
    return largest


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> float:
    """Expected calibration error of n ≥ 1 answers, in 0 … 1."""
    places = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(places, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def worst_window(right: NDArray[np.bool_], frames: int = WINDOW_FRAMES) -> float | None:
    """Least accuracy of any `frames` consecutive answers; None if there are fewer."""
    if len(right) < frames:
        return None
    sums = np.concatenate([[0], np.cumsum(right)])
    return float((sums[frames:] - sums[:-frames]).min() / frames)


def timeline(right: NDArray[np.bool_], points: int = TIMELINE_POINTS) -> list[float]:
    """Accuracy of consecutive, nearly equal parts of the stream, in order; at most `points` of them."""
    parts = np.array_split(right, min(points, len(right)))
    return [float(part.mean()) for part in parts]
