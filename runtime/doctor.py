"""Facts about the machine, and whether a bundle computes here what it computed where it was made.

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

import numpy as np
import numpy.typing as npt

from mgg_edge.manifest import Manifest
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Engine, has_gpu
from mgg_edge.runtime.engines.onnxruntime_engine import usable_cores
from mgg_edge.runtime.engines.onnxruntime_import import import_onnxruntime

__all__ = [
    "LOGITS_LIMIT",
    "UPDATE_LIMIT",
    "Environment",
    "SelfTest",
    "engine_providers",
    "environment",
    "gpu_advice",
    "import_time_ms",
    "jetson_release",
    "package_conflicts",
    "package_versions",
    "self_test",
    "update_distance",
]

REQUIRED = ("numpy", "safetensors", "av", "pillow")
ENGINES = ("onnxruntime", "onnxruntime-gpu")
OPTIONAL = ("tensorrt", "tensorrt-rtx-cu13-bindings", "cuda-bindings", "torch", "torchvision", "timm", "onnx")
ENGINE_INSTALL = "pip install 'mgg-edge[cpu]'"
IMPORT_TIMEOUT_S = 60

LOGITS_LIMIT = 1e-3  # largest |difference|; the same that an export must hold
# Relative L2 of one update, without the thousandth part of θ that strays most: Adam's first update is g/|g|, and where
# g is near 0 its sign is chance on any processor. A wrong gradient of one layer is more than that.
UPDATE_LIMIT, LEFT_TO_CHANCE = 1e-2, 1e-3
HALF_FACTOR = 4.0  # in half precision: times what the export found, which was other pictures' and PyTorch's


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


@dataclass(frozen=True)
class SelfTest:
    """A bundle's recorded results against this machine's.

    Attributes:
        engine: name and version of the engine.
        infer_logits: largest |difference| of the logits of plain inference.
        settled_logits: the same with θ folded in, or None where the engine does not fold.
        adapt_logits: largest |difference| of the logits of an adaptation step.
        update: relative L2 distance of θ's first update from the recorded one, but for what is left to chance.
        logits_limit: what is allowed of the logits.
        update_limit: what is allowed of the update.
    """

    engine: str
    infer_logits: float
    settled_logits: float | None
    adapt_logits: float
    update: float
    logits_limit: float = LOGITS_LIMIT
    update_limit: float = UPDATE_LIMIT

    @property
    def passed(self) -> bool:
        """Every difference is within its limit; NaN is not."""
        return all(found <= limit for _, found, limit in self.rows)

    @property
    def rows(self) -> tuple[tuple[str, float, float], ...]:
        """What was compared, how far it differs, and what is allowed."""
        settled = () if self.settled_logits is None else (("with θ folded in, largest", self.settled_logits),)
        logits = (
            ("inference logits, largest", self.infer_logits),
            *settled,
            ("adaptation logits, largest", self.adapt_logits),
        )
        return (
            *((name, found, self.logits_limit) for name, found in logits),
            ("first update, relative L2", self.update, self.update_limit),
        )


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


def self_test(bundle: Bundle, engine: Engine) -> SelfTest:
    """Run a bundle's recorded frames through an engine that holds the initial state.

    Args:
        bundle: its self-test has `frames` u8[B,H,W,3], `infer.logits` f32[b,C], `adapt.logits` f32[B,C], `adapt.theta`.
        engine: freshly opened on this bundle; nothing is committed to it.

    Raises:
        EngineError: the engine cannot run the graphs.
    """
    recorded = bundle.self_test
    frames = np.asarray(recorded["frames"], np.uint8)
    shown = frames[: bundle.manifest.infer_batch]
    infer_difference = _largest(engine.infer(shown)[0], recorded["infer.logits"])
    settled = engine.settle(bundle.initial_state)
    settled_difference = None if settled is None else _largest(settled(shown)[0], recorded["infer.logits"])
    adapt_logits, _ = engine.adapt(frames)
    source = np.asarray(bundle.initial_state["theta"], np.float64)
    update, expected = (
        np.asarray(theta, np.float64) - source for theta in (engine.candidate["theta"], recorded["adapt.theta"])
    )
    return SelfTest(
        engine=engine.name,
        infer_logits=infer_difference,
        settled_logits=settled_difference,
        adapt_logits=_largest(adapt_logits, recorded["adapt.logits"]),
        update=update_distance(update, expected),
        **_limits(bundle.manifest, engine.name),
    )


def update_distance(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    """Relative L2 distance of updates f64[N], without the `LEFT_TO_CHANCE` of them that stray most.

    The length of the update itself where none is expected; NaN where a number is not finite.
    """
    strays = np.sort(np.abs(found - expected))
    if not np.isfinite(strays).all():
        return float("nan")
    kept = strays[: len(strays) - int(LEFT_TO_CHANCE * len(strays))]
    return float(np.linalg.norm(kept) / (np.linalg.norm(expected) or 1.0))


def _limits(manifest: Manifest, engine: str) -> dict[str, float]:
    """Wider than for float32 where the engine multiplies in half precision; the processor never does."""
    half = manifest.half_parity
    if half is None or engine.startswith("onnxruntime-cpu"):
        return {}
    update = max(row.engine for row in half.rows if row.quantity == "update")
    return {
        "logits_limit": max(LOGITS_LIMIT, HALF_FACTOR * half.logits_max),
        "update_limit": max(UPDATE_LIMIT, HALF_FACTOR * update),
    }


def _largest(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> float:
    return float(np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max())
