"""ONNX Runtime on a GPU: the same graphs as on the processor, between addresses of the device.

The session launches into our stream and does not wait at its end: upload, kernels and downloads are one queue. TF32 is
off, as for TensorRT. Each session holds its own copy of the weights on the device. Launches are not recorded: ONNX
Runtime may allocate in any run, and its own recording refuses a stream that is not its own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from typing import Any

from mgg_edge.container import graph_name
from mgg_edge.errors import EngineError, MissingDependencyError
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.bundle.graphs import declare_weights
from mgg_edge.runtime.engines.cuda import Cuda, DeviceArray, open_cuda
from mgg_edge.runtime.engines.gpu_engine import GpuEngine
from mgg_edge.runtime.engines.onnxruntime_import import import_onnxruntime, mapped, quiet_options
from mgg_edge.state import TensorSpec

__all__ = ["PROVIDER", "open_onnxruntime_cuda"]

PROVIDER = "CUDAExecutionProvider"
INSTALL = "pip install 'mgg-edge[gpu]' in an environment without the package onnxruntime"


def open_onnxruntime_cuda(
    bundle: Bundle, with_adapt: bool = True, *, ort: Any = None, cuda: Cuda | None = None
) -> GpuEngine:
    """Open the graphs of a bundle on the first CUDA device.

    Args:
        bundle: a verified bundle.
        with_adapt: False leaves out the adaptation graph and its memory.
        ort: the module onnxruntime; that of this machine when None.
        cuda: the device; the first one when None.

    Raises:
        MissingDependencyError: no ONNX Runtime with CUDA, no cuda-python or no device.
        EngineError: ONNX Runtime refused a graph, or the device has too little memory.
    """
    found = ort or _import()
    if PROVIDER not in (providers := found.get_available_providers()):
        raise MissingDependencyError(
            f"engine 'cuda': expected ONNX Runtime with {PROVIDER}, found {', '.join(providers)}; "
            f"install it with: {INSTALL}"
        )
    device = cuda or open_cuda()
    values = {name: found.OrtValue.ortvalue_from_numpy(array) for name, array in bundle.weights.items()}

    def load(graph: str, stream: int) -> _Kernels:
        # the graphs in half precision are those of TensorRT's lowering, of which ONNX Runtime knows every operator
        member = graph_name(graph, "onnxruntime" if bundle.manifest.precision == "float32" else "tensorrt")
        names, where = bundle.references[member], f"{bundle.path}: {member}"
        with mapped(f"{where}: cannot load the graph"):
            options = quiet_options(found)
            options.add_external_initializers(list(names), [values[name] for name in names])
            provider = (PROVIDER, {"device_id": "0", "use_tf32": "0", "user_compute_stream": str(stream)})
            model = declare_weights(bundle.graphs[member], bundle.weights, names)
            session = found.InferenceSession(model, options, providers=[provider])
        if session.get_providers()[0] != PROVIDER:  # it falls back by itself, with a line in its own log
            raise EngineError(
                f"{where}: ONNX Runtime cannot use CUDA here: its CUDA and cuDNN libraries are missing or do not fit "
                f"the driver ({device.device.driver})"
            )
        return _Kernels(found, session, where)

    return GpuEngine(bundle, f"onnxruntime-cuda {found.__version__}", device, load, with_adapt)


class _Kernels:
    """Implements `Kernels`."""

    recordable = False

    def __init__(self, ort: Any, session: Any, where: str) -> None:
        self._session, self._where = session, where
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def check(self, specs: tuple[TensorSpec, ...]) -> None:
        """Nothing to do: the session was made from a graph that the bundle has checked, and checks what is bound."""

    def bind(self, arrays: Mapping[str, DeviceArray]) -> Callable[[], None]:
        binding = self._session.io_binding()
        with mapped(f"{self._where}: cannot bind the graph"):
            for one in self._session.get_inputs():
                array = arrays[one.name]
                binding.bind_input(one.name, "cuda", 0, array.host.dtype.type, array.host.shape, array.address)
            for one in self._session.get_outputs():
                array = arrays[one.name]
                binding.bind_output(one.name, "cuda", 0, array.host.dtype.type, array.host.shape, array.address)

        def launch() -> None:
            with mapped(f"{self._where}: cannot run the graph"):
                self._session.run_with_iobinding(binding, self._run_options)

        return launch

    def close(self) -> None:
        self._session = None


def _import() -> Any:
    try:
        ort = import_onnxruntime()
    except ImportError as error:
        raise MissingDependencyError(
            f"engine 'cuda': the package onnxruntime-gpu is missing ({error}); install it with: {INSTALL}"
        ) from error
    if hasattr(ort, "preload_dlls"):  # CUDA and cuDNN as packages of the environment, where there are such
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what is missing; the session says so as well
            ort.preload_dlls()
    return ort
