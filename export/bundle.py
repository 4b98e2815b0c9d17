"""Compose everything a bundle holds, check it, and write it."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import safetensors.numpy
import torch
from torch import Tensor

import mgg_edge
from mgg_edge.container import describe_members, write_container
from mgg_edge.errors import UnsupportedError, UsageError
from mgg_edge.export.graph_builder import OPSET, REVERSED
from mgg_edge.export.graphs import build_graphs
from mgg_edge.export.half_precision import HalfGraph
from mgg_edge.export.parity import LEAST_STEPS, REPORTED_STEPS, Parity, check_parity, measure_parity
from mgg_edge.export.tensorrt_lint import lint_tensorrt
from mgg_edge.files import output_target
from mgg_edge.learn.images import synthetic_frames
from mgg_edge.learn.step import AdaptStep
from mgg_edge.manifest import (
    SCHEMA_VERSION,
    BackboneInfo,
    Manifest,
    ObjectiveInfo,
    Precision,
    RuleInfo,
    StatisticsInfo,
)
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from mgg_edge.runtime.engines.onnxruntime_import import import_onnxruntime
from mgg_edge.state import AdaptState

__all__ = ["Origins", "Progress", "export_bundle"]

PARITY_SEED = 20_000
SELF_TEST_SEED = 10_000
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Origins:
    """Where the numbers came from, for people reading the manifest.

    Attributes:
        weights: of the backbone, such as a file name or `random:0`.
        rule: of the rule's learned numbers; empty if it has none.
        statistics: of the source images.
    """

    weights: str
    rule: str
    statistics: str


def export_bundle(
    step: AdaptStep,
    path: Path,
    *,
    adapt_batch: int,
    labels: Sequence[str],
    origins: Origins,
    infer_batch: int = 1,
    parity_steps: int = REPORTED_STEPS[-1],
    precision: str = "float32",
    progress: Progress = lambda _stage, _done, _total: None,
) -> Manifest:
    """Export a step as one bundle file, which appears at `path` only if every check passed.

    Args:
        step: backbone, objective, rule, statistics and learning rate.
        path: destination, replaced if it exists.
        adapt_batch: B, frames per adaptation step, at least 2.
        labels: C class names.
        origins: for the manifest.
        infer_batch: frames per inference call.
        parity_steps: adaptation steps of the numeric check, at least `LEAST_STEPS`.
        precision: of the large products in the graphs for GPUs: `float32`, `float16` or `bfloat16`. How far these stray
            is measured and stated, not judged.
        progress: called with a stage's name, and how much of how much of it is done.

    Returns:
        The manifest as written.

    Raises:
        UnsupportedError: an operator or construct cannot be lowered; it is named.
        ParityError: the exported step strays from the float64 reference.
        SinkError: the file cannot be written.
        UsageError: a batch size, label count or precision that does not fit.
    """
    if precision not in set(Precision):
        raise UsageError(f"precision: expected one of {', '.join(Precision)}, found '{precision}'")
    if adapt_batch < 2 or infer_batch < 1 or parity_steps < LEAST_STEPS:
        raise UsageError(
            f"export: expected adapt batch ≥ 2, infer batch ≥ 1 and parity steps ≥ {LEAST_STEPS}, "
            f"found {adapt_batch}, {infer_batch} and {parity_steps}"
        )
    if len(labels) != step.backbone.classes:
        raise UsageError(f"labels: expected {step.backbone.classes} names, found {len(labels)}")
    folder = output_target(path).parent
    progress("trace and lower", 0, 1)
    try:
        graphs, half = build_graphs(step, infer_batch, adapt_batch, precision)
    except UnsupportedError as error:
        raise UnsupportedError(f"backbone '{step.backbone.name}': {error}") from error
    _refuse_unbuildable(graphs)
    progress("trace and lower", 1, 1)
    members = _members(step, graphs, infer_batch, adapt_batch)
    manifest = _manifest(step, labels, origins, infer_batch, adapt_batch).replace(
        members=describe_members(members), precision=precision
    )
    parity = _check(step, manifest, members, folder, parity_steps, progress, half)
    manifest = manifest.replace(parity=parity.info, half_parity=parity.half)
    write_container(path, manifest, members)
    return manifest


def _refuse_unbuildable(graphs: Mapping[str, onnx.ModelProto]) -> None:
    problems = [
        problem for name, graph in graphs.items() if name.endswith(".tensorrt.onnx") for problem in lint_tensorrt(graph)
    ]
    if problems:
        raise UnsupportedError(f"TensorRT lowering: {'; '.join(problems[:3])}")


def _members(
    step: AdaptStep, graphs: Mapping[str, onnx.ModelProto], infer_batch: int, adapt_batch: int
) -> dict[str, bytes]:
    used = {name for graph in graphs.values() for node in graph.graph.node for name in node.input}
    weights = {name: value.contiguous().numpy() for name, value in _stored(step.constants(), used).items()}
    state = {name: value.contiguous().numpy() for name, value in step.initial_state().items()}
    return {
        "weights.safetensors": safetensors.numpy.save(weights),
        "state.safetensors": safetensors.numpy.save(state),
        "selftest.safetensors": safetensors.numpy.save(_self_test(step, infer_batch, adapt_batch)),
        **{name: graph.SerializeToString(deterministic=True) for name, graph in graphs.items()},
    }


def _stored(constants: Mapping[str, Tensor], used: Collection[str]) -> dict[str, Tensor]:
    """The constants that graphs refer to, some of them reversed."""
    # The statistics always: the run time measures drift by them, and calibration replaces them.
    plain = {name: value for name, value in constants.items() if name in used or name.startswith("statistics.")}
    sources = {name: name.removesuffix(REVERSED) for name in used if name.endswith(REVERSED)}
    return plain | {
        name: constants[source].flip(tuple(range(2, constants[source].ndim)))
        for name, source in sorted(sources.items())
    }


def _self_test(step: AdaptStep, infer_batch: int, adapt_batch: int) -> dict[str, np.ndarray]:
    frames = _frames(step, max(infer_batch, adapt_batch), SELF_TEST_SEED)
    constants, state = step.constants(), step.initial_state()
    with torch.no_grad():
        logits, _ = step.infer(frames[:infer_batch], state, constants)
    output = step.adapt(frames[:adapt_batch], state, constants)
    tensors = {
        "frames": frames,
        "infer.logits": logits,
        "adapt.logits": output.logits,
        "adapt.theta": output.state["theta"],
    }
    return {name: value.contiguous().numpy() for name, value in tensors.items()}


def _manifest(step: AdaptStep, labels: Sequence[str], origins: Origins, infer_batch: int, adapt_batch: int) -> Manifest:
    backbone = step.backbone
    packages = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "onnx")}
    packages["onnxruntime"] = str(import_onnxruntime().__version__)  # by two names on the index, with one module
    state = AdaptState({name: value.numpy() for name, value in step.initial_state().items()})
    return Manifest(
        schema=SCHEMA_VERSION,
        producer={"mgg-edge": mgg_edge.__version__, **packages},
        backbone=BackboneInfo(backbone.name, origins.weights, backbone.classes, backbone.features, backbone.outputs),
        preprocess=backbone.preprocess,
        objective=ObjectiveInfo(step.objective.entropy_weight, step.objective.discrepancy_weight),
        rule=RuleInfo(
            step.rule.name,
            step.learning_rate,
            step.rule.options(),
            origins.rule,
            step.rule.largest_update(step.learning_rate),
            step.rule.largest_drift(step.learning_rate),
            step.rule.schedule,
            step.rule.knows_calm,
        ),
        statistics=StatisticsInfo(origins.statistics, step.statistics.images),
        labels=tuple(labels),
        taps=backbone.taps,
        norms=backbone.norms.parameters,
        state=state.specs,
        infer_state=backbone.infer_state,
        infer_batch=infer_batch,
        adapt_batch=adapt_batch,
        opset=OPSET,
        parity=None,
        site=None,
        members={},
    )


def _check(
    step: AdaptStep,
    manifest: Manifest,
    members: Mapping[str, bytes],
    folder: Path,
    steps: int,
    progress: Progress,
    half: HalfGraph | None,
) -> Parity:
    """Parity of the bundle as the device would open it: written, read back, verified, spliced, run."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".mgg-edge-") as scratch:
        draft = Path(scratch) / "draft.mgg"
        write_container(draft, manifest, members)
        engine = OnnxRuntimeEngine(Bundle.load(draft))
    try:
        batches = (_frames(step, manifest.adapt_batch, PARITY_SEED + index) for index in range(steps))
        parity = measure_parity(
            step, engine, batches, manifest.infer_batch, lambda done: progress("parity", done, steps), half
        )
    finally:
        engine.close()
    check_parity(parity)
    return parity


def _frames(step: AdaptStep, count: int, seed: int) -> Tensor:
    return synthetic_frames(count, step.backbone.preprocess.height, step.backbone.preprocess.width, seed)
