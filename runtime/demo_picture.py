"""The demonstration as a video a person can follow.

┌──────────────────────────────────────────────────────────┐
│  title                                            NIGHT  │
│                           frozen      mgg      adapted   │
│ ┌───────────┐               3          8          B      │   what each reads, green if right
│ │  camera   │              41 %       52 %       87 %    │   share of right ones lately
│ │  picture  │                                            │
│ └───────────┘            ● frozen   ● frozen  ● adapted  │
│  ▒ ▒ ▒ ▒ ▒ ▒  the last pictures                          │
│  ───╲______╱‾‾‾╲____  accuracy over time, weather behind │
└──────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mgg_edge.runtime.demo import READERS, Scores
from mgg_edge.runtime.outputs.sinks import VideoFile
from mgg_edge.runtime.prediction import Prediction
from mgg_edge.runtime.sources.source_demo import COURSE, DemoFrame
from mgg_edge.scenes.glyphs import CHARACTERS

__all__ = ["DemoVideo"]

WIDTH, HEIGHT = 1280, 720
RATE, EVERY = Fraction(15), 2  # one of two frames is shown: a reader is faster than an eye
CAMERA = (40, 96, 300)  # left, top, side
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

    def add(self, frame: DemoFrame, predictions: Mapping[str, Prediction], scores: Scores) -> None:
        """Take one frame of the stream; every second one becomes a picture.

        Raises:
            SinkError: the video cannot be written.
        """
        self._lately.append(frame.image)
        for name in READERS:
            self._curves[name].append((frame.index, scores.recent(name)))
        if frame.index % EVERY == 0:
            self._video.append(self._draw(frame, predictions, scores))
        self._steps = {name: prediction.step for name, prediction in predictions.items()}

    def close(self) -> None:
        """Complete the video."""
        self._video.close()

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
        for column, name in zip(COLUMNS, READERS, strict=True):
            middle, prediction = column + COLUMN_WIDTH / 2, predictions[name]
            right = prediction.label == truth
            pen.text((middle, 152), prediction.label, RIGHT if right else WRONG, self._fonts[110], anchor="ma")
            pen.text((middle, 290), f"{scores.recent(name):.0%}", TEXT, self._fonts[44], anchor="ma")
            state, colour = self._state(name, prediction)
            pen.text((middle, 352), state, colour, self._fonts[22], anchor="ma")
        left, top, side, _ = STRIP
        for place, image in enumerate(reversed(self._lately)):
            picture.paste(_enlarged(image, side), (left + place * (side + 3), top))
        self._draw_curves(pen)
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


def _enlarged(image: npt.NDArray[np.uint8], side: int) -> Image.Image:
    return Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
