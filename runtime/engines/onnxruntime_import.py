"""The one place that imports ONNX Runtime, keeps it from calling home, and gives its errors our shape.

Its wheels send usage data by default: they write an identity below the home directory and look up a host of their
vendor. A camera must not. The library reads the switch when it is loaded, so it is set before; an application that has
set it keeps its choice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mgg_edge.errors import EngineError

__all__ = ["TELEMETRY_SWITCH", "import_onnxruntime", "mapped", "quiet_options"]

TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"
FATAL_SEVERITY = 4  # errors come as exceptions; printed as well, they would spoil the terminal


def import_onnxruntime() -> Any:
    """The module `onnxruntime`.

    Raises:
        ImportError: it is not installed, or its shared libraries do not fit this machine.
    """
    os.environ.setdefault(TELEMETRY_SWITCH, "1")
    import onnxruntime

    return onnxruntime


def quiet_options(ort: Any) -> Any:
    """Session options that print nothing."""
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_SEVERITY
    return options


@contextmanager
def mapped(what: str) -> Iterator[None]:
    """Turn what an engine's package raises into an EngineError; the types of onnxruntime share no base of their own."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise EngineError(f"{what}: {_one_line(error)}") from error
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise EngineError(f"{what}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
