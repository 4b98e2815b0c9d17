"""TensorRT on a GPU, from a workstation's to a Jetson's: plans from the cache, launched by `enqueueV3`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mgg_edge.errors import EngineError, MissingDependencyError
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.cuda import Cuda, DeviceArray, open_cuda
from mgg_edge.runtime.engines.engine import Progress
from mgg_edge.runtime.engines.engine_cache import EngineCache, default_cache
from mgg_edge.runtime.engines.gpu_engine import GpuEngine
from mgg_edge.runtime.engines.tensorrt_build import BuildOptions, Messages
from mgg_edge.runtime.engines.tensorrt_import import Library, import_tensorrt
from mgg_edge.runtime.engines.tensorrt_plans import stored_plan
from mgg_edge.state import TensorSpec

__all__ = ["open_tensorrt"]


def open_tensorrt(
    bundle: Bundle,
    with_adapt: bool = True,
    *,
    library: Library | None = None,
    cuda: Cuda | None = None,
    options: BuildOptions | None = None,
    cache: EngineCache | None = None,
    progress: Progress = lambda _stage, _done, _total: None,
) -> GpuEngine:
    """Open the engines of a bundle; what is not in the cache is built first.

    Args:
        bundle: a verified bundle.
        with_adapt: False leaves out the adaptation graph and its memory.
        library: TensorRT; that of this machine when None.
        cuda: the device; the first one when None.
        options: of builds.
        cache: of built engines; the user's when None.
        progress: called with a stage of a build, and how much of how much of it is done.

    Raises:
        MissingDependencyError: no TensorRT for this device, no cuda-python or no device.
        EngineError: TensorRT refused a graph, or the device has too little memory.
        SinkError: the cache cannot be written.
    """
    found, device = library or import_tensorrt(), cuda or open_cuda()
    if found.targets and device.device.capability not in found.targets:
        raise MissingDependencyError(
            f"engine 'tensorrt': {found.name} {found.version} runs on {', '.join(found.targets)}, found "
            f"{device.device.capability} ({device.device.name}): install the package tensorrt, or use --engine cuda"
        )
    store, chosen = cache or EngineCache(default_cache()), options or BuildOptions()
    messages = Messages(found.module)
    runtime = found.module.Runtime(messages.logger)

    def load(graph: str, stream: int) -> _Kernels:
        plan = stored_plan(bundle, graph, found, device.device, chosen, store, progress)
        engine = runtime.deserialize_cuda_engine(plan.data)
        context = None if engine is None else engine.create_execution_context()
        if context is None:
            raise EngineError(
                f"{bundle.path}: {graph}: cannot load the engine "
                f"({device.free_bytes() >> 20} MiB are free on the device): {messages.last()}"
            )
        return _Kernels(found.module, runtime, engine, context, stream, f"{bundle.path}: {graph}", messages)

    return GpuEngine(bundle, f"{found.name} {found.version}", device, load, with_adapt)


class _Kernels:
    """Implements `Kernels`."""

    recordable = True

    def __init__(
        self, module: Any, runtime: Any, engine: Any, context: Any, stream: int, where: str, messages: Messages
    ) -> None:
        self._module, self._engine, self._context = module, engine, context
        self._runtime = runtime  # an engine lives no longer than it
        self._stream, self._where, self._messages = stream, where, messages

    def check(self, specs: tuple[TensorSpec, ...]) -> None:
        engine, where = self._engine, self._where
        found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if found != (expected := {spec.name for spec in specs}):
            raise EngineError(f"{where}: expected an engine with tensors {sorted(expected)}, found {sorted(found)}")
        for spec in specs:
            kind = np.dtype(self._module.nptype(engine.get_tensor_dtype(spec.name)))
            if (shape := tuple(engine.get_tensor_shape(spec.name))) != spec.shape or kind != np.dtype(spec.dtype):
                raise EngineError(f"{where}: expected {spec}, found {kind}{list(shape)}")

    def bind(self, arrays: Mapping[str, DeviceArray]) -> Callable[[], None]:
        addresses = {name: array.address for name, array in arrays.items()}

        def launch() -> None:
            for name, address in addresses.items():
                self._context.set_tensor_address(name, address)
            if not self._context.execute_async_v3(self._stream):
                raise EngineError(f"{self._where}: cannot run the graph: {self._messages.last()}")

        return launch

    def close(self) -> None:
        self._context = self._engine = None
