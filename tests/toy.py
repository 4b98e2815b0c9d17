"""A complete toy bundle, made with numpy and onnx.helper only, and the same mathematics in numpy.

The classifier, for frames u8[b,8,8,3] with θ = [γ, β] ∈ R¹², D = 6 features and C = 4 classes:

    n = LN(((frames / 255 − mean) / std).ravel() · P + p),  z = γ ⊙ n + β,  logits = z · W + w

The adaptation step is SGD with momentum on the mean entropy H, written out by hand:

    ∂H/∂logits = −p ⊙ (log p + H(x)) / B,  ∂H/∂z = ∂H/∂logits · Wᵀ,  g = [Σₓ ∂H/∂z ⊙ n, Σₓ ∂H/∂z]
    momentum ← 0.9 momentum + g,  θ ← θ − α momentum,  step ← step + 1
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

from mgg_edge.container import describe_members, write_container
from mgg_edge.manifest import (
    SCHEMA_VERSION,
    BackboneInfo,
    Manifest,
    ObjectiveInfo,
    PreprocessInfo,
    RuleInfo,
    StatisticsInfo,
    TapInfo,
)
from mgg_edge.norms import NormParameter
from mgg_edge.state import TensorSpec

EDGE, FEATURES, CLASSES, BATCH, OPSET = 8, 6, 4, 4, 17
THETA = 2 * FEATURES
LEARNING_RATE, DECAY, EPSILON = 0.05, 0.9, 1e-5
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 0.2)
LABELS = ("tram", "bus", "bicycle", "lorry")
STATE = (
    TensorSpec("theta", "float32", (THETA,)),
    TensorSpec("momentum", "float32", (THETA,)),
    TensorSpec("step", "float32", ()),
)
SCALARS = ("entropy", "discrepancy", "loss", "gradient_norm", "update_norm")

Arrays = dict[str, np.ndarray]


def weights() -> Arrays:
    """Constants of both graphs."""
    random = np.random.default_rng(0)
    pixels = EDGE * EDGE * 3
    arrays = {
        "backbone.projection": random.normal(size=(pixels, FEATURES)) / np.sqrt(pixels),
        "backbone.projection_bias": random.normal(size=FEATURES) / 10,
        "backbone.head": random.normal(size=(FEATURES, CLASSES)),
        "backbone.head_bias": random.normal(size=CLASSES) / 10,
        "backbone.mean": np.array(MEAN),
        "backbone.std": np.array(STD),
        "statistics.mean": random.normal(size=FEATURES) / 10,
        "statistics.std": 1 + random.random(FEATURES),
        "learning_rate": np.array(LEARNING_RATE),
        "rule.decay": np.array(DECAY),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def initial_state() -> Arrays:
    """γ = 1, β = 0, nothing remembered."""
    theta = np.concatenate([np.ones(FEATURES), np.zeros(FEATURES)])
    arrays = {"theta": theta, "momentum": np.zeros(THETA), "step": np.zeros(())}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def frames(count: int, seed: int = 0) -> np.ndarray:
    """Frames u8[count,8,8,3] that differ from each other."""
    return np.random.default_rng(seed).integers(0, 256, (count, EDGE, EDGE, 3), np.uint8)


def reference_infer(pictures: np.ndarray, theta: np.ndarray, constants: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    """Logits [b,C], features [b,D] and normalised values [b,D] in the dtype of `constants`."""
    scaled = (pictures.astype(theta.dtype) / 255 - constants["backbone.mean"]) / constants["backbone.std"]
    hidden = (
        scaled.reshape(len(pictures), -1) @ constants["backbone.projection"] + constants["backbone.projection_bias"]
    )
    centred = hidden - hidden.mean(1, keepdims=True)
    normalised = centred / np.sqrt((centred**2).mean(1, keepdims=True) + EPSILON)
    features = normalised * theta[:FEATURES] + theta[FEATURES:]
    return features @ constants["backbone.head"] + constants["backbone.head_bias"], features, normalised


def reference_adapt(pictures: np.ndarray, state: Arrays, constants: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    """Logits [B,C], diagnostics in the order of `SCALARS`, new state."""
    logits, features, normalised = reference_infer(pictures, state["theta"], constants)
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(log_p)
    entropies = -(p * log_p).sum(1, keepdims=True)
    by_features = (-p * (log_p + entropies) / len(pictures)) @ constants["backbone.head"].T
    gradient = np.concatenate([(by_features * normalised).sum(0), by_features.sum(0)])
    momentum = constants["rule.decay"] * state["momentum"] + gradient
    spread = (features.mean(0) - constants["statistics.mean"]) ** 2
    spread = spread + (features.std(0, ddof=1) - constants["statistics.std"]) ** 2
    entropy = entropies.mean()
    diagnostics = (entropy, spread.mean(), entropy, np.linalg.norm(gradient), np.linalg.norm(momentum))
    theta = state["theta"] - constants["learning_rate"] * momentum
    return logits, diagnostics, {"theta": theta, "momentum": momentum, "step": state["step"] + 1}


class _Nodes:
    """Collects nodes and small constants."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, operator: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        name = to or f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def cast(self, name: str) -> str:
        self.nodes.append(helper.make_node("Cast", [name], [f"{name}_f32"], to=TensorProto.FLOAT))
        return f"{name}_f32"

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def model(self, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "toy", [_value(spec) for spec in inputs], [_value(spec) for spec in outputs], self.constants
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), spec.shape)


def _forward(node: _Nodes, batch: int) -> tuple[str, str]:
    """Names of the normalised values and of the scale; writes `logits` and `features`."""
    scaled = node("Div", node.cast("frames"), node.constant(255))
    normal = node("Div", node("Sub", scaled, "backbone.mean"), "backbone.std")
    flat = node("Reshape", normal, node.constant((batch, EDGE * EDGE * 3), np.int64))
    hidden = node("Add", node("MatMul", flat, "backbone.projection"), "backbone.projection_bias")
    ones, zeros = node.constant(np.ones(FEATURES)), node.constant(np.zeros(FEATURES))
    normalised = node("LayerNormalization", hidden, ones, zeros, epsilon=EPSILON)
    bounds = [node.constant([bound], np.int64) for bound in (0, FEATURES, THETA)]
    gamma = node("Slice", "theta", bounds[0], bounds[1])
    beta = node("Slice", "theta", bounds[1], bounds[2])
    features = node("Add", node("Mul", normalised, gamma), beta, to="features")
    node("Add", node("MatMul", features, "backbone.head"), "backbone.head_bias", to="logits")
    return normalised, features


def infer_model(batch: int = 1) -> onnx.ModelProto:
    """The infer graph without weights."""
    node = _Nodes()
    _forward(node, batch)
    return node.model(
        (TensorSpec("frames", "uint8", (batch, EDGE, EDGE, 3)), STATE[0]),
        (TensorSpec("logits", "float32", (batch, CLASSES)), TensorSpec("features", "float32", (batch, FEATURES))),
    )


def adapt_model(batch: int = BATCH) -> onnx.ModelProto:
    """The adapt graph without weights."""
    node = _Nodes()
    normalised, features = _forward(node, batch)
    log_p = node("LogSoftmax", "logits", axis=1)
    p = node("Exp", log_p)
    classes = node.constant([1], np.int64)
    entropies = node("Neg", node("ReduceSum", node("Mul", p, log_p), classes, keepdims=1))
    node("ReduceMean", entropies, keepdims=0, to="entropy")
    node("Identity", "entropy", to="loss")
    by_logits = node("Div", node("Neg", node("Mul", p, node("Add", log_p, entropies))), node.constant(batch))
    by_features = node("MatMul", by_logits, node("Transpose", "backbone.head", perm=[1, 0]))
    images = node.constant([0], np.int64)
    by_gamma = node("ReduceSum", node("Mul", by_features, normalised), images, keepdims=0)
    by_beta = node("ReduceSum", by_features, images, keepdims=0)
    gradient = node("Concat", by_gamma, by_beta, axis=0)
    node("ReduceL2", gradient, keepdims=0, to="gradient_norm")
    node("Add", node("Mul", "rule.decay", "momentum"), gradient, to="momentum_out")
    node("ReduceL2", "momentum_out", keepdims=0, to="update_norm")
    node("Sub", "theta", node("Mul", "learning_rate", "momentum_out"), to="theta_out")
    node("Add", "step", node.constant(1), to="step_out")
    mean = node("ReduceMean", features, axes=[0], keepdims=1)
    centred = node("Sub", features, mean)
    variance = node(
        "Div", node("ReduceSum", node("Mul", centred, centred), images, keepdims=1), node.constant(batch - 1)
    )
    gaps = [node("Sub", mean, "statistics.mean"), node("Sub", node("Sqrt", variance), "statistics.std")]
    squares = [node("Mul", gap, gap) for gap in gaps]
    node("ReduceMean", node("Add", *squares), keepdims=0, to="discrepancy")
    outputs = [TensorSpec("logits", "float32", (batch, CLASSES))]
    outputs += [TensorSpec(name, "float32", ()) for name in SCALARS]
    outputs += [dataclasses.replace(spec, name=f"{spec.name}_out") for spec in STATE]
    return node.model((TensorSpec("frames", "uint8", (batch, EDGE, EDGE, 3)), *STATE), outputs)


def manifest() -> Manifest:
    """The toy's manifest, not yet describing members."""
    return Manifest(
        schema=SCHEMA_VERSION,
        producer={"mgg-edge": "0.1.0"},
        backbone=BackboneInfo("toy", "random:0", CLASSES, FEATURES),
        preprocess=PreprocessInfo(EDGE, EDGE, "shortest-side", 0.875, "bicubic", MEAN, STD),
        objective=ObjectiveInfo(1.0, 0.0),
        rule=RuleInfo("sgd", LEARNING_RATE, {"momentum": DECAY}, "", None, None, "window"),
        statistics=StatisticsInfo("synthetic", 32),
        labels=LABELS,
        taps=(TapInfo("norm", FEATURES, "vector"),),
        norms=(NormParameter("norm.weight", (FEATURES,)), NormParameter("norm.bias", (FEATURES,))),
        state=STATE,
        infer_state=("theta",),
        infer_batch=1,
        adapt_batch=BATCH,
        opset=OPSET,
        site=None,
        parity=None,
        members={},
    )


def self_test() -> Arrays:
    """Self-test vectors, from numpy."""
    pictures, constants, state = frames(BATCH, seed=1), weights(), initial_state()
    logits, _, after = reference_adapt(pictures, state, constants)
    first = reference_infer(pictures[:1], state["theta"], constants)[0]
    return {"frames": pictures, "infer.logits": first, "adapt.logits": logits, "adapt.theta": after["theta"]}


@dataclass(frozen=True)
class Parts:
    """Everything a bundle file is made of, before digests; mutate a part, then pack.

    `manifest` is plain JSON, so that it can be made invalid; `members` holds the payloads in file order.
    """

    manifest: dict[str, Any]
    members: dict[str, bytes]

    def with_manifest(self, change: Callable[[dict[str, Any]], None]) -> Parts:
        """A copy with a changed manifest."""
        altered = json.loads(json.dumps(self.manifest))
        change(altered)
        return Parts(altered, self.members)

    def with_member(self, name: str, data: bytes) -> Parts:
        """A copy with one payload replaced."""
        return Parts(self.manifest, {**self.members, name: data})

    def with_tensors(self, name: str, change: Callable[[Arrays], Any]) -> Parts:
        """A copy with changed tensors in one safetensors member."""
        arrays = dict(safetensors.numpy.load(self.members[name]))
        change(arrays)
        return self.with_member(name, safetensors.numpy.save(arrays))

    def with_graph(self, name: str, change: Callable[[onnx.ModelProto], Any]) -> Parts:
        """A copy with a changed graph."""
        model = onnx.ModelProto.FromString(self.members[name])
        change(model)
        return self.with_member(name, model.SerializeToString())


def parts() -> Parts:
    """The parts of the valid toy bundle."""
    members = {
        "weights.safetensors": safetensors.numpy.save(weights()),
        "state.safetensors": safetensors.numpy.save(initial_state()),
        "selftest.safetensors": safetensors.numpy.save(self_test()),
        "infer.onnxruntime.onnx": infer_model().SerializeToString(),
        "infer.tensorrt.onnx": infer_model().SerializeToString(),
        "adapt.onnxruntime.onnx": adapt_model().SerializeToString(),
        "adapt.tensorrt.onnx": adapt_model().SerializeToString(),
    }
    return Parts(json.loads(manifest().to_json()), members)


def write_bundle(path: Path) -> Path:
    """Write the valid toy bundle the way an export does."""
    members = parts().members
    write_container(path, manifest().replace(members=describe_members(members)), members)
    return path


@dataclass(frozen=True)
class Packing:
    """How the ZIP file is laid out; every field is a way to break it.

    Attributes:
        describe: whether the manifest's `members` are recomputed from the payloads.
        encode: turns the manifest into bytes.
        attributes: external attributes by member name.
        compression: ZIP method by member name.
        renamed: other names of members.
        extra: further members, in order, duplicates allowed.
        left_out: members that are not written.
        tamper: change of the whole body before the outer digest is taken.
    """

    describe: bool = True
    encode: Callable[[dict[str, Any]], bytes] = lambda value: json.dumps(value).encode()
    attributes: Mapping[str, int] = field(default_factory=dict)
    compression: Mapping[str, int] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[tuple[str, bytes], ...] = ()
    left_out: tuple[str, ...] = ()
    tamper: Callable[[bytearray], Any] = lambda body: None


def pack(source: Parts, packing: Packing | None = None) -> bytes:
    """A bundle file with correct digests around whatever the parts and the packing hold."""
    how = packing or Packing()
    content = dict(source.manifest)
    if how.describe:
        content["members"] = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in source.members.items()
        }
    entries = [("manifest.json", how.encode(content)), *source.members.items(), *how.extra]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
        for name, data in entries:
            if name in how.left_out:
                continue
            info = zipfile.ZipInfo(how.renamed.get(name, name), (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, how.attributes.get(name, 0o100644 << 16)
            info.compress_type = how.compression.get(name, zipfile.ZIP_STORED)
            archive.writestr(info, data)
        archive.comment = b"\0" * 71
    body = bytearray(buffer.getvalue()[:-71])
    how.tamper(body)
    return bytes(body) + b"sha256=" + hashlib.sha256(body).hexdigest().encode()
