"""The adapter: predictions, the schedule, and that no failed step ever stops or alters inference."""

from __future__ import annotations

import dataclasses
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import toy
from mgg_edge.errors import EngineError, MggEdgeError, StateError, UsageError
from mgg_edge.runtime import Adapter, Bundle, Diagnostics, Engine, StepLimits, open_engine
from mgg_edge.runtime.adaptation import adapter_learner, adapter_times
from mgg_edge.runtime.bundle.graphs import embed_weights
from mgg_edge.state import AdaptState


class Wrapped:
    """An engine whose parts a test replaces."""

    def __init__(self, engine: Engine) -> None:
        self.real = engine

    def __getattr__(self, name: str):
        return getattr(self.real, name)


@pytest.fixture
def wrapped(toy_engine: Engine) -> Wrapped:
    return Wrapped(toy_engine)


def run(adapter: Adapter, count: int, seed: int = 0) -> list:
    return [adapter(frame) for frame in toy.frames(count, seed)]


def counts(adapter: Adapter) -> tuple[int, int, int]:
    counters = adapter.counters
    return counters.frames_inferred, counters.adapt_steps, counters.adapt_rejected


def values(predictions: list) -> list[tuple]:
    return [(p.label, p.probability, p.entropy, p.logits.tobytes(), p.adapted, p.step) for p in predictions]


class TestPredictions:
    def test_fields(self, toy_bundle: Path):
        with Adapter.open(toy_bundle) as adapter:
            frame = toy.frames(1)
            prediction = adapter(frame[0])
        logits = toy.reference_infer(frame, toy.initial_state()["theta"], toy.weights())[0][0].astype(np.float64)
        p = np.exp(logits) / np.exp(logits).sum()
        assert prediction.index == p.argmax()
        assert prediction.label == toy.LABELS[p.argmax()]
        assert prediction.probability == pytest.approx(p.max(), abs=1e-5)
        assert prediction.entropy == pytest.approx(-(p * np.log(p)).sum(), abs=1e-5)
        assert (prediction.adapted, prediction.step) == (False, 0)
        assert (prediction.logits.dtype, prediction.logits.shape) == (np.float32, (toy.CLASSES,))
        with pytest.raises(ValueError, match="read-only"):
            prediction.logits[0] = 0

    @pytest.mark.parametrize("logits", [[0, 0, 0, 0], [1e4, 0, 0, 0], [-1e38, 1e38, 0, 0], [1e-30, 0, 0, 0]])
    def test_extreme_logits(self, loaded_toy: Bundle, wrapped: Wrapped, logits: list[float]):
        wrapped.infer = lambda frames, state: (np.array([logits], np.float32), np.zeros((1, toy.FEATURES), np.float32))
        prediction = Adapter(loaded_toy, wrapped)(toy.frames(1)[0])
        assert 0.25 <= prediction.probability <= 1
        assert 0 <= prediction.entropy <= math.log(4) + 1e-12

    def test_frames_of_other_sizes_are_fitted(self, toy_bundle: Path):
        with Adapter.open(toy_bundle, adapt="off") as adapter:
            for size in ((8, 8), (1, 1), (480, 640), (33, 7)):
                adapter(np.full((*size, 3), 100, np.uint8))
            assert adapter.counters.frames_inferred == 4

    def test_an_infer_batch_above_one(self, tmp_path: Path):
        model = toy.infer_model(2).SerializeToString()
        parts = toy.parts().with_manifest(lambda m: m.update(infer_batch=2))
        for lowering in ("onnxruntime", "tensorrt"):
            parts = parts.with_member(f"infer.{lowering}.onnx", model)
        logits = toy.reference_infer(toy.frames(4, 1)[:2], toy.initial_state()["theta"], toy.weights())[0]
        parts = parts.with_tensors("selftest.safetensors", lambda t: t.update({"infer.logits": logits}))
        path = tmp_path / "two.mgg"
        path.write_bytes(toy.pack(parts))
        with Adapter.open(path) as adapter, Adapter.open(toy.write_bundle(tmp_path / "one.mgg")) as single:
            for two, one in zip(run(adapter, 12), run(single, 12), strict=True):
                np.testing.assert_allclose(two.logits, one.logits, atol=1e-5)


class TestSchedule:
    def test_a_step_whenever_the_buffer_is_full(self, toy_bundle: Path):
        with Adapter.open(toy_bundle) as adapter:
            predictions = run(adapter, 13)
            assert [p.step for p in predictions] == [0] * 4 + [1] * 4 + [2] * 4 + [3]
            assert [p.adapted for p in predictions] == [False] * 4 + [True] * 9
            assert counts(adapter) == (13, 3, 0)
            assert (len(adapter.infer_times_ms), len(adapter.adapt_times_ms)) == (13, 3)
            assert float(adapter.state()["step"]) == 3

    def test_a_still_picture_is_no_batch(self, toy_bundle: Path):
        with Adapter.open(toy_bundle) as adapter:
            for _ in range(50):
                adapter(toy.frames(1)[0])
            assert adapter.counters.adapt_steps == 0

    def test_steps_equal_the_engine_s(self, toy_bundle: Path, toy_engine: Engine):
        with Adapter.open(toy_bundle, threads=1) as adapter:
            run(adapter, 12)
            for start in range(0, 12, toy.BATCH):
                toy_engine.adapt(toy.frames(12)[start : start + toy.BATCH])
                toy_engine.commit()
            assert adapter.state().digest() == toy_engine.state().digest()

    def test_off_is_bit_identical_to_plain_onnxruntime(self, toy_bundle: Path, loaded_toy: Bundle):
        member = "infer.onnxruntime.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        plain = onnxruntime.InferenceSession(
            embed_weights(loaded_toy.graphs[member], loaded_toy.weights, loaded_toy.references[member]),
            options,
            providers=["CPUExecutionProvider"],
        )
        theta = loaded_toy.initial_state["theta"]
        with Adapter.open(toy_bundle, adapt="off", threads=1) as adapter:
            for frame in toy.frames(40):
                expected = plain.run(["logits"], {"frames": frame[None], "theta": theta})[0][0]
                prediction = adapter(frame)
                assert prediction.logits.tobytes() == expected.tobytes()
                assert (prediction.adapted, prediction.step) == (False, 0)
            assert adapter.counters.adapt_steps == 0
            assert adapter.adapt_times_ms == ()

    def test_predictions_before_the_first_step_are_the_source_s(self, toy_bundle: Path):
        with Adapter.open(toy_bundle, threads=1) as on, Adapter.open(toy_bundle, adapt="off", threads=1) as off:
            assert values(run(on, 4)) == values(run(off, 4))

    def test_times_are_bounded(self, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(adapter_times, "LATEST", 5)
        with Adapter.open(toy_bundle) as adapter:
            run(adapter, 30)
            assert (len(adapter.infer_times_ms), len(adapter.adapt_times_ms)) == (5, 5)
            assert adapter.infer_totals[0] == 30
            assert adapter.infer_totals[1] > sum(adapter.infer_times_ms)


def fail_adapt(wrapped: Wrapped) -> None:
    def adapt(frames):
        raise EngineError("cannot run the graph: out of luck")

    wrapped.adapt = adapt


def change_diagnostics(name: str, value: float):
    def change(wrapped: Wrapped) -> None:
        def adapt(frames):
            logits, diagnostics = wrapped.real.adapt(frames)
            return logits, diagnostics._replace(**{name: value})

        wrapped.adapt = adapt

    return change


def change_candidate(name: str, value: float):
    """Write into the engine's own output buffer, as a bad graph would."""

    def change(wrapped: Wrapped) -> None:
        def adapt(frames):
            result = wrapped.real.adapt(frames)
            wrapped.real._sets.candidate[name][...] = value
            return result

        wrapped.adapt = adapt

    return change


def change_logits(value: float):
    def change(wrapped: Wrapped) -> None:
        def adapt(frames):
            logits, diagnostics = wrapped.real.adapt(frames)
            return np.full_like(logits, value), diagnostics

        wrapped.adapt = adapt

    return change


FAULTS = {
    "engine-error": (fail_adapt, "cannot run the graph: out of luck"),
    "nan-loss": (change_diagnostics("loss", math.nan), "loss is not finite"),
    "inf-gradient": (change_diagnostics("gradient_norm", math.inf), "gradient_norm is not finite"),
    "nan-theta": (change_candidate("theta", math.nan), "state 'theta' is not finite"),
    "inf-momentum": (change_candidate("momentum", math.inf), "state 'momentum' is not finite"),
    "nan-step": (change_candidate("step", math.nan), "state 'step' is not finite"),
    "far-theta": (change_candidate("theta", 1e6), "theta moves further in one step than the update rule allows"),
    "nan-logits": (change_logits(math.nan), "logits are not finite"),
}


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_inference_goes_on_and_the_state_stays(
        self, loaded_toy: Bundle, wrapped: Wrapped, fault: str, caplog: pytest.LogCaptureFixture
    ):
        inject, reason = FAULTS[fault]
        adapter = Adapter(loaded_toy, wrapped)
        run(adapter, 4)
        before = adapter.state().digest()
        inject(wrapped)
        with caplog.at_level(logging.WARNING):
            predictions = run(adapter, 12, seed=3)
        assert adapter.state().digest() == before
        assert counts(adapter) == (16, 1, 3)
        assert adapter.last_rejection == reason
        assert [record.getMessage() for record in caplog.records] == [f"adaptation step refused: {reason}"]
        assert all(p.step == 1 and np.isfinite(p.logits).all() for p in predictions)

    def test_a_fault_that_passes_heals(self, loaded_toy: Bundle, wrapped: Wrapped):
        adapter = Adapter(loaded_toy, wrapped)
        fail_adapt(wrapped)
        run(adapter, 4)
        del wrapped.adapt
        run(adapter, 4, seed=1)
        assert (adapter.counters.adapt_steps, adapter.counters.adapt_rejected) == (1, 1)

    def test_a_refused_candidate_never_becomes_the_start_of_the_next(self, loaded_toy: Bundle, wrapped: Wrapped):
        adapter, healthy = Adapter(loaded_toy, wrapped), open_engine(loaded_toy, threads=1)
        change_candidate("theta", math.nan)(wrapped)
        run(adapter, 4)
        del wrapped.adapt
        run(adapter, 4, seed=1)
        healthy.adapt(toy.frames(4, seed=1))
        assert adapter.state().digest() == healthy.candidate.digest()

    def test_tight_limits_refuse_every_step(self, loaded_toy: Bundle, toy_engine: Engine):
        adapter = Adapter(loaded_toy, toy_engine, limits=StepLimits(max_update=0.0))
        run(adapter, 20)
        assert (adapter.counters.adapt_steps, adapter.counters.adapt_rejected) == (0, 5)

    def test_reasons_do_not_pile_up(self, loaded_toy: Bundle, wrapped: Wrapped, caplog: pytest.LogCaptureFixture):
        adapter, count = Adapter(loaded_toy, wrapped), iter(range(10_000))

        def adapt(frames):
            raise EngineError(f"reason {next(count)}")

        wrapped.adapt = adapt
        run(adapter, 4 * 200)
        assert adapter.counters.adapt_rejected == 200
        assert len(caplog.records) <= adapter_learner.MAX_LOGGED_REASONS

    def test_adapted_logits_that_are_not_finite_lead_back_to_the_source(
        self, loaded_toy: Bundle, toy_engine: Engine, caplog: pytest.LogCaptureFixture
    ):
        adapter = Adapter(loaded_toy, toy_engine)
        run(adapter, 8)
        huge = {**adapter.state(), "theta": np.full(toy.THETA, 3e38, np.float32)}
        adapter.load_state(AdaptState(huge))
        (prediction,) = run(adapter, 1)
        assert (prediction.adapted, prediction.step) == (False, 0)
        assert np.isfinite(prediction.logits).all()
        assert adapter.state().digest() == loaded_toy.initial_state.digest()
        assert adapter.counters.adapt_rejected == 1
        assert "back to the source model" in (adapter.last_rejection or "")

    def test_source_logits_that_are_not_finite_are_an_engine_error(self, loaded_toy: Bundle, wrapped: Wrapped):
        wrapped.infer = lambda frames, state: (np.full((1, 4), np.nan, np.float32), np.zeros((1, 6), np.float32))
        with pytest.raises(EngineError, match="expected finite logits from the source model"):
            Adapter(loaded_toy, wrapped)(toy.frames(1)[0])

    @pytest.mark.parametrize(
        "frame",
        [None, "frame", np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8)],
        ids=["none", "text", "dtype", "rank", "empty"],
    )
    def test_bad_frames(self, toy_bundle: Path, frame):
        with Adapter.open(toy_bundle) as adapter:
            with pytest.raises(UsageError, match=r"frame: expected .* found "):
                adapter(frame)
            adapter(toy.frames(1)[0])
            assert adapter.counters.frames_inferred == 1


class TestState:
    def test_resume_is_bit_exact(self, toy_bundle: Path):
        with Adapter.open(toy_bundle, threads=1) as first, Adapter.open(toy_bundle, threads=1) as second:
            run(first, 8)
            second.load_state(first.state())
            assert values(run(second, 9, seed=5)) == values(run(first, 9, seed=5))
            assert second.state().digest() == first.state().digest()

    def test_loading_the_source_state_is_not_adapted(self, toy_bundle: Path, loaded_toy: Bundle):
        with Adapter.open(toy_bundle) as adapter:
            run(adapter, 8)
            adapter.load_state(loaded_toy.initial_state)
            (prediction,) = run(adapter, 1)
            assert (prediction.adapted, prediction.step) == (False, 0)

    def test_a_rule_without_a_step_counter(self, loaded_toy: Bundle, toy_engine: Engine):
        manifest = loaded_toy.manifest.replace(state=toy.STATE[:1])
        source = AdaptState({"theta": loaded_toy.initial_state["theta"]})
        adapter = Adapter(dataclasses.replace(loaded_toy, manifest=manifest, initial_state=source), toy_engine)
        adapter.load_state(AdaptState({"theta": source["theta"] + np.float32(0.5)}))
        (prediction,) = run(adapter, 1)
        assert (prediction.adapted, prediction.step) == (True, 0)

    def test_a_foreign_state_is_refused_and_changes_nothing(self, toy_bundle: Path):
        with Adapter.open(toy_bundle) as adapter:
            run(adapter, 4)
            before = adapter.state().digest()
            with pytest.raises(StateError):
                adapter.load_state(AdaptState({"theta": np.zeros(3, np.float32)}))
            assert adapter.state().digest() == before
            assert run(adapter, 1)[0].step == 1


def test_frames_gathered_before_a_state_was_loaded_are_not_adapted_on(toy_bundle: Path):
    """They were of the time before: a batch begins anew."""
    with Adapter.open(toy_bundle, adapt="always", threads=1) as adapter:
        frames = toy.frames(2 * toy.BATCH)
        for frame in frames[: toy.BATCH - 1]:
            adapter(frame)
        adapter.load_state(adapter.state())
        for frame in frames[toy.BATCH - 1 : 2 * toy.BATCH - 2]:
            adapter(frame)
        assert adapter.counters.adapt_steps == 0
        adapter(frames[-1])
        assert adapter.counters.adapt_steps == 1


class TestOpening:
    def test_properties(self, toy_bundle: Path, loaded_toy: Bundle):
        with Adapter.open(toy_bundle) as adapter:
            assert adapter.manifest == loaded_toy.manifest
            assert adapter.bundle_id == loaded_toy.id
            assert adapter.engine_name == f"onnxruntime-cpu {onnxruntime.__version__}"
            assert adapter.last_rejection is None

    def test_text_paths(self, toy_bundle: Path):
        Adapter.open(str(toy_bundle)).close()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"adapt": "sometimes"}, "adapt: expected one of auto, always, window, burst, off, found 'sometimes'"),
            ({"engine": "npu"}, "engine: expected one of auto, cpu, cuda, tensorrt, openvino, found 'npu'"),
            ({"threads": 0}, "threads: expected a whole number"),
        ],
    )
    def test_options(self, toy_bundle: Path, options: dict, message: str):
        with pytest.raises(UsageError, match=message):
            Adapter.open(toy_bundle, **options)

    def test_missing_bundle(self, tmp_path: Path):
        with pytest.raises(UsageError, match="no such bundle"):
            Adapter.open(tmp_path / "none.mgg")

    def test_closed(self, toy_bundle: Path):
        with Adapter.open(toy_bundle) as adapter:
            pass
        adapter.close()
        with pytest.raises(EngineError, match="found a closed one"):
            adapter(toy.frames(1)[0])


WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "timm", "onnx", "onnxscript", "typer", "rich"}:
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
import mgg_edge.runtime
lazy = {"onnxruntime", "av", "PIL"} & set(sys.modules)
assert not lazy, f"import mgg_edge.runtime pays for {lazy}"

import numpy as np
random = np.random.default_rng(0)
with mgg_edge.runtime.Adapter.open(sys.argv[1]) as adapter:
    for _ in range(12):
        prediction = adapter(random.integers(0, 256, (30, 40, 3), np.uint8))
    assert adapter.counters.adapt_steps == 3, adapter.counters
    print(prediction.label, prediction.step)
"""


def test_runs_where_importing_torch_or_onnx_fails(toy_bundle: Path):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(toy_bundle)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "2"
    assert done.stderr == ""


def test_no_file_but_the_bundle_stays_open(toy_bundle: Path):
    def descriptors() -> set[str]:
        folder = Path("/proc/self/fd")
        return {str(entry.readlink()) for entry in folder.iterdir() if entry.exists()} - {str(folder)}

    with Adapter.open(toy_bundle) as adapter:
        run(adapter, 8)
        assert str(toy_bundle) not in descriptors()


def test_diagnostics_are_named_as_the_graph_s_outputs():
    assert Diagnostics._fields == toy.SCALARS


def test_every_error_of_the_run_time_is_in_the_tree(toy_bundle: Path):
    with Adapter.open(toy_bundle) as adapter, pytest.raises(MggEdgeError):
        adapter(None)


@pytest.mark.parametrize("background", [False, True])
def test_in_a_forked_child_an_adapter_refuses_and_closes_at_once(toy_bundle, background):
    """In a process of its own: this one has threads."""
    code = f"""
import os, sys
import numpy as np
from mgg_edge.errors import UsageError
from mgg_edge.runtime import Adapter
adapter = Adapter.open({str(toy_bundle)!r}, threads=1, background={background})
frame = np.zeros((24, 32, 3), np.uint8)
adapter(frame)
child = os.fork()
if not child:
    try:
        adapter(frame)
    except UsageError as error:
        adapter.close()
        os._exit(7 if "after the fork" in str(error) else 1)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
adapter(frame)
adapter.close()
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
