"""The one place that finds TensorRT: the full package, or TensorRT for RTX, whose Python interface is the same.

tensorrt                    workstation, server, Jetson (part of JetPack); builds for the device at hand only
tensorrt_rtx                RTX cards; builds for a named compute capability, also on a machine without a GPU
tensorrt_rtx_bindings       the same, installed without the package that only gives it its short name
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from mgg_edge.errors import MissingDependencyError

__all__ = ["INSTALL_RTX", "Library", "import_tensorrt"]

MODULES = {
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
    "tensorrt_rtx_bindings": "tensorrt-rtx",
}
INSTALL = "pip install 'mgg-edge[tensorrt]' (JetPack brings its own)"
INSTALL_RTX = "pip install 'mgg-edge[tensorrt-rtx]'"


class Library(NamedTuple):
    """TensorRT as it is installed.

    Attributes:
        module: the Python module.
        name: `tensorrt` or `tensorrt-rtx`.
        version: such as `10.3.0`.
    """

    module: Any
    name: str
    version: str

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities it builds for on any machine, such as `sm86`; none for the full package."""
        members = getattr(self.module, "ComputeCapability", None)
        names = [] if members is None else members.__members__
        return tuple(name.lower() for name in names if name.startswith("SM"))


def import_tensorrt(*, ahead_of_time: bool = False) -> Library:
    """The TensorRT of this machine; the full package comes first.

    Args:
        ahead_of_time: only one that builds for other devices than this machine's.

    Raises:
        MissingDependencyError: there is none, or its shared libraries do not fit this machine.
    """
    problems = []
    for name, flavour in MODULES.items():
        if ahead_of_time and flavour == "tensorrt":
            continue
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:  # a shared library that is absent or does not fit
            problems.append(f"{name}: {' '.join(str(error).split())[:200]}")
            continue
        return Library(module, flavour, str(module.__version__))
    found = f"found one that cannot be loaded ({'; '.join(problems)})" if problems else "found none"
    line = INSTALL_RTX if ahead_of_time else f"{INSTALL}, or on an RTX card: {INSTALL_RTX}"
    raise MissingDependencyError(f"engine 'tensorrt': expected the package TensorRT, {found}; install it with: {line}")
