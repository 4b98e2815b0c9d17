"""The demonstration as a video a person can follow.

┌──────────────────────────────────────────────────────────┐
│  title                                            NIGHT  │
│                           frozen      mgg      adapted   │
│ ┌───────────┐              3 ✗        8 ✗        B ✓     │   what each reads, and whether it is right
│ │  camera   │              41 %       52 %       87 %    │   right ones of the last 60
│ │  picture  │                                            │
│ └───────────┘            ● frozen   ● frozen  ● adapted  │
│  it shows B                                              │
│  ▒ ▒ ▒ ▒ ▒ ▒  the last pictures                          │
│  ───╲______╱‾‾‾╲____  accuracy over time, weather behind │
└──────────────────────────────────────────────────────────┘

One of six pictures is shown, long enough to be read, longer where only the adapted reader is right; all of them count.
A card of the totals comes last.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mgg_edge.runtime.demo import ADAPTED, LATELY_FRAMES, READERS, Scores
from mgg_edge.runtime.outputs.sinks import VideoFile
from mgg_edge.runtime.prediction import Prediction
from mgg_edge.runtime.sources.source_demo import COURSE, DemoFrame
from mgg_edge.scenes.glyphs import CHARACTERS

__all__ = ["DemoVideo", "draw_mark"]

WIDTH, HEIGHT = 1280, 720
RATE, EVERY = Fraction(15), 6  # one of six frames is shown: a reader is faster than an eye
SHOWN, HELD, APART = 2, 10, 30  # pictures of a shown frame, of one that tells something, and frames between two such
CARD = 75  # pictures of the last card
CAMERA = (40, 96, 264)  # left, top, side
STRIP = (40, 420, 64, 18)  # left, top, side, pictures
CHART = (70, 520, 1170, 160)  # left, top, width, height
COLUMNS, COLUMN_WIDTH = (400, 690, 980), 260
BACKGROUND, PANEL, TEXT, FAINT = (16, 20, 26), (27, 33, 42), (236, 240, 245), (128, 138, 150)
RIGHT, WRONG = (78, 214, 140), (240, 98, 98)
COLOURS = {"frozen": (150, 160, 172), "mgg": (255, 190, 84), "adapted": (78, 214, 140)}
TITLES = {"frozen": "frozen", "mgg": "mgg (paper)", "adapted": "adapted (default)"}
SKY = {"clear": (24, 34, 46), "fog": (58, 62, 68), "noise": (56, 44, 60), "blur": (38, 50, 64), "night": (10, 12, 24)}


class DemoVideo:
    """Draws and writes the demonstration.

    Args:
        path: of the video; see `VideoFile`.
        frames: of the whole stream, for the time axis.
    """

    def __init__(self, path: str | os.PathLike[str], frames: int) -> None:
        self._video = VideoFile(path, WIDTH, HEIGHT, RATE)
        self._frames = frames
        self._lately: deque[npt.NDArray[np.uint8]] = deque(maxlen=STRIP[3])
        self._curves: dict[str, list[tuple[int, float]]] = {name: [] for name in READERS}
        self._steps = dict.fromkeys(READERS, 0)
        self._fonts = {size: ImageFont.load_default(size) for size in (18, 22, 34, 44, 110)}
        self._still = self._draw_still()
        self._held = -APART
        self._scores: Scores | None = None

    def add(self, frame: DemoFrame, predictions: Mapping[str, Prediction], scores: Scores) -> None:
        """Take one frame of the stream; one of six is shown.

        Raises:
            SinkError: the video cannot be written.
        """
        self._lately.append(frame.image)
        for name in READERS:
            self._curves[name].append((frame.index, scores.recent(name)))
        self._scores = scores
        if frame.index % EVERY == 0:
            picture = self._draw(frame, predictions, scores)
            for _ in range(self._pictures_of(frame.index, scores)):
                self._video.append(picture)
        self._steps = {name: prediction.step for name, prediction in predictions.items()}

    def close(self) -> None:
        """Show the totals and complete the video."""
        if self._scores is not None:
            card = self._draw_card(self._scores)
            for _ in range(CARD):
                self._video.append(card)
        self._video.close()

    def _pictures_of(self, index: int, scores: Scores) -> int:
        """How long a frame is shown: longer where only the adapted reader is right, but not one after the other."""
        tells = scores.right[ADAPTED][-1] and not any(scores.right[name][-1] for name in READERS if name != ADAPTED)
        if not tells or index - self._held < APART:
            return SHOWN
        self._held = index
        return HELD

    def abort(self) -> None:
        """Leave nothing half-written behind."""
        self._video.abort()

    def _draw_still(self) -> Image.Image:
        """What never changes: title, panels, the weather behind the chart."""
        picture = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
        pen = ImageDraw.Draw(picture)
        pen.text((40, 24), "a reader that heals itself", TEXT, self._fonts[34])
        for left, name in zip(COLUMNS, READERS, strict=True):
            pen.rounded_rectangle((left, 96, left + COLUMN_WIDTH, 396), 14, PANEL)
            pen.text((left + COLUMN_WIDTH / 2, 112), TITLES[name], COLOURS[name], self._fonts[22], anchor="ma")
        left, top, width, height = CHART
        for number, (name, _) in enumerate(COURSE):
            start, end = (left + width * place / len(COURSE) for place in (number, number + 1))
            pen.rectangle((start, top, end, top + height), SKY[name])
            pen.text(((start + end) / 2, top + height + 8), name, FAINT, self._fonts[18], anchor="ma")
        for share in (0.5, 1.0):
            level = top + height * (1 - share)
            pen.line((left, level, left + width, level), (70, 78, 88))
            pen.text((left - 6, level), f"{share:.0%}", FAINT, self._fonts[18], anchor="rm")
        return picture

    def _draw(self, frame: DemoFrame, predictions: Mapping[str, Prediction], scores: Scores) -> npt.NDArray[np.uint8]:
        picture = self._still.copy()
        pen = ImageDraw.Draw(picture)
        left, top, side = CAMERA
        picture.paste(_enlarged(frame.image, side), (left, top))
        pen.text((WIDTH - 40, 24), frame.weather, TEXT, self._fonts[34], anchor="ra")
        truth = CHARACTERS[frame.label]
        pen.text((left, top + side + 12), f"it shows {truth}", TEXT, self._fonts[22])
        for column, name in zip(COLUMNS, READERS, strict=True):
            middle, prediction = column + COLUMN_WIDTH / 2, predictions[name]
            right = prediction.label == truth
            pen.text((middle, 140), prediction.label, RIGHT if right else WRONG, self._fonts[110], anchor="ma")
            draw_mark(pen, column + COLUMN_WIDTH - 44, 196, right=right)
            pen.text((middle, 268), f"{scores.recent(name):.0%}", TEXT, self._fonts[44], anchor="ma")
            pen.text((middle, 320), f"right of the last {LATELY_FRAMES}", FAINT, self._fonts[18], anchor="ma")
            state, colour = self._state(name, prediction)
            pen.text((middle, 356), state, colour, self._fonts[22], anchor="ma")
        left, top, side, _ = STRIP
        for place, image in enumerate(reversed(self._lately)):
            picture.paste(_enlarged(image, side), (left + place * (side + 3), top))
        self._draw_curves(pen)
        return np.asarray(picture)

    def _draw_card(self, scores: Scores) -> npt.NDArray[np.uint8]:
        """The totals: each reader in each weather, and in all."""
        picture = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
        pen = ImageDraw.Draw(picture)
        found = scores.summary()
        pen.text((40, 24), f"read right, of {found['frames']:,} characters of unseen fonts", TEXT, self._fonts[34])
        rows = [(one["weather"], {name: one[name] for name in READERS}) for one in found["stretches"]]
        rows.append(("in all", {name: found[f"accuracy_{name}"] for name in READERS}))
        for left, name in zip(COLUMNS, READERS, strict=True):
            pen.text((left + COLUMN_WIDTH / 2, 112), TITLES[name], COLOURS[name], self._fonts[22], anchor="ma")
        step = min(64, (HEIGHT - 190) // len(rows))
        for number, (weather, shares) in enumerate(rows):
            level = 164 + number * step + (16 if number == len(rows) - 1 else 0)
            size = 44 if number == len(rows) - 1 else 34
            pen.text((70, level), weather, TEXT if size == 44 else FAINT, self._fonts[size])
            for left, name in zip(COLUMNS, READERS, strict=True):
                best = shares[name] == max(shares.values())
                colour = COLOURS[name] if best else FAINT
                pen.text(
                    (left + COLUMN_WIDTH / 2, level), f"{shares[name]:.1%}", colour, self._fonts[size], anchor="ma"
                )
        return np.asarray(picture)

    def _state(self, name: str, prediction: Prediction) -> tuple[str, tuple[int, int, int]]:
        if not prediction.adapted:
            return "source model", FAINT
        if prediction.step > self._steps[name]:
            return f"adapting: step {prediction.step}", COLOURS[name]
        return f"adapted, step {prediction.step}", FAINT

    def _draw_curves(self, pen: ImageDraw.ImageDraw) -> None:
        left, top, width, height = CHART
        for name in READERS:
            points = [
                (left + width * index / self._frames, top + height * (1 - share)) for index, share in self._curves[name]
            ]
            if len(points) > 1:
                pen.line(points[:: max(1, len(points) // 600)] + points[-1:], COLOURS[name], 3)


def draw_mark(pen: ImageDraw.ImageDraw, left: float, top: float, *, right: bool) -> None:
    """A tick or a cross: colour alone says nothing to one man in twelve."""
    if right:
        pen.line((left - 14, top, left - 4, top + 11, left + 15, top - 14), RIGHT, 6, joint="curve")
        return
    for slope in (-1, 1):
        pen.line((left - 13, top - 13 * slope, left + 13, top + 13 * slope), WRONG, 6)


def _enlarged(image: npt.NDArray[np.uint8], side: int) -> Image.Image:
    return Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
