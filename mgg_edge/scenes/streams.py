"""Streams: seeded batches of labelled pictures whose weather changes. Training, evaluation and run time share them.

    clean                      no weather
    iid:KIND[@S]               one corruption at severity S (5), labels in random order
    sorted[:KIND[@S]]          the same with labels in class order: one class for many frames
    drift[:KIND,KIND…]         each weather comes and goes, severities 1 2 3 4 5 5 4 3 2 1, clear between and around
    recurring[:KIND,KIND…]     each weather at severity 5, one after the other, over and over

KIND is a key of `corruptions.KINDS`. A stream can be gone through again and is then the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mgg_edge.errors import UsageError
from mgg_edge.scenes.corruptions import KINDS, SEVERITIES, corrupt
from mgg_edge.scenes.sources import ImageSource

__all__ = ["CLEAN", "STREAM_NAMES", "Batch", "Course", "Stream", "Weather", "parse_course", "parse_weather"]

CLEAN = "clean"
DRIFT_KINDS = ("fog", "gaussian_noise", "defocus_blur", "night")
RECURRING_KINDS = ("gaussian_noise", "fog", "defocus_blur", "contrast")
RECURRING_ROUNDS = 3
SORTED_RUN_FRAMES = 128  # frames of one class after the other in a class-sorted stream
STREAM_NAMES = ("clean", "iid:KIND[@SEVERITY]", "sorted[:KIND[@SEVERITY]]", "drift[:KIND,…]", "recurring[:KIND,…]")


@dataclass(frozen=True)
class Weather:
    """A corruption at a severity; `kind` is None for clear weather."""

    kind: str | None = None
    severity: int = SEVERITIES[-1]

    @property
    def name(self) -> str:
        """`clean`, or the kind with its severity, such as `fog@5`."""
        return CLEAN if self.kind is None else f"{self.kind}@{self.severity}"

    def __call__(self, frames: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Pictures u8[n, H, W, 3] in this weather."""
        return frames if self.kind is None else corrupt(frames, self.kind, self.severity, rng)


@dataclass(frozen=True)
class Course:
    """What a stream shows.

    Attributes:
        weathers: each for an equal share of the frames.
        sorted_labels: labels in class order, not at random.
    """

    weathers: tuple[Weather, ...]
    sorted_labels: bool = False


@dataclass(frozen=True)
class Batch:
    """Attributes: frames u8[B, H, W, 3]; labels i64[B]; domain: name of the weather."""

    frames: NDArray[np.uint8]
    labels: NDArray[np.int64]
    domain: str


@dataclass(frozen=True)
class Stream:
    """Batches that can be gone through again, the same each time.

    Attributes:
        source: pictures to draw.
        course: what it shows.
        batch: B.
        frames: in all; what does not fill a batch is left out.
        seed: of everything drawn.

    Raises:
        UsageError: fewer frames than one batch.
    """

    source: ImageSource
    course: Course
    batch: int
    frames: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= self.frames:
            raise UsageError(f"stream: expected at least one batch of {self.batch} frames, found {self.frames} frames")

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(self.seed)
        count = self.frames // self.batch
        order = self._sorted(count * self.batch, rng) if self.course.sorted_labels else None
        for number in range(count):
            weather = self.course.weathers[number * len(self.course.weathers) // count]
            span = slice(number * self.batch, (number + 1) * self.batch)
            labels = rng.choice(self.source.available, self.batch) if order is None else order[span]
            yield Batch(weather(self.source.draw(labels, rng), rng), labels, weather.name)

    def _sorted(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Runs of one class; classes in random order, none again before all were there."""
        available = self.source.available
        runs = -(-count // SORTED_RUN_FRAMES)
        rounds = [rng.permutation(available) for _ in range(-(-runs // len(available)))]
        return np.repeat(np.concatenate(rounds), SORTED_RUN_FRAMES)[:count]


def parse_weather(text: str) -> Weather:
    """The weather a text names: `clean`, KIND or KIND@SEVERITY.

    Raises:
        UsageError: it names none.
    """
    if text == CLEAN:
        return Weather()
    kind, _, level = text.partition("@")
    severity = int(level) if level.isdecimal() else SEVERITIES[-1] if not level else 0
    if kind not in KINDS or severity not in SEVERITIES:
        raise UsageError(f"weather: expected clean or KIND[@1…5], KIND one of {', '.join(KINDS)}, found '{text}'")
    return Weather(kind, severity)


def parse_course(text: str) -> Course:
    """The course a text names, see the top of this module.

    Raises:
        UsageError: it names none.
    """
    name, _, rest = text.partition(":")
    if name == "clean" and not rest:
        return Course((Weather(),))
    if name == "iid" and rest:
        return Course((parse_weather(rest),))
    if name == "sorted":
        return Course((parse_weather(rest or CLEAN),), sorted_labels=True)
    if name in ("drift", "recurring"):
        kinds = rest.split(",") if rest else DRIFT_KINDS if name == "drift" else RECURRING_KINDS
        weathers = [parse_weather(kind) for kind in kinds]
        return Course(tuple(_drift(weathers) if name == "drift" else RECURRING_ROUNDS * weathers))
    raise UsageError(f"stream: expected one of {', '.join(STREAM_NAMES)}, found '{text}'")


def _drift(weathers: list[Weather]) -> list[Weather]:
    clear = [Weather()] * len(SEVERITIES)
    waves = [[Weather(weather.kind, level) for level in (*SEVERITIES, *SEVERITIES[::-1])] for weather in weathers]
    return [*clear, *itertools.chain.from_iterable((*wave, *clear) for wave in waves)]
