"""Inference with θ folded in: the same answers, from when θ has stood still until it moves, and never another θ's."""

from __future__ import annotations

import gc
import logging
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import toy
from mgg_edge.errors import EngineError, UsageError
from mgg_edge.runtime import Adapter, Bundle, open_engine
from mgg_edge.runtime.adaptation.adapter_settings import AdapterSettings
from mgg_edge.runtime.bundle.graphs import bind_inputs, read_graph
from mgg_edge.runtime.engines import onnxruntime_engine, settling
from mgg_edge.runtime.store.record import RunRecorder
from mgg_edge.runtime.store.record_file import Record
from mgg_edge.runtime.store.record_replay import Replay
from mgg_edge.state import AdaptState

MEMBER = "infer.onnxruntime.onnx"
TOLERANCE = 1e-5
FOUR = AdapterSettings(settle_frames=4)


@pytest.fixture
def folds(monkeypatch):
    """The toy has a LayerNorm, which is not worth folding; here it is folded all the same."""
    monkeypatch.setattr(settling, "has_batch_norm", lambda _bundle: True)


def other_state(bundle: Bundle, by: float = 0.1) -> AdaptState:
    return AdaptState({**bundle.initial_state, "theta": bundle.initial_state["theta"] + np.float32(by)})


def settled(adapter: Adapter) -> bool:
    return adapter._learner.published.settled is not None


class TestGraph:
    def test_an_input_becomes_an_initialiser(self, loaded_toy: Bundle):
        theta = loaded_toy.initial_state["theta"]
        bound = bind_inputs(loaded_toy.graphs[MEMBER], {"theta": theta}, MEMBER)
        model = onnx.load_from_string(bound)
        assert [value.name for value in model.graph.input] == ["frames"]
        (found,) = (tensor for tensor in model.graph.initializer if tensor.name == "theta")
        np.testing.assert_array_equal(numpy_helper.to_array(found), theta)
        before, after = read_graph(loaded_toy.graphs[MEMBER], MEMBER), read_graph(bound, MEMBER)
        assert (after.outputs, after.opset, after.free_names) == (before.outputs, before.opset, before.free_names)

    def test_everything_else_stays_as_it_is(self, loaded_toy: Bundle):
        whole = onnx.load_from_string(loaded_toy.graphs[MEMBER])
        bound = onnx.load_from_string(bind_inputs(loaded_toy.graphs[MEMBER], {}, MEMBER))
        assert bound == whole
        adapt = loaded_toy.graphs["adapt.onnxruntime.onnx"]
        assert onnx.load_from_string(bind_inputs(adapt, {}, MEMBER)) == onnx.load_from_string(adapt)

    def test_what_only_an_output_that_is_left_out_needs_goes_with_it(self, loaded_toy: Bundle):
        whole = onnx.load_from_string(loaded_toy.graphs[MEMBER]).graph
        bound = onnx.load_from_string(bind_inputs(loaded_toy.graphs[MEMBER], {}, MEMBER, without=("logits",))).graph
        assert [value.name for value in bound.output] == ["features"]
        read = {"features"}.union(*(node.input for node in bound.node))
        assert all(read.intersection(node.output) for node in bound.node)
        gone = {name for node in whole.node if node not in list(bound.node) for name in node.output}
        assert "logits" in gone
        assert not gone & read


class TestEngine:
    def test_nothing_is_folded_without_batch_normalisation(self, toy_engine, loaded_toy: Bundle):
        assert toy_engine.settle(loaded_toy.initial_state) is None

    @pytest.mark.usefixtures("folds")
    def test_it_answers_under_the_state_it_was_given(self, toy_engine, loaded_toy: Bundle):
        for state in (loaded_toy.initial_state, other_state(loaded_toy)):
            inference, frames = toy_engine.settle(state), toy.frames(1, seed=3)
            for found, expected in zip(inference(frames), toy_engine.infer(frames, state), strict=True):
                np.testing.assert_allclose(found, expected, atol=TOLERANCE)
            assert not np.allclose(inference(frames)[0], toy_engine.infer(frames, other_state(loaded_toy, 0.7))[0])

    @pytest.mark.usefixtures("folds")
    def test_features_that_nobody_looks_at_are_left_out(self, toy_engine, loaded_toy: Bundle):
        frames, state = toy.frames(1, seed=3), loaded_toy.initial_state
        logits, features = toy_engine.settle(state, features=False)(frames)
        np.testing.assert_allclose(logits, toy_engine.infer(frames, state)[0], atol=TOLERANCE)
        assert features.shape == (1, 0)
        assert toy_engine.settle(state)(frames)[1].shape == (1, toy.FEATURES)

    @pytest.mark.usefixtures("folds")
    def test_frames_are_checked(self, toy_engine, loaded_toy: Bundle):
        with pytest.raises(UsageError, match=r"expected uint8\[1, 8, 8, 3\]"):
            toy_engine.settle(loaded_toy.initial_state)(np.zeros((2, 8, 8, 3), np.uint8))

    @pytest.mark.usefixtures("folds")
    def test_cameras_at_the_same_state_share_it_and_the_last_frees_it(self, loaded_toy: Bundle):
        first, second = (open_engine(loaded_toy, "cpu", threads=1) for _ in range(2))
        one, two = first.settle(loaded_toy.initial_state), second.settle(loaded_toy.initial_state)
        assert one is two
        assert first.settle(other_state(loaded_toy)) is not one
        del one
        gc.collect()
        assert two(toy.frames(1))[0].shape == (1, toy.CLASSES)
        del two
        gc.collect()
        assert not any(key[0] == loaded_toy.id for key in settling._kept)
        for engine in (first, second):
            engine.close()
            with pytest.raises(EngineError, match="closed"):
                engine.settle(loaded_toy.initial_state)


@pytest.mark.usefixtures("folds")
class TestAdapter:
    def test_it_begins_when_theta_has_stood_still_and_ends_when_it_moves(self, toy_bundle: Path):
        with Adapter.open(toy_bundle, threads=1, settings=FOUR) as adapter:
            still = toy.frames(1)[0]
            states = []
            for _ in range(5):
                states.append(settled(adapter))
                adapter(still)
            assert states == [False] * 4 + [True]
            assert adapter.version == 0
            for frame in toy.frames(8, seed=1):
                adapter(frame)
            assert adapter.counters.adapt_steps >= 1
            assert not settled(adapter)

    @pytest.mark.parametrize("background", [False, True])
    def test_the_answers_are_those_of_the_unfolded(self, toy_bundle: Path, background: bool):
        frames = toy.frames(60, seed=4)
        never = AdapterSettings(settle_frames=0)
        with (
            Adapter.open(toy_bundle, threads=1, adapt="burst", settings=FOUR, background=background) as one,
            Adapter.open(toy_bundle, threads=1, adapt="burst", settings=never) as other,
        ):
            for frame in frames:
                found, expected = one(frame), other(frame)
                one.drain()
                assert (found.label, found.step) == (expected.label, expected.step)
                np.testing.assert_allclose(found.logits, expected.logits, atol=1e-4)
            assert not settled(other)

    def test_a_commit_that_leaves_what_inference_reads_keeps_it(self, toy_bundle: Path):
        with Adapter.open(toy_bundle, threads=1, settings=FOUR) as adapter:
            for _ in range(4):
                adapter(toy.frames(1)[0])
            before = adapter._learner.published.settled
            state = adapter.state()
            adapter.load_state(AdaptState({**state, "momentum": state["momentum"] + np.float32(1)}))
            assert adapter.version == 1
            assert adapter._learner.published.settled is before is not None
            adapter.load_state(other_state(Bundle.load(toy_bundle)))
            assert not settled(adapter)

    @pytest.mark.parametrize("background", [False, True])
    def test_off_begins_with_it(self, toy_bundle: Path, background: bool):
        with Adapter.open(toy_bundle, adapt="off", threads=1, background=background) as adapter:
            assert settled(adapter)
            adapter(toy.frames(1)[0])

    def test_zero_frames_never_fold(self, toy_bundle: Path):
        for adapt in ("off", "always"):
            with Adapter.open(toy_bundle, adapt=adapt, threads=1, settings=AdapterSettings(settle_frames=0)) as adapter:
                for _ in range(40):
                    adapter(toy.frames(1)[0])
                assert not settled(adapter)

    def test_a_refusal_is_told_once_and_inference_goes_on(self, toy_bundle: Path, monkeypatch, caplog):
        def refuse(self, state, *, features):
            raise EngineError("no memory left")

        monkeypatch.setattr(onnxruntime_engine.OnnxRuntimeEngine, "settle", refuse)
        with caplog.at_level(logging.WARNING), Adapter.open(toy_bundle, threads=1, settings=FOUR) as adapter:
            for _ in range(20):
                adapter(toy.frames(1)[0])
        assert [record.message for record in caplog.records] == ["inference stays as it is: no memory left"]

    def test_what_was_folded_too_late_is_thrown_away(self, toy_bundle: Path, monkeypatch):
        began, go = threading.Event(), threading.Event()
        real = onnxruntime_engine.OnnxRuntimeEngine.settle

        def slow(self, state, *, features):
            began.set()
            assert go.wait(20)
            return real(self, state, features=features)

        monkeypatch.setattr(onnxruntime_engine.OnnxRuntimeEngine, "settle", slow)
        with Adapter.open(toy_bundle, threads=1, settings=FOUR, background=True) as adapter:
            for _ in range(4):
                adapter(toy.frames(1)[0])
            assert began.wait(20)
            adapter.load_state(other_state(Bundle.load(toy_bundle)))  # meanwhile θ is another
            for _ in range(8):
                adapter(toy.frames(1)[0])  # no frame waits for a folding that takes long
            go.set()
            adapter._settler.close()
            assert not settled(adapter)
            adapter(toy.frames(1)[0])  # and then it is the other's turn
            adapter._settler.close()
            assert settled(adapter)


@pytest.fixture
def rounds_otherwise(monkeypatch):
    """Folded convolutions round otherwise; the toy, which has none, is made to."""
    real = settling.SettledInference.__call__

    def call(self, frames):
        logits, features = real(self, frames)
        return np.nextafter(logits, np.float32(np.inf)), features

    monkeypatch.setattr(settling.SettledInference, "__call__", call)


@pytest.mark.usefixtures("folds", "rounds_otherwise")
class TestReplay:
    @pytest.mark.parametrize("background", [False, True])
    @pytest.mark.parametrize("adapt", ["always", "burst", "off"])
    def test_replay_is_exact_and_knows_which_frames_were_folded(
        self, toy_bundle: Path, tmp_path: Path, adapt: str, background: bool
    ):
        recorder = RunRecorder(tmp_path / "run.mggrun")
        frames = np.concatenate([np.repeat(toy.frames(1), 8, axis=0), toy.frames(200)])
        options = {"adapt": adapt, "threads": 1, "settings": FOUR, "background": background, "journal": recorder}
        with Adapter.open(toy_bundle, **options) as adapter:
            recorder.begin(adapter, {})
            for frame in frames:
                adapter(frame)
                adapter._settler.close()
            adapter.drain()
        recorder.close()
        record, bundle = Record.read(recorder.path), Bundle.load(toy_bundle)
        folded = [line.settled for line in record.frames]
        assert folded[4:8] == [True] * 4
        assert all(folded) == (adapt == "off")
        engine = open_engine(bundle, "cpu", threads=1)
        assert Replay(record, bundle, engine).run(frames).difference is None
        engine.close()

    def test_an_engine_that_does_not_fold_says_so(self, toy_bundle: Path, tmp_path: Path, monkeypatch):
        recorder = RunRecorder(tmp_path / "run.mggrun")
        with Adapter.open(toy_bundle, adapt="off", threads=1, journal=recorder) as adapter:
            recorder.begin(adapter, {})
            adapter(toy.frames(1)[0])
        recorder.close()
        monkeypatch.setattr(settling, "has_batch_norm", lambda _bundle: False)
        bundle = Bundle.load(toy_bundle)
        engine = open_engine(bundle, "cpu", threads=1)
        difference = Replay(Record.read(recorder.path), bundle, engine).run(toy.frames(1)).difference
        engine.close()
        assert "θ folded into inference" in difference
