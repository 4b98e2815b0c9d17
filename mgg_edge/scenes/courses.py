"""What a stream shows, by name: which weathers in which order, and in which order the labels come.

    clean                          no weather, labels at random
    iid:KINDS                      each weather for an equal share of the frames, labels at random
    continual[:KINDS]              the same over the fifteen kinds of ImageNet-C
    mixed[:KINDS]                  every frame in a weather of its own among these
    correlated:GAMMA[:KINDS]       labels cluster in time: each class is spread over the stream's slots by a Dirichlet
                                   distribution of concentration GAMMA (arXiv 2208.05117); less is more clustered
    label-shift[:RATIO][:KINDS]    one class after the other is RATIO (100) times as likely as each other one
    batch1[:KINDS]                 one frame at a time
    sorted[:KINDS]                 labels in class order, one class for many frames
    drift[:KINDS]                  each weather comes and goes, severities 1 2 3 4 5 5 4 3 2 1, clear between and around
    recurring[:KINDS]              each weather at severity 5, one after the other, over and over
    one-pass[:KINDS]               every picture of a folder once, whatever number of frames is asked for
    folder:NAME                    every picture of that folder within the data's, which has folders of classes, once

KINDS is KIND[@SEVERITY] or several joined by `+`, KIND a key of `corruptions.KINDS`; severity 5 where none is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mgg_edge.errors import UsageError
from mgg_edge.scenes.corruptions import BENCHMARK_KINDS, KINDS, SEVERITIES, corrupt
from mgg_edge.scenes.label_orders import AtRandom, Correlated, InRuns, LabelOrder, Shifting

__all__ = ["CLEAN", "FOLDER", "STREAM_NAMES", "Course", "Weather", "parse_course", "parse_weather"]

CLEAN, MIXED, FOLDER = "clean", "mixed", "folder"
DRIFT_KINDS = ("fog", "gaussian_noise", "defocus_blur", "night")
RECURRING_KINDS = ("gaussian_noise", "fog", "defocus_blur", "contrast")
RECURRING_ROUNDS = 3
DEFAULT_RATIO = 100.0


@dataclass(frozen=True)
class Weather:
    """What befalls pictures.

    Attributes:
        choices: kinds with their severities, of which each picture meets one; none for clear weather.
        label: what pictures are called that come as they are, or empty.
    """

    choices: tuple[tuple[str, int], ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """`clean`, a kind with its severity such as `fog@5`, or `mixed:` and several."""
        if not self.choices:
            return self.label or CLEAN
        names = "+".join(f"{kind}@{severity}" for kind, severity in self.choices)
        return names if len(self.choices) == 1 else f"{MIXED}:{names}"

    def __call__(self, frames: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Pictures u8[n, H, W, 3] in this weather."""
        if not self.choices:
            return frames
        if len(self.choices) == 1:
            return corrupt(frames, *self.choices[0], rng)
        drawn, weathered = rng.integers(len(self.choices), size=len(frames)), np.empty_like(frames)
        for place, choice in enumerate(self.choices):
            if (own := drawn == place).any():
                weathered[own] = corrupt(frames[own], *choice, rng)
        return weathered


@dataclass(frozen=True)
class Course:
    """What a stream shows.

    Attributes:
        weathers: each for an equal share of the frames.
        order: in which the labels come.
        single: one frame a batch.
        once: every picture of the source once, instead of a number of draws.
    """

    weathers: tuple[Weather, ...]
    order: LabelOrder = field(default_factory=AtRandom)
    single: bool = False
    once: bool = False


def parse_weather(text: str) -> Weather:
    """The weather a text names: `clean`, KIND[@SEVERITY], or `mixed:` and several joined by `+`.

    Raises:
        UsageError: it names none.
    """
    if text == CLEAN:
        return Weather()
    if text.startswith(f"{MIXED}:"):
        parts = [parse_weather(part) for part in text.removeprefix(f"{MIXED}:").split("+")]
        return Weather(tuple(itertools.chain.from_iterable(part.choices for part in parts)))
    kind, _, level = text.partition("@")
    severity = int(level) if level.isdecimal() else SEVERITIES[-1] if not level else 0
    if kind not in KINDS or severity not in SEVERITIES:
        raise UsageError(f"weather: expected clean or KIND[@1…5], KIND one of {', '.join(KINDS)}, found '{text}'")
    return Weather(((kind, severity),))


def parse_course(text: str) -> Course:
    """The course a text names, see the top of this module.

    Raises:
        UsageError: it names none.
    """
    name, *rest = text.split(":")
    entry = _COURSES.get(name)
    if entry is None or len(rest) < entry.least or len(rest) > entry.most:
        raise UsageError(f"stream: expected one of {', '.join(STREAM_NAMES)}, found '{text}'")
    return entry.parse(rest)


@dataclass(frozen=True)
class _Entry:
    """How a course is written: what follows its name, at least and at most how many parts, and how they are read."""

    form: str
    least: int
    most: int
    parse: Callable[[list[str]], Course]


def _kinds(parts: list[str], default: tuple[str, ...]) -> tuple[Weather, ...]:
    return tuple(parse_weather(kind) for kind in (parts[-1].split("+") if parts else default))


def _number(text: str, what: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least < value < float("inf"):
        raise UsageError(f"stream: {what}: expected a number above {least:g}, found '{text}'")
    return value


def _clean(_parts: list[str]) -> Course:
    return Course((Weather(),))


def _iid(parts: list[str]) -> Course:
    return Course(_kinds(parts, (CLEAN,)))


def _continual(parts: list[str]) -> Course:
    return Course(_kinds(parts, BENCHMARK_KINDS))


def _mixed(parts: list[str]) -> Course:
    weathers = _kinds(parts, BENCHMARK_KINDS)
    if Weather() in weathers:
        raise UsageError("stream: mixed expected kinds of weather, found 'clean' among them")
    return Course((Weather(tuple(itertools.chain.from_iterable(one.choices for one in weathers))),))


def _correlated(parts: list[str]) -> Course:
    return replace(_iid(parts[1:]), order=Correlated(_number(parts[0], "GAMMA", 0.0)))


def _label_shift(parts: list[str]) -> Course:
    numeric = parts and not parts[0][:1].isalpha()
    ratio = _number(parts[0], "RATIO", 1.0) if numeric else DEFAULT_RATIO
    return replace(_iid(parts[1:] if numeric else parts), order=Shifting(ratio))


def _drift(parts: list[str]) -> Course:
    clear = [Weather()] * len(SEVERITIES)
    waves = [
        [Weather(tuple((kind, level) for kind, _ in weather.choices)) for level in (*SEVERITIES, *SEVERITIES[::-1])]
        for weather in _kinds(parts, DRIFT_KINDS)
    ]
    return Course((*clear, *itertools.chain.from_iterable((*wave, *clear) for wave in waves)))


_COURSES = {
    "clean": _Entry("", 0, 0, _clean),
    "iid": _Entry(":KINDS", 1, 1, _iid),
    "continual": _Entry("[:KINDS]", 0, 1, _continual),
    "mixed": _Entry("[:KINDS]", 0, 1, _mixed),
    "correlated": _Entry(":GAMMA[:KINDS]", 1, 2, _correlated),
    "label-shift": _Entry("[:RATIO][:KINDS]", 0, 2, _label_shift),
    "batch1": _Entry("[:KINDS]", 0, 1, lambda parts: replace(_iid(parts), single=True)),
    "sorted": _Entry("[:KINDS]", 0, 1, lambda parts: replace(_iid(parts), order=InRuns())),
    "drift": _Entry("[:KINDS]", 0, 1, _drift),
    "recurring": _Entry("[:KINDS]", 0, 1, lambda parts: Course(RECURRING_ROUNDS * _kinds(parts, RECURRING_KINDS))),
    FOLDER: _Entry(":NAME", 1, 1, lambda parts: Course((Weather(label=parts[0]),), once=True)),
    "one-pass": _Entry("[:KINDS]", 0, 1, lambda parts: replace(_iid(parts), once=True)),
}
STREAM_NAMES = tuple(f"{name}{entry.form}" for name, entry in _COURSES.items())
