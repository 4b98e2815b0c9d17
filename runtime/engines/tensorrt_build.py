"""From an ONNX graph to a TensorRT plan: parsed, configured, built; nothing is run.

The graph alone types all numbers ("strongly typed"): TensorRT 11 knows nothing else, TensorRT 10 and TensorRT for
RTX take it as a flag. TF32 is off, because it rounds float32 products to ten bits and the step would no longer be
the one that parity was measured for.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mgg_edge.errors import EngineError, UsageError
from mgg_edge.runtime.engines.engine import Progress
from mgg_edge.runtime.engines.tensorrt_import import Library

__all__ = ["BuildOptions", "Messages", "Plan", "build_plan", "check_memory", "parse_graph"]

logger = logging.getLogger(__name__)

MIB = 1 << 20
# Peak growth of a process that built both graphs, TensorRT for RTX 1.7: ViT-Tiny (22 MiB) 420 MiB, ViT-Small
# (84 MiB) 470 MiB. The full package loads more libraries and times kernels: it is given twice the room.
BUILD_BASE_BYTES, BUILD_PER_WEIGHT_BYTE = 700 * MIB, 4
MAX_LEVEL = 5


@dataclass(frozen=True)
class BuildOptions:
    """What a person may choose about a build; part of an engine's key.

    Attributes:
        workspace_mib: scratch memory that a layer may use on the device, MiB; None leaves it to TensorRT (all of it).
        level: how long TensorRT searches for faster kernels, 0 to 5; None leaves it to TensorRT (3).

    Raises:
        UsageError: a number outside its range.
    """

    workspace_mib: int | None = None
    level: int | None = None

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"workspace: expected at least 1 MiB, found {self.workspace_mib}")
        if self.level is not None and not 0 <= self.level <= MAX_LEVEL:
            raise UsageError(f"optimisation level: expected 0 to {MAX_LEVEL}, found {self.level}")


class Plan(NamedTuple):
    """A built engine, serialised.

    Attributes:
        data: what `Runtime.deserialize_cuda_engine` takes.
        timing_cache: measured kernel times, to make the next build shorter; empty where nothing was timed.
    """

    data: bytes
    timing_cache: bytes


def build_plan(
    library: Library,
    graph: bytes,
    where: str,
    options: BuildOptions,
    *,
    target: str | None = None,
    timing_cache: bytes = b"",
    progress: Progress = lambda _stage, _done, _total: None,
) -> Plan:
    """Build a plan.

    Args:
        library: TensorRT.
        graph: encoded ONNX model, with its weights.
        where: what it is, for messages.
        options: of the build.
        target: one of the library's, such as `sm86`; None for the device at hand.
        timing_cache: of an earlier build on the same device, or nothing.
        progress: called with what is being done, and how much of how much of it.

    Raises:
        EngineError: the graph was refused, there is too little memory, or the build failed.
    """
    check_memory(len(graph), where)
    module, messages = library.module, Messages(library.module)
    builder, network = parse_graph(library, graph, where, messages)
    config = builder.create_builder_config()
    config.clear_flag(module.BuilderFlag.TF32)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if target is not None:
        _aim(library, config, target)
    times = None if library.targets else config.create_timing_cache(timing_cache)  # RTX times no kernels when it builds
    if times is not None:
        config.set_timing_cache(times, ignore_mismatch=False)
    config.progress_monitor = monitor = _monitor(module, progress)
    plan = builder.build_serialized_network(network, config)
    del monitor  # held until here: the configuration does not keep it alive
    if plan is None:
        raise EngineError(f"{where}: {library.name} {library.version} cannot build the engine: {messages.last()}")
    return Plan(bytes(plan), b"" if times is None else bytes(times.serialize()))


def parse_graph(library: Library, graph: bytes, where: str, messages: Messages | None = None) -> tuple[Any, Any]:
    """The builder and the network of a graph.

    Raises:
        EngineError: TensorRT refuses the graph; the message has its reason.
    """
    module, messages = library.module, messages or Messages(library.module)
    builder = module.Builder(messages.logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, messages.logger)
    if not parser.parse(graph):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise EngineError(
            f"{where}: {library.name} {library.version} refuses the graph: {'; '.join(reasons) or messages.last()}"
        )
    return builder, network


def check_memory(graph_bytes: int, where: str, meminfo: Path = Path("/proc/meminfo")) -> None:
    """Refuse a build that would end in the kernel's killing the process.

    Raises:
        EngineError: less memory is available than such a build took where it was measured.
    """
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        return
    needed = BUILD_BASE_BYTES + BUILD_PER_WEIGHT_BYTE * graph_bytes
    if found is not None and (available := int(found[1]) * 1024) < needed:
        raise EngineError(
            f"{where}: expected about {needed // MIB} MiB of free memory to build, found {available // MIB}; stop "
            "other programs, add swap, or build on another machine and bring the engine: mgg-edge engines add"
        )


def _aim(library: Library, config: Any, target: str) -> None:
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(library.module.ComputeCapability.__members__[target.upper()], 0):
        raise EngineError(f"engine: {library.name} {library.version} does not take the target {target}")


class Messages:
    """TensorRT's log: warnings and worse are kept for error messages, the rest goes to the package's debug log."""

    def __init__(self, module: Any) -> None:
        kept: list[str] = []

        class Log(module.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR):
                    kept.append(message)
                logger.debug("%s", message)

        self.logger, self._kept = Log(), kept

    def last(self) -> str:
        """The newest error, or that there was none."""
        return self._kept[-1] if self._kept else "it gave no reason"


def _monitor(module: Any, progress: Progress) -> Any:
    """A progress monitor that reports the outermost phases, the only ones a person can place."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[phase] = steps
                progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.steps:
                progress(phase, step + 1, self.steps[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            if phase in self.steps:
                steps = self.steps.pop(phase)
                progress(phase, steps, steps)

    return Monitor()
