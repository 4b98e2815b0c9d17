"""The update rules on whole streams, as a run would use them: the second half of docs/RESULTS.md.

    scripts/bench streams                    about a quarter of an hour on two cores; finished parts are kept

Each rule is exported and run by the device half (ONNX Runtime, batch 8) with its default schedule; online accuracy,
each frame read once, as it comes, in pictures of unseen type families.

    clean       1,500 frames without weather
    sorted      2,304 clean frames, one class for 128 frames
    one scene   1,500 clean frames of three classes alone
    drift       3,600 frames: fog, noise, blur and night come and go
    recurring   3,600 frames: noise, fog, blur and contrast at severity 5, three times round
    long        8,000 frames of Gaussian noise at severity 5, adapted to on every batch: 1,000 updates
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from _export import export_if_stale
from _results import stream_table
from _runs import labelled, read

from mgg_edge.scenes.courses import parse_course
from mgg_edge.scenes.glyphs import load_glyphs
from mgg_edge.scenes.sources import GlyphSource
from mgg_edge.scenes.streams import Stream

BATCH = 8
STREAMS = {
    "clean": ("clean", 1500, "auto"),
    "sorted": ("sorted", 2304, "auto"),
    "one scene": ("clean", 1500, "auto"),
    "drift": ("drift", 3600, "auto"),
    "recurring": ("recurring", 3600, "auto"),
    "long": ("iid:gaussian_noise@5", 8000, "always"),
}
SEEDS = {"long": (0,)}
RATES = {"sgd": 1e-2, "adam": 1e-2}
WINDOW = 500


class Few(GlyphSource):
    """Three classes alone."""

    @property
    def available(self) -> np.ndarray:
        """C, O and 4."""
        return np.array([2, 14, 30])


def bundle_of(rule: str, parts: Path, folder: Path) -> Path:
    """The rule's bundle, exported if it is not there."""
    learned = parts / f"{rule}.safetensors"
    words = ["--backbone", "mgg_reader_32", "--weights", parts / "reader.safetensors", "--batch", BATCH]
    words += ["--source-data", parts / "glyphs.safetensors"]
    if learned.exists():
        return export_if_stale(folder / f"{rule}.mgg", words, learned)
    return export_if_stale(folder / f"{rule}.mgg", [*words, "--rule", rule, "--learning-rate", RATES[rule]], None)


def measure(bundle: Path, name: str, seed: int, source: GlyphSource, adapt: str | None = None) -> dict[str, Any]:
    text, frames, mode = STREAMS[name]
    pictures = Few(source.glyphs) if name == "one scene" else source
    right, facts = read(bundle, labelled(Stream(pictures, parse_course(text), 25, frames, seed)), adapt or mode)
    windows = np.convolve(right, np.ones(WINDOW) / WINDOW, "valid")
    return {"accuracy": float(right.mean()), "last": float(windows[-1]), "steps": facts["steps"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=Path(".cache/default"), help="glyphs, reader and rules")
    parser.add_argument("--kept", type=Path, default=Path(".cache/results"), help="finished parts")
    parser.add_argument("--only", default="frozen,sgd,adam,mgg,mgg+,adam+,forward", help="rules, comma-separated")
    arguments = parser.parse_args()
    source = GlyphSource(load_glyphs(arguments.parts / "glyphs.safetensors").select("test"))
    for rule in arguments.only.split(","):
        bundle = bundle_of("sgd" if rule == "frozen" else rule, arguments.parts, arguments.kept / "bundles")
        for name in STREAMS:
            for seed in SEEDS.get(name, (0, 1, 2)):
                kept = arguments.kept / f"stream.{rule}.{name.replace(' ', '-')}.{seed}.json"
                if kept.exists() and kept.stat().st_mtime > bundle.stat().st_mtime:
                    continue
                started = time.monotonic()
                result = measure(bundle, name, seed, source, "off" if rule == "frozen" else None)
                kept.write_text(json.dumps({"rule": rule, "stream": name, "seed": seed, **result}))
                print(f"-- {rule} {name} {seed}: {result} {time.monotonic() - started:.0f} s", flush=True)
    print(stream_table(arguments.kept))


if __name__ == "__main__":
    main()
