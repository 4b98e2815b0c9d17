"""Facts about the machine: versions, processor, GPU, and what keeps it from working.

Nothing here imports a package only to learn its version: PyTorch alone takes seconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mgg_edge.runtime.engines.engine import has_gpu
from mgg_edge.runtime.engines.onnxruntime_import import import_onnxruntime
from mgg_edge.runtime.engines.threads import usable_cores

__all__ = [
    "Environment",
    "engine_providers",
    "environment",
    "gpu_advice",
    "import_time_ms",
    "jetson_release",
    "package_conflicts",
    "package_versions",
]

REQUIRED = ("numpy", "safetensors", "av", "pillow")
ENGINES = ("onnxruntime", "onnxruntime-gpu")
OPTIONAL = (
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "cuda-bindings",
    "torch",
    "torchvision",
    "timm",
    "onnx",
)
ENGINE_INSTALL = "pip install 'mgg-edge[cpu]'"
IMPORT_TIMEOUT_S = 60


@dataclass(frozen=True)
class Environment:
    """Facts about this machine.

    Attributes:
        python, system, machine: version of Python, the operating system, the processor architecture.
        cores: processor cores this process may use.
        jetson: the L4T release of a Jetson, such as `R36.4.3`, or None elsewhere.
        gpu: the kernel's driver shows an NVIDIA GPU.
        packages: version by distribution name; None where it is not installed.
        providers: execution providers of ONNX Runtime, best first; empty without it.
        import_ms: time to import `mgg_edge.runtime` in a fresh process, or None if that failed.
        advice: what keeps the GPU from being used, each with the line that mends it; the run time works without.
        problems: what keeps the run time from working, each with the line that mends it.
    """

    python: str
    system: str
    machine: str
    cores: int
    jetson: str | None
    gpu: bool
    packages: Mapping[str, str | None]
    providers: tuple[str, ...]
    import_ms: float | None
    advice: tuple[str, ...]
    problems: tuple[str, ...]


def environment() -> Environment:
    """Gather the facts; takes about a second, as it starts one fresh Python."""
    packages, jetson, gpu = package_versions(), jetson_release(), has_gpu()
    providers, engine_problem = engine_providers()
    problems = [f"{name} is not installed: pip install {name}" for name in REQUIRED if packages[name] is None]
    if engine_problem is not None:
        problems.append(engine_problem)
    problems += package_conflicts(packages)
    import_ms = import_time_ms()
    if import_ms is None and not problems:
        problems.append("mgg_edge.runtime cannot be imported: pip install --force-reinstall mgg-edge")
    return Environment(
        python=platform.python_version(),
        system=platform.platform(),
        machine=platform.machine(),
        cores=usable_cores(),
        jetson=jetson,
        gpu=gpu,
        packages=packages,
        providers=providers,
        import_ms=import_ms,
        advice=tuple(gpu_advice(packages, providers, jetson) if gpu or jetson else ()),
        problems=tuple(problems),
    )


def package_versions(lookup: Callable[[str], str] = importlib.metadata.version) -> dict[str, str | None]:
    """Installed versions of the packages that matter, from their metadata.

    Args:
        lookup: version of a distribution; raises `PackageNotFoundError` where there is none.
    """
    versions: dict[str, str | None] = {}
    for name in (*REQUIRED, *ENGINES, *OPTIONAL):
        try:
            versions[name] = lookup(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def package_conflicts(packages: Mapping[str, str | None]) -> list[str]:
    """Two distributions that write into one module: the one installed last wins, whichever that was."""
    installed = [name for name in ENGINES if packages.get(name) is not None]
    if len(installed) < 2:
        return []
    line = f"pip uninstall -y {' '.join(installed)}, then install one again"
    return [f"{' and '.join(installed)} are both installed and overwrite each other's files: {line}"]


def gpu_advice(packages: Mapping[str, str | None], providers: tuple[str, ...], jetson: str | None) -> list[str]:
    """What a machine with a GPU lacks to use it."""
    advice = []
    tensorrt = any(packages.get(name) for name in ("tensorrt", "tensorrt-rtx-cu13-bindings"))
    if not tensorrt and jetson is not None:
        # JetPack's Python module belongs to the system's interpreter, where an environment sees it only if asked to.
        advice.append(
            "tensorrt is not visible here: sudo apt install python3-libnvinfer, and make the environment with "
            "python3 -m venv --system-site-packages"
        )
    elif not tensorrt:
        advice.append(
            "no TensorRT: pip install 'mgg-edge[tensorrt]', or on an RTX card pip install 'mgg-edge[tensorrt-rtx]'"
        )
    if packages.get("cuda-bindings") is None:
        version = jetson_cuda(jetson) if jetson is not None else ""
        advice.append(f"cuda-python is not installed: pip install 'cuda-python{version}'")
    if "CUDAExecutionProvider" not in providers and not tensorrt and jetson is None:
        advice.append("onnxruntime has no CUDA: pip uninstall -y onnxruntime && pip install 'mgg-edge[gpu]'")
    return advice


def jetson_cuda(release: str) -> str:
    """Which cuda-python fits a Jetson's CUDA: 12.6 with JetPack 6 (R36), 13 with JetPack 7 (R38 and later)."""
    return "==12.6.*" if release.startswith(("R35", "R36")) else "==13.*"


def engine_providers() -> tuple[tuple[str, ...], str | None]:
    """ONNX Runtime's execution providers, and what is wrong if there are none."""
    try:
        onnxruntime = import_onnxruntime()
    except ImportError as error:  # also a wheel whose shared libraries do not fit this machine
        return (), f"onnxruntime cannot be imported ({error}): {ENGINE_INSTALL}"
    return tuple(onnxruntime.get_available_providers()), None


def jetson_release(path: Path = Path("/etc/nv_tegra_release")) -> str | None:
    """The L4T release of a Jetson, such as `R36.4.3`; None on other machines."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"R(\d+)\D+REVISION:\s*([\d.]+)", text)
    return f"R{found[1]}.{found[2]}" if found else text.strip().partition("\n")[0]


def import_time_ms() -> float | None:
    """Milliseconds to import `mgg_edge.runtime` in a fresh process; None if it cannot be imported."""
    code = "import time; s = time.perf_counter(); import mgg_edge.runtime; print((time.perf_counter() - s) * 1e3)"
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter with a fixed program
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return None
    return round(float(done.stdout), 1)
