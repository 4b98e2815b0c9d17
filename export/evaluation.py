"""Jobs of `mgg-edge eval`: from settings to a model, a method and a stream, in whatever process runs them.

A model comes from a name and weights, or from a bundle; a bundle's own rule is its exported step, on PyTorch or, with
the engine `onnxruntime`, through the run time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

import mgg_edge
from mgg_edge.errors import UsageError
from mgg_edge.export.compose import ExportRequest, class_labels, compose_backbone
from mgg_edge.export.engine_method import EngineMethod
from mgg_edge.export.restore import restore_step
from mgg_edge.files import packaged_file
from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.class_folders import ClassOrder, Naming
from mgg_edge.learn.evaluation import Checks, Job, Row, evaluate, make_jobs
from mgg_edge.learn.evaluation.samples import draw_samples
from mgg_edge.learn.evaluation.scenery import Scenery, open_scenery
from mgg_edge.learn.methods import NEED_SOURCE, Classifier, Method, build_method, parse_method
from mgg_edge.learn.methods.discrepancy import RuleMethod
from mgg_edge.learn.methods.published import published_options
from mgg_edge.learn.norm_statistics import DEFAULT_NORM_STATISTICS
from mgg_edge.learn.statistics import SourceStatistics, measure_statistics
from mgg_edge.learn.step import AdaptStep
from mgg_edge.manifest import PreprocessInfo
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import open_engine
from mgg_edge.scenes.corruptions import BENCHMARK_KINDS
from mgg_edge.scenes.courses import FOLDER, parse_course

__all__ = [
    "ENGINES",
    "PROTOCOLS",
    "EvaluationRequest",
    "corruption_streams",
    "describe",
    "draw_samples_of",
    "packaged_path",
    "plan_jobs",
    "run_job",
]

ENGINES = ("torch", "onnxruntime")
PROTOCOLS = ("own", "published")
STATISTICS_BATCH = 64
HASH_CHUNK_BYTES = 1 << 20
PACKAGED_FILES = {"default": "default.mgg", "characters": "characters.safetensors"}
OWN_SOURCE = "a part of the data, shown to no stream"
VERSIONS = ("mgg-edge", "torch", "timm", "numpy")


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
        labels: of a backbone's classes: a file, `imagenet`, or None for what is known of its weights.
        classes_file: names that folders have instead of the labels.
        class_order: how folders become classes.
        mask: whether answers are chosen among the classes that have folders.
        protocol: `own` takes the methods' options as they are here, `published` what their authors set.
        own_source: whether a part of the data may stand for the source domain where no other is named.
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
    labels: str | None = None
    classes_file: str | None = None
    class_order: str = ClassOrder.NAMES.value
    mask: bool = True
    protocol: str = PROTOCOLS[0]
    own_source: bool = True

    def __post_init__(self) -> None:
        if (self.backbone is None) == (self.bundle is None):
            raise UsageError("evaluation: expected either --backbone or --bundle")
        if self.engine not in ENGINES:
            raise UsageError(f"engine: expected one of {', '.join(ENGINES)}, found '{self.engine}'")
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"protocol: expected one of {', '.join(PROTOCOLS)}, found '{self.protocol}'")
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
    jobs: list[Job] = []
    digest = cache(_digest)  # for this plan alone: the next one finds other contents
    for stream in streams:
        parse_course(stream)
        shown = _of_stream(request, stream)
        jobs += make_jobs(methods, [stream], seeds, _settings(request, shown, digest))
        for method in methods:
            _method(shown, method, seed=0)
            if method.partition(":")[0] in NEED_SOURCE:
                _scenery(shown).source_frames(1)
    return tuple(jobs)


def corruption_streams(directory: Path, severity: int) -> tuple[str, ...]:
    """Streams of a tree KIND/SEVERITY/CLASS/PICTURE, as ImageNet-C comes: one for each of its fifteen kinds there is.

    Raises:
        UsageError: there is none.
    """
    found = [kind for kind in BENCHMARK_KINDS if (directory / kind / str(severity)).is_dir()]
    if not found:
        raise UsageError(
            f"{directory}: expected folders such as {BENCHMARK_KINDS[0]}/{severity} with one folder a class in them, "
            "found none"
        )
    return tuple(f"{FOLDER}:{kind}/{severity}" for kind in found)


def _of_stream(request: EvaluationRequest, stream: str) -> EvaluationRequest:
    """The request for one stream: of `folder:NAME` the data lies in that folder."""
    name, _, folder = stream.partition(":")
    if name != FOLDER:
        return request
    return dataclasses.replace(request, data=str(Path(request.data) / folder), own_source=False)


def _settings(request: EvaluationRequest, shown: EvaluationRequest, digest: Callable[[Path], str]) -> dict[str, Any]:
    """What decides a result beside method, stream and seed: the request, and the contents of its files."""
    named = (request.weights, request.bundle, request.mgg, shown.data, request.source_data, request.labels,
             request.classes_file)  # fmt: skip
    words = ("random", "pretrained", "package", "imagenet")
    digests = {name: digest(Path(name)) for name in named if name is not None and name not in words}
    return {**dataclasses.asdict(request), "digests": digests, "version": mgg_edge.__version__}


def packaged_path(text: str) -> Path:
    """The file a user names: `default` is the package's reader, `characters` its glyph file, anything else a path.

    Raises:
        UsageError: this build of the package has no such file.
    """
    name = PACKAGED_FILES.get(text)
    return Path(text) if name is None else packaged_file(name)


def describe(request: EvaluationRequest, streams: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What was run, by name, and which folder was taken for which class."""
    model = _model(_without_data(request))
    facts = {
        "model": request.bundle or f"{request.backbone} ({request.weights})",
        "engine": request.engine,
        "data": request.data,
        "source data": request.source_data or (OWN_SOURCE if request.own_source else "none"),
        "batch": f"{request.batch} frames, {request.frames} a stream",
        "kept apart": f"at most {request.held_out} frames a domain, shown to no stream",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS),
    }
    if model.bundle is not None:
        facts["bundle id"] = model.bundle.id
        facts["norm statistics"] = "as exported"
    else:
        facts["norm statistics"] = request.norm_statistics
    if request.protocol != PROTOCOLS[0]:
        facts["protocol"] = f"{request.protocol}: options as the methods' authors set them (docs/METHODS.md)"
    mapping: dict[str, str] = {}
    for shown in dict.fromkeys(_of_stream(request, stream) for stream in streams):
        scenery = _scenery(shown)
        mapping |= scenery.mapping
        if scenery.mapping:
            total = len(scenery.pictures.classes)
            facts["classes"] = f"{len(scenery.pictures.available)} of {total} have pictures"
            if scenery.classes is not None:
                facts["classes"] += "; answers are chosen among them alone (--no-mask to choose among all)"
    if request.mgg:
        facts["mgg"] = request.mgg
    return facts, mapping


def draw_samples_of(request: EvaluationRequest, streams: Sequence[str]) -> bytes:
    """A PNG file of pictures of the streams."""
    return draw_samples({stream: _scenery(_of_stream(request, stream)) for stream in streams})


def run_job(job: Job) -> Row:
    """Run one job; model and data are kept for the next one of this process.

    Raises:
        MggEdgeError: what `plan_jobs` could not foresee.
    """
    fields = {field.name for field in dataclasses.fields(EvaluationRequest)}
    named = EvaluationRequest(**{name: value for name, value in job.setting.items() if name in fields})
    request = _of_stream(named, job.stream)
    scenery = _scenery(request)
    stream = scenery.stream(job.stream, batch=request.batch, frames=request.frames, seed=job.seed)
    checks = Checks()
    if count := request.held_out:
        checks = Checks(cache(lambda domain: scenery.held_out(domain, count)), scenery.clean(count))
    return evaluate(_method(request, job.method, job.seed), stream, checks, scenery.classes).to_dict()


@dataclass(frozen=True)
class _Model:
    """Attributes: backbone, None where the engine needs no PyTorch model; step and bundle, if it comes from one."""

    info: PreprocessInfo
    labels: tuple[str, ...]
    backbone: Backbone | None
    step: AdaptStep | None
    bundle: Bundle | None


def _without_data(request: EvaluationRequest) -> EvaluationRequest:
    """One key for the model, whichever pictures it is shown."""
    return dataclasses.replace(request, data="", source_data=None)


@cache
def _model(request: EvaluationRequest) -> _Model:
    if request.bundle is None:
        labels = None if request.labels is None else Path(request.labels)
        asked = ExportRequest(
            str(request.backbone), request.weights, labels=labels, norm_statistics=request.norm_statistics
        )
        backbone = compose_backbone(asked)
        return _Model(backbone.preprocess, class_labels(asked, backbone), backbone, None, None)
    bundle = Bundle.load(request.bundle)
    step = None if request.engine == "onnxruntime" else restore_step(bundle)
    restored = None if step is None else step.backbone
    return _Model(bundle.manifest.preprocess, bundle.manifest.labels, restored, step, bundle)


@lru_cache(maxsize=4)
def _scenery(request: EvaluationRequest) -> Scenery:
    model = _model(_without_data(request))
    source_data = None if request.source_data is None else Path(request.source_data)
    classes_file = None if request.classes_file is None else Path(request.classes_file)
    naming = Naming(model.labels, classes_file, ClassOrder(request.class_order))
    return open_scenery(
        Path(request.data), source_data, model.info, naming, keep_apart=request.held_out > 0, mask=request.mask,
        is_source=request.own_source,
    )  # fmt: skip


class _Source:
    """Knowledge of the source domain, measured when a method asks for it.

    Args:
        request: names the model and the data.
    """

    def __init__(self, request: EvaluationRequest) -> None:
        self._request, self._model = request, _model(_without_data(request))

    @cached_property
    def frames(self) -> Tensor:
        """Clean images u8[M, H, W, 3]."""
        return _scenery(self._request).source_frames(self._request.source_images)

    @cached_property
    def statistics(self) -> SourceStatistics:
        """Of the features; a bundle brings its own."""
        if self._model.step is not None:
            return self._model.step.statistics
        if self._model.backbone is None:
            raise UsageError("evaluation: a bundle run by the engine has no model in PyTorch")
        return measure_statistics(self._model.backbone, self.frames.split(STATISTICS_BATCH))


@lru_cache(maxsize=4)
def _source(request: EvaluationRequest) -> _Source:
    return _Source(request)


def _method(request: EvaluationRequest, text: str, seed: int) -> Method:
    model, name = _model(_without_data(request)), text.partition(":")[0]
    if model.bundle is not None and request.engine == "onnxruntime":
        rule = model.bundle.manifest.rule.name
        if text not in ("none", rule):
            raise UsageError(f"engine: onnxruntime runs none and the bundle's own rule, {rule}; found '{text}'")
        adapt = text == rule
        if adapt and model.bundle.manifest.adapt_batch % request.batch:
            raise UsageError(
                f"batch: expected {model.bundle.manifest.adapt_batch} frames, the size the step was exported for, or a "
                f"part of it, found {request.batch}"
            )
        return EngineMethod(model.bundle, open_engine(model.bundle, "cpu", threads=1, with_adapt=adapt), adapt=adapt)
    defaults: dict[str, Any] = {"seed": seed}
    if model.bundle is not None and model.step is not None:
        if text == model.step.rule.name:
            return RuleMethod(model.step, model.bundle.manifest.adapt_batch)
        defaults["least_batch"] = model.bundle.manifest.adapt_batch
    if name == "mgg" and request.mgg is not None:
        defaults["weights"] = request.mgg
    if model.backbone is None:
        raise UsageError("evaluation: a bundle run by the engine has no model in PyTorch")
    if request.protocol == "published":
        defaults |= published_options(name, layer_norm=Classifier(model.backbone).has_layer_norm)
    return build_method(parse_method(text, **defaults), model.backbone, _source(request))


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a directory.

    Raises:
        UsageError: it is not there, or a file cannot be read.
    """
    if not path.is_dir():
        return _contents(path)
    hasher = hashlib.sha256()
    for entry in sorted(path.rglob("*")):
        if entry.is_file():
            name = entry.relative_to(path).as_posix().encode("utf-8", "surrogateescape")
            hasher.update(name + b"\0" + _contents(entry).encode())
    return hasher.hexdigest()


def _contents(path: Path) -> str:
    hasher = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                hasher.update(chunk)
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror}") from error
    return hasher.hexdigest()
