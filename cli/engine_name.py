"""`--engine`, as every command of the device half takes it."""

from __future__ import annotations

from mgg_edge.compat import StrEnum

__all__ = ["ENGINE_HELP", "EngineName"]

ENGINE_HELP = (
    "What computes: TensorRT or ONNX Runtime on the GPU, or the processor; the best that works by default. openvino is "
    "another way of using the processor: steps in half to two thirds of the time."
)


class EngineName(StrEnum):
    """Names that `mgg_edge.runtime.open_engine` takes; written out, so that `--help` need not import it."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"
    OPENVINO = "openvino"
