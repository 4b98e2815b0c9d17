"""Stand-ins of `cuda.bindings.runtime` and `tensorrt` that keep records and compute on the processor.

Device memory is other memory of the host: whoever reads a result without a download sees zeros. Streams are queues:
work is done when somebody waits for the stream, so whoever forgets to wait sees old numbers. A recorded graph holds the
addresses of the moment it was recorded. A plan is the ONNX graph itself, run by ONNX Runtime between device addresses.
"""

from __future__ import annotations

import ctypes
import itertools
from enum import IntEnum
from types import SimpleNamespace

import numpy as np

from mgg_edge.runtime.engines.onnxruntime_import import import_onnxruntime

PLAN = b"stand-in plan\n"
TYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8", "tensor(int64)": "int64"}


class Status(IntEnum):
    """Of a call."""

    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900


class FakeCuda:
    """The module `cuda.bindings.runtime`, as far as the engines use it."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, free_bytes: int = 8 << 30):
        self.calls: list[str] = []
        self.memory: dict[int, ctypes.Array] = {}
        self.queues: dict[int, list] = {}
        self.capturing: dict[int, list] = {}
        self.graphs: dict[int, list] = {}
        self.free_bytes, self.capturable = free_bytes, True
        self._names = itertools.count(1)

    def __getattribute__(self, name):
        if name.startswith("cuda") and name[4].isupper() and callable(value := object.__getattribute__(self, name)):
            self.calls.append(name)
            return value
        return object.__getattribute__(self, name)

    def submit(self, stream, work):
        """Put work into a stream: recorded, or done when somebody waits."""
        self.capturing.get(stream, self.queues[stream]).append(work)

    def cudaGetDeviceCount(self):
        return Status.cudaSuccess, 1

    def cudaGetDeviceProperties(self, _device):
        return Status.cudaSuccess, SimpleNamespace(name=b"Stand-in", major=8, minor=7)

    def cudaDriverGetVersion(self):
        return Status.cudaSuccess, 12060

    def cudaMemGetInfo(self):
        return Status.cudaSuccess, self.free_bytes, 8 << 30

    def cudaMalloc(self, size):
        if size > self.free_bytes:
            return Status.cudaErrorMemoryAllocation, None
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return Status.cudaSuccess, ctypes.addressof(buffer)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address):
        del self.memory[address]
        return (Status.cudaSuccess,)

    cudaFreeHost = cudaFree

    def cudaStreamCreateWithFlags(self, _flags):
        stream = next(self._names)
        self.queues[stream] = []
        return Status.cudaSuccess, stream

    def cudaStreamDestroy(self, stream):
        del self.queues[stream]
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, target, source, size, _kind, stream):
        self.submit(stream, lambda: ctypes.memmove(target, source, size))
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        queue = self.queues[stream]
        while queue:
            queue.pop(0)()
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, _mode):
        self.capturing[stream] = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        work, name = self.capturing.pop(stream), next(self._names)
        if not self.capturable:
            return Status.cudaErrorStreamCaptureUnsupported, None
        self.graphs[name] = work
        return Status.cudaSuccess, name

    def cudaGraphInstantiate(self, graph, _flags):
        executable = next(self._names)
        self.graphs[executable] = self.graphs[graph]
        return Status.cudaSuccess, executable

    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]
        return (Status.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph, stream):
        self.queues[stream].extend(self.graphs[graph])
        return (Status.cudaSuccess,)


class _Flags:
    def __init__(self):
        self.settings = {}

    def clear_flag(self, flag):
        self.settings[flag] = False

    def set_memory_pool_limit(self, pool, limit):
        self.settings[pool] = limit

    def create_timing_cache(self, data):
        return SimpleNamespace(serialize=lambda: data + b"t")

    def set_timing_cache(self, cache, ignore_mismatch):
        self.settings["timing"], self.settings["ignore_mismatch"] = cache, ignore_mismatch


class _Context:
    def __init__(self, engine):
        self._engine, self._addresses = engine, {}

    def set_tensor_address(self, name, address):
        assert address in self._engine.cuda.memory, f"{name}: not an address of the device"
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        addresses = dict(self._addresses)  # those of this moment
        if not self._engine.healthy:
            return False
        self._engine.cuda.submit(stream, lambda: self._engine.compute(addresses))
        return True


class _Engine:
    healthy = True

    def __init__(self, cuda, plan):
        ort = import_onnxruntime()
        self.cuda = cuda
        self._session = ort.InferenceSession(plan, providers=["CPUExecutionProvider"])
        self._io = {one.name: one for one in (*self._session.get_inputs(), *self._session.get_outputs())}

    num_io_tensors = property(lambda self: len(self._io))

    def get_tensor_name(self, index):
        return list(self._io)[index]

    def get_tensor_shape(self, name):
        return self._io[name].shape

    def get_tensor_dtype(self, name):
        return TYPES[self._io[name].type]

    def create_execution_context(self):
        return _Context(self)

    def array(self, name, address):
        """The tensor at a device address."""
        return np.ctypeslib.as_array(self.cuda.memory[address]).view(self.get_tensor_dtype(name))

    def compute(self, addresses):
        """Run the graph between device addresses."""
        inputs = {
            one.name: self.array(one.name, addresses[one.name]).reshape(one.shape) for one in self._session.get_inputs()
        }
        names = [one.name for one in self._session.get_outputs()]
        for name, value in zip(names, self._session.run(names, inputs), strict=True):
            self.array(name, addresses[name])[...] = value.ravel()


class FakeTensorRt:
    """The module `tensorrt`, as far as the engines use it; `made` holds the configurations of builds."""

    __version__ = "10.3.0"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    BuilderFlag = SimpleNamespace(TF32="TF32")
    MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2

    class IProgressMonitor:
        pass

    def __init__(self, cuda: FakeCuda):
        self.cuda, self.made, self.engines = cuda, [], []
        self.refusal: str | None = None

    @staticmethod
    def nptype(kind):
        return np.dtype(kind)

    def Builder(self, log):
        def build(network, config):
            config.progress_monitor.phase_start("Building engine", None, 2)
            config.progress_monitor.phase_start("inner", "Building engine", 9)
            assert config.progress_monitor.step_complete("Building engine", 0)
            config.progress_monitor.phase_finish("inner")
            config.progress_monitor.phase_finish("Building engine")
            config.network_flags = network.flags
            self.made.append(config)
            if self.refusal:
                log.log(self.ILogger.ERROR, self.refusal)
                return None
            return PLAN + network.graph

        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(flags=flags, graph=b""),
            create_builder_config=_Flags,
            build_serialized_network=build,
        )

    def OnnxParser(self, network, _log):
        def parse(graph):
            network.graph = graph
            return True

        return SimpleNamespace(parse=parse, num_errors=0)

    def Runtime(self, _log):
        def load(plan):
            assert plan.startswith(PLAN)
            engine = _Engine(self.cuda, plan.removeprefix(PLAN))
            self.engines.append(engine)
            return engine

        return SimpleNamespace(deserialize_cuda_engine=load)


class GpuOnnxRuntime:
    """The module `onnxruntime` with a CUDA provider: sessions run on the processor, when their stream is waited for."""

    def __init__(self, cuda: FakeCuda):
        self._real, self._cuda = import_onnxruntime(), cuda
        self.providers, self.falls_back = [], False

    def __getattr__(self, name):
        return getattr(self._real, name)

    def get_available_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, model, options, providers):
        self.providers += providers
        session = self._real.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        stream = int(providers[0][1]["user_compute_stream"])
        return _Session(session, self._cuda, stream, self.falls_back)


class _Session:
    def __init__(self, session, cuda, stream, falls_back):
        self._session, self._cuda, self._stream, self._falls_back = session, cuda, stream, falls_back
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def get_providers(self):
        return ["CPUExecutionProvider"] if self._falls_back else ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self):
        binding = self._session.io_binding()

        def onto_host(bind):
            def placed(name, device, number, kind, shape, address):
                assert (device, number) == ("cuda", 0)
                assert address in self._cuda.memory
                bind(name, "cpu", 0, kind, shape, address)

            return placed

        return SimpleNamespace(
            real=binding, bind_input=onto_host(binding.bind_input), bind_output=onto_host(binding.bind_output)
        )

    def run_with_iobinding(self, binding, options):
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self._cuda.submit(self._stream, lambda: self._session.run_with_iobinding(binding.real))
