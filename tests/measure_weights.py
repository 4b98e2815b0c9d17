"""Prints the memory, MiB, that two sessions add to 64 MiB of weights: as the engine opens them, and with copies."""

import pathlib
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from mgg_edge.runtime.bundle.graphs import declare_weights
from mgg_edge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine


def resident_mib() -> float:
    for line in pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no resident size")


edge = 4096
weights = {"w": np.random.default_rng(0).random((edge, edge), np.float32)}
value = helper.make_tensor_value_info
graph = helper.make_graph(
    [helper.make_node("Add", ["x", "w"], ["y"])],
    "sum",
    [value("x", TensorProto.FLOAT, [1, edge])],
    [value("y", TensorProto.FLOAT, [edge, edge])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
data = declare_weights(model.SerializeToString(), weights, ["w"])
initialiser = onnxruntime.OrtValue.ortvalue_from_numpy(weights["w"])


def copying_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.add_external_initializers(["w"], [initialiser])
    return options


engine = object.__new__(OnnxRuntimeEngine)
engine._ort = onnxruntime
engine._threads, engine._bundle, engine._initialisers = 1, SimpleNamespace(weights=weights), {"w": initialiser}
makers = (lambda: engine._options(("w",), ["w"], folded=False), copying_options)
kept, added = [], []
for make in makers:
    before = resident_mib()
    kept += [onnxruntime.InferenceSession(data, make(), providers=["CPUExecutionProvider"]) for _ in range(2)]
    added.append(resident_mib() - before)
print(*added)
sys.exit(0)
