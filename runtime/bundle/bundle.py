"""A bundle in memory: verified, parsed, and checked against its own manifest.

    file ─ container: digests, members ─ manifest ─ weights, state, self-test ─ graphs against the contract

Whatever leaves `Bundle.load` has the names, types and shapes the engines rely on, finite numbers, and graphs
that read nothing but their inputs and the bundle's own weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from mgg_edge.container import GRAPHS, LOWERINGS, graph_name, read_container
from mgg_edge.errors import BundleError, WeightsError
from mgg_edge.manifest import Manifest
from mgg_edge.runtime.bundle.graphs import GraphSummary, read_graph
from mgg_edge.runtime.bundle.tensors import read_tensors
from mgg_edge.state import AdaptState, TensorSpec

__all__ = ["DIAGNOSTICS", "Bundle", "graph_contract"]

Array = npt.NDArray[np.generic]
DIAGNOSTICS = ("entropy", "discrepancy", "loss", "gradient_norm", "update_norm")
_STATE, _WEIGHTS, _SELF_TEST = "state.safetensors", "weights.safetensors", "selftest.safetensors"


@dataclass(frozen=True)
class Bundle:
    """One model with its adaptation step, ready for an engine.

    Attributes:
        path: the file it came from.
        id: SHA-256 of the manifest, 64 hex digits; binds files derived from this bundle to it.
        manifest: everything that is not a tensor or a graph.
        weights: constants of all graphs by name, read-only.
        initial_state: the source model's state.
        self_test: `frames` u8[max(b,B),H,W,3], `infer.logits` f32[b,C], `adapt.logits` f32[B,C], `adapt.theta` f32[N];
            of a calibrated bundle also `canaries` u8[n,H,W,3].
        graphs: encoded ONNX models without weights, by member name such as `infer.onnxruntime.onnx`.
        references: per graph, the names of the weights it reads, sorted.
    """

    path: Path
    id: str
    manifest: Manifest
    weights: Mapping[str, Array]
    initial_state: AdaptState
    self_test: Mapping[str, Array]
    graphs: Mapping[str, bytes]
    references: Mapping[str, tuple[str, ...]]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and verify a bundle file.

        Raises:
            UsageError: there is no such file.
            BundleError: damaged, altered, contradicting its manifest, or a graph outside the contract.
            ManifestError: the manifest breaks its schema.
            WeightsError: a tensor holds NaN or Inf, or contradicts the manifest.
        """
        file = Path(path)
        manifest, members, identity = read_container(file)
        weights = read_tensors(members.pop(_WEIGHTS), f"{file}: {_WEIGHTS}")
        _check_weights(manifest, weights, f"{file}: {_WEIGHTS}")
        state = _read_state(manifest, members.pop(_STATE), f"{file}: {_STATE}")
        self_test = read_tensors(members.pop(_SELF_TEST), f"{file}: {_SELF_TEST}")
        _check_specs(self_test, _self_test_specs(manifest), f"{file}: {_SELF_TEST}")
        references = {
            graph_name(graph, lowering): _check_graph(
                manifest, graph, members[graph_name(graph, lowering)], weights, f"{file}: {graph_name(graph, lowering)}"
            )
            for graph in GRAPHS
            for lowering in LOWERINGS
        }
        return cls(
            path=file,
            id=identity,
            manifest=manifest,
            weights=MappingProxyType(weights),
            initial_state=state,
            self_test=MappingProxyType(self_test),
            graphs=MappingProxyType(members),
            references=MappingProxyType(references),
        )


def graph_contract(manifest: Manifest, graph: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs, in order, that the graph `infer` or `adapt` must have."""
    batch = manifest.infer_batch if graph == "infer" else manifest.adapt_batch
    frames = TensorSpec("frames", "uint8", (batch, manifest.preprocess.height, manifest.preprocess.width, 3))
    logits = TensorSpec("logits", "float32", (batch, manifest.backbone.classes))
    if graph == "infer":
        features = TensorSpec("features", "float32", (batch, manifest.backbone.features))
        return (frames, *manifest.infer_specs), (logits, features)
    scalars = tuple(TensorSpec(name, "float32", ()) for name in DIAGNOSTICS)
    state_out = tuple(TensorSpec(f"{spec.name}_out", spec.dtype, spec.shape) for spec in manifest.state)
    return (frames, *manifest.state), (logits, *scalars, *state_out)


def _read_state(manifest: Manifest, data: bytes, where: str) -> AdaptState:
    arrays = read_tensors(data, where)
    # safetensors orders tensors by its own rule; the graph's order is the manifest's.
    _check_specs(arrays, manifest.state, where)
    return AdaptState({spec.name: arrays[spec.name] for spec in manifest.state})


def _self_test_specs(manifest: Manifest) -> tuple[TensorSpec, ...]:
    (frames, *_), (adapt_logits, *_) = graph_contract(manifest, "adapt")
    _, (infer_logits, *_) = graph_contract(manifest, "infer")
    images = max(manifest.infer_batch, manifest.adapt_batch)
    canaries = len(manifest.site.canaries) if manifest.site is not None else 0
    own = (TensorSpec("canaries", "uint8", (canaries, *frames.shape[1:])),) if canaries else ()
    return (
        *own,
        replace(frames, shape=(images, *frames.shape[1:])),
        TensorSpec("infer.logits", "float32", infer_logits.shape),
        TensorSpec("adapt.logits", "float32", adapt_logits.shape),
        TensorSpec("adapt.theta", "float32", manifest.state[0].shape),
    )


def _check_specs(arrays: Mapping[str, Array], expected: tuple[TensorSpec, ...], where: str) -> None:
    if set(arrays) != (names := {spec.name for spec in expected}):
        raise BundleError(f"{where}: expected tensors {sorted(names)}, found {sorted(arrays)}")
    for spec in expected:
        array = arrays[spec.name]
        found = f"{array.dtype}{list(array.shape)}"
        if found != (wanted := f"{spec.dtype}{list(spec.shape)}"):
            raise BundleError(f"{where}: '{spec.name}' expected {wanted}, found {found}")


def _check_weights(manifest: Manifest, weights: Mapping[str, Array], where: str) -> None:
    """Weights the manifest speaks of; a graph that reads a weight nobody has is refused with the graph."""
    features = (manifest.backbone.features,)
    for name, shape in (("learning_rate", ()), ("statistics.mean", features), ("statistics.std", features)):
        found = weights.get(name)
        if found is not None and (str(found.dtype), found.shape) != ("float32", shape):
            raise WeightsError(
                f"{where}: '{name}' expected float32{list(shape)}, found {found.dtype}{list(found.shape)}"
            )
    rate, declared = weights.get("learning_rate"), manifest.rule.learning_rate
    if rate is not None and rate != np.float32(declared):
        raise WeightsError(f"{where}: 'learning_rate' expected manifest.rule.learning_rate {declared}, found {rate}")
    deviation = weights.get("statistics.std")
    if deviation is not None and not np.greater_equal(deviation, 0).all():
        raise WeightsError(f"{where}: 'statistics.std' expected numbers of at least 0, found negative ones")


def _check_graph(
    manifest: Manifest, graph: str, data: bytes, weights: Mapping[str, Array], where: str
) -> tuple[str, ...]:
    summary = read_graph(data, where)
    inputs, outputs = graph_contract(manifest, graph)
    _check_signature(where, "input", inputs, summary.inputs)
    _check_signature(where, "output", outputs, summary.outputs)
    if summary.opset != manifest.opset:
        raise BundleError(f"{where}: expected operator set {manifest.opset} (manifest.opset), found {summary.opset}")
    _check_names(where, summary, weights)
    return tuple(sorted(summary.free_names))


def _check_signature(where: str, what: str, expected: tuple[TensorSpec, ...], found: tuple[TensorSpec, ...]) -> None:
    for index, spec in enumerate(expected):
        if index >= len(found):
            raise BundleError(f"{where}: {what} '{spec.name}' is missing; expected {len(expected)} {what}s")
        if spec != found[index]:
            raise BundleError(f"{where}: {what} {index} expected {spec}, found {found[index]}")
    if len(found) > len(expected):
        raise BundleError(f"{where}: expected {len(expected)} {what}s, found {len(found)}")


def _check_names(where: str, summary: GraphSummary, weights: Mapping[str, Array]) -> None:
    if absent := sorted(summary.free_names - set(weights)):
        raise BundleError(f"{where}: the graph reads '{absent[0]}', which is neither computed nor among the weights")
    if shadowed := sorted(summary.defined_names & set(weights)):
        raise BundleError(f"{where}: the graph defines '{shadowed[0]}', which is the name of a weight")
