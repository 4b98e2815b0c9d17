"""Real pictures: EfficientNet-Lite0 with ImageNet weights on cameras that things pass. The table of docs/RESULTS.md.

    scripts/build_objects                    first: scenes and cut-outs, two minutes
    scripts/bench objects                    hours; finished parts are kept
    PYTHONPATH=. python benchmarks/objects.py --quick      some minutes: two scenes, severity 3, a few kinds

Scenes and things of part 0 alone (`mgg_edge.scenes.objects`): nothing was trained or chosen on them. Every camera is
calibrated on clean pictures of half of the things; the other half passes in each of the fifteen kinds of weather. Truth
is what the frozen model says of the clean picture. Rows that learn nothing have to be beaten:

    frozen        the source model
    constant      the commonest class of the calibration, always
    prior         frozen logits plus the logarithm of the calibration's class frequencies
    robust        one θ for all weathers, with the gate of `forward+` and without its map
    oracle        norm parameters fitted with the truth, on the very scene and weather, to the calibration's things

The project's own rules run as `mgg-edge run` runs them, on the calibrated bundle with the verdict's own schedule;
published methods on PyTorch, sixteen pictures a batch: those that train with the statistics of the batch as their
authors run them, and as `NAME-source` with the source's.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _export import export_if_stale
from _objects import Camera, Clip, cameras_of
from safetensors import safe_open
from safetensors.torch import save_file

from mgg_edge.export.compose import ExportRequest, compose_backbone
from mgg_edge.learn.imagenet import imagenet_names
from mgg_edge.learn.methods import Source, build_method
from mgg_edge.learn.statistics import measure_statistics
from mgg_edge.runtime import Adapter
from mgg_edge.runtime.adaptation.calibration import calibrate
from mgg_edge.scenes.corruptions import BENCHMARK_KINDS, corrupt
from mgg_edge.scenes.objects import TEST

SIDE, BATCH = 160, 16
SEVERITIES = (1, 3, 5)
PRIOR_WEIGHT = 1.0
CALM = ("clear", "few", "elsewhere")
ORACLE_STEPS, ORACLE_RATE = 300, 2e-3
OF_BATCHES, OF_SOURCE = ("bn", "tent", "eata", "sar", "deyo", "cotta", "roid"), ("lame", "t3a", "foa")
ON_SOURCE = "-source"
PUBLISHED = (*OF_BATCHES, *OF_SOURCE, *(name + ON_SOURCE for name in OF_BATCHES[1:]))
OWN: dict[str, tuple[str, ...]] = {
    "statistics": ("--rule", "statistics", "--norm-statistics", "mix:0.3"),
    "robust": ("--norm-statistics", "source"),
    "forward+": ("--norm-statistics", "source"),
}
MODEL = ("--backbone", "efficientnet_lite0", "--weights", "package", "--image-size", SIDE, "--batch", 8)
PACKAGED = Path(str(importlib.resources.files("mgg_edge.data") / "efficientnet_lite0.safetensors"))
Predict = Callable[[np.ndarray], np.ndarray]


class Frozen:
    """The source model, and what PyTorch's rows need of it."""

    def __init__(self) -> None:
        request = ExportRequest("efficientnet_lite0", "package", image_size=SIDE, norm_statistics="source")
        self.backbone, self.moving = (
            compose_backbone(request),
            compose_backbone(replace(request, norm_statistics="batch")),
        )
        self._constants, self._norms = self.backbone.constants(), self.backbone.split(self.backbone.theta())

    def logits(self, frames: np.ndarray) -> np.ndarray:
        """Of frames u8[n, H, W, 3]: f32[n, C]."""
        with torch.no_grad():
            parts = torch.from_numpy(frames).split(BATCH)
            found = [self.backbone.forward(part, self._norms, self._constants)[0] for part in parts]
        return torch.cat(found).numpy()

    def classes(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classes and their probabilities."""
        probabilities = torch.from_numpy(self.logits(frames)).softmax(1).numpy()
        return probabilities.argmax(1), probabilities.max(1)

    def oracle(self, camera: Camera, weather: Callable[[np.ndarray], np.ndarray], seen: np.ndarray) -> np.ndarray:
        """Classes of what is seen under norm parameters fitted to the calibration's things in the same weather."""
        target, rng = torch.from_numpy(self.logits(camera.clean)).softmax(1), np.random.default_rng(0)
        theta = self.backbone.theta().requires_grad_()
        optimiser = torch.optim.Adam([theta], ORACLE_RATE)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, ORACLE_STEPS)
        for _ in range(ORACLE_STEPS):
            chosen = rng.choice(len(camera.clean), BATCH)
            frames = torch.from_numpy(weather(camera.clean[chosen]))
            logits, _ = self.backbone.forward(frames, self.backbone.split(theta), self._constants)
            loss = -(target[chosen] * logits.log_softmax(1)).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decay.step()
        with torch.no_grad():
            norms = self.backbone.split(theta.detach())
            parts = torch.from_numpy(seen).split(BATCH)
            found = [self.backbone.forward(part, norms, self._constants)[0] for part in parts]
        return torch.cat(found).argmax(1).numpy()

    def published(self, name: str, clean: np.ndarray) -> Predict:
        """Classes of a stream by a published method, from the source model."""
        backbone = self.moving if name in OF_BATCHES else self.backbone
        frames = torch.from_numpy(clean)
        source = Source(measure_statistics(backbone, frames.split(BATCH)), frames)

        def run(stream: np.ndarray) -> np.ndarray:
            method = build_method(name.removesuffix(ON_SOURCE), backbone, source)
            state, found = method.init(), []
            for part in torch.from_numpy(stream).split(BATCH):
                logits, state = method.step(part, state)
                found.append(logits.detach().argmax(1))
            return torch.cat(found).numpy()

        return run


def device(bundle: Path) -> Predict:
    """Classes of a stream as `mgg-edge run` gives them."""

    def run(stream: np.ndarray) -> np.ndarray:
        with Adapter.open(bundle, threads=1) as adapter:
            return np.array([adapter(frame).index for frame in stream])

    return run


def rows_of(arguments: argparse.Namespace, frozen: Frozen, camera: Camera, folder: Path) -> dict[str, Predict]:
    """Every method's answers to a stream before this camera."""
    calibration = frozen.classes(camera.clean)[0]
    frequencies = np.bincount(calibration, minlength=frozen.backbone.classes) + 1e-3
    log_prior = np.log(frequencies / frequencies.sum())
    commonest = int(np.bincount(calibration).argmax())
    rows: dict[str, Predict] = {
        "frozen": lambda stream: frozen.logits(stream).argmax(1),
        "constant": lambda stream: np.full(len(stream), commonest),
        "prior": lambda stream: (frozen.logits(stream) + PRIOR_WEIGHT * log_prior).argmax(1),
    }
    for name in arguments.methods.split(","):
        if name in PUBLISHED:
            rows[name] = frozen.published(name, camera.clean)
        elif name in OWN:
            rows[name] = device(_calibrated(arguments, name, camera, folder))
    return rows


def _calibrated(arguments: argparse.Namespace, name: str, camera: Camera, folder: Path) -> Path:
    """The camera's own bundle of a rule."""
    learned = None
    if name in ("robust", "forward+"):
        learned = _without_map(arguments.rule, folder) if name == "robust" else arguments.rule
    words = [*MODEL, *OWN[name], "--source-data", arguments.pictures / "scenes"]
    bundle = export_if_stale(folder / f"{name}.mgg", words, learned)
    site = folder / f"{name}-{camera.name.replace('/', '-')}-{arguments.seed}.mgg"
    if not site.exists() or site.stat().st_mtime < bundle.stat().st_mtime:
        found = calibrate(bundle, Clip(camera.name, camera.clean), site, threads=1)
        print(f"{name}: {camera.name}: {found.verdict}, {found.clean_changed:.1%} changed on clean", flush=True)
    return site


def _without_map(rule: Path, folder: Path) -> Path:
    """The robust θ of a learned `forward+` alone, with its gate: the row that the map has to beat."""
    target = folder / f"robust-of-{rule.name}"
    if not target.exists() or target.stat().st_mtime < rule.stat().st_mtime:
        with safe_open(rule, framework="pt") as file:
            facts, numbers = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(numbers | {"write": torch.zeros_like(numbers["write"])}, target, facts)
    return target


def measure(
    arguments: argparse.Namespace, frozen: Frozen, camera: Camera, severity: int, folder: Path
) -> dict[str, Any]:
    """Shares of pictures named as in clear weather, by method and kind."""
    rows = rows_of(arguments, frozen, camera, folder)
    shares: dict[str, dict[str, float]] = {name: {} for name in rows}
    human: dict[str, list[float]] = {name: [] for name in rows}
    balanced: dict[str, list[float]] = {name: [] for name in rows}
    named = camera.names >= 0
    calm = {"few": (camera.few, camera.few_truth), "elsewhere": (camera.elsewhere, camera.elsewhere_truth)}
    for number, kind in enumerate(("clear", "few", *arguments.kinds, "elsewhere")):
        rng = np.random.default_rng([arguments.seed, severity, number])
        stream, truth = calm.get(kind, (camera.seen, camera.truth))
        weathered = kind in arguments.kinds
        if weathered:
            stream = corrupt(stream, kind, severity, rng)
        for name, predict in rows.items():
            found = predict(stream)
            shares[name][kind] = float((found == truth).mean())
            if weathered:
                balanced[name].append(_balanced_recall(found, truth))
                human[name] += [float((found == camera.names)[named].mean())] if named.any() else []
        if arguments.oracle and weathered:
            own = np.random.default_rng([arguments.seed, severity, number, 1])
            found = frozen.oracle(camera, lambda part, kind=kind, own=own: corrupt(part, kind, severity, own), stream)
            shares.setdefault("oracle", {})[kind] = float((found == truth).mean())
    means = [{name: float(np.mean(values)) for name, values in one.items() if values} for one in (human, balanced)]
    named_as = {"shares": shares, "people": means[0], "balanced": means[1]}
    return {"camera": camera.name, "severity": severity, "seed": arguments.seed, **named_as}


def _balanced_recall(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean over classes of the share of their pictures that are named so."""
    return float(np.mean([(found[truth == label] == label).mean() for label in np.unique(truth)]))


def table(found: list[dict[str, Any]], kinds: tuple[str, ...], level: int) -> str:
    """Mean over cameras ± their spread, seeds averaged; the last two columns at one severity."""
    severities = sorted({part["severity"] for part in found})
    names = list(dict.fromkeys(name for part in found for name in part["shares"]))
    heads = [f"severity {one}" for one in severities] + [f"balanced recall, {level}", f"as a person, {level}"]
    lines = [f"| | clear kept | three things | another scene | {' | '.join(heads)} |"]
    lines.append(f"|---|{'---|' * (3 + len(heads))}")
    for name in names:
        parts = [part for part in found if name in part["shares"]]
        cells = [_share([(part, part["shares"][name].get(kind)) for part in parts]) for kind in CALM]
        for one in severities:
            own = [(part, part["shares"][name]) for part in parts if part["severity"] == one]
            cells.append(_share([(part, float(np.mean([shares[kind] for kind in kinds]))) for part, shares in own]))
        at_level = [part for part in parts if part["severity"] == level]
        cells += [_share([(part, part[means].get(name)) for part in at_level]) for means in ("balanced", "people")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(values: list[tuple[dict[str, Any], float | None]]) -> str:
    """Mean and deviation over cameras, per cent; of each camera the mean of its parts."""
    by_camera: dict[str, list[float]] = {}
    for part, value in values:
        if value is not None:
            by_camera.setdefault(part["camera"], []).append(100 * value)
    known = [np.mean(own) for own in by_camera.values()]
    if not known:
        return ""
    return f"{np.mean(known):.1f}" + (f" ± {np.std(known, ddof=1):.1f}" if len(known) > 1 else "")


def kinds_table(found: list[dict[str, Any]], kinds: tuple[str, ...], severity: int) -> str:
    """Every kind at one severity, mean over cameras."""
    own = [part for part in found if part["severity"] == severity]
    names = [name for name in dict.fromkeys(name for part in own for name in part["shares"]) if name != "constant"]
    lines = [f"| severity {severity} | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for kind in kinds:
        known = ([part["shares"][name][kind] for part in own if name in part["shares"]] for name in names)
        cells = [f"{100 * np.mean(values):.1f}" for values in known]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def people(path: Path) -> dict[str, int]:
    """What a person calls the stamps, as classes of ImageNet: lines of a path and a WordNet id."""
    ids = {names[0]: index for index, names in enumerate(imagenet_names())}
    lines = [line.split() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return {words[0]: ids[words[1]] for words in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path(".cache/objects"), help="what scripts/build_objects made")
    parser.add_argument("--out", type=Path, default=Path(".cache/results/objects"), help="bundles and figures")
    parser.add_argument("--rule", type=Path, default=PACKAGED, help="learned forward+; the package's by default")
    parser.add_argument("--methods", default="statistics,robust,forward+", help=f"of {', '.join((*OWN, *PUBLISHED))}")
    parser.add_argument("--oracle", action="store_true", help="an upper bound; five minutes a camera and kind")
    parser.add_argument("--scenes", type=int, default=8)
    parser.add_argument("--frames", type=int, default=96, help="pictures of each kind")
    parser.add_argument("--severities", default="1,3,5")
    parser.add_argument("--seeds", default="0", help="of what passes where; comma-separated")
    parser.add_argument("--quick", action="store_true", help="two scenes, severity 3, five kinds, 48 pictures")
    arguments = parser.parse_args()
    arguments.kinds = BENCHMARK_KINDS
    if arguments.quick:
        arguments.scenes, arguments.severities, arguments.frames = 2, "3", 48
        arguments.kinds = BENCHMARK_KINDS[::3]
    frozen = Frozen()
    said = people(Path(__file__).parent.parent / "scripts" / "objects.txt")
    severities = [int(one) for one in arguments.severities.split(",")]
    found = []
    for seed in map(int, arguments.seeds.split(",")):
        arguments.seed = seed
        cameras = cameras_of(
            arguments.pictures, TEST, frozen.classes, SIDE, arguments.frames, seed, arguments.scenes, said
        )
        print(f"{len(cameras)} cameras: {', '.join(camera.name for camera in cameras)}", flush=True)
        for camera, severity in product(cameras, severities):
            of = [camera.name.replace("/", "-"), severity, arguments.seed, arguments.frames, len(arguments.kinds)]
            label = "-".join(map(str, [*of, arguments.methods.replace(",", "+"), *["oracle"] * arguments.oracle]))
            part = arguments.out / "parts" / f"{label}.json"
            if not part.exists():
                part.parent.mkdir(parents=True, exist_ok=True)
                part.write_text(json.dumps(measure(arguments, frozen, camera, severity, arguments.out)))
            found.append(json.loads(part.read_text()))
            print(f"{camera.name} at {severity}: {_line(found[-1], arguments.kinds)}", flush=True)
    level = 3 if 3 in severities else severities[0]
    print(f"\n{table(found, arguments.kinds, level)}\n\n{kinds_table(found, arguments.kinds, level)}\n")
    print(json.dumps({"cameras": sorted({part["camera"] for part in found}), "parts": len(found)}))


def _line(part: dict[str, Any], kinds: tuple[str, ...]) -> str:
    means = {name: 100 * np.mean([own[kind] for kind in kinds]) for name, own in part["shares"].items()}
    return ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())


if __name__ == "__main__":
    main()
