"""OpenVINO on the processor: the numbers of ONNX Runtime, by the same protocol."""

from __future__ import annotations

import dataclasses
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import toy
from mgg_edge.cli.main import main
from mgg_edge.errors import EngineError, MissingDependencyError, StateError, UsageError
from mgg_edge.files import packaged_file
from mgg_edge.runtime import Adapter, Bundle, demo, open_engine
from mgg_edge.runtime.engines import openvino_engine, settling
from mgg_edge.state import AdaptState

pytest.importorskip("openvino", reason="the engine needs the extra openvino")


@pytest.fixture(scope="module", params=[demo.DEFAULT_BUNDLE, demo.MGG_BUNDLE])
def reader(request) -> Bundle:
    return Bundle.load(packaged_file(request.param))


def batches(bundle: Bundle, count: int, batch: int) -> np.ndarray:
    size = bundle.manifest.preprocess
    shape = (count, batch, size.height, size.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def moved(state: AdaptState) -> AdaptState:
    noise = np.random.default_rng(1).normal(0, 0.01, state["theta"].shape).astype(np.float32)
    return AdaptState({**state, "theta": state["theta"] + noise})


def test_steps_are_those_of_onnxruntime(reader: Bundle):
    """Each step from the state of the other: what is compared is one step, not two trajectories."""
    engines = [open_engine(reader, name, threads=1) for name in ("cpu", "openvino")]
    assert engines[1].name.startswith("openvino-cpu 20")
    for frames in batches(reader, 5, reader.manifest.adapt_batch):
        (logits, said), (expected_logits, expected) = (engine.adapt(frames) for engine in reversed(engines))
        np.testing.assert_allclose(logits, expected_logits, atol=1e-4)
        np.testing.assert_allclose(said, expected, rtol=1e-3, atol=1e-6)
        candidates = [engine.candidate for engine in engines]
        for name in candidates[0]:
            assert candidates[1][name].dtype == candidates[0][name].dtype
            np.testing.assert_allclose(candidates[1][name], candidates[0][name], rtol=1e-3, atol=1e-4, err_msg=name)
        engines[0].commit()
        engines[1].load_state(engines[0].state())
    for frames in batches(reader, 2, reader.manifest.infer_batch):
        for state in (None, reader.initial_state):
            (one, features), (other, expected_features) = (engine.infer(frames, state) for engine in engines)
            np.testing.assert_allclose(one, other, atol=1e-4)
            np.testing.assert_allclose(features, expected_features, atol=1e-4)
    for engine in engines:
        engine.close()


def test_a_step_leaves_the_committed_state_alone_until_it_is_committed(loaded_toy: Bundle):
    engine = open_engine(loaded_toy, "openvino", threads=1)
    before = engine.state().digest()
    with pytest.raises(StateError, match="expected a candidate, found none"):
        _ = engine.candidate
    engine.adapt(batches(loaded_toy, 1, loaded_toy.manifest.adapt_batch)[0])
    candidate = engine.candidate.digest()
    assert engine.state().digest() == before != candidate
    engine.commit()
    assert engine.state().digest() == candidate
    engine.load_state(loaded_toy.initial_state)
    assert engine.state().digest() == before
    engine.close()


def test_settled_inference_is_that_of_the_state(reader: Bundle, monkeypatch):
    engine, state = open_engine(reader, "openvino", threads=1), moved(reader.initial_state)
    frames = batches(reader, 1, reader.manifest.infer_batch)[0]
    expected, features = engine.infer(frames, state)
    monkeypatch.setattr(settling, "has_batch_norm", lambda _bundle: True)
    whole, short = (engine.settle(state, features=wanted) for wanted in (True, False))
    assert whole is engine.settle(state)  # shared
    np.testing.assert_allclose(whole(frames)[0], expected, atol=1e-4)
    np.testing.assert_allclose(whole(frames)[1], features, atol=1e-4)
    np.testing.assert_allclose(short(frames)[0], expected, atol=1e-4)
    assert short(frames)[1].shape == (len(frames), 0)
    monkeypatch.setattr(settling, "has_batch_norm", lambda _bundle: False)
    assert engine.settle(state) is None
    engine.close()


def test_inference_from_many_threads_beside_steps(loaded_toy: Bundle):
    engine = open_engine(loaded_toy, "openvino", threads=1)
    states = [loaded_toy.initial_state, moved(loaded_toy.initial_state)]
    frames = batches(loaded_toy, 8, loaded_toy.manifest.infer_batch)
    expected = [[engine.infer(one, state)[0] for one in frames] for state in states]
    ended = threading.Event()

    def adapt() -> int:
        made = 0
        while not ended.is_set():
            engine.adapt(batches(loaded_toy, 1, loaded_toy.manifest.adapt_batch)[0])
            engine.commit()
            made += 1
        return made

    def infer(which: int) -> bool:
        found = [[engine.infer(one, states[which])[0] for one in frames] for _ in range(20)]
        return all(np.array_equal(one, other) for run in found for one, other in zip(run, expected[which], strict=True))

    with ThreadPoolExecutor(5) as pool:
        steps = pool.submit(adapt)
        right = [pool.submit(infer, number % 2) for number in range(4)]
        assert all(one.result() for one in right)
        ended.set()
        assert steps.result() > 0
    engine.close()


class TestRefusals:
    def test_what_it_cannot_do_is_said(self, loaded_toy: Bundle):
        engine = open_engine(loaded_toy, "openvino", threads=1, with_adapt=False)
        frames = batches(loaded_toy, 1, loaded_toy.manifest.adapt_batch)[0]
        with pytest.raises(UsageError, match="expected an engine opened with its adaptation graph, found one without"):
            engine.adapt(frames)
        with pytest.raises(UsageError, match="frames: expected uint8"):
            engine.infer(frames.astype(np.float32))
        engine.close()
        engine.close()
        with pytest.raises(EngineError, match="found a closed one"):
            engine.infer(batches(loaded_toy, 1, loaded_toy.manifest.infer_batch)[0])
        with pytest.raises(UsageError, match="threads: expected a whole number from 1"):
            open_engine(loaded_toy, "openvino", threads=0)

    def test_a_graph_it_refuses_is_named(self, loaded_toy: Bundle):
        name = "infer.onnxruntime.onnx"
        other = loaded_toy.graphs[name].replace(b"MatMul", b"MatNot")
        assert other != loaded_toy.graphs[name]
        broken = dataclasses.replace(loaded_toy, graphs={**loaded_toy.graphs, name: other})
        with pytest.raises(EngineError, match=rf"{name}: cannot load the graph: "):
            open_engine(broken, "openvino")

    @pytest.mark.parametrize("with_adapt", [True, False])
    def test_other_numbers_than_the_bundle_has_recorded(self, loaded_toy: Bundle, with_adapt: bool):
        name = "adapt.theta" if with_adapt else "infer.logits"
        other = {**loaded_toy.self_test, name: loaded_toy.self_test[name] + np.float32(0.1)}
        with pytest.raises(EngineError, match=r"openvino-cpu .* computes something else than the bundle has recorded"):
            open_engine(dataclasses.replace(loaded_toy, self_test=other), "openvino", with_adapt=with_adapt)

    def test_weights_that_it_mistakes_are_noticed(self, monkeypatch):
        """Without two names for what is read both ways the gradient of attention is wrong; then nothing is opened."""
        bundle = Bundle.load(packaged_file(demo.MGG_BUNDLE))
        monkeypatch.setattr(openvino_engine, "part_transposed", lambda graph, _names, _where: (graph, {}))
        with pytest.raises(EngineError, match="first update, relative L2 difference"):
            open_engine(bundle, "openvino")

    def test_without_the_package_it_says_what_to_install(self, loaded_toy: Bundle, monkeypatch):
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(MissingDependencyError, match=r"pip install 'mgg-edge\[openvino\]'"):
            open_engine(loaded_toy, "openvino")


def test_an_adapter_and_the_commands_run_on_it(toy_bundle: Path, tmp_path: Path, capsys):
    answers = {}
    for name in ("cpu", "openvino"):
        with Adapter.open(toy_bundle, engine=name, adapt="always", threads=1) as adapter:
            answers[name] = [adapter(frame).probability for frame in toy.frames(60)]
            assert adapter.counters.adapt_steps > 0
    np.testing.assert_allclose(answers["openvino"], answers["cpu"], atol=1e-3)
    bundle = ["--bundle", str(packaged_file(demo.DEFAULT_BUNDLE)), "--engine", "openvino", "--json"]
    for words in (["doctor", *bundle], ["run", *bundle, "--source", "demo", "--limit", "40"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code
        assert "openvino-cpu" in capsys.readouterr().out
