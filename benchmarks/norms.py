"""Which norms adapt: accuracy and cost against `--adapt last:K`; the curve is in docs/BACKBONES.md.

    scripts/bench norms               about five minutes on two cores; needs the parts of scripts/build_default

Accuracy: Adam at 1e-2, 10 updates of 16 pictures on each of the 15 kinds at severity 5, then 300 others are read.
Time: a step of 8 pictures on ONNX Runtime, in turns with the forward; medians, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from adaptation import FRESH, Kinds, accuracy, adapt

from mgg_edge.export import Origins, export_bundle
from mgg_edge.learn import Adam, AdaptStep, Backbone, Objective
from mgg_edge.learn.checkpoint import read_state_dict
from mgg_edge.learn.reader import READER_NAME
from mgg_edge.learn.training.learner import Learner
from mgg_edge.learn.training.rules import source_statistics
from mgg_edge.runtime import Bundle
from mgg_edge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from mgg_edge.scenes.glyphs import load_glyphs
from mgg_edge.scenes.sources import GlyphSource

CHOICES = ("last:1", "last:2", "last:4", "last:8", "all")
RATE, BATCH, REPEATS = 1e-2, 8, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=Path(".cache/default"), help="glyphs and reader")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    glyphs = load_glyphs(arguments.parts / "glyphs.safetensors")
    weights = read_state_dict(arguments.parts / "reader.safetensors")
    source, kinds = GlyphSource(glyphs.select("source-train")), Kinds(GlyphSource(glyphs.select("test")), 0)
    print("| `--adapt` | numbers in θ | accuracy | step, ms | step / forward |\n|---|---|---|---|---|")
    for choice in CHOICES:
        backbone = Backbone.create(READER_NAME, weights, adapt=choice)
        step = AdaptStep(backbone, Objective(), Adam(), source_statistics(backbone, source, 0), RATE)
        learner = Learner(backbone, Objective(), step.statistics, torch.device("cpu"))
        fresh = kinds.draw(FRESH, 0)
        if choice == CHOICES[0]:
            frozen = np.mean(accuracy(learner, learner.start(15), fresh))
            print(f"| frozen | 0 | {100 * frozen:.1f} | | |")
        theta = adapt(Adam(), lambda _n: RATE, learner, lambda n: kinds.draw(16, 16_000 + n)[0], 15, (10,))[10]
        score = float(np.mean(accuracy(learner, theta, fresh)))
        step_ms, ratio = times(step)
        print(f"| {choice} | {backbone.norms.size} | {100 * score:.1f} | {step_ms:.1f} | {ratio:.2f} |", flush=True)


def times(step: AdaptStep) -> tuple[float, float]:
    """Median milliseconds of a step, and over those of the forward at the same batch."""
    with tempfile.TemporaryDirectory() as folder:
        path, labels = Path(folder) / "x.mgg", [str(index) for index in range(step.backbone.classes)]
        origins = Origins("reader", "", "glyphs")
        export_bundle(step, path, adapt_batch=BATCH, infer_batch=BATCH, labels=labels, origins=origins, parity_steps=5)
        engine = OnnxRuntimeEngine(Bundle.load(path), threads=1)
    info = step.backbone.preprocess
    frames = np.random.default_rng(0).integers(0, 256, (BATCH, info.height, info.width, 3), np.uint8)
    found: dict[str, list[float]] = {"infer": [], "adapt": []}
    for _ in range(REPEATS):
        for name, run in (("infer", engine.infer), ("adapt", engine.adapt)):
            started = time.perf_counter()
            run(frames)
            found[name].append((time.perf_counter() - started) * 1e3)
    engine.close()
    infer_ms, adapt_ms = (statistics.median(found[name][5:]) for name in ("infer", "adapt"))
    return adapt_ms, adapt_ms / infer_ms


if __name__ == "__main__":
    main()
