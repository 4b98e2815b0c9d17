"""The plans of a bundle: found in the cache or built into it.

TensorRT for RTX compiles its kernels when an engine is loaded, so its plans are of a class of devices and can be built
anywhere; those of the full package are of the one device, and driver, they were timed on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from mgg_edge.container import GRAPHS, graph_name
from mgg_edge.errors import UsageError
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.bundle.graphs import embed_weights
from mgg_edge.runtime.engines.cuda import Device, open_cuda
from mgg_edge.runtime.engines.engine import Progress
from mgg_edge.runtime.engines.engine_cache import EngineCache, default_cache
from mgg_edge.runtime.engines.engine_key import EngineKey
from mgg_edge.runtime.engines.tensorrt_build import BuildOptions, build_plan
from mgg_edge.runtime.engines.tensorrt_import import Library, import_tensorrt

__all__ = ["Aim", "StoredPlan", "build_engines", "explain", "parse_engine", "plan_key", "stored_plan"]

_TARGET = re.compile(r"sm\d{2,3}")


class Aim(NamedTuple):
    """What to build for.

    Attributes:
        library: TensorRT.
        devices: one or more.
    """

    library: Library
    devices: tuple[Device, ...]


class StoredPlan(NamedTuple):
    """A plan in the cache.

    Attributes:
        data: the plan.
        path: its file.
        what: the graph, the library and the device, in words.
        built: it was built now, rather than found.
    """

    data: bytes
    path: Path
    what: str
    built: bool


def parse_engine(text: str) -> Aim:
    """What `tensorrt` (this machine's device) or `tensorrt:sm86,sm89` (others) asks to build, and what builds it.

    Raises:
        UsageError: anything else, a target named twice, or one that this TensorRT does not build for.
        MissingDependencyError: no TensorRT that can do it; no target named and no device at hand.
    """
    name, colon, listed = text.partition(":")
    targets = tuple(part.strip().lower() for part in listed.split(",")) if colon else ()
    if name != "tensorrt" or not all(map(_TARGET.fullmatch, targets)) or len(set(targets)) != len(targets):
        raise UsageError(f"engine: expected tensorrt, or compute capabilities as in tensorrt:sm86,sm89, found '{text}'")
    library = import_tensorrt(ahead_of_time=bool(targets))
    if not targets:
        return Aim(library, (open_cuda("name the target's compute capability, such as tensorrt:sm86").device,))
    if unknown := sorted(set(targets) - set(library.targets)):
        raise UsageError(
            f"engine: {library.name} {library.version} builds ahead of time for {', '.join(library.targets)}, "
            f"found '{unknown[0]}'"
        )
    return Aim(library, tuple(Device.any_of(target) for target in targets))


def plan_key(bundle: Bundle, graph: str, library: Library, device: Device, options: BuildOptions) -> EngineKey:
    """What the plan of a graph depends on."""
    members = bundle.manifest.members
    shown = Device.any_of(device.capability) if library.targets else device
    level = "auto" if options.level is None else options.level
    return EngineKey(
        graph=graph,
        graph_sha256=members[graph_name(graph, "tensorrt")].sha256,
        weights_sha256=members["weights.safetensors"].sha256,
        library=f"{library.name} {library.version}",
        device=shown.name,
        capability=shown.capability,
        driver=shown.driver,
        options=f"workspace {options.workspace_mib or 'all'}, level {level}, no TF32",
    )


def stored_plan(
    bundle: Bundle,
    graph: str,
    library: Library,
    device: Device,
    options: BuildOptions,
    cache: EngineCache,
    progress: Progress = lambda _stage, _done, _total: None,
) -> StoredPlan:
    """The plan of a graph, from the cache or built into it by one process alone.

    Raises:
        EngineError: the graph cannot be built.
        SinkError: the cache cannot be written.
    """
    key = plan_key(bundle, graph, library, device, options)
    if (found := cache.get(key)) is not None:
        return StoredPlan(found, cache.path(key), key.words, built=False)
    with cache.building():
        if (found := cache.get(key)) is not None:
            return StoredPlan(found, cache.path(key), key.words, built=False)
        member = graph_name(graph, "tensorrt")
        model = embed_weights(bundle.graphs[member], bundle.weights, bundle.references[member])
        times = re.sub(r"[^\w.]+", "-", f"{key.library}-{key.device}-{key.capability}-{key.driver}")
        plan = build_plan(
            library,
            model,
            f"{bundle.path}: {member}",
            options,
            target=device.capability if library.targets else None,
            timing_cache=cache.timing(times),
            progress=lambda stage, done, total: progress(f"{graph} for {device.capability}: {stage}", done, total),
        )
        if plan.timing_cache:
            cache.put_timing(times, plan.timing_cache)
        return StoredPlan(plan.data, cache.put(key, plan.data, bundle.path.name), key.words, built=True)


def build_engines(
    path: Path,
    aim: Aim,
    options: BuildOptions,
    cache: EngineCache | None = None,
    progress: Progress = lambda _stage, _done, _total: None,
) -> tuple[StoredPlan, ...]:
    """The plans of both graphs of a bundle for each device.

    Raises:
        EngineError, SinkError: as `stored_plan`.
    """
    bundle, store = Bundle.load(path), cache or EngineCache(default_cache())
    return tuple(
        stored_plan(bundle, graph, aim.library, device, options, store, progress)
        for device in aim.devices
        for graph in GRAPHS
    )


def explain(path: Path, target: str | None, cache: EngineCache) -> dict[str, str]:
    """By graph, whether its plan is in the cache, and if not, what differs from the nearest one that is.

    Raises:
        MissingDependencyError: no TensorRT; no target named and no device at hand.
        UsageError: no such bundle, or something that is no compute capability.
    """
    aim = parse_engine("tensorrt" if target is None else f"tensorrt:{target}")
    bundle, reasons = Bundle.load(path), {}
    for graph in GRAPHS:
        key = plan_key(bundle, graph, aim.library, aim.devices[0], BuildOptions())
        if cache.get(key) is not None:
            reasons[graph] = f"found, {cache.path(key)}"
        elif (nearest := cache.nearest(key)) is None:  # reads and verifies every engine
            reasons[graph] = "to be built: there is no engine yet"
        else:
            differences = "; ".join(nearest.key.differences(key))
            reasons[graph] = f"to be built: {differences} (against {nearest.path.name}, of {nearest.bundle})"
    return reasons
