"""Real photographs, real weights: EfficientNet-Lite0 on films, shot by shot. The street table of docs/RESULTS.md.

    scripts/build_photographs; mgg-edge train …      first, as docs/RESULTS.md says
    scripts/bench street                             two hours on two cores; finished parts are kept

Truth is what the frozen model says of the clean picture. Of every shot three pictures of four are clean footage to
calibrate with, the fourth is what the camera sees: to and fro until there are 40, each in weather of its own chance.
Every method runs as `mgg-edge run` would run it, with its default schedule, with the statistics of the package's
photographs and with those of the shot (`mgg-edge calibrate`, whose verdict it obeys).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _export import export_if_stale
from _results import street_tables

from mgg_edge.errors import UsageError
from mgg_edge.runtime import Adapter
from mgg_edge.runtime.adaptation.calibration import calibrate
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.preprocess import fit
from mgg_edge.runtime.sources.source import Frame
from mgg_edge.runtime.sources.video import VideoSource
from mgg_edge.scenes.corruptions import BENCHMARK_KINDS, SEVERITIES
from mgg_edge.scenes.courses import Weather

FILMS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
CUT_LEVELS = 25  # mean difference of two pictures of different shots, of 255
LEAST_FRAMES = 44  # three of four are 33, and calibration wants 32
SEEN, EVERY = 40, 4
SIDE = 160
METHODS: dict[str, tuple[str, ...]] = {
    "statistics": ("--rule", "statistics", "--norm-statistics", "mix:0.3"),
    "forward": ("--rule", "forward", "--norm-statistics", "source"),
    "mgg": ("--rule", "mgg", "--norm-statistics", "source"),
    "mgg and statistics": ("--rule", "mgg", "--norm-statistics", "mix:0.3"),
}
LEARNED = {"mgg": "mgg", "mgg and statistics": "mgg", "forward": "forward-street"}


class Shot:
    """Clean pictures of one shot, as a source for `calibrate`."""

    frames_expected = None

    def __init__(self, name: str, pictures: list[np.ndarray]) -> None:
        self.name, self.pictures = name, pictures
        self.clean = [picture for number, picture in enumerate(pictures) if number % EVERY != EVERY - 1]
        own = [*range(EVERY - 1, len(pictures), EVERY)]
        there_and_back = itertools.cycle([*own, *own[-2:0:-1]])
        self.seen = [pictures[place] for place in itertools.islice(there_and_back, SEEN)]
        self._weathers: dict[str, np.ndarray] = {}

    def under(self, weather: Weather, clean: np.ndarray, seed: list[int]) -> np.ndarray:
        """What the camera sees u8[n, H, W, 3] in a weather, made once for all methods."""
        if weather.name not in self._weathers:
            self._weathers[weather.name] = weather(clean, np.random.default_rng(seed))
        return self._weathers[weather.name]

    def __iter__(self) -> Any:
        return (Frame(number, number / 25, picture) for number, picture in enumerate(self.clean))


def shots_of(path: Path) -> list[Shot]:
    """The shots of a film that are long enough."""
    parts: list[list[np.ndarray]] = [[]]
    with VideoSource(path) as video:
        for frame in video:
            if parts[-1] and np.abs(frame.image[::8, ::8].astype(float) - parts[-1][-1][::8, ::8]).mean() > CUT_LEVELS:
                parts.append([])
            parts[-1].append(frame.image)
    return [Shot(f"{path.stem} {n}", part) for n, part in enumerate(parts, 1) if len(part) >= LEAST_FRAMES]


def bundle_of(method: str, parts: Path, folder: Path, photographs: Path) -> Path:
    """The method's bundle, exported if it is not there."""
    words = ["--backbone", "efficientnet_lite0", "--weights", "package", "--image-size", SIDE, *METHODS[method]]
    words += ["--source-data", photographs, "--batch", 8]
    learned = parts / f"{LEARNED[method]}.safetensors" if method in LEARNED else None
    return export_if_stale(folder / f"street-{method.replace(' ', '-')}.mgg", words, learned)


def run(bundle: Path, pictures: np.ndarray, adapt: str) -> tuple[np.ndarray, int]:
    """Classes i64[n] of pictures u8[n, H, W, 3] one after the other, and updates made."""
    with Adapter.open(bundle, adapt=adapt, threads=1) as adapter:
        found = np.array([adapter(picture).index for picture in pictures])
        return found, adapter.counters.adapt_steps


def measure(bundle: Path, shot: Shot, adapt: str) -> dict[str, Any]:
    """Agreement with the clean predictions, clean and by kind and severity."""
    info = Bundle.load(bundle).manifest.preprocess
    clean = np.stack([fit(picture, info) for picture in shot.seen])
    truth, _ = run(bundle, clean, "off")
    found, steps = run(bundle, clean, adapt)
    kinds: dict[str, list[float]] = {}
    for number, kind in enumerate(BENCHMARK_KINDS):
        kinds[kind] = []
        for severity in SEVERITIES:
            agreed, made = run(bundle, shot.under(Weather(((kind, severity),)), clean, [number, severity]), adapt)
            kinds[kind].append(float(np.mean(agreed == truth)))
            steps += made
    return {"clean": float(np.mean(found == truth)), "kinds": kinds, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=Path(".cache/default"), help="learned rules")
    parser.add_argument("--kept", type=Path, default=Path(".cache/results"), help="finished parts")
    parser.add_argument("--photographs", type=Path, default=Path(".cache/photographs"), help="source pictures")
    parser.add_argument("--only", default=",".join(("frozen", *METHODS)), help="methods, comma-separated")
    parser.add_argument("--shots", help="of shots whose names begin so")
    arguments = parser.parse_args()
    if not arguments.photographs.is_dir():
        raise UsageError(f"{arguments.photographs}: expected a folder of photographs; run scripts/build_photographs")
    folder = arguments.kept / "bundles"
    shots = [shot for film in FILMS for shot in shots_of(Path(os.environ["MGG_EDGE_VIDEOS"]) / film)]
    for shot, method in itertools.product(shots, arguments.only.split(",")):
        if not shot.name.startswith(arguments.shots or ""):
            continue
        bundle = bundle_of("mgg" if method == "frozen" else method, arguments.parts, folder, arguments.photographs)
        for place in ("",) if method == "frozen" else ("", "calibrated"):
            kept = arguments.kept / f"street.{method}-{place}-{shot.name}.json".replace(" ", "_")
            if kept.exists() and kept.stat().st_mtime > bundle.stat().st_mtime:
                continue
            started, used, verdict = time.monotonic(), bundle, ""
            with tempfile.TemporaryDirectory() as scratch:
                if place:
                    used = Path(scratch) / "site.mgg"
                    verdict = calibrate(bundle, shot, used, threads=1).verdict
                result = measure(used, shot, "off" if method == "frozen" else "auto")
            facts = {"method": method, "place": place, "shot": shot.name, "verdict": verdict, **result}
            kept.write_text(json.dumps(facts))
            means = f"clean {result['clean']:.3f}, kinds {np.mean(list(result['kinds'].values())):.3f}"
            took_s = time.monotonic() - started
            print(f"-- {shot.name}, {method} {place} {verdict}: {means}, {took_s:.0f} s", flush=True)
    print(street_tables(arguments.kept))


if __name__ == "__main__":
    main()
