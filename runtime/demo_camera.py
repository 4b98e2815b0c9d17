"""The demonstration on real pictures: one camera that different things pass, in weather that comes and goes.

Photographs and cut-outs are those `scripts/build_objects` brings, scene and things of the test part alone: no packaged
numbers have seen them. Half of the things are there in clear weather while the camera is calibrated, the other half
passes in the film. Truth is what the frozen model calls a thing in the film's clear weather.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.adapter import Adapter
from mgg_edge.runtime.demo import stretches
from mgg_edge.runtime.demo_picture import BACKGROUND, FAINT, RIGHT, TEXT, WRONG, draw_mark
from mgg_edge.runtime.outputs.sinks import VideoFile
from mgg_edge.scenes.courses import CLEAN, parse_weather
from mgg_edge.scenes.objects import TEST, CutOut, Scene, load_cut_outs, load_scenes, place

__all__ = ["CameraFilm", "Reading", "make_film", "read_film", "write_film"]

SIDE, RATE = 240, Fraction(12)
SCENE = "Blinds.jpg"
# Named alike before most scenes by EfficientNet-Lite0, in clear weather (benchmarks/_objects.py decides so).
THINGS = (
    "animals/birds/penguin.png", "animals/marsupials/koala.png", "animals/marsupials/wombat.png",
    "animals/mammals/bovines/mountaingoat.png", "hobbies/binoculars.png", "household/wheelie_bin.png",
    "plants/mushrooms/cep.png", "plants/mushrooms/cep-2.png", "plants/flowers/flower8.png",
    "plants/flowers/pigface.png",
    "seasonal/halloween/jackolantern_mean.png", "vehicles/flight/balloon360.png",
)  # fmt: skip
WEATHERS = (CLEAN, "fog@3", "gaussian_noise@3", "defocus_blur@3", "frost@3", CLEAN)
CLEAR_VIEWS = 12  # of each thing while the camera is calibrated
VIEWS, VIEW_FRAMES = 3, 6  # of each thing in each weather, half a second each
SENSOR_NOISE = 1.5  # standard deviation, grey levels
READERS = {"frozen": "off", "adapted": "auto"}
WIDTH, HEIGHT = 1120, 480

Pictures = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CameraFilm:
    """What the camera sees.

    Attributes:
        clear: u8[n,H,W,3], before the film.
        frames: u8[m,H,W,3], the film.
        weathers: of each frame of the film.
        things: in each frame of the film.
    """

    clear: Pictures
    frames: Pictures
    weathers: tuple[str, ...]
    things: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What was read in a film. Attributes: truth: of each frame; said: of each frame, by reader."""

    truth: tuple[str, ...]
    said: dict[str, tuple[str, ...]]

    def share(self, reader: str, span: slice) -> float:
        """Of right ones among some frames."""
        pairs = list(zip(self.said[reader][span], self.truth[span], strict=True))
        return sum(one == other for one, other in pairs) / len(pairs)


def make_film(pictures: Path, seed: int = 0) -> CameraFilm:
    """A film of the test part.

    Args:
        pictures: the folder that `scripts/build_objects` made.
        seed: of the order of things and the weather.

    Raises:
        UsageError: photograph or cut-outs are missing.
        SourceError: a file that is no picture.
    """
    scenes = [scene for scene in load_scenes(pictures / "scenes", SIDE, SIDE, TEST) if Path(scene.name).name == SCENE]
    things = [thing for thing in load_cut_outs(pictures / "stamps", TEST) if thing.name in THINGS]
    if not scenes or len(things) < len(THINGS):
        raise UsageError(
            f"{pictures}: expected the photograph {SCENE} and {len(THINGS)} cut-outs of the test part, found "
            f"{len(scenes)} and {len(things)}: run scripts/build_objects"
        )
    rng = np.random.default_rng(seed)
    known, others = things[::2], things[1::2]
    clear = np.stack([frame for frame, _ in _passing(scenes[0], known, CLEAR_VIEWS, 1, rng)])
    frames, weathers, shown = [], [], []
    for name in WEATHERS:
        weather = parse_weather(name)
        for frame, thing in _passing(scenes[0], others, VIEWS, VIEW_FRAMES, rng):
            frames.append(weather(frame[None], rng)[0])
            weathers.append(name)
            shown.append(thing)
    return CameraFilm(clear, np.stack(frames), tuple(weathers), tuple(shown))


def read_film(film: CameraFilm, bundle: Path, progress: Callable[[str, int, int], None]) -> Reading:
    """The film read by a calibrated bundle, frozen and adapting.

    Raises:
        MggEdgeError: the bundle cannot be opened or run.
    """
    said: dict[str, tuple[str, ...]] = {}
    for name, adapt in READERS.items():
        with Adapter.open(bundle, adapt=adapt, threads=1) as adapter:
            labels = []
            for index, frame in enumerate(film.frames):
                labels.append(adapter(frame, float(index / RATE)).label)
                progress(f"{name} reading", index + 1, len(film.frames))
        said[name] = tuple(labels)
    clear: dict[str, Counter[str]] = {}
    for weather, thing, label in zip(film.weathers, film.things, said["frozen"], strict=True):
        if weather == CLEAN:
            clear.setdefault(thing, Counter())[label] += 1
    return Reading(tuple(clear[thing].most_common(1)[0][0] for thing in film.things), said)


def write_film(path: Path, film: CameraFilm, reading: Reading) -> None:
    """The film, and beside it what both read and how often they have been right in this weather.

    Raises:
        SinkError: the video cannot be written.
    """
    fonts = {size: ImageFont.load_default(size) for size in (20, 30, 40)}
    video = VideoFile(path, WIDTH, HEIGHT, RATE)
    try:
        for span in stretches(film.weathers):
            for index in range(span.start, span.stop):
                picture = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
                camera = Image.fromarray(film.frames[index])
                picture.paste(camera.resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC))
                pen = ImageDraw.Draw(picture)
                pen.text((520, 30), film.weathers[index].partition("@")[0].replace("_", " "), TEXT, fonts[40])
                pen.text((520, 92), f"named in clear weather: {reading.truth[index]}", FAINT, fonts[20])
                for number, (name, labels) in enumerate(reading.said.items()):
                    right, top = labels[index] == reading.truth[index], 150 + 150 * number
                    share = reading.share(name, slice(span.start, index + 1))
                    pen.text((520, top), f"{name}: right {share:.0%} of this weather so far", FAINT, fonts[20])
                    draw_mark(pen, 534, top + 54, right=right)
                    pen.text((564, top + 34), labels[index][:32], RIGHT if right else WRONG, fonts[30])
                video.append(np.asarray(picture))
    except BaseException:
        video.abort()
        raise
    video.close()


def _passing(
    scene: Scene, things: Sequence[CutOut], views: int, frames: int, rng: np.random.Generator
) -> Iterator[tuple[Pictures, str]]:
    """Every thing some times in random order, each view for some frames under a little noise of the sensor."""
    for index in rng.permutation(np.repeat(np.arange(len(things)), views)):
        view = place(scene, things[int(index)], rng).astype(np.float64)
        for _ in range(frames):
            noisy = view + rng.normal(0, SENSOR_NOISE, view.shape)
            yield np.clip(np.rint(noisy), 0, 255).astype(np.uint8), things[int(index)].name
