"""ONNX Runtime: the toy's mathematics, ping-pong state, one copy of the weights, no file, mapped errors."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import helper
from onnxruntime.capi import onnxruntime_pybind11_state as native

import toy
from mgg_edge.errors import EngineError, MissingDependencyError, StateError, UsageError
from mgg_edge.runtime import Bundle, Engine, open_engine
from mgg_edge.runtime.bundle.graphs import embed_weights
from mgg_edge.runtime.engines import onnxruntime_engine
from mgg_edge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from mgg_edge.state import AdaptState

# float32 on values of order 1 through a dot product of 192 terms: some ten units in the last place.
LOGITS_TOLERANCE = 1e-5
# Relative L2 of the accumulated update: no division by a small root here, so rounding alone.
UPDATE_TOLERANCE = 1e-5
NATIVE_EXCEPTIONS = sorted(
    name for name, kind in vars(native).items() if isinstance(kind, type) and issubclass(kind, Exception)
)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def as_float64(arrays: toy.Arrays) -> toy.Arrays:
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def with_adapt_graph(tmp_path: Path, change) -> Bundle:
    parts = toy.parts().with_graph("adapt.onnxruntime.onnx", change)
    path = tmp_path / "changed.mgg"
    path.write_bytes(toy.pack(parts))
    return Bundle.load(path)


class TestMathematics:
    def test_infer_matches_numpy(self, toy_engine: Engine):
        logits, features = toy_engine.infer(toy.frames(1, seed=7))
        expected = toy.reference_infer(toy.frames(1, seed=7), as_float64(toy.initial_state())["theta"], toy.weights())
        np.testing.assert_allclose(logits, expected[0], atol=LOGITS_TOLERANCE)
        np.testing.assert_allclose(features, expected[1], atol=LOGITS_TOLERANCE)
        assert (logits.dtype, features.dtype) == (np.float32, np.float32)

    def test_steps_match_numpy_in_float64(self, toy_engine: Engine):
        constants, state = as_float64(toy.weights()), as_float64(toy.initial_state())
        start = state["theta"]
        for step in range(20):
            pictures = toy.frames(toy.BATCH, seed=step)
            logits, diagnostics = toy_engine.adapt(pictures)
            expected_logits, expected_diagnostics, state = toy.reference_adapt(pictures, state, constants)
            np.testing.assert_allclose(logits, expected_logits, atol=LOGITS_TOLERANCE)
            np.testing.assert_allclose(diagnostics, expected_diagnostics, rtol=1e-4, atol=1e-6)
            toy_engine.commit()
            assert relative(toy_engine.state()["theta"] - start, state["theta"] - start) < UPDATE_TOLERANCE
        assert float(toy_engine.state()["step"]) == 20
        assert relative(toy_engine.state()["momentum"], state["momentum"]) < UPDATE_TOLERANCE

    def test_self_test_vectors(self, loaded_toy: Bundle, toy_engine: Engine):
        vectors = loaded_toy.self_test
        np.testing.assert_allclose(
            toy_engine.infer(vectors["frames"][:1])[0], vectors["infer.logits"], atol=LOGITS_TOLERANCE
        )
        logits, _ = toy_engine.adapt(vectors["frames"])
        np.testing.assert_allclose(logits, vectors["adapt.logits"], atol=LOGITS_TOLERANCE)
        start = toy.initial_state()["theta"]
        assert relative(toy_engine.candidate["theta"] - start, vectors["adapt.theta"] - start) < UPDATE_TOLERANCE

    @pytest.mark.parametrize("threads", [1, 2, None])
    def test_bit_identical_to_plain_onnxruntime(self, loaded_toy: Bundle, threads: int | None):
        member = "infer.onnxruntime.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        plain = onnxruntime.InferenceSession(
            embed_weights(loaded_toy.graphs[member], loaded_toy.weights, loaded_toy.references[member]),
            options,
            providers=["CPUExecutionProvider"],
        )
        engine = open_engine(loaded_toy, threads=threads, with_adapt=False)
        for seed in range(5):
            picture = toy.frames(1, seed)
            expected = plain.run(None, {"frames": picture, "theta": loaded_toy.initial_state["theta"]})
            for found, wanted in zip(engine.infer(picture), expected, strict=True):
                assert found.tobytes() == wanted.tobytes()


class TestState:
    def test_adapt_commits_nothing(self, toy_engine: Engine):
        before, logits = toy_engine.state().digest(), toy_engine.infer(toy.frames(1))[0]
        toy_engine.adapt(toy.frames(toy.BATCH))
        assert toy_engine.state().digest() == before
        assert toy_engine.infer(toy.frames(1))[0].tobytes() == logits.tobytes()
        assert toy_engine.candidate.digest() != before

    def test_commit_swaps(self, toy_engine: Engine):
        before = toy_engine.infer(toy.frames(1))[0]
        toy_engine.adapt(toy.frames(toy.BATCH))
        candidate = toy_engine.candidate.digest()
        toy_engine.commit()
        assert toy_engine.state().digest() == candidate
        assert not np.array_equal(toy_engine.infer(toy.frames(1))[0], before)

    def test_buffers_never_alias(self, toy_engine: Engine):
        for _ in range(3):
            toy_engine.adapt(toy.frames(toy.BATCH))
            for committed in toy_engine._sets.committed.values():
                assert not any(np.shares_memory(committed, array) for array in toy_engine.candidate.values())
            toy_engine.commit()

    def test_refused_steps_do_not_accumulate(self, toy_engine: Engine):
        """The second of two adapt calls without a commit starts from the same state and gives the same result."""
        toy_engine.adapt(toy.frames(toy.BATCH))
        first = toy_engine.candidate.digest()
        toy_engine.adapt(toy.frames(toy.BATCH, seed=5))
        toy_engine.adapt(toy.frames(toy.BATCH))
        assert toy_engine.candidate.digest() == first

    def test_resuming_is_bit_exact(self, loaded_toy: Bundle, toy_engine: Engine):
        for seed in range(3):
            toy_engine.adapt(toy.frames(toy.BATCH, seed))
            toy_engine.commit()
        other = open_engine(loaded_toy, threads=1)
        other.load_state(toy_engine.state())
        for engine in (toy_engine, other):
            engine.adapt(toy.frames(toy.BATCH, seed=9))
            engine.commit()
        assert other.state().digest() == toy_engine.state().digest()

    def test_state_is_a_copy(self, toy_engine: Engine):
        copy = toy_engine.state()
        digest = copy.digest()
        for seed in range(2):
            toy_engine.adapt(toy.frames(toy.BATCH, seed))
            toy_engine.commit()
        assert copy.digest() == digest

    def test_outputs_are_copies(self, toy_engine: Engine):
        logits, features = toy_engine.infer(toy.frames(1))
        kept = logits.copy(), features.copy()
        toy_engine.infer(toy.frames(1, seed=1))
        assert np.array_equal(logits, kept[0])
        assert np.array_equal(features, kept[1])

    def test_no_candidate_at_first_nor_after_commit_nor_after_load(self, loaded_toy: Bundle, toy_engine: Engine):
        def expect_none():
            with pytest.raises(StateError, match="expected a candidate, found none"):
                toy_engine.commit()
            with pytest.raises(StateError, match="expected a candidate, found none"):
                _ = toy_engine.candidate

        expect_none()
        toy_engine.adapt(toy.frames(toy.BATCH))
        toy_engine.commit()
        expect_none()
        toy_engine.adapt(toy.frames(toy.BATCH))
        toy_engine.load_state(loaded_toy.initial_state)
        expect_none()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a.pop("step"), "expected arrays"),
            (
                lambda a: a.update(theta=np.zeros(11, np.float32)),
                r"'theta' expected float32\[12\], found float32\[11\]",
            ),
            (lambda a: a.update(momentum=np.zeros(12)), "'momentum' expected float32"),
            (lambda a: a.update(momentum=np.full(12, np.nan, np.float32)), "'momentum' expected finite"),
            (lambda a: a.update(theta=np.full(12, np.inf, np.float32)), "'theta' expected finite"),
        ],
        ids=["missing", "shape", "dtype", "nan", "inf"],
    )
    def test_load_state_refuses(self, toy_engine: Engine, change, message: str):
        before = toy_engine.state().digest()
        arrays = toy.initial_state()
        change(arrays)
        with pytest.raises(StateError, match=message):
            toy_engine.load_state(AdaptState(arrays))
        assert toy_engine.state().digest() == before

    def test_a_state_that_passes_through_unchanged(self, tmp_path: Path):
        """An Identity from input to output must not make the engine alias or lose the tensor."""

        def change(model):
            (node,) = [node for node in model.graph.node if node.output[0] == "step_out"]
            node.CopyFrom(helper.make_node("Identity", ["step"], ["step_out"]))

        engine = open_engine(with_adapt_graph(tmp_path, change), threads=1)
        state = engine.state()
        engine.load_state(AdaptState({**state, "step": np.float32(41)}))
        for seed in range(3):
            engine.adapt(toy.frames(toy.BATCH, seed))
            engine.commit()
        assert float(engine.state()["step"]) == 41


class TestRefusals:
    @pytest.mark.parametrize(
        "frames",
        [
            toy.frames(2),
            toy.frames(1)[0],
            toy.frames(1)[..., :2],
            toy.frames(1).astype(np.float32),
            toy.frames(1).tolist(),
            None,
        ],
        ids=["batch", "rank", "channels", "dtype", "list", "none"],
    )
    def test_frames(self, toy_engine: Engine, frames):
        with pytest.raises(UsageError, match=r"frames: expected .*uint8\[1, 8, 8, 3\], found"):
            toy_engine.infer(frames)

    @pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", 10**6])
    def test_threads(self, loaded_toy: Bundle, threads):
        with pytest.raises(UsageError, match="threads: expected a whole number from 1 to 1024"):
            open_engine(loaded_toy, threads=threads)

    def test_without_the_adaptation_graph(self, loaded_toy: Bundle):
        engine = open_engine(loaded_toy, with_adapt=False)
        with pytest.raises(UsageError, match="expected an engine opened with its adaptation graph"):
            engine.adapt(toy.frames(toy.BATCH))

    def test_closed(self, toy_engine: Engine):
        toy_engine.close()
        toy_engine.close()
        for call in (lambda: toy_engine.infer(toy.frames(1)), lambda: toy_engine.adapt(toy.frames(toy.BATCH))):
            with pytest.raises(EngineError, match="expected an open engine, found a closed one"):
                call()

    def test_missing_package(self, loaded_toy: Bundle, monkeypatch: pytest.MonkeyPatch):
        real = builtins.__import__

        def refuse(name, *rest):
            if name == "onnxruntime":
                raise ImportError("No module named 'onnxruntime'")
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(MissingDependencyError, match=r"install it with: pip install 'mgg-edge\[cpu\]'"):
            open_engine(loaded_toy)

    def test_an_operator_that_does_not_exist(self, tmp_path: Path):
        bundle = with_adapt_graph(tmp_path, lambda m: m.graph.node[5].__setattr__("op_type", "Frobnicate"))
        with pytest.raises(
            EngineError, match=r"adapt\.onnxruntime\.onnx: cannot load the graph: .*Frobnicate"
        ) as refusal:
            open_engine(bundle)
        assert "\n" not in str(refusal.value)

    def test_a_graph_that_fails_while_running(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
        """The failed step leaves no candidate, and the state as it was."""

        def change(model):
            graph = model.graph
            (node,) = [node for node in graph.node if node.output[0] == "step_out"]
            node.output[0] = "step_next"
            indices = helper.make_tensor("beyond", 7, [], [99])
            graph.initializer.append(indices)
            # An index computed at run time: not to be found out while loading.
            graph.node.append(helper.make_node("Cast", ["gradient_norm"], ["norm_int"], to=7))
            graph.node.append(helper.make_node("Add", ["norm_int", "beyond"], ["index"]))
            graph.node.append(helper.make_node("Gather", ["theta", "index"], ["picked"], axis=0))
            graph.node.append(helper.make_node("Add", ["step_next", "picked"], ["step_out"]))

        engine = open_engine(with_adapt_graph(tmp_path, change), threads=1)
        before = engine.state().digest()
        with pytest.raises(EngineError, match=r"cannot run the graph: .*indices"):
            engine.adapt(toy.frames(toy.BATCH))
        with pytest.raises(StateError):
            engine.commit()
        assert engine.state().digest() == before
        engine.infer(toy.frames(1))
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("name", NATIVE_EXCEPTIONS)
    def test_every_exception_of_onnxruntime_is_mapped(self, toy_engine: Engine, name: str):
        class Failing:
            def run_with_iobinding(self, binding):
                raise getattr(native, name)("first line\nsecond line")

        graph = toy_engine._infer
        toy_engine._infer = type(graph)(Failing(), graph.buffers, graph.bindings)
        with pytest.raises(EngineError, match="cannot run the graph: first line second line"):
            toy_engine.infer(toy.frames(1))

    def test_a_failed_step_takes_the_older_candidate_with_it(self, toy_engine: Engine):
        """Its buffers may be half overwritten."""

        class Failing:
            def run_with_iobinding(self, binding):
                raise RuntimeError("out of luck")

        toy_engine.adapt(toy.frames(toy.BATCH))
        graph = toy_engine._adapt
        toy_engine._adapt = type(graph)(Failing(), graph.buffers, graph.bindings)
        with pytest.raises(EngineError, match="out of luck"):
            toy_engine.adapt(toy.frames(toy.BATCH))
        with pytest.raises(StateError, match="expected a candidate, found none"):
            toy_engine.commit()

    def test_a_bug_of_ours_is_not_mapped(self, toy_engine: Engine):
        class Failing:
            def run_with_iobinding(self, binding):
                raise KeyError("ours")

        graph = toy_engine._infer
        toy_engine._infer = type(graph)(Failing(), graph.buffers, graph.bindings)
        with pytest.raises(KeyError):
            toy_engine.infer(toy.frames(1))


class TestWeights:
    """One copy in memory, however many sessions; no file is opened for them."""

    def test_sessions_read_the_bundle_s_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(onnxruntime_engine, "LEAST_SHARED_SCALARS", 1)  # small weights are copied
        bundle = Bundle.load(toy.write_bundle(tmp_path / "own.mgg"))
        engine = OnnxRuntimeEngine(bundle, threads=1)
        before, _ = engine.adapt(toy.frames(toy.BATCH))
        head, bias = bundle.weights["backbone.head"], bundle.weights["backbone.head_bias"]
        source_bias = bias.copy()
        overwrite(head, 2 * head)
        overwrite(bias, bias + 1)  # added to a product, so a copy was made of it
        found, _ = engine.adapt(toy.frames(toy.BATCH))
        np.testing.assert_allclose(found, 2 * before - source_bias, atol=LOGITS_TOLERANCE)

    def test_two_sessions_cost_no_second_copy(self, tmp_path: Path):
        """64 MiB of weights: two sessions may add a quarter of that; a copy each would add 128 MiB."""
        code = (Path(__file__).parent / "measure_weights.py").read_text()
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        shared_mib, private_mib = map(float, done.stdout.split())
        assert shared_mib < 16
        assert private_mib > 96, "the measurement itself must see copies"

    def test_no_file_is_opened(self, loaded_toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """A file of the name that initialisers declare must not be read, nor its absence matter."""
        monkeypatch.chdir(tmp_path)
        expected = open_engine(loaded_toy).infer(toy.frames(1))[0]
        (tmp_path / "in-memory").write_bytes(b"\xff" * 4096)
        assert open_engine(loaded_toy).infer(toy.frames(1))[0].tobytes() == expected.tobytes()


def overwrite(read_only: np.ndarray, values: np.ndarray) -> None:
    """Write through the read-only view, as only a test may."""
    import ctypes

    ctypes.memmove(read_only.ctypes.data, np.ascontiguousarray(values).ctypes.data, read_only.nbytes)


def test_more_threads_than_cores_are_capped_with_a_warning(loaded_toy: Bundle, monkeypatch, caplog):
    asked = []
    real = onnxruntime.InferenceSession

    def session(model, options, **others):
        asked.append(options.intra_op_num_threads)
        return real(model, options, **others)

    monkeypatch.setattr("mgg_edge.runtime.engines.threads.usable_cores", lambda: 2)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    open_engine(loaded_toy, threads=1024).close()
    assert asked == [2, 2]
    assert caplog.messages == ["threads: 1024 asked for, 2 cores here: using 2"]
    caplog.clear()
    open_engine(loaded_toy, threads=2).close()
    assert (asked[2:], caplog.messages) == ([2, 2], [])
