"""Labelled streams through an adapter, as `mgg-edge run` would take them; settings with one threshold changed."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mgg_edge.runtime import Adapter
from mgg_edge.runtime.adaptation.adapter_settings import AdapterSettings
from mgg_edge.scenes.domains import Domain, draw_domain
from mgg_edge.scenes.sources import GlyphSource
from mgg_edge.scenes.streams import Stream

UNJUDGED = -1  # label of a frame whose prediction does not count
Frames = Iterable[tuple[np.ndarray, np.ndarray]]


def parser_of(doc: str | None, rules: str, out: str) -> argparse.ArgumentParser:
    """Arguments of a benchmark that runs the reader's exported bundles."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=Path(".cache/default"), help="glyphs")
    parser.add_argument("--bundles", type=Path, default=Path(".cache/results/bundles"), help="those of `streams`")
    parser.add_argument("--rules", default=rules, help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path(".cache/results") / out, help="figures")
    return parser


def labelled(stream: Stream) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames and labels of each batch."""
    for batch in stream:
        yield batch.frames, batch.labels


def domains_stream(
    source: GlyphSource, seed: int, domains: int, domain_frames: int, clear_frames: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Random domains of meta-training, never a kind of the benchmark, with clear weather before each."""
    rng = np.random.default_rng(seed)
    for _ in range(domains):
        for domain, frames in ((Domain("clean", ()), clear_frames), (draw_domain(rng, 0.0), domain_frames)):
            labels = rng.choice(source.available, frames)
            yield domain(source.draw(labels, rng), rng), labels


def read(
    bundle: Path, stream: Frames, adapt: str, settings: AdapterSettings | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Which of the judged frames were read right, each as it comes, and what adaptation did: seconds and counts."""
    right = []
    with Adapter.open(bundle, adapt=adapt, threads=1, settings=settings) as adapter:
        for frames, labels in stream:
            found = np.array([adapter(frame).index for frame in frames])
            right.append((found == labels)[labels != UNJUDGED])
        counters, spent_ms = adapter.counters, sum(adapter.adapt_times_ms)
    facts = {"steps": counters.adapt_steps, "wakes": counters.wakes, "restores": counters.restores}
    facts |= {"rejected": counters.adapt_rejected, "rollbacks": sum(counters.rollbacks.values())}
    return np.concatenate(right), {"adapt_s": round(spent_ms / 1e3, 1), **facts}


def run(bundle: Path, stream: Frames, adapt: str, settings: AdapterSettings | None = None) -> dict[str, Any]:
    """Online accuracy, seconds in steps, and counts."""
    right, facts = read(bundle, stream, adapt, settings)
    return {"accuracy": float(right.mean()), **facts}


def mean_run(
    bundle: Path, streams: Iterable[Frames], adapt: str, settings: AdapterSettings | None = None
) -> dict[str, float]:
    """`run` on several streams, averaged."""
    rows = [run(bundle, stream, adapt, settings) for stream in streams]
    return {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}


def changed(changes: Mapping[str, Any]) -> AdapterSettings:
    """The default settings but for some, such as `{"burst.updates": 25}`."""
    settings = AdapterSettings()
    for name, value in changes.items():
        part, _, field = name.rpartition(".")
        inner = replace(getattr(settings, part), **{field: value}) if part else value
        settings = replace(settings, **{part or field: inner})
    return settings
