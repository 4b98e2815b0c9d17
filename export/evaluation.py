"""Jobs of `mgg-edge eval`: from settings to a model, a method and a stream, in whatever process runs them.

A model comes from a name and weights, or from a bundle; a bundle's own rule is its exported step, on PyTorch or, with
the engine `onnxruntime`, through the run time.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mgg_edge
from mgg_edge.errors import UsageError
from mgg_edge.export.compose import ExportRequest, compose_backbone
from mgg_edge.export.engine_method import EngineMethod
from mgg_edge.export.restore import restore_step
from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.evaluation import Checks, Job, Row, evaluate, make_jobs
from mgg_edge.learn.evaluation.scenery import Scenery, open_scenery
from mgg_edge.learn.methods import Method, Source, build_method, parse_method
from mgg_edge.learn.methods.discrepancy import RuleMethod
from mgg_edge.learn.norm_statistics import DEFAULT_NORM_STATISTICS
from mgg_edge.learn.statistics import measure_statistics
from mgg_edge.learn.step import AdaptStep
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import open_engine
from mgg_edge.scenes.streams import parse_course

__all__ = ["ENGINES", "EvaluationRequest", "plan_jobs", "run_job"]

ENGINES = ("torch", "onnxruntime")
STATISTICS_BATCH = 64
HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate; every field decides the results.

    Attributes:
        backbone: model name, or None with a bundle.
        weights: its weights, as for an export.
        bundle: file of a bundle, or None with a backbone.
        data: glyph file or ImageFolder directory that streams are drawn from.
        source_data: the same for the source domain.
        mgg: file of learned numbers for `mgg` on a backbone.
        engine: `torch`, or `onnxruntime` for the exported step of a bundle.
        batch: frames of a batch.
        frames: of a stream.
        held_out: frames kept apart for each domain; 0 measures nothing after n batches.
        source_images: clean images methods may know.
        norm_statistics: of batch normalisation of a backbone.
    """

    data: str
    backbone: str | None = None
    weights: str = "random"
    bundle: str | None = None
    source_data: str | None = None
    mgg: str | None = None
    engine: str = "torch"
    batch: int = 16
    frames: int = 2000
    held_out: int = 500
    source_images: int = 512
    norm_statistics: str = DEFAULT_NORM_STATISTICS

    def __post_init__(self) -> None:
        if (self.backbone is None) == (self.bundle is None):
            raise UsageError("evaluation: expected either --backbone or --bundle")
        if self.engine not in ENGINES:
            raise UsageError(f"engine: expected one of {', '.join(ENGINES)}, found '{self.engine}'")
        if self.engine == "onnxruntime" and self.bundle is None:
            raise UsageError("engine: onnxruntime runs the exported step of a bundle; name one with --bundle")
        if not (1 <= self.batch <= self.frames and self.held_out >= 0 and self.source_images >= 1):
            raise UsageError(f"evaluation: expected positive sizes and at least one batch of frames, found {self}")


def plan_jobs(
    request: EvaluationRequest, methods: Sequence[str], streams: Sequence[str], seeds: Sequence[int]
) -> tuple[Job, ...]:
    """The jobs of a sweep, each checked as far as can be without running it.

    Raises:
        UsageError: a method, stream or file that is not there.
        UnsupportedError: a method the model cannot do.
        MggEdgeError: a model or data that cannot be read.
    """
    for stream in streams:
        parse_course(stream)
    settings = dataclasses.asdict(request)
    named = (request.weights, request.bundle, request.mgg, request.data, request.source_data)
    files = [Path(name) for name in named if name is not None and name not in ("random", "pretrained", "package")]
    digests = {str(path): _digest(path) for path in files}
    jobs = make_jobs(methods, streams, seeds, {**settings, "digests": digests, "version": mgg_edge.__version__})
    for method in methods:
        _method(request, method, seed=0)
    return jobs


def run_job(job: Job) -> Row:
    """Run one job; model and data are kept for the next one of this process.

    Raises:
        MggEdgeError: what `plan_jobs` could not foresee.
    """
    fields = {field.name for field in dataclasses.fields(EvaluationRequest)}
    request = EvaluationRequest(**{name: value for name, value in job.setting.items() if name in fields})
    scenery = _world(request).scenery
    stream = scenery.stream(job.stream, batch=request.batch, frames=request.frames, seed=job.seed)
    checks = Checks()
    if count := request.held_out:
        checks = Checks(cache(lambda domain: scenery.held_out(domain, count)), scenery.clean(count))
    return evaluate(_method(request, job.method, job.seed), stream, checks).to_dict()


@dataclass(frozen=True)
class _World:
    """Attributes: backbone, None where the engine needs no PyTorch model; step and bundle, if it comes from one."""

    backbone: Backbone | None
    scenery: Scenery
    step: AdaptStep | None
    bundle: Bundle | None


@cache
def _world(request: EvaluationRequest) -> _World:
    source_data = Path(request.source_data) if request.source_data else None
    if request.bundle is None:
        backbone = compose_backbone(
            ExportRequest(str(request.backbone), request.weights, norm_statistics=request.norm_statistics)
        )
        scenery = open_scenery(Path(request.data), source_data, backbone.preprocess, backbone.classes)
        return _World(backbone, scenery, None, None)
    bundle = Bundle.load(request.bundle)
    manifest = bundle.manifest
    scenery = open_scenery(Path(request.data), source_data, manifest.preprocess, manifest.backbone.classes)
    if request.engine == "onnxruntime":
        return _World(None, scenery, None, bundle)
    step = restore_step(bundle)
    return _World(step.backbone, scenery, step, bundle)


@cache
def _source(request: EvaluationRequest) -> Source:
    world = _world(request)
    frames = world.scenery.source_frames(request.source_images)
    if world.step is not None:
        return Source(world.step.statistics, frames)
    if world.backbone is None:
        raise UsageError("evaluation: a bundle run by the engine has no model in PyTorch")
    return Source(measure_statistics(world.backbone, frames.split(STATISTICS_BATCH)), frames)


def _method(request: EvaluationRequest, text: str, seed: int) -> Method:
    world = _world(request)
    if world.bundle is not None and request.engine == "onnxruntime":
        rule = world.bundle.manifest.rule.name
        if text not in ("none", rule):
            raise UsageError(f"engine: onnxruntime runs none and the bundle's own rule, {rule}; found '{text}'")
        adapt = text == rule
        if adapt and world.bundle.manifest.adapt_batch % request.batch:
            raise UsageError(
                f"batch: expected {world.bundle.manifest.adapt_batch} frames, the size the step was exported for, or a "
                f"part of it, found {request.batch}"
            )
        return EngineMethod(world.bundle, open_engine(world.bundle, "cpu", threads=1, with_adapt=adapt), adapt=adapt)
    defaults: dict[str, Any] = {"seed": seed}
    if world.bundle is not None and world.step is not None:
        if text == world.step.rule.name:
            return RuleMethod(world.step, world.bundle.manifest.adapt_batch)
        defaults["least_batch"] = world.bundle.manifest.adapt_batch
    if text.partition(":")[0] == "mgg" and request.mgg is not None:
        defaults["weights"] = request.mgg
    if world.backbone is None:
        raise UsageError("evaluation: a bundle run by the engine has no model in PyTorch")
    return build_method(parse_method(text, **defaults), world.backbone, _source(request))


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and sizes in a directory.

    Raises:
        UsageError: it is not there.
    """
    hasher = hashlib.sha256()
    if path.is_dir():
        for entry in sorted(path.rglob("*")):
            if entry.is_file():
                hasher.update(f"{entry.relative_to(path)}:{entry.stat().st_size};".encode())
        return hasher.hexdigest()
    try:
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                hasher.update(chunk)
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror}") from error
    return hasher.hexdigest()
