"""One method on one stream.

Two kinds of accuracy, never to be mixed:

    online          of the answers the method gave while it adapted, each frame once, as it came
    after n         of the state after the first n batches, frozen, on held-out frames of the domain of the n-th batch:
                    the same frames for every method. A batch that a method skips or collects counts, since all see the
                    same data; n = 0 is before the first batch, `all` after the last.

Nothing here knows a model: a method answers batches, a stream gives them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mgg_edge.errors import UsageError
from mgg_edge.learn.evaluation.memory import peak_memory_mb, reset_peak_memory
from mgg_edge.learn.evaluation.metrics import calibration_error, confidences, correct, timeline, worst_window
from mgg_edge.learn.methods.base import Method

__all__ = ["CHECKPOINTS", "Checks", "LabelledBatch", "LabelledSet", "Result", "evaluate"]

CHECKPOINTS = (1, 5, 10, 25)
ALL = "all"


class LabelledSet(Protocol):
    """Frames u8[n, H, W, 3] with labels i64[n]."""

    @property
    def frames(self) -> NDArray[np.uint8]: ...  # noqa: D102
    @property
    def labels(self) -> NDArray[np.int64]: ...  # noqa: D102


class LabelledBatch(LabelledSet, Protocol):
    """One batch of a stream, with the domain it comes from."""

    @property
    def domain(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Checks:
    """What is measured beside the stream.

    Attributes:
        held_out: held-out frames of a domain by its name, or None to measure nothing after n batches.
        clean: held-out frames of the source domain, or None.
        checkpoints: after how many batches, ascending.
    """

    held_out: Callable[[str], LabelledSet] | None = None
    clean: LabelledSet | None = None
    checkpoints: tuple[int, ...] = CHECKPOINTS


@dataclass(frozen=True)
class Result:
    """What came out; accuracies are fractions.

    Attributes:
        frames, batches: length of the stream.
        accuracy: online.
        calibration_error: of the online answers.
        accuracy_after: by number of batches as text, `0` and `all` among them; empty without held-out frames.
        worst_window: least online accuracy of 500 consecutive frames; None on a shorter stream.
        clean_accuracy_after: of the last state on clean frames; None without.
        domains: online accuracy by domain.
        timeline: online accuracy of consecutive parts of the stream.
        frame_ms: time of a step divided by its frames, mean without the first batch.
        peak_memory_mb: of the process during the stream.
        non_finite: answers with NaN or Inf.
        answers: each frame's `labels`, `predicted` class and `confidence`, as they came: any figure of answers online
            can be computed anew from them.
    """

    frames: int
    batches: int
    accuracy: float
    calibration_error: float
    accuracy_after: dict[str, float]
    worst_window: float | None
    clean_accuracy_after: float | None
    domains: dict[str, float]
    timeline: list[float]
    frame_ms: float
    peak_memory_mb: float
    non_finite: int
    answers: dict[str, list[Any]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


class _Record:
    """Answers as they come."""

    def __init__(self, classes: NDArray[np.int64] | None) -> None:
        self.classes = classes
        self.right: list[NDArray[np.bool_]] = []
        self.confidence: list[NDArray[np.float64]] = []
        self.labels: list[NDArray[np.int64]] = []
        self.predicted: list[NDArray[np.int64]] = []
        self.domains: list[str] = []
        self.times_ms: list[float] = []
        self.non_finite = 0

    def add(self, logits: NDArray[np.floating], batch: LabelledBatch, time_ms: float) -> None:
        logits, labels = among(logits, batch.labels, self.classes)
        self.right.append(correct(logits, labels))
        self.labels.append(batch.labels)
        self.predicted.append(logits.argmax(1) if self.classes is None else self.classes[logits.argmax(1)])
        self.confidence.append(confidences(logits))
        self.domains += [batch.domain] * len(batch.labels)
        self.times_ms.append(time_ms)
        self.non_finite += int((~np.isfinite(logits).all(1)).sum())


def evaluate(
    method: Method,
    stream: Iterable[LabelledBatch],
    checks: Checks | None = None,
    classes: NDArray[np.int64] | None = None,
) -> Result:
    """Run a method through a stream once.

    Args:
        method: what answers.
        stream: what it is asked.
        checks: what is measured beside the stream.
        classes: the only labels there are, ascending: answers are chosen among them; None for all.

    Raises:
        UsageError: the stream gives nothing.
    """
    checks = checks or Checks()
    record, after = _Record(classes), dict[str, float]()
    state, domain, size = method.init(), "", 0
    reset_peak_memory()
    for number, batch in enumerate(stream, start=1):
        if number == 1:
            size = len(batch.labels)
            _check(after, "0", method, state, batch.domain, checks, size, classes)
        start_s = time.perf_counter()
        logits, state = method.step(torch.from_numpy(np.ascontiguousarray(batch.frames)), state)
        record.add(logits.numpy(), batch, (time.perf_counter() - start_s) * 1e3)
        domain = batch.domain
        if number in checks.checkpoints:
            _check(after, str(number), method, state, domain, checks, size, classes)
    if not record.right:
        raise UsageError("evaluation: expected a stream of at least one batch, found none")
    memory_mb = peak_memory_mb()
    _check(after, ALL, method, state, domain, checks, size, classes)
    clean = None if checks.clean is None else measure_frozen(method, state, checks.clean, size, classes)
    return _result(record, after, clean, memory_mb)


def among(
    logits: NDArray[np.floating], labels: NDArray[np.int64], classes: NDArray[np.int64] | None
) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Logits f[n, K] of K classes alone, and labels i64[n] as places among them."""
    return (logits, labels) if classes is None else (logits[:, classes], np.searchsorted(classes, labels))


def measure_frozen(
    method: Method, state: Any, pictures: LabelledSet, batch: int, classes: NDArray[np.int64] | None = None
) -> float:
    """Accuracy of a frozen state on labelled frames, asked in batches as the stream's."""
    right = 0
    for start in range(0, len(pictures.labels), batch):
        part = slice(start, start + batch)
        logits = method.predict(torch.from_numpy(np.ascontiguousarray(pictures.frames[part])), state)
        right += int(correct(*among(logits.numpy(), pictures.labels[part], classes)).sum())
    return right / len(pictures.labels)


def _check(
    after: dict[str, float],
    name: str,
    method: Method,
    state: Any,
    domain: str,
    checks: Checks,
    batch: int,
    classes: NDArray[np.int64] | None,
) -> None:
    if checks.held_out is not None:
        after[name] = measure_frozen(method, state, checks.held_out(domain), batch, classes)


def _result(record: _Record, after: dict[str, float], clean: float | None, memory_mb: float) -> Result:
    right, domains = np.concatenate(record.right), np.array(record.domains)
    later = slice(1 if len(record.right) > 1 else 0, None)
    frames_timed = sum(len(part) for part in record.right[later])
    return Result(
        frames=len(right),
        batches=len(record.right),
        accuracy=float(right.mean()),
        calibration_error=calibration_error(np.concatenate(record.confidence), right),
        accuracy_after=after,
        worst_window=worst_window(right),
        clean_accuracy_after=clean,
        domains={name: float(right[domains == name].mean()) for name in dict.fromkeys(record.domains)},
        timeline=timeline(right),
        frame_ms=sum(record.times_ms[later]) / frames_timed,
        peak_memory_mb=memory_mb,
        non_finite=record.non_finite,
        answers={
            "labels": np.concatenate(record.labels).tolist(),
            "predicted": np.concatenate(record.predicted).tolist(),
            "confidence": np.concatenate(record.confidence).round(6).tolist(),
        },
    )
