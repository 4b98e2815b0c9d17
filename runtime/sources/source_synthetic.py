"""A source made of numbers, with faults where they are asked for: for tests, soak runs and rehearsals on a device.

    synthetic:frames=1000,width=64,height=48,rate=30,seed=7,faults=torn+black,share=0.05

Every picture differs from the others, and depends on the seed and its index alone. Faults (`share` of the pictures,
chosen by the seed):

    black, white    a blank picture
    frozen          the picture before, again
    torn            the lower part is of an earlier picture
    noise           uniform noise
    shape           not a picture: u8[H,W,4], f32[H,W,3] or without a pixel, in turn
    backwards       the time of 1 s before
    hang            nothing for `hang_s` seconds, for ever by default
    disconnect      the source fails
    crash           the process dies (only in a decoding process: `synthetic:…,live=1`)

`every=N` puts the faults at every N-th picture instead. Bytes have no NaN; that fault is for the engine's outputs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mgg_edge.compat import Self
from mgg_edge.errors import SourceError, UsageError
from mgg_edge.runtime.sources.source import ClosingSource, Frame

__all__ = ["FAULTS", "SyntheticOptions", "SyntheticSource", "synthetic_picture"]

FAULTS = ("black", "white", "frozen", "torn", "noise", "shape", "backwards", "hang", "disconnect", "crash")
TEARING = 0.6  # of the height is of the new picture
_PREFIX = "synthetic:"


@dataclass(frozen=True)
class SyntheticOptions:
    """What to make.

    Attributes:
        frames: number of pictures; 0 never ends.
        width, height: pixels.
        rate: pictures per second, as stated.
        seed: of pictures and faults.
        faults: names joined by `+`.
        share: of the pictures that are faulty, 0 to 1.
        every: 0, or the distance of faulty pictures.
        paced: 1 delivers in real time, 0 as fast as possible.
        hang_s: length of a `hang`; 0 is for ever.
        live: 1 decodes in a process of its own, as a camera would be.
    """

    frames: int = 0
    width: int = 64
    height: int = 48
    rate: float = 30.0
    seed: int = 0
    faults: str = ""
    share: float = 0.05
    every: int = 0
    paced: int = 0
    hang_s: float = 0.0
    live: int = 0

    @property
    def fault_names(self) -> tuple[str, ...]:
        """The faults to choose from."""
        return tuple(filter(None, self.faults.split("+")))

    def __post_init__(self) -> None:
        if unknown := set(self.fault_names) - set(FAULTS):
            raise UsageError(f"synthetic: expected faults among {', '.join(FAULTS)}, found '{min(unknown)}'")
        sizes = 1 <= self.width <= 1 << 13 and 1 <= self.height <= 1 << 13
        if not (sizes and 0 < self.rate <= 1000 and 0 <= self.share <= 1 and self.hang_s >= 0):
            raise UsageError("synthetic: expected width and height from 1 to 8192, rate to 1000, share from 0 to 1")
        if not (self.frames >= 0 and self.every >= 0 and self.seed >= 0):
            raise UsageError("synthetic: expected frames, every and seed of at least 0")

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Options of a text such as `synthetic:frames=100,faults=torn`.

        Raises:
            UsageError: an unknown name, or a value of another type.
        """
        kinds: dict[str, type[Any]] = {field.name: type(getattr(cls, field.name)) for field in fields(cls)}
        values: dict[str, Any] = {}
        for item in filter(None, spec.removeprefix(_PREFIX).split(",")):
            name, _, value = item.partition("=")
            if name not in kinds:
                raise UsageError(f"synthetic: expected one of {', '.join(kinds)}, found '{name}'")
            try:
                values[name] = kinds[name](value)
            except ValueError as error:
                raise UsageError(f"synthetic: {name}: expected a number, found '{value}'") from error
        return cls(**values)


class SyntheticSource(ClosingSource):
    """Deterministic pictures and faults.

    Args:
        options: what to make.
        in_decoder: this is a decoding process, which may crash.
    """

    def __init__(self, options: SyntheticOptions | None = None, *, in_decoder: bool = False) -> None:
        self.options = options or SyntheticOptions()
        self.name, self.live = "synthetic", bool(self.options.paced)
        self.width, self.height = self.options.width, self.options.height
        self.rate = Fraction(self.options.rate).limit_denominator(1001)
        self.frames_expected = self.options.frames or None
        self._in_decoder, self._closing = in_decoder, threading.Event()

    @classmethod
    def parse(cls, spec: str, *, in_decoder: bool = False, **changes: Any) -> Self:
        """The source of a text such as `synthetic:frames=100`."""
        return cls(replace(SyntheticOptions.parse(spec), **changes), in_decoder=in_decoder)

    def __iter__(self) -> Iterator[Frame]:
        """Yield pictures; the same ones each time.

        Raises:
            SourceError: the fault `disconnect`.
        """
        start_s, index = time.monotonic(), 0
        before = self._picture(0)
        while not self.options.frames or index < self.options.frames:
            if self.options.paced and self._closing.wait(max(0.0, start_s + index / self.rate - time.monotonic())):
                return
            fault = fault_at(self.options, index)
            if fault in ("hang", "disconnect", "crash"):
                self._stop(fault)
            if self._closing.is_set():
                return
            image = self._faulty(fault, index, before)
            time_s = float(index / self.rate) - (1.0 if fault == "backwards" else 0.0)
            yield Frame(index, time_s, image)
            before, index = image if image.shape == before.shape else before, index + 1

    def interrupt(self) -> None:
        """End the iteration, also out of a `hang`."""
        self._closing.set()

    def _picture(self, index: int) -> npt.NDArray[np.uint8]:
        return synthetic_picture(index, self.height, self.width, self.options.seed)

    def _faulty(self, fault: str | None, index: int, before: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        shape = (self.height, self.width, 3)
        if fault in ("black", "white"):
            return np.full(shape, 0 if fault == "black" else 255, np.uint8)
        if fault == "frozen":
            return before.copy()
        if fault == "noise":
            return _random(self.options.seed, index, 2).integers(0, 256, shape, np.uint8)
        if fault == "shape":
            odd: tuple[Any, ...] = (
                np.zeros((self.height, self.width, 4), np.uint8),
                np.zeros(shape, np.float32),
                np.zeros((0, self.width, 3), np.uint8),
            )
            return cast("npt.NDArray[np.uint8]", odd[index % len(odd)])
        image = self._picture(index)
        if fault == "torn":
            row = int(self.height * TEARING)
            image[row:] = self._picture(max(0, index - 5))[row:]
        return image

    def _stop(self, fault: str) -> None:
        if fault == "disconnect":
            raise SourceError("synthetic: disconnected, as asked")
        if fault == "crash":
            if not self._in_decoder:
                raise UsageError("synthetic: the fault 'crash' needs live=1: it kills the process it happens in")
            os.kill(os.getpid(), signal.SIGSEGV)
        self._closing.wait(self.options.hang_s or None)


def fault_at(options: SyntheticOptions, index: int) -> str | None:
    """The fault of one picture, or None; depends on the options alone. The first picture is good."""
    names = options.fault_names
    if not names or not index:
        return None
    if options.every:
        turn, rest = divmod(index, options.every)
        return None if rest else names[(turn - 1) % len(names)]
    random = _random(options.seed, index, 1)
    return names[int(random.integers(len(names)))] if random.random() < options.share else None


def synthetic_picture(index: int, height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A picture u8[height,width,3]: smooth colours that wander with the index, and a moving block."""
    random = _random(seed, index, 0)
    corners = random.integers(0, 256, (2, 2, 3)).astype(np.float32)
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    columns = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    top = corners[0, 0] * (1 - columns) + corners[0, 1] * columns
    image = (top * (1 - rows) + (corners[1, 0] * (1 - columns) + corners[1, 1] * columns) * rows).astype(np.uint8)
    picture: npt.NDArray[np.uint8] = image
    edge = max(1, min(height, width) // 4)
    row, column = (index * 3) % max(1, height - edge), (index * 5) % max(1, width - edge)
    picture[row : row + edge, column : column + edge] = random.integers(0, 256, 3, np.uint8)
    return picture


def _random(seed: int, index: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng((seed, index, purpose))
