"""Films of one camera that different things pass, made of what scripts/build_objects brought.

    python scripts/object_film.py --pictures .cache/objects --out films

writes `clean.mp4`, clear weather with half of the things, to calibrate with, and `weather.mp4`, the other half in clear
weather, fog, noise, blur, frost and clear weather again. Scene and things are of the test part: no packaged numbers
have seen them. `weather.csv` says which thing and which weather is in view. Prints one JSON line.

    python scripts/object_film.py --out films --score site.mgg

says how often a bundle names the things as the frozen model names them in clear weather, frozen and adapted, and writes
`side.mp4`: the film with both readings beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mgg_edge.errors import MggEdgeError, UsageError
from mgg_edge.runtime import Adapter
from mgg_edge.runtime.demo_picture import draw_mark
from mgg_edge.runtime.outputs.sinks import VideoFile
from mgg_edge.runtime.sources.video import VideoSource
from mgg_edge.scenes.courses import parse_weather
from mgg_edge.scenes.objects import TEST, CutOut, Scene, load_cut_outs, load_scenes, place

SIDE, RATE = 240, 12
READERS = {"frozen": "off", "adapted": "auto"}
VIEW_FRAMES = 6  # half a second of each view of a thing
VIEWS = 3  # of each thing in each weather
WEATHERS = ("clean", "fog@3", "gaussian_noise@3", "defocus_blur@3", "frost@3", "clean")
# Named alike before most scenes by the net of the example, in clear weather (benchmarks/_objects.py decides so).
THINGS = (
    "animals/birds/penguin.png", "animals/marsupials/koala.png", "animals/marsupials/wombat.png",
    "animals/mammals/bovines/mountaingoat.png", "hobbies/binoculars.png", "household/wheelie_bin.png",
    "plants/mushrooms/cep.png", "plants/mushrooms/cep-2.png", "plants/flowers/flower8.png",
    "plants/flowers/pigface.png",
    "seasonal/halloween/jackolantern_mean.png", "vehicles/flight/balloon360.png",
)  # fmt: skip


def main() -> int:
    """Make the films; exit status as the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path(".cache/objects"))
    parser.add_argument("--scene", default="Blinds.jpg", help="file name of a photograph")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--score", type=Path, help="bundle to score on the films that are there")
    arguments = parser.parse_args()
    try:
        if arguments.score is not None:
            print(_score(arguments.out, arguments.score))
            return 0
        print(json.dumps(_make(arguments.pictures, arguments.scene, arguments.out)))
    except MggEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _make(pictures: Path, scene_name: str, out: Path) -> dict[str, object]:
    scenes = [
        scene for scene in load_scenes(pictures / "scenes", SIDE, SIDE, TEST) if Path(scene.name).name == scene_name
    ]
    if not scenes:
        raise UsageError(f"{pictures}: expected a photograph '{scene_name}' of the test part, found none")
    things = [thing for thing in load_cut_outs(pictures / "stamps", TEST) if thing.name in THINGS]
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    known, others = things[::2], things[1::2]
    clean = _write(out / "clean.mp4", (frame for frame, _ in _passing(scenes[0], known, 12, 1, rng)))
    rows: list[tuple[str, str]] = []

    def weathered() -> Iterator[np.ndarray]:
        for name in WEATHERS:
            weather = parse_weather(name)
            for frame, thing in _passing(scenes[0], others, VIEWS, VIEW_FRAMES, rng):
                rows.append((name, thing))
                yield weather(frame[None], rng)[0]

    frames = _write(out / "weather.mp4", weathered())
    with (out / "weather.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("frame", "weather", "thing"), *((index, *row) for index, row in enumerate(rows))])
    return {"out": str(out), "clean_frames": clean, "weather_frames": frames}


def _score(folder: Path, bundle: Path) -> str:
    with (folder / "weather.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    said: dict[str, list[str]] = {}
    with VideoSource(folder / "weather.mp4") as film:
        frames = list(film)
    for name, adapt in READERS.items():
        with Adapter.open(bundle, adapt=adapt, threads=1) as adapter:
            said[name] = [adapter(frame.image, frame.time_s).label for frame in frames]
    clear: dict[str, Counter[str]] = {}
    for row, label in zip(rows, said["frozen"], strict=True):
        if row["weather"] == "clean":
            clear.setdefault(row["thing"], Counter())[label] += 1
    truth = [clear[row["thing"]].most_common(1)[0][0] for row in rows]
    lines, part = ["weather           frozen  adapted"], len(rows) // len(WEATHERS)
    for start in range(0, len(rows), part):
        span = slice(start, start + part)
        frozen, adapted = (np.mean(np.array(found[span]) == truth[span]) for found in said.values())
        lines.append(f"{rows[start]['weather']:<16}  {frozen:6.1%}  {adapted:7.1%}")
    _write_side(folder / "side.mp4", [frame.image for frame in frames], rows, truth, said)
    return "\n".join(lines)


def _write_side(
    path: Path, frames: list[np.ndarray], rows: list[dict[str, str]], truth: list[str], said: dict[str, list[str]]
) -> None:
    """The film, and beside it what both models read and how often they have been right in this weather."""
    fonts = {size: ImageFont.load_default(size) for size in (20, 30, 40)}
    video = VideoFile(path, 1120, 480, Fraction(RATE))
    start, right = 0, dict.fromkeys(said, 0)
    for index, frame in enumerate(frames):
        weather = rows[index]["weather"]
        if weather != rows[start]["weather"]:
            start, right = index, dict.fromkeys(said, 0)
        picture = Image.new("RGB", (1120, 480), (16, 20, 26))
        picture.paste(Image.fromarray(frame).resize((480, 480), Image.Resampling.BICUBIC))
        pen = ImageDraw.Draw(picture)
        pen.text((520, 30), weather.partition("@")[0].replace("_", " "), (236, 240, 245), fonts[40])
        pen.text((520, 92), f"named in clear weather: {truth[index]}", (128, 138, 150), fonts[20])
        for number, (name, labels) in enumerate(said.items()):
            good = labels[index] == truth[index]
            right[name] += good
            top, colour = 150 + 150 * number, (78, 214, 140) if good else (240, 98, 98)
            share = f"right {right[name] / (index - start + 1):.0%} of this weather so far"
            pen.text((520, top), f"{name}: {share}", (128, 138, 150), fonts[20])
            draw_mark(pen, 534, top + 54, right=good)
            pen.text((564, top + 34), labels[index][:32], colour, fonts[30])
        video.append(np.asarray(picture))
    video.close()


def _passing(
    scene: Scene, things: list[CutOut], views: int, frames: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, str]]:
    """Every thing some times in random order, each view for some frames under a little noise of the sensor."""
    order = rng.permutation(np.repeat(np.arange(len(things)), views))
    for index in order:
        view = place(scene, things[int(index)], rng).astype(np.float64)
        for _ in range(frames):
            noisy = view + rng.normal(0, 1.5, view.shape)
            yield np.clip(np.rint(noisy), 0, 255).astype(np.uint8), things[int(index)].name


def _write(path: Path, frames: Iterator[np.ndarray]) -> int:
    count = 0
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=RATE, options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            count += 1
        film.mux(stream.encode())
    return count


if __name__ == "__main__":
    sys.exit(main())
