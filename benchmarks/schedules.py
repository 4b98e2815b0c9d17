"""When to adapt, by experiment: `burst` against `always`, and its thresholds. The tables of docs/RELIABILITY.md.

    scripts/bench schedules          twenty minutes on one core

    thresholds  9,000 frames of the validation families: ten random domains of meta-training (never a kind of the
                benchmark) of 600 frames each, clear weather between them; one threshold changed at a time
    half-hour   45,000 frames of the test families at 25 a second: six kinds come and go, severities 1 … 5 … 1

The reader's exported bundles run as `mgg-edge run` would run them (ONNX Runtime, batch 8, one thread). `time` is the
time spent in steps, guards included, over that of `always`; `gain` is the accuracy over that of the frozen model.
"""

from __future__ import annotations

import json
from typing import Any

from _runs import changed, domains_stream, labelled, mean_run, parser_of, run

from mgg_edge.scenes.courses import parse_course
from mgg_edge.scenes.glyphs import load_glyphs
from mgg_edge.scenes.sources import GlyphSource
from mgg_edge.scenes.streams import Stream

RULES = ("adam", "mgg", "mgg+", "adam+")
HALF_HOUR = "drift:fog+gaussian_noise+defocus_blur+night+snow+contrast"
HALF_HOUR_FRAMES = 25 * 60 * 30
DOMAINS, DOMAIN_FRAMES, CLEAR_FRAMES = 10, 600, 300
VARIANTS: dict[str, dict[str, float]] = {
    "default": {},
    "6 updates": {"burst.updates": 6},
    "25 updates": {"burst.updates": 25},
    "50 updates": {"burst.updates": 50},
    "6 updates, wake at 1.35": {"burst.updates": 6, "burst.wake_ratio": 1.35, "burst.rest_ratio": 1.14},
    "8 updates, wake at 1.35": {"burst.updates": 8, "burst.wake_ratio": 1.35, "burst.rest_ratio": 1.14},
    "wake at 1.1": {"burst.wake_ratio": 1.1, "burst.rest_ratio": 1.05},
    "wake at 1.35": {"burst.wake_ratio": 1.35, "burst.rest_ratio": 1.14},
    "wake at 1.4": {"burst.wake_ratio": 1.4},
    "wake at 1.7": {"burst.wake_ratio": 1.7},
    "patience 8": {"burst.patience_frames": 8},
    "patience 72": {"burst.patience_frames": 72},
    "settle 32": {"burst.settle_frames": 32},
    "no snapshots": {"snapshots": 0},
}


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
    arguments = parser_of(__doc__, rules=",".join(RULES), out="schedules.json").parse_args()
    glyphs = load_glyphs(arguments.parts / "glyphs.safetensors")
    found: dict[str, Any] = {}

    source = GlyphSource(glyphs.select("source-validation"))
    streams = [list(domains_stream(source, seed, DOMAINS, DOMAIN_FRAMES, CLEAR_FRAMES)) for seed in (0, 1)]
    for rule in arguments.rules.split(","):
        bundle = arguments.bundles / f"{rule}.mgg"
        runs = (("off", {}), ("always", {}), *(("burst", changes) for changes in VARIANTS.values()))
        frozen, always, *others = (mean_run(bundle, streams, adapt, changed(changes)) for adapt, changes in runs)
        found[f"thresholds {rule}"] = {"frozen": frozen, "always": always, **dict(zip(VARIANTS, others, strict=True))}
        print_table(f"`{rule}`, thresholds", frozen["accuracy"], dict(zip(VARIANTS, others, strict=True)), always)
        arguments.out.write_text(json.dumps(found, indent=1))

    course = parse_course(HALF_HOUR)
    half_hour = list(labelled(Stream(GlyphSource(glyphs.select("test")), course, 25, HALF_HOUR_FRAMES, 0)))
    for rule in arguments.rules.split(","):
        bundle = arguments.bundles / f"{rule}.mgg"
        frozen, always, burst = (run(bundle, half_hour, adapt) for adapt in ("off", "always", "burst"))
        found[f"half-hour {rule}"] = {"frozen": frozen, "always": always, "burst": burst}
        print_table(f"`{rule}`, half an hour", frozen["accuracy"], {"burst": burst}, always)
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
