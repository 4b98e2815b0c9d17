"""One graph of a bundle on a GPU: kernels, a stream and buffers, run again and again from fixed addresses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import EngineError
from mgg_edge.runtime.engines.cuda import Cuda, DeviceArray
from mgg_edge.runtime.engines.engine import check_frames
from mgg_edge.state import TensorSpec

__all__ = ["GpuGraph", "Kernels"]

logger = logging.getLogger(__name__)


class Kernels(Protocol):
    """What computes a graph between addresses of the device."""

    recordable: bool
    """Launches may be recorded into a CUDA graph."""

    def check(self, specs: tuple[TensorSpec, ...]) -> None:
        """Refuse other tensors than these: they are about to be read and written by address.

        Raises:
            EngineError: other names, types or shapes.
        """

    def bind(self, arrays: Mapping[str, DeviceArray]) -> Callable[[], None]:
        """What puts all kernels into the stream, between these tensors; raises EngineError where that fails."""

    def close(self) -> None:
        """Release them; safe to call twice."""


class GpuGraph:
    """A stream, and once loaded, kernels and the buffers of what is not state.

    Args:
        cuda: the device.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.stream = cuda, cuda.stream()
        self._kernels: Kernels | None = None
        self._buffers: dict[str, DeviceArray] = {}
        self._runners: list[_Runner] = []
        self._closed = False

    def load(
        self, kernels: Kernels, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], own: Collection[str]
    ) -> None:
        """Take kernels, check them against the contract, and make the buffers of the tensors named in `own`.

        Raises:
            EngineError: other names, types or shapes, or too little memory.
        """
        self._kernels = kernels
        kernels.check((*inputs, *outputs))
        for spec in (*inputs, *outputs):
            if spec.name in own:
                self._buffers[spec.name] = self._cuda.empty(spec.shape, spec.dtype)
        self._outputs = {spec.name: self._buffers[spec.name] for spec in outputs if spec.name in own}

    def runner(self, sources: Mapping[str, DeviceArray], targets: Mapping[str, DeviceArray]) -> Callable[[], None]:
        """What runs the graph from one set of state to another: recorded at its second call, replayed from then on."""
        if self._kernels is None:
            raise EngineError("engine: expected loaded kernels, found none")
        launch = self._kernels.bind({**self._buffers, **sources, **targets})

        def work() -> None:
            self._cuda.upload(self._buffers["frames"], self.stream)
            launch()
            for array in (*self._outputs.values(), *targets.values()):
                self._cuda.download(array, self.stream)

        runner = _Runner(self._cuda, work, self.stream, self._kernels.recordable)
        self._runners.append(runner)
        return runner

    def run(self, runner: Callable[[], None], frames: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        """Run on frames; the outputs that are not state: views, valid until the next run.

        Raises:
            UsageError: frames of another type or shape.
            EngineError: the device failed.
        """
        host = self._buffers["frames"].host
        np.copyto(host, check_frames(frames, host.shape))
        runner()
        self._cuda.wait(self.stream)
        return {name: array.host for name, array in self._outputs.items()}

    def close(self) -> None:
        """Release everything; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        for runner in self._runners:
            runner.close()
        if self._kernels is not None:
            self._kernels.close()
        while self._buffers:
            self._cuda.free(self._buffers.popitem()[1])
        self._cuda.close_stream(self.stream)


class _Runner:
    """Work that is recorded when it is asked for the second time: the first run still allocates, which no graph may."""

    def __init__(self, cuda: Cuda, work: Callable[[], None], stream: int, recordable: bool) -> None:
        self._cuda, self._work, self._stream, self._recordable = cuda, work, stream, recordable
        self._calls = 0
        self._recorded: Any = None

    def __call__(self) -> None:
        self._calls += 1
        if self._calls == 2 and self._recordable:
            try:
                self._recorded = self._cuda.record(self._work, self._stream)
            except EngineError as error:  # something that cannot be recorded: the same kernels, launched one by one
                logger.debug("not recorded: %s", error)
        if self._recorded is None:
            self._work()
        else:
            self._cuda.launch(self._recorded, self._stream)

    def close(self) -> None:
        """Give the record back."""
        if self._recorded is not None:
            self._cuda.forget(self._recorded)
            self._recorded = None
