"""What the thresholds of gate and guard cost and save, one changed at a time. A table of docs/RELIABILITY.md.

    scripts/bench guards             forty minutes on one core

    weather   1,920 frames of the validation families: four random domains of meta-training, clear weather between them
    hostile   the same with runs of 8 frames that show nothing to learn from, a fifth of all: dark, blown, grey, frozen,
              torn, noise; the accuracy is that of the others
    sorted    1,920 clean frames, one class for 128 of them

Every batch is adapted to (`--adapt always`), which gives gate and guard most to do. Two seeds each; the reader's
exported bundles on ONNX Runtime, batch 8, one thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from _runs import UNJUDGED, Frames, changed, domains_stream, labelled, mean_run, parser_of

from mgg_edge.scenes.courses import parse_course
from mgg_edge.scenes.glyphs import load_glyphs
from mgg_edge.scenes.sources import GlyphSource
from mgg_edge.scenes.streams import Stream

FRAMES, RUN, SHARE = 1920, 8, 0.2
HOSTILE = ("dark", "blown", "grey", "frozen", "torn", "noise")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "gate: luma 0 to 255": {"gate.min_luma": 0.0, "gate.max_luma": 255.0},
    "gate: luma 30 to 225": {"gate.min_luma": 30.0, "gate.max_luma": 225.0},
    "gate: contrast 0": {"gate.min_contrast": 0.0},
    "gate: contrast 12": {"gate.min_contrast": 12.0},
    "gate: difference 0": {"gate.min_difference": 0.0},
    "gate: difference 6": {"gate.min_difference": 6.0},
    "gate: all open": {
        "gate.min_luma": 0.0,
        "gate.max_luma": 255.0,
        "gate.min_contrast": 0.0,
        "gate.min_difference": 0.0,
    },
    "canaries: none": {"canary.capacity": 0},
    "canaries: 25 % must live": {"canary.min_agreement": 0.25},
    "canaries: 50 % must live": {"canary.min_agreement": 0.5},
    "canaries: 90 % must live": {"canary.min_agreement": 0.9},
    "canaries: 24 of them": {"canary.capacity": 24},
    "collapse: never suspected": {"collapse.min_fraction": 0.0},
    "collapse: share 0.7": {"collapse.max_share": 0.7},
    "collapse: fraction 0.9": {"collapse.min_fraction": 0.9},
    "verify every commit": {"ladder.verify_every": 1},
    "verify every 32": {"ladder.verify_every": 32},
}


def hostile(frames: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Frames u8[n, H, W, C] with runs of hostile ones put over them."""
    frames, labels, shape = frames.copy(), labels.copy(), frames.shape[1:]
    for start in range(RUN, len(frames) - RUN, RUN):
        if rng.random() >= SHARE:
            continue
        kind, run = HOSTILE[rng.integers(len(HOSTILE))], slice(start, start + RUN)
        noise, labels[run] = rng.normal(0, 3, (RUN, *shape)), UNJUDGED
        if kind == "frozen":
            frames[run] = frames[start - 1]
        elif kind == "torn":
            frames[run, shape[0] // 2 :] = 128
        elif kind == "noise":
            frames[run] = rng.integers(0, 256, (RUN, *shape))
        else:
            frames[run] = np.clip({"dark": 4, "blown": 251, "grey": 128}[kind] + noise, 0, 255)
    return frames, labels


def streams_of(name: str, source: GlyphSource, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The stream of this module's table."""
    rng = np.random.default_rng([seed, 1])
    if name == "sorted":
        yield from labelled(Stream(source, parse_course("sorted"), 25, FRAMES, seed))
        return
    for frames, labels in domains_stream(source, seed, domains=4, domain_frames=360, clear_frames=120):
        yield hostile(frames, labels, rng) if name == "hostile" else (frames, labels)


def main() -> None:
    parser = parser_of(__doc__, rules="mgg+,adam", out="guards.json")
    parser.add_argument("--seeds", default="0,1", help="comma-separated")
    arguments = parser.parse_args()
    source = GlyphSource(load_glyphs(arguments.parts / "glyphs.safetensors").select("source-validation"))
    names = ("weather", "hostile", "sorted")
    streams: dict[str, list[Frames]] = {
        name: [list(streams_of(name, source, int(seed))) for seed in arguments.seeds.split(",")] for name in names
    }
    found: dict[str, Any] = {}
    for rule in arguments.rules.split(","):
        bundle = arguments.bundles / f"{rule}.mgg"
        print(f"\n| `{rule}` | {' | '.join(names)} | refused, rolled back: {', '.join(names)} |\n|---|---|---|---|---|")
        for title, adapt, changes in (
            ("frozen", "off", {}),
            *((title, "always", changes) for title, changes in VARIANTS.items()),
        ):
            rows = [mean_run(bundle, streams[name], adapt, changed(changes)) for name in names]
            found[f"{rule}, {title}"] = dict(zip(names, rows, strict=True))
            accuracies = " | ".join(f"{100 * row['accuracy']:.1f}" for row in rows)
            counts = ", ".join(f"{row['rejected']:.0f} {row['rollbacks']:.0f}" for row in rows)
            print(f"| {title} | {accuracies} | {counts} |", flush=True)
            arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
