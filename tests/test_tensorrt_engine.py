"""The TensorRT engine up to the device call: on stand-ins of CUDA and TensorRT that compute on the processor."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import toy
from gpu_standin import FakeCuda, FakeTensorRt, Status
from mgg_edge.errors import EngineError, MissingDependencyError, StateError, UsageError
from mgg_edge.runtime import Adapter, Bundle
from mgg_edge.runtime.engines.cuda import Cuda, driver_version
from mgg_edge.runtime.engines.engine_cache import EngineCache
from mgg_edge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from mgg_edge.runtime.engines.tensorrt_build import BuildOptions
from mgg_edge.runtime.engines.tensorrt_engine import open_tensorrt
from mgg_edge.runtime.engines.tensorrt_import import Library
from mgg_edge.state import AdaptState


class Parts:
    """An engine's surroundings."""

    def __init__(self, tmp_path, **cuda):
        self.runtime = FakeCuda(**cuda)
        self.module = FakeTensorRt(self.runtime)
        driver = tmp_path / "driver"
        driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n")
        self.cuda = Cuda(self.runtime, driver)
        self.runtime.calls.clear()
        self.cache = EngineCache(tmp_path / "engines")
        self.library = Library(self.module, "tensorrt", self.module.__version__)

    def open(self, bundle, **options):
        return open_tensorrt(bundle, library=self.library, cuda=self.cuda, cache=self.cache, **options)


@pytest.fixture
def parts(tmp_path):
    return Parts(tmp_path)


@pytest.fixture
def engine(parts, loaded_toy):
    engine = parts.open(loaded_toy)
    yield engine
    engine.close()


@pytest.fixture
def reference(loaded_toy):
    engine = OnnxRuntimeEngine(loaded_toy, threads=1)
    yield engine
    engine.close()


def test_fifty_steps_are_those_of_onnxruntime(engine, reference):
    """First calls run, second ones record, later ones replay: all must agree, for both sets of state."""
    for step in range(50):
        pictures, picture = toy.frames(toy.BATCH, seed=step), toy.frames(1, seed=1000 + step)
        for found, expected in zip(engine.adapt(pictures), reference.adapt(pictures), strict=True):
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        if step % 7 != 3:  # a refused step leaves its set to be written again
            engine.commit()
            reference.commit()
        assert engine.state().digest() == reference.state().digest()
        for found, expected in zip(engine.infer(picture), reference.infer(picture), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_work_is_recorded_once_for_each_set_and_replayed(parts, engine):
    for step in range(8):
        engine.infer(toy.frames(1, step))
        engine.adapt(toy.frames(toy.BATCH, step))
        engine.commit()
    assert parts.runtime.calls.count("cudaGraphInstantiate") == 3  # infer, and adapt from either set
    assert parts.runtime.calls.count("cudaGraphLaunch") == 7 + 3 + 3
    assert parts.runtime.calls.count("cudaMalloc") == parts.runtime.calls.count("cudaMallocHost")


def test_what_cannot_be_recorded_is_launched_as_it_is(parts, loaded_toy, reference):
    parts.runtime.capturable = False
    engine = parts.open(loaded_toy)
    for step in range(6):
        pictures = toy.frames(toy.BATCH, step)
        np.testing.assert_array_equal(engine.adapt(pictures)[0], reference.adapt(pictures)[0])
        engine.commit()
        reference.commit()
    assert "cudaGraphLaunch" not in parts.runtime.calls
    engine.close()


def test_a_state_is_uploaded_once(parts, engine):
    state = engine.state()
    counts = []
    for seed in range(4):
        parts.runtime.calls.clear()
        engine.infer(toy.frames(1, seed), state)
        counts.append(parts.runtime.calls.count("cudaMemcpyAsync"))
    assert counts == [4, 3, 0, 0]  # θ, frames, logits, features; from the second on recorded


def test_a_given_state_is_used_and_the_committed_one_kept(engine, reference):
    engine.adapt(toy.frames(toy.BATCH))
    reference.adapt(toy.frames(toy.BATCH))
    picture = toy.frames(1, 3)
    for state in (engine.candidate, engine.state(), None):
        other = reference.candidate if state is not None and state.digest() != engine.state().digest() else None
        np.testing.assert_array_equal(engine.infer(picture, state)[0], reference.infer(picture, other)[0])


def test_refused_steps_do_not_accumulate(engine):
    engine.adapt(toy.frames(toy.BATCH))
    first, before = engine.candidate.digest(), engine.state().digest()
    engine.adapt(toy.frames(toy.BATCH, seed=5))
    engine.adapt(toy.frames(toy.BATCH))
    assert (engine.candidate.digest(), engine.state().digest()) == (first, before)


def test_a_loaded_state_is_the_devices_too(engine, reference):
    for one in (engine, reference):
        one.adapt(toy.frames(toy.BATCH))
        one.commit()
    saved = reference.state()
    engine.load_state(saved)
    with pytest.raises(StateError, match="found none; call adapt first"):
        engine.commit()
    np.testing.assert_array_equal(
        engine.adapt(toy.frames(toy.BATCH, 2))[0], reference.adapt(toy.frames(toy.BATCH, 2))[0]
    )
    assert engine.candidate.digest() == reference.candidate.digest()
    with pytest.raises(StateError, match="found NaN or Inf"):
        engine.load_state(AdaptState({**saved, "theta": np.full_like(saved["theta"], np.nan)}))


def test_everything_is_given_back(parts, loaded_toy):
    engine = parts.open(loaded_toy)
    for step in range(4):
        engine.infer(toy.frames(1, step))
        engine.adapt(toy.frames(toy.BATCH, step))
        engine.commit()
    engine.close()
    engine.close()
    assert (parts.runtime.memory, parts.runtime.queues, parts.runtime.graphs) == ({}, {}, {})
    for action in (lambda: engine.infer(toy.frames(1)), lambda: engine.adapt(toy.frames(toy.BATCH)), engine.state):
        with pytest.raises(EngineError, match="expected an open engine, found a closed one"):
            action()


def test_too_little_memory_is_said_and_nothing_kept(tmp_path, loaded_toy):
    parts = Parts(tmp_path, free_bytes=100)
    with pytest.raises(EngineError, match="cudaErrorMemoryAllocation"):
        parts.open(loaded_toy)
    assert parts.runtime.queues == {}


def test_a_failing_run_leaves_no_candidate(parts, engine):
    engine.adapt(toy.frames(toy.BATCH))
    for made in parts.module.engines:
        made.healthy = False
    before = engine.state().digest()
    engine._sets.place = 1 - engine._sets.place  # the set that is not yet recorded
    with pytest.raises(EngineError, match=r"adapt: cannot run the graph: it gave no reason"):
        engine.adapt(toy.frames(toy.BATCH))
    engine._sets.place = 1 - engine._sets.place
    assert engine.state().digest() == before
    with pytest.raises(StateError, match="expected a candidate, found none"):
        engine.commit()


def test_an_engine_of_another_contract_is_refused(parts, loaded_toy, monkeypatch):
    monkeypatch.setattr("gpu_standin._Engine.get_tensor_shape", lambda _engine, _name: [1, 2])
    with pytest.raises(EngineError, match=r"infer: expected TensorSpec.*found uint8\[1, 2\]"):
        parts.open(loaded_toy)
    assert (parts.runtime.memory, parts.runtime.queues) == ({}, {})


def test_the_build_is_strongly_typed_without_tf32_and_keeps_kernel_times(parts, loaded_toy):
    stages = []
    options = BuildOptions(workspace_mib=3, level=4)
    parts.open(loaded_toy, options=options, progress=lambda *stage: stages.append(stage)).close()
    assert len(parts.module.made) == 2
    for config in parts.module.made:
        assert config.network_flags == 1 << 1
        assert config.settings["TF32"] is False
        assert config.settings["workspace"] == 3 << 20
        assert config.settings["ignore_mismatch"] is False
        assert config.builder_optimization_level == 4
    assert stages[:3] == [("infer for sm87: Building engine", done, 2) for done in (0, 1, 2)]
    assert [config.settings["timing"].serialize() for config in parts.module.made] == [b"t", b"tt"]
    (key,) = {entry.key for entry in parts.cache.entries() if entry.key.graph == "adapt"}
    assert (key.device, key.capability, key.driver) == ("Stand-in", "sm87", "CUDA 12060, driver 550.54.14")
    assert (key.library, key.options) == ("tensorrt 10.3.0", "workspace 3, level 4, no TF32")


def test_a_second_start_builds_nothing(parts, loaded_toy):
    parts.open(loaded_toy).close()
    parts.open(loaded_toy).close()
    assert len(parts.module.made) == 2


def test_a_failed_build_says_why_and_keeps_nothing(parts, loaded_toy):
    parts.module.refusal = "no implementation for node X"
    with pytest.raises(EngineError, match=r"tensorrt 10.3.0 cannot build the engine: no implementation for node X"):
        parts.open(loaded_toy)
    assert parts.cache.entries() == ()


def test_without_the_adaptation_graph_only_inference_is_built(parts, loaded_toy):
    engine = parts.open(loaded_toy, with_adapt=False)
    assert len(parts.module.made) == 1
    engine.infer(toy.frames(1))
    with pytest.raises(UsageError, match="found one without"):
        engine.adapt(toy.frames(toy.BATCH))
    engine.close()


@pytest.mark.parametrize("frames", [toy.frames(2), toy.frames(1).astype(np.float32), None])
def test_other_frames_are_refused(engine, frames):
    with pytest.raises(UsageError, match="frames: expected"):
        engine.infer(frames)


def test_inference_and_adaptation_at_once(engine, reference):
    """Any thread may infer while another one adapts."""
    state, picture = engine.state(), toy.frames(1, 5)
    expected, wrong, stop = reference.infer(picture)[0], [], threading.Event()

    def ask():
        while not stop.is_set():
            if not np.array_equal(engine.infer(picture, state)[0], expected):
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(60):
        engine.adapt(toy.frames(toy.BATCH, step))
        engine.commit()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_adapter_runs_on_it(parts, loaded_toy: Bundle):
    with Adapter(loaded_toy, parts.open(loaded_toy), adapt="always") as adapter:
        predictions = [adapter(frame) for frame in toy.frames(24, seed=3)]
        assert adapter.counters.adapt_steps > 0
    assert all(0 <= prediction.probability <= 1 for prediction in predictions)


def test_no_device_is_said(tmp_path):
    runtime = FakeCuda()
    runtime.cudaGetDeviceCount = lambda: (Status.cudaErrorMemoryAllocation, None)
    with pytest.raises(MissingDependencyError, match=r"found none \(cudaGetDeviceCount: cudaErrorMem"):
        Cuda(runtime, tmp_path)
    runtime.cudaGetDeviceCount = lambda: (Status.cudaSuccess, 0)
    with pytest.raises(MissingDependencyError, match="expected a CUDA device, found none"):
        Cuda(runtime, tmp_path)


def test_the_drivers_version(tmp_path):
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\nGCC 11.4.0\n")
    assert driver_version(path) == "540.4.0"
    path.write_text("nothing")
    assert (driver_version(path), driver_version(tmp_path / "absent")) == ("unknown", "unknown")
