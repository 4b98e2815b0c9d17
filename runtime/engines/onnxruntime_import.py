"""The one place that imports ONNX Runtime, and keeps it from calling home.

Its wheels send usage data by default: they write an identity below the home directory and look up a host of their
vendor. A camera must not. The library reads the switch when it is loaded, so it is set before; an application that has
set it keeps its choice.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["TELEMETRY_SWITCH", "import_onnxruntime"]

TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"


def import_onnxruntime() -> Any:
    """The module `onnxruntime`.

    Raises:
        ImportError: it is not installed, or its shared libraries do not fit this machine.
    """
    os.environ.setdefault(TELEMETRY_SWITCH, "1")
    import onnxruntime

    return onnxruntime
