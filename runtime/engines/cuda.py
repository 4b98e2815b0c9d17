"""What the engines need of CUDA, over NVIDIA's own Python bindings (`cuda-python`).

Those bindings wrap every call one to one and are built for servers and Jetsons alike. pycuda is not used: it compiles
on installation and brings a context of its own beside the primary one, which TensorRT and ONNX Runtime share.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import EngineError, MissingDependencyError
from mgg_edge.runtime.engines.engine_key import ANY

__all__ = ["Cuda", "Device", "DeviceArray", "driver_version", "open_cuda"]

INSTALL = "pip install cuda-python"
Array = npt.NDArray[np.generic]


class Device(NamedTuple):
    """A GPU, or every GPU of a kind.

    Attributes:
        name: of the GPU, `any` for a class of them.
        capability: compute capability, such as `sm86`.
        driver: version of the driver, `any` as above.
    """

    name: str
    capability: str
    driver: str

    @classmethod
    def any_of(cls, capability: str) -> Device:
        """Every device of a compute capability."""
        return cls(ANY, capability, ANY)


class DeviceArray(NamedTuple):
    """A tensor on the device with a page-locked copy on the host, which transfers read and write directly."""

    address: int
    host: Array

    @property
    def size_bytes(self) -> int:
        """Of either copy."""
        return self.host.nbytes


def open_cuda(otherwise: str = "", driver_file: Path = Path("/proc/driver/nvidia/version")) -> Cuda:
    """The first CUDA device.

    Args:
        otherwise: what to do where there is none, for the message.
        driver_file: where Linux tells the driver's version.

    Raises:
        MissingDependencyError: the package cuda-python is absent, or there is no device.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingDependencyError(
            f"engine: expected the package cuda-python, found none ({error}); install it with: {INSTALL}"
        ) from error
    try:
        return Cuda(runtime, driver_file)
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{error}; {otherwise}" if otherwise else str(error)) from error


class Cuda:
    """One device: memory, one stream a user, recorded graphs.

    Args:
        runtime: the module `cuda.bindings.runtime`.
        driver_file: where Linux tells the driver's version.

    Raises:
        MissingDependencyError: there is no device, or no driver.
    """

    def __init__(self, runtime: Any, driver_file: Path) -> None:
        self._runtime = runtime
        try:
            count = self._call("cudaGetDeviceCount")
        except EngineError as error:
            raise MissingDependencyError(f"engine: expected a CUDA device, found none ({error})") from error
        if count < 1:
            raise MissingDependencyError("engine: expected a CUDA device, found none")
        properties = self._call("cudaGetDeviceProperties", 0)
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        version = f"CUDA {self._call('cudaDriverGetVersion')}, driver {driver_version(driver_file)}"
        self.device = Device(name, f"sm{properties.major}{properties.minor}", version)

    def free_bytes(self) -> int:
        """Memory that is free on the device."""
        return int(self._call("cudaMemGetInfo")[0])

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """A tensor of zeros on the host and of anything on the device."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        pinned = self._call("cudaMallocHost", size)
        host: Array = np.frombuffer(memoryview((ctypes.c_char * size).from_address(int(pinned))), kind).reshape(shape)
        host[...] = 0
        return DeviceArray(int(self._call("cudaMalloc", size)), host)

    def free(self, array: DeviceArray) -> None:
        """Give both copies back; `array.host` must not be used afterwards."""
        self._call("cudaFree", array.address)
        self._call("cudaFreeHost", array.host.ctypes.data)

    def stream(self) -> int:
        """A new stream."""
        return int(self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking))

    def close_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def upload(self, array: DeviceArray, stream: int) -> None:
        """Host to device, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", array.address, array.host.ctypes.data, array.size_bytes, kind, stream)

    def download(self, array: DeviceArray, stream: int) -> None:
        """Device to host, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.host.ctypes.data, array.address, array.size_bytes, kind, stream)

    def wait(self, stream: int) -> None:
        """Until everything in the stream is done."""
        self._call("cudaStreamSynchronize", stream)

    def record(self, work: Callable[[], None], stream: int) -> Any:
        """Record what `work` puts into the stream, for `launch`; it is not done now.

        Raises:
            EngineError: something in it cannot be recorded.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        finally:
            graph = self._call("cudaStreamEndCapture", stream)
        executable = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)
        return executable

    def launch(self, recorded: Any, stream: int) -> None:
        """Put recorded work into the stream."""
        self._call("cudaGraphLaunch", recorded, stream)

    def forget(self, recorded: Any) -> None:
        """Give recorded work back."""
        self._call("cudaGraphExecDestroy", recorded)

    def _call(self, name: str, *arguments: Any) -> Any:
        """One call of the runtime: its result, several as a tuple.

        Raises:
            EngineError: the call failed.
        """
        status, *results = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            raise EngineError(f"{name}: {getattr(status, 'name', status)}")
        return results[0] if len(results) == 1 else tuple(results)


def driver_version(path: Path) -> str:
    """Version of the kernel's driver, such as 550.54.14; `unknown` where the system does not tell it."""
    try:
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", path.read_text(errors="replace"))
    except OSError:
        return "unknown"
    return found[1] if found else "unknown"
