"""The judge of exports is sharp: graphs made wrong in many ways, each of them slightly, are refused.

A mutant is an adapt graph with one node or one constant changed. Mutants that no numbers tell from the original, as
where a clamp is never reached, are told by PyTorch's own operators in float64: what changes nothing there is no fault.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx import numpy_helper  # noqa: E402

import mgg_edge.export.bundle as bundle_module  # noqa: E402
from mgg_edge.errors import MggEdgeError, ParityError  # noqa: E402
from mgg_edge.export import Origins, export_bundle  # noqa: E402
from mgg_edge.export.graphs import build_graphs  # noqa: E402
from mgg_edge.learn import AdaptStep, Backbone, Objective, measure_statistics  # noqa: E402
from mgg_edge.learn.images import synthetic_frames  # noqa: E402
from mgg_edge.learn.rules.files import untrained_rule  # noqa: E402
from vit import small_step  # noqa: E402

pytestmark = pytest.mark.torch

ADAPT = "adapt.onnxruntime.onnx"
STEPS = 6
SWAPS = {
    "Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul", "ReduceMean": "ReduceSum", "Relu": "Abs", "Erf": "Tanh",
    "Sigmoid": "Tanh", "Tanh": "Sigmoid", "Sqrt": "Abs", "Exp": "Identity", "Max": "Min", "Min": "Max",
    "Greater": "Less", "Less": "Greater", "GreaterOrEqual": "LessOrEqual", "Neg": "Identity", "Reciprocal": "Identity",
    "Clip": "Identity", "HardSwish": "Relu", "Softmax": "LogSoftmax", "Log": "Identity",
}  # fmt: skip


def as_if_trained(model):
    """Statistics other than the 0 and 1 of a new net, under which a root or a quotient of them changes nothing."""
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(0.5 + torch.rand(buffer.shape, generator=generator))
        elif name.endswith("running_mean"):
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))


@cache
def steps():
    """Three nets: a transformer with the MGG, one with batch normalisation that moves and Adam, a ResNet with SGD."""
    found = {"transformer": small_step("mgg")}
    for name, rule, statistics in (("mobilenetv3_small_050", "adam", "mix:0.1"), ("resnet10t", "sgd", "source")):
        net = Backbone.create(name, seed=3, img_size=32, num_classes=10, norm_statistics=statistics)
        as_if_trained(net.model)
        known = measure_statistics(net, synthetic_frames(32, 32, 32, 0).split(8))
        found[name] = AdaptStep(net, Objective(), untrained_rule(rule, net.norms.size, net.features), known, 1e-2)
    return found


@cache
def graphs(name):
    return build_graphs(steps()[name], 1, 4)


def constants(model):
    """Scalars and short vectors of float32 that the graph computes with."""
    return [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and 0 < np.prod(tensor.dims, initial=1) <= 16
    ]


def mutants(model, count, seed):
    """`count` wrong graphs with what is wrong with each."""
    rng = np.random.default_rng(seed)
    nodes = [index for index, node in enumerate(model.graph.node) if node.op_type in SWAPS]
    tensors = constants(model)
    for number in range(count):
        wrong = copy.deepcopy(model)
        if number % 3 == 0 and tensors:
            place = int(rng.integers(len(tensors)))
            tensor = constants(wrong)[place]
            values = numpy_helper.to_array(tensor)
            # Off in the third or fourth digit; an ε, which only its size makes matter, taken for another one.
            changed = values * np.float32(1 + 3e-3 if np.abs(values).max() > 1e-4 else 1e3)
            if np.array_equal(changed, values):
                continue
            tensor.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), tensor.name))
            yield f"constant {values.ravel()[:3]} for {changed.ravel()[:3]}", wrong
            continue
        node = wrong.graph.node[int(rng.choice(nodes))]
        before = node.op_type
        node.op_type = SWAPS[before]
        yield f"{before} taken for {node.op_type}, giving {node.output[0]}", wrong


def says_the_same(name, model, wrong):
    """Whether a mutant differs by no more than float32's rounding on pictures and states like those of the check."""
    import onnxruntime

    step = steps()[name]
    frames = synthetic_frames(4, step.backbone.preprocess.height, step.backbone.preprocess.width, 50_000)
    values = {**step.constants(), **step.initial_state(), "frames": frames}

    def run(graph):
        whole = copy.deepcopy(graph)
        known = {tensor.name for tensor in whole.graph.initializer} | {entry.name for entry in whole.graph.input}
        used = {source for node in whole.graph.node for source in node.input}
        for key, value in values.items():
            if key in used and key not in known:
                whole.graph.initializer.append(numpy_helper.from_array(value.numpy(), key))
            reverse = f"{key}{bundle_module.REVERSED}"
            if reverse in used:
                flipped = value.flip(tuple(range(2, value.ndim)))
                whole.graph.initializer.append(numpy_helper.from_array(flipped.numpy(), reverse))
        session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
        inputs = {entry.name: values[entry.name].numpy() for entry in session.get_inputs()}
        return session.run(None, inputs)

    return all(
        np.linalg.norm(one - other) <= 2e-5 * max(np.linalg.norm(one), 1e-12)
        for one, other in zip(run(model), run(wrong), strict=True)
    )


def refused(name, wrong, tmp_path, monkeypatch):
    """Whether the export of a step with another adapt graph is refused."""
    step, own = steps()[name], graphs(name)
    changed = own._replace(models={**own.models, ADAPT: wrong})
    monkeypatch.setattr(bundle_module, "build_graphs", lambda *_: changed)
    labels, origins = [str(index) for index in range(10)], Origins("", "", "")
    try:
        export_bundle(step, tmp_path / "x.mgg", adapt_batch=4, labels=labels, origins=origins, parity_steps=STEPS)
    except (ParityError, MggEdgeError):
        return True
    return False


def outcome(name, count, seed, tmp_path, monkeypatch):
    model = graphs(name).models[ADAPT]
    assert not refused(name, model, tmp_path, monkeypatch), "the right graph"
    missed, judged = [], 0
    for what, wrong in mutants(model, count, seed):
        if refused(name, wrong, tmp_path, monkeypatch):
            judged += 1
        elif not says_the_same(name, model, wrong):
            missed.append(what)
            judged += 1
    return judged, missed


@pytest.mark.parametrize("name", ["transformer", "mobilenetv3_small_050", "resnet10t"])
def test_a_few_wrong_graphs_are_refused(name, tmp_path, monkeypatch):
    judged, missed = outcome(name, 6, 1, tmp_path, monkeypatch)
    assert not missed
    assert judged >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "mobilenetv3_small_050", "resnet10t"])
def test_many_wrong_graphs_are_refused(name, tmp_path, monkeypatch):
    judged, missed = outcome(name, 45, 2, tmp_path, monkeypatch)
    assert not missed
    assert judged >= 30
