"""Calibration to a site: what a camera sees there when all is well, and what adapting is worth.

Feature statistics are about content as much as about weather. A fixed camera sees one scene: against statistics of
other pictures every clean frame of it looks like bad weather. So the site's own clean pictures give

    μ_S, σ_S        mean and unbiased deviation of their features under θ₀
    Δ_clean(M)      the largest discrepancy of M of them in a row: what content alone can do here
    clean_entropy   the largest mean entropy of B of them in a row: how unsure the source model is without weather
    canaries        some of them; a candidate under which too many change class is refused
    μ_C, σ²_C       of batch normalisation, where its statistics move (`site_statistics`)

The report needs no labels: pictures are put into random weathers of the kind that rules are meta-trained on, and the
frozen model's predictions of the clean ones are the truth, for the frozen model and for an adapter as a run would use
it. It looks at the last part of the footage with statistics and canaries of the part before: what adapting is worth has
to show on what comes later. The bundle that is written then knows all of the footage.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from mgg_edge.container import describe_members, read_container, write_container
from mgg_edge.errors import UsageError
from mgg_edge.files import output_target
from mgg_edge.manifest import Manifest, SiteInfo, SiteRow
from mgg_edge.runtime.adaptation.adapter import Adapter
from mgg_edge.runtime.adaptation.adapter_inference import infer_all
from mgg_edge.runtime.adaptation.gate_thumbnail import difference_levels, thumbnail
from mgg_edge.runtime.adaptation.guard_canary import entropies
from mgg_edge.runtime.adaptation.site_statistics import with_site_statistics
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Engine, open_engine
from mgg_edge.runtime.preprocess import fit
from mgg_edge.runtime.sources.source import FrameSource
from mgg_edge.scenes.domains import draw_domain

__all__ = [
    "CLEAN_WINDOWS",
    "LIVE_SECONDS",
    "MIN_FRAMES",
    "Measured",
    "calibrate",
    "gather_frames",
    "judge",
    "measure_site",
]

ENGINE = "cpu"  # a GPU engine would be built anew for every draft of the statistics
# As in `mgg_edge.learn.rules.base`, which the run time must not import; a test holds the two together.
CLEAN_WINDOWS = (2, 4, 8, 16, 32, 64, 128)
MIN_FRAMES, MAX_FRAMES = 32, 512
LIVE_SECONDS = 180.0
REPORT_FRAMES = 64
REPORT_WEATHERS, REPORT_SEED = 12, 2027
KNOWN_SHARE = 0.7  # of the footage, for the report
CANARIES = 16
MIN_DIFFERENCE_LEVELS = 1.0
MAX_CLEAN_CHANGED = 0.01
MAX_LOSS_OF_A_KIND = 0.05  # three pictures of 64: less is chance
Frames = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """What clean pictures of a site say.

    Attributes:
        mean, std: f32[D], μ_S and σ_S.
        clean_discrepancy: f32[7], Δ_clean at `CLEAN_WINDOWS`.
        clean_entropy: nats.
        classes: i64[n], the source model's prediction of each picture.
    """

    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]
    clean_discrepancy: npt.NDArray[np.float32]
    clean_entropy: float
    classes: npt.NDArray[np.int64]


def gather_frames(
    source: FrameSource,
    manifest: Manifest,
    limit: int = MAX_FRAMES,
    *,
    seconds: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = lambda _stage, _done, _total: None,
) -> Frames:
    """Clean pictures u8[n, H, W, 3] at model size, n ≤ `limit`, spread over the whole source where its length is known.

    A picture that differs from the one kept last by less than a grey level is left out.

    Args:
        source: of clean pictures.
        manifest: of the bundle.
        limit: most pictures.
        seconds: of the source's clock over which to spread them; to its end if None.
        stop: asked before each picture; True makes do with what there is.
        progress: told of the seconds, or of the pictures where their number is known.

    Raises:
        UsageError: fewer than 32 pictures that differ.
        SourceError: the source failed.
    """
    stride = 1 if seconds else max(1, (source.frames_expected or 0) // limit)
    kept: list[Frames] = []
    last: npt.NDArray[np.float32] | None = None
    due_s = 0.0
    for number, frame in enumerate(source):
        if stop() or (seconds is not None and frame.time_s >= seconds):
            break
        if seconds is not None:
            progress("seconds of footage", int(frame.time_s), math.ceil(seconds))
        elif source.frames_expected:
            progress("pictures looked at", number, source.frames_expected)
        if number % stride or frame.time_s < due_s:
            continue
        due_s = frame.time_s + seconds / limit if seconds else 0.0
        fitted = fit(frame.image, manifest.preprocess)
        small = thumbnail(fitted)
        if last is not None and difference_levels(last, small) < MIN_DIFFERENCE_LEVELS:
            continue
        kept.append(fitted)
        last = small
        if len(kept) == limit:
            break
    if len(kept) < max(MIN_FRAMES, manifest.adapt_batch):
        raise UsageError(
            f"{source.name}: expected at least {max(MIN_FRAMES, manifest.adapt_batch)} pictures that differ, "
            f"found {len(kept)}: calibrate while something moves, or for longer"
        )
    return np.stack(kept)


def measure_site(engine: Engine, bundle: Bundle, frames: Frames) -> Measured:
    """Statistics of clean pictures u8[n, H, W, 3] in the order they were seen."""
    return _measured(*infer_all(engine, frames, bundle.initial_state, bundle.manifest.infer_batch), bundle.manifest)


def _measured(logits: npt.NDArray[np.float32], features: npt.NDArray[np.float32], manifest: Manifest) -> Measured:
    values, each, batch = features.astype(np.float64), entropies(logits), manifest.adapt_batch
    mean, std = values.mean(0), values.std(0, ddof=1)
    means = [each[start : start + batch].mean() for start in range(len(each) - batch + 1)]
    return Measured(
        mean.astype(np.float32),
        std.astype(np.float32),
        _clean_discrepancy(values, mean, std).astype(np.float32),
        float(max(means)),
        logits.argmax(1).astype(np.int64),
    )


def judge(rows: Sequence[SiteRow], clean_changed: float) -> str:
    """The verdict on a rule: `adapt`, `burst only` or `do not adapt`.

    Adapting must leave clean pictures alone (at most 1 % changed) and gain on the mean of the weathers; if some weather
    loses more than 5 points by it, it is kept to short bursts.
    """
    gains = [row.adapted - row.frozen for row in rows]
    if not (clean_changed <= MAX_CLEAN_CHANGED and float(np.mean(gains)) > 0):
        return "do not adapt"
    return "adapt" if min(gains) >= -MAX_LOSS_OF_A_KIND else "burst only"


def calibrate(
    path: Path,
    source: FrameSource,
    out: Path,
    *,
    threads: int | None = None,
    seconds: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = lambda _stage, _done, _total: None,
) -> SiteInfo:
    """Write a bundle for a site; weights and graphs are those of the bundle at `path`, byte for byte or in value.

    Args:
        path: the bundle to start from.
        source: clean pictures of the site.
        out: bundle to write, replaced if it exists.
        threads: of the engine.
        seconds: of footage; a camera's or stream's first three minutes, a file's whole length if None.
        stop: asked before each picture; True makes do with those there are.
        progress: called with a stage's name, and how much of how much of it is done.

    Returns:
        What was found, as the new bundle's manifest says it.

    Raises:
        UsageError: too few pictures.
        MggEdgeError: a bundle or source that cannot be read, or a file that cannot be written.
    """
    output_target(out)  # before the work
    bundle = Bundle.load(path)
    if seconds is None and source.live and source.frames_expected is None:
        seconds = LIVE_SECONDS
    frames = gather_frames(source, bundle.manifest, seconds=seconds, stop=stop, progress=progress)
    progress("clean pictures", len(frames), len(frames))
    engine = open_engine(bundle, ENGINE, threads=threads, with_adapt=False)
    try:
        logits, features = infer_all(engine, frames, bundle.initial_state, bundle.manifest.infer_batch)
    finally:
        engine.close()
    known = max(math.ceil(KNOWN_SHARE * len(frames)), MIN_FRAMES, bundle.manifest.adapt_batch)
    before = _measured(logits[:known], features[:known], bundle.manifest)
    whole = _measured(logits, features, bundle.manifest)
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch) / "draft.mgg"
        _write_site(bundle, frames[:known], before, source.name, draft, threads, progress)
        # Of little footage some is seen again.
        later = slice(min(known, len(frames) - len(frames) // 4), None)
        rows = _report(draft, frames[later], whole.classes[later], threads, progress)
        changed = 1 - _agreement(draft, frames, whole.classes, "auto", threads)
        found = {"rows": rows, "clean_changed": changed, "verdict": judge(rows, changed)}
        return _write_site(bundle, frames, whole, source.name, out, threads, progress, found)


def _write_site(
    bundle: Bundle,
    frames: Frames,
    measured: Measured,
    name: str,
    out: Path,
    threads: int | None,
    progress: Progress,
    found: Mapping[str, Any] | None = None,
) -> SiteInfo:
    """Write a bundle that knows these frames; a draft as long as nothing is found about adapting there."""
    kept = np.linspace(0, len(frames) - 1, CANARIES).astype(int)
    canaries, classes = frames[kept], tuple(measured.classes[kept].tolist())
    site = SiteInfo(bundle.id, name, len(frames), classes, measured.clean_entropy, 0.0, "adapt", ())
    moved = with_site_statistics(bundle, frames, ENGINE, threads, progress)
    if found is None:
        _write(moved, out, measured, canaries, site, {})
        return site
    judged = dataclasses.replace(site, **found)
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch) / "draft.mgg"
        _write(moved, draft, measured, canaries, site, {})
        recorded = _first_step(draft, threads)
    _write(moved, out, measured, canaries, judged, recorded)
    return judged


def _report(
    draft: Path, clean: Frames, truth: npt.NDArray[np.int64], threads: int | None, progress: Progress
) -> tuple[SiteRow, ...]:
    """Agreement with the clean predictions in weathers of the training, each kept for some frames."""
    chosen = np.resize(np.arange(len(clean)), REPORT_FRAMES)
    rows = []
    for number in range(REPORT_WEATHERS):
        rng = np.random.default_rng([REPORT_SEED, number])
        weather = draw_domain(rng, 0.0)
        corrupted = weather(clean[chosen], rng)
        frozen, adapted = (_agreement(draft, corrupted, truth[chosen], mode, threads) for mode in ("off", "auto"))
        rows.append(SiteRow(weather.name, frozen, adapted))
        progress("simulated weather", number + 1, REPORT_WEATHERS)
    return tuple(rows)


def _agreement(
    draft: Path, frames: Iterable[Frames], truth: npt.NDArray[np.int64], mode: str, threads: int | None
) -> float:
    with Adapter.open(draft, engine=ENGINE, adapt=mode, threads=threads) as adapter:
        found = [adapter(frame).index for frame in frames]
    return float(np.mean(np.array(found) == truth))


def _first_step(draft: Path, threads: int | None) -> dict[str, npt.NDArray[np.float32]]:
    """Logits and θ of a step on the self-test's frames: they depend on the statistics."""
    bundle = Bundle.load(draft)
    engine = open_engine(bundle, ENGINE, threads=threads)
    try:
        logits, _ = engine.adapt(bundle.self_test["frames"][: bundle.manifest.adapt_batch].astype(np.uint8))
        theta = engine.candidate["theta"].astype(np.float32)
        return {"adapt.logits": logits.astype(np.float32), "adapt.theta": theta}
    finally:
        engine.close()


def _write(
    bundle: Bundle,
    out: Path,
    measured: Measured,
    canaries: Frames,
    site: SiteInfo,
    recorded: Mapping[str, npt.NDArray[np.float32]],
) -> None:
    manifest, members, _ = read_container(bundle.path)
    statistics = {
        "statistics.mean": measured.mean,
        "statistics.std": measured.std,
        "statistics.clean_discrepancy": measured.clean_discrepancy,
    }
    self_test = {**bundle.self_test, **recorded, "canaries": canaries}
    members["state.safetensors"] = safetensors.numpy.save(
        {name: np.array(array, order="C") for name, array in bundle.initial_state.items()}
    )
    members["weights.safetensors"] = safetensors.numpy.save(
        {name: np.array(array, order="C") for name, array in {**bundle.weights, **statistics}.items()}
    )
    members["selftest.safetensors"] = safetensors.numpy.save(
        {name: np.array(array, order="C") for name, array in self_test.items()}
    )
    found = dataclasses.replace(manifest.statistics, source=site.source, images=site.frames)
    new = manifest.replace(site=site, statistics=found, members=describe_members(members))
    write_container(out, new, members)


def _clean_discrepancy(
    features: npt.NDArray[np.float64], mean: npt.NDArray[np.float64], std: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The largest discrepancy of M features in a row, for every M; where there are too few, it falls like 1/M."""
    found: list[float] = []
    for window in CLEAN_WINDOWS:
        if 2 * window > len(features) and found:
            found.append(found[-1] / 2)
            continue
        starts = range(0, len(features) - window + 1, max(1, window // 4))
        parts = (features[start : start + window] for start in starts)
        found.append(
            max(
                float(np.square(part.mean(0) - mean).mean() + np.square(part.std(0, ddof=1) - std).mean())
                for part in parts
            )
        )
    return np.array(found)
