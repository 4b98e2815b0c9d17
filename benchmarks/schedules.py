"""When to adapt, by experiment: `burst` against `always`, and its thresholds. The tables of docs/RELIABILITY.md.

    scripts/bench schedules          twenty minutes on one core

    thresholds  9,000 frames of the validation families: ten random domains of meta-training (never a kind of the
                benchmark) of 600 frames each, clear weather between them; one threshold changed at a time
    half-hour   45,000 frames of the test families at 25 a second: six kinds come and go, severities 1 … 5 … 1

The reader's exported bundles run as `mgg-edge run` would run them (ONNX Runtime, batch 8, one thread). `time` is the
time spent in steps, guards included, over that of `always`; `gain` is the accuracy over that of the frozen model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mgg_edge.runtime import Adapter
from mgg_edge.runtime.adaptation.adapter_settings import AdapterSettings
from mgg_edge.scenes.domains import Domain, draw_domain
from mgg_edge.scenes.glyphs import load_glyphs
from mgg_edge.scenes.sources import GlyphSource
from mgg_edge.scenes.streams import Stream, parse_course

RULES = ("adam", "mgg", "mgg+", "adam+")
HALF_HOUR = "drift:fog,gaussian_noise,defocus_blur,night,snow,contrast"
HALF_HOUR_FRAMES = 25 * 60 * 30
DOMAINS, DOMAIN_FRAMES, CLEAR_FRAMES = 10, 600, 300
VARIANTS: dict[str, dict[str, float]] = {
    "default": {},
    "10 updates": {"updates": 10},
    "50 updates": {"updates": 50},
    "wake at 1.1": {"wake_ratio": 1.1, "rest_ratio": 1.05},
    "wake at 1.4": {"wake_ratio": 1.4},
    "wake at 1.7": {"wake_ratio": 1.7},
    "patience 8": {"patience_frames": 8},
    "patience 72": {"patience_frames": 72},
    "settle 32": {"settle_frames": 32},
    "no snapshots": {"snapshots": 0},
}
Frames = list[tuple[np.ndarray, np.ndarray]]


def domains_stream(source: GlyphSource, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random domains with clear weather between them."""
    rng = np.random.default_rng(seed)
    for _ in range(DOMAINS):
        for domain, frames in ((Domain("clean", ()), CLEAR_FRAMES), (draw_domain(rng, 0.0), DOMAIN_FRAMES)):
            labels = rng.choice(source.available, frames)
            yield domain(source.draw(labels, rng), rng), labels


def run(bundle: Path, stream: Frames, adapt: str, settings: AdapterSettings | None = None) -> dict[str, Any]:
    """Online accuracy, milliseconds in steps, and counts."""
    right = 0
    with Adapter.open(bundle, adapt=adapt, threads=1, settings=settings) as adapter:
        for frames, labels in stream:
            right += sum(adapter(frame).index == label for frame, label in zip(frames, labels, strict=True))
        counters, spent_ms = adapter.counters, sum(adapter.adapt_times_ms)
    total = sum(len(labels) for _, labels in stream)
    facts = {"steps": counters.adapt_steps, "wakes": counters.wakes, "restores": counters.restores}
    return {"accuracy": right / total, "adapt_s": round(spent_ms / 1e3, 1), **facts}


def variant(changes: dict[str, float]) -> AdapterSettings:
    """Settings with one threshold changed."""
    settings = AdapterSettings()
    if "snapshots" in changes:
        return replace(settings, snapshots=int(changes["snapshots"]))
    return replace(settings, burst=replace(settings.burst, **changes))


def print_table(title: str, frozen: float, rows: dict[str, dict[str, Any]], always: dict[str, Any]) -> None:
    """Rows against `always`."""
    print(f"\n{title}; frozen {100 * frozen:.1f} %\n")
    print("| run | accuracy | gain kept | time | steps | wakes | restored |\n|---|---|---|---|---|---|---|")
    for name, row in {"always": always, **rows}.items():
        gain = (row["accuracy"] - frozen) / (always["accuracy"] - frozen)
        time = row["adapt_s"] / max(always["adapt_s"], 1e-9)
        counts = " | ".join(str(row[key]) for key in ("steps", "wakes", "restores"))
        print(f"| {name} | {100 * row['accuracy']:.1f} | {gain:.0%} | {time:.0%} | {counts} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=Path(".cache/default"), help="glyphs")
    parser.add_argument("--bundles", type=Path, default=Path(".cache/results/bundles"), help="those of `streams`")
    parser.add_argument("--rules", default=",".join(RULES), help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path(".cache/results/schedules.json"), help="figures")
    arguments = parser.parse_args()
    glyphs = load_glyphs(arguments.parts / "glyphs.safetensors")
    found: dict[str, Any] = {}

    source = GlyphSource(glyphs.select("source-validation"))
    streams = [list(domains_stream(source, seed)) for seed in (0, 1)]
    for rule in arguments.rules.split(","):
        bundle = arguments.bundles / f"{rule}.mgg"
        means = []
        for adapt, changes in (("off", {}), ("always", {}), *(("burst", changes) for changes in VARIANTS.values())):
            rows = [run(bundle, stream, adapt, variant(changes)) for stream in streams]
            means.append({key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]})
        frozen, always, *others = means
        found[f"thresholds {rule}"] = {"frozen": frozen, "always": always, **dict(zip(VARIANTS, others, strict=True))}
        print_table(f"`{rule}`, thresholds", frozen["accuracy"], dict(zip(VARIANTS, others, strict=True)), always)
        arguments.out.write_text(json.dumps(found, indent=1))

    course = parse_course(HALF_HOUR)
    half_hour = [
        (batch.frames, batch.labels)
        for batch in Stream(GlyphSource(glyphs.select("test")), course, 25, HALF_HOUR_FRAMES, 0)
    ]
    for rule in arguments.rules.split(","):
        bundle = arguments.bundles / f"{rule}.mgg"
        frozen, always, burst = (run(bundle, half_hour, adapt) for adapt in ("off", "always", "burst"))
        found[f"half-hour {rule}"] = {"frozen": frozen, "always": always, "burst": burst}
        print_table(f"`{rule}`, half an hour", frozen["accuracy"], {"burst": burst}, always)
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
