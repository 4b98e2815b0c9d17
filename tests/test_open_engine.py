"""Which engine runs: what was asked for, or the best that works here, and what is said when it is not the best."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import toy
from gpu_standin import FakeCuda, FakeTensorRt, GpuOnnxRuntime
from mgg_edge.errors import EngineError, MissingDependencyError, UsageError
from mgg_edge.runtime import open_engine
from mgg_edge.runtime.engines import cuda, engine, onnxruntime_cuda, tensorrt_engine, tensorrt_import
from mgg_edge.runtime.engines.cuda import Cuda
from mgg_edge.runtime.engines.onnxruntime_cuda import open_onnxruntime_cuda
from mgg_edge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from mgg_edge.runtime.engines.tensorrt_import import Library, import_tensorrt


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU, TensorRT and ONNX Runtime for CUDA, all stand-ins."""
    runtime = FakeCuda()
    module, device = FakeTensorRt(runtime), Cuda(runtime, tmp_path)
    monkeypatch.setenv("MGG_EDGE_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setattr(engine, "has_gpu", lambda: True)
    monkeypatch.setattr(tensorrt_engine, "import_tensorrt", lambda: Library(module, "tensorrt", "10.3.0"))
    monkeypatch.setattr(tensorrt_engine, "open_cuda", lambda: device)
    monkeypatch.setattr(onnxruntime_cuda, "_import", lambda: GpuOnnxRuntime(runtime))
    monkeypatch.setattr(onnxruntime_cuda, "open_cuda", lambda: device)
    return runtime


def absent(*_arguments, **_options):
    raise MissingDependencyError("engine 'x': not here")


def opened_name(bundle, name="auto"):
    opened = open_engine(bundle, name, threads=1)
    opened.infer(toy.frames(1))
    opened.close()
    return opened.name


def test_auto_takes_tensorrt_then_cuda_then_the_processor(gpu, loaded_toy, monkeypatch, caplog):
    assert opened_name(loaded_toy) == "tensorrt 10.3.0 on Stand-in"
    assert caplog.messages == []
    monkeypatch.setattr(tensorrt_engine, "import_tensorrt", absent)
    assert opened_name(loaded_toy).startswith("onnxruntime-cuda ")
    assert caplog.messages == ["engine 'tensorrt' cannot be used here: engine 'x': not here"]
    caplog.clear()
    monkeypatch.setattr(onnxruntime_cuda, "_import", absent)
    assert opened_name(loaded_toy).startswith("onnxruntime-cpu ")
    assert [message.split("'")[1] for message in caplog.messages] == ["tensorrt", "cuda"]


def test_tensorrt_for_rtx_leaves_other_gpus_to_cuda(gpu, loaded_toy, monkeypatch, caplog):
    """An H100 is none of its targets: said before anything is built."""
    module = SimpleNamespace(ComputeCapability=SimpleNamespace(__members__={"SM75": 1, "SM120": 2, "CURRENT": 3}))
    monkeypatch.setattr(tensorrt_engine, "import_tensorrt", lambda: Library(module, "tensorrt-rtx", "1.7.1"))
    assert opened_name(loaded_toy).startswith("onnxruntime-cuda ")
    (message,) = caplog.messages
    assert "runs on sm75, sm120, found sm87 (Stand-in): install the package tensorrt, or use --engine cuda" in message


def test_without_a_gpu_auto_is_the_processor_and_says_nothing(loaded_toy, monkeypatch, caplog):
    monkeypatch.setattr(engine, "has_gpu", lambda: False)
    monkeypatch.setattr(tensorrt_engine, "import_tensorrt", absent)
    assert opened_name(loaded_toy).startswith("onnxruntime-cpu ")
    assert caplog.messages == []


def test_what_was_asked_for_is_never_replaced(gpu, loaded_toy, monkeypatch):
    assert opened_name(loaded_toy, "cpu").startswith("onnxruntime-cpu ")
    assert opened_name(loaded_toy, "cuda").startswith("onnxruntime-cuda ")
    assert opened_name(loaded_toy, "tensorrt").startswith("tensorrt ")
    monkeypatch.setattr(tensorrt_engine, "import_tensorrt", absent)
    with pytest.raises(MissingDependencyError, match="not here"):
        open_engine(loaded_toy, "tensorrt")
    with pytest.raises(UsageError, match="expected one of auto, cpu, cuda, tensorrt, openvino, found 'npu'"):
        open_engine(loaded_toy, "npu")


@pytest.mark.parametrize("node", ["nvidia0", "nvhost-ctrl-gpu", "nvgpu", "dxg"])
def test_a_gpu_is_seen_by_its_device_node(tmp_path, node):
    (tmp_path / "nvidia-caps").mkdir()
    assert not engine.has_gpu(tmp_path)
    (tmp_path / node).touch()
    assert engine.has_gpu(tmp_path)


class TestCuda:
    """ONNX Runtime on the GPU, up to the device call."""

    def test_fifty_steps_are_those_of_the_processor(self, gpu, loaded_toy):
        ours, reference = open_engine(loaded_toy, "cuda"), OnnxRuntimeEngine(loaded_toy, threads=1)
        for step in range(50):
            pictures, picture = toy.frames(toy.BATCH, seed=step), toy.frames(1, seed=1000 + step)
            np.testing.assert_array_equal(ours.adapt(pictures)[0], reference.adapt(pictures)[0])
            if step % 7 != 3:
                ours.commit()
                reference.commit()
            assert ours.state().digest() == reference.state().digest()
            np.testing.assert_array_equal(ours.infer(picture)[0], reference.infer(picture)[0])
        ours.close()
        assert (gpu.memory, gpu.queues, gpu.graphs) == ({}, {}, {})

    def test_the_session_has_our_stream_and_no_tf32(self, gpu, loaded_toy):
        ort = GpuOnnxRuntime(gpu)
        opened = open_onnxruntime_cuda(loaded_toy, ort=ort, cuda=onnxruntime_cuda.open_cuda())
        for (name, options), graph in zip(ort.providers, opened._graphs, strict=True):
            assert name == "CUDAExecutionProvider"
            assert options == {"device_id": "0", "use_tf32": "0", "user_compute_stream": str(graph.stream)}
        opened.close()

    def test_a_silent_fallback_of_onnxruntime_is_refused(self, gpu, loaded_toy):
        ort = GpuOnnxRuntime(gpu)
        ort.falls_back = True
        with pytest.raises(EngineError, match="ONNX Runtime cannot use CUDA here"):
            open_onnxruntime_cuda(loaded_toy, ort=ort, cuda=onnxruntime_cuda.open_cuda())
        assert (gpu.memory, gpu.queues) == ({}, {})

    def test_libraries_are_loaded_without_a_word(self, monkeypatch, capsys):
        """ONNX Runtime prints those that are missing, between the lines that scripts read."""
        loaded = []
        ort = SimpleNamespace(preload_dlls=lambda: print("Failed to load libcublas.so.13", *loaded.append(1) or ()))
        monkeypatch.setattr(onnxruntime_cuda, "import_onnxruntime", lambda: ort)
        assert onnxruntime_cuda._import() is ort
        assert (loaded, capsys.readouterr().out) == ([1], "")

    def test_an_onnxruntime_without_cuda_is_named(self, loaded_toy):
        with pytest.raises(MissingDependencyError, match=r"with CUDAExecutionProvider, found .*CPU"):
            open_onnxruntime_cuda(loaded_toy)


class TestImport:
    """Which TensorRT is taken."""

    @staticmethod
    def install(monkeypatch, **modules):
        for name in tensorrt_import.MODULES:
            monkeypatch.setitem(sys.modules, name, modules.get(name))

    def test_the_full_package_comes_first(self, monkeypatch):
        full, rtx = FakeTensorRt(FakeCuda()), FakeTensorRt(FakeCuda())
        self.install(monkeypatch, tensorrt=full, tensorrt_rtx=rtx)
        assert import_tensorrt().module is full
        assert import_tensorrt(ahead_of_time=True).module is rtx
        self.install(monkeypatch, tensorrt_rtx_bindings=rtx)
        assert import_tensorrt() == (rtx, "tensorrt-rtx", "10.3.0")

    def test_none_is_said_with_what_to_do(self, monkeypatch):
        self.install(monkeypatch)
        with pytest.raises(MissingDependencyError, match=r"found none; install it with: pip install 'mgg-edge"):
            import_tensorrt()
        with pytest.raises(MissingDependencyError, match=r"with: pip install 'mgg-edge\[tensorrt-rtx\]'$"):
            import_tensorrt(ahead_of_time=True)

    def test_one_that_cannot_be_loaded_is_named(self, monkeypatch):
        def broken(name):
            if name == "tensorrt":
                raise OSError("libnvinfer.so.10: cannot open shared object file")
            raise ModuleNotFoundError(name)

        monkeypatch.setattr(tensorrt_import.importlib, "import_module", broken)
        with pytest.raises(MissingDependencyError, match=r"cannot be loaded \(tensorrt: libnvinfer.so.10: cannot open"):
            import_tensorrt()


def test_no_cuda_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=r"expected the package cuda-python.*pip install cuda-python"):
        cuda.open_cuda()
