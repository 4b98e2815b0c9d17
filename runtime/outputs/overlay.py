"""What an annotated picture shows: a band at the lower edge over the picture.

    ┌───────────────────────────────────────┐
    │ picture                               │
    │ label                          ╱╲  ╱╲ │
    │ 83%  ● adapted (step 12)   H  ╱  ╲╱  ╲│
    │━━━━━━━━━━━━━━━━━──────────────────────│  probability
    └───────────────────────────────────────┘

Sizes follow the picture's; a very small picture is enlarged by a whole factor so that the text stays legible.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mgg_edge.errors import MissingDependencyError

__all__ = ["Caption", "Overlay"]

MIN_WIDTH, MAX_ENLARGED = 240, 1024  # pixels: what the text needs, and an end to enlarging long thin pictures
HISTORY = 120  # frames in the sparkline
MIN_FONT, MAX_FONT = 13, 48  # pixels
FONT_PER_EDGE = 1 / 24  # of the picture's shorter side
LINE_HEIGHT, BAND_HEIGHT, WIDE = 1.35, 4.1, 30  # in font sizes; a band as wide as WIDE also shows the entropy's value
CHART_FRACTION = 0.26  # of the band's width
MIN_CHART_TOP = 0.5  # nats: noise around zero should look like zero
SMOOTHING = 3
BRIGHTNESS = 0.28  # what remains of the picture under the band
WHITE, RULE = (255, 255, 255), (84, 90, 98)
SOURCE, ADAPTED = (168, 178, 190), (64, 214, 138)
ENTROPY, ENTROPY_AREA = (255, 190, 84), (112, 84, 40)

RGB = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Caption:
    """What to write on one picture.

    Attributes:
        label: predicted class.
        probability: of that class, in [0, 1].
        entropy: of the prediction, nats.
        step: updates committed before the prediction; 0 is the source model.
    """

    label: str
    probability: float
    entropy: float
    step: int


@dataclass
class Overlay:
    """Draws captions on pictures of one video and remembers the entropies for the sparkline.

    Args:
        width, height: size of the pictures to come, pixels. A picture of another size is fitted into it, with bars.

    Attributes:
        size: (width, height) of the annotated pictures: even, as video coding wants it.
    """

    width: int
    height: int
    _entropies: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def __post_init__(self) -> None:
        self._factor = max(1, min(-(-MIN_WIDTH // self.width), MAX_ENLARGED // self.height))
        self._inner = (self.width * self._factor, self.height * self._factor)
        self.size = (self._inner[0] + self._inner[0] % 2, self._inner[1] + self._inner[1] % 2)

    def draw(self, image: RGB, caption: Caption) -> RGB:
        """A picture u8[height, width, 3] RGB of `size` with the caption on it; `image` is left as it was."""
        self._entropies.append(caption.entropy)
        canvas = self._fit(image)
        font = _font(round(min(max(min(self._inner) * FONT_PER_EDGE, MIN_FONT), MAX_FONT)))
        band = min(round(font.size * BAND_HEIGHT), canvas.shape[0])
        part = Image.fromarray((canvas[-band:] * BRIGHTNESS).astype(np.uint8))
        _draw_band(part, font, caption, tuple(self._entropies))
        canvas[-band:] = np.asarray(part)
        return canvas

    def _fit(self, image: RGB) -> RGB:
        height, width = image.shape[:2]
        canvas = np.zeros((self.size[1], self.size[0], 3), np.uint8)
        if (width, height) == (self.width, self.height):
            inner = image.repeat(self._factor, 0).repeat(self._factor, 1) if self._factor > 1 else image
            # An odd edge is doubled rather than left black, which would smear into its neighbours.
            rows, columns = self.size[1] - inner.shape[0], self.size[0] - inner.shape[1]
            return np.pad(inner, ((0, rows), (0, columns), (0, 0)), mode="edge")
        scale = min(self.size[0] / width, self.size[1] / height)
        fitted = (max(1, round(width * scale)), max(1, round(height * scale)))
        left, top = (self.size[0] - fitted[0]) // 2, (self.size[1] - fitted[1]) // 2
        resized = np.asarray(Image.fromarray(image).resize(fitted, Image.Resampling.BILINEAR))
        canvas[top : top + fitted[1], left : left + fitted[0]] = resized
        return canvas


def _draw_band(part: Image.Image, font: ImageFont.FreeTypeFont, caption: Caption, entropies: Sequence[float]) -> None:
    draw = ImageDraw.Draw(part)
    width, height = part.size
    pad, line, bar = font.size * 0.55, font.size * LINE_HEIGHT, max(3, round(font.size / 5))
    chart = round(width * CHART_FRACTION)
    reading = f"entropy {caption.entropy:.2f}"
    reading_width = font.getlength(reading) + pad if width >= WIDE * font.size else 0
    room = width - 3 * pad - chart - reading_width

    draw.text((pad, pad), _shorten(caption.label, font, room), WHITE, font)
    draw.text((pad, pad + line), f"{caption.probability:.{0 if caption.probability >= 0.1 else 1}%}", WHITE, font)
    # The figures change width; what follows them must not jump.
    left = pad + font.getlength("100%") + font.size * 0.6
    _draw_badge(draw, (left, pad + line), font, caption.step, room + pad - left)
    if reading_width:
        draw.text((width - pad - chart - reading_width, pad + line), reading, ENTROPY, font)
    _draw_chart(part, (round(width - pad) - chart, round(pad)), (chart, round(2 * line)), entropies)
    draw.rectangle((0, height - bar, width, height), RULE)
    draw.rectangle((0, height - bar, width * caption.probability, height), ADAPTED if caption.step else SOURCE)


def _draw_badge(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], font: ImageFont.FreeTypeFont, step: int, room: float
) -> None:
    colour = ADAPTED if step else SOURCE
    radius = font.size * 0.26
    middle = at[1] + font.size * 0.62
    draw.ellipse((at[0], middle - radius, at[0] + 2 * radius, middle + radius), colour)
    text = f"adapted (step {step})" if step else "source"
    draw.text((at[0] + 3.4 * radius, at[1]), _shorten(text, font, room - 3.4 * radius), colour, font)


def _draw_chart(part: Image.Image, at: tuple[int, int], size: tuple[int, int], values: Sequence[float]) -> None:
    """Sparkline from 0 to the largest value shown, newest at the right; drawn larger and reduced, for smooth lines."""
    width, height = size[0] * SMOOTHING, size[1] * SMOOTHING
    box = (*at, at[0] + size[0], at[1] + size[1])
    chart = part.crop(box).resize((width, height))
    draw = ImageDraw.Draw(chart)
    top, stroke = max(*values, MIN_CHART_TOP), max(2, round(size[1] / 16)) * SMOOTHING
    step = (width - stroke) / (HISTORY - 1)
    right, low = width - stroke / 2, height - stroke / 2
    points = [
        (right - step * (len(values) - 1 - index), low - (low - stroke) * value / top)
        for index, value in enumerate(values)
    ]
    draw.polygon([*points, (right, low), (points[0][0], low)], ENTROPY_AREA)
    draw.line([(0, low), (width, low)], RULE, SMOOTHING)
    draw.line([*points, points[-1]], ENTROPY, stroke, joint="curve")
    part.paste(chart.resize(size, Image.Resampling.BOX), box[:2])


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    # A line break in a label would spoil the layout; a letter is at least a pixel wide, so that no more can fit.
    whole = " ".join(text[: 8 * int(room) + 8].split())
    text = whole[: int(room) + 1]
    if text == whole and font.getlength(text) <= room:
        return text
    fitting = bisect.bisect_right(range(len(text)), room, key=lambda count: font.getlength(text[: count + 1] + "…"))
    return text[:fitting].rstrip() + "…"


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    try:
        font = ImageFont.load_default(size)
    except ImportError as error:
        raise MissingDependencyError(
            "pillow was built without FreeType, which draws the captions: pip install --force-reinstall pillow"
        ) from error
    return cast(ImageFont.FreeTypeFont, font)
