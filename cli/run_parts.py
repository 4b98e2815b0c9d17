"""What `mgg-edge run` puts together: named sources, their outputs, adapters on one set of weights, and the server."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import mgg_edge
from mgg_edge.cli.display import RunDisplay
from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.adapter import Adapter, AdapterSettings, Journal
from mgg_edge.runtime.adaptation.site import site_note
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Engine, Progress, open_engine
from mgg_edge.runtime.outputs.http_frozen import FrozenModel
from mgg_edge.runtime.outputs.http_history import History
from mgg_edge.runtime.outputs.http_server import LiveServer, parse_listen
from mgg_edge.runtime.outputs.http_view import CameraView
from mgg_edge.runtime.outputs.sinks import AnnotatedVideo, CsvLines, JsonLines, Sink
from mgg_edge.runtime.pipeline import Policy, Reader
from mgg_edge.runtime.session_lanes import Lane
from mgg_edge.runtime.sources.source import FrameSource
from mgg_edge.runtime.sources.source_live import LiveOptions
from mgg_edge.runtime.sources.source_open import open_source, split_name, suggest_name
from mgg_edge.runtime.store.state_file import file_name
from mgg_edge.runtime.store.state_file_keeper import StateKeeper

__all__ = ["Outputs", "Views", "adapters_for", "lanes_for", "open_named", "serving"]

_logger = logging.getLogger(__name__)


def open_named(
    specs: Sequence[str], options: LiveOptions, stack: contextlib.ExitStack, *, strict: bool = False
) -> dict[str, FrameSource]:
    """Open sources by what the user wrote, under different names, side by side; closed with the stack.

    Of several, a camera or stream that is not there holds up none of the others: it is tried again while they run,
    unless `strict` wants all of them.

    Raises:
        UsageError: two of one given name, or a source that does not exist.
        SourceError: one that cannot be read, or none of several cameras is there.
    """
    named: dict[str, str] = {}
    for index, spec in enumerate(specs):
        given, text = split_name(spec)
        name = given or _free(suggest_name(text, index), named)
        if name in named:
            raise UsageError(f"source: expected different names, found '{name}' twice")
        named[name] = text
    patient = replace(options, must_connect=strict or len(named) == 1)
    with ThreadPoolExecutor(len(named)) as opening:
        futures = {name: opening.submit(open_source, text, patient, strict=strict) for name, text in named.items()}
        for future in futures.values():
            if future.exception() is None:
                stack.callback(future.result().close)
    opened = {name: future.result() for name, future in futures.items()}
    absent = {name: failure for name, source in opened.items() if (failure := getattr(source, "failure", None))}
    if absent and len(absent) == len(opened):
        raise next(iter(absent.values()))
    for name, failure in absent.items():
        _logger.warning("camera %s is not there yet: %s; the others run, it is tried again", name, failure)
    return opened


@dataclass(frozen=True)
class Outputs:
    """Where each source's predictions go.

    Attributes:
        sinks: by the name of the source.
        videos: the annotated videos among them.
    """

    sinks: Mapping[str, list[Sink]]
    videos: list[AnnotatedVideo] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        cameras: Mapping[str, FrameSource],
        lines: JsonLines | None,
        save: Path | None,
        csv: Path | None,
        stack: contextlib.ExitStack,
    ) -> Outputs:
        """Create the outputs: one file for each source, `out-NAME.mp4` where there are several.

        Raises:
            UsageError: an output would overwrite a source, or cannot be what it is asked to be.
            SinkError: it cannot be created.
        """
        outputs = cls({name: [] for name in cameras})
        several = len(cameras) > 1
        for name, source in cameras.items():
            sinks = outputs.sinks[name]
            if lines is not None:
                sinks.append(lines.of_source(name))
            if save is not None:
                path = _for_source(save, name, several, source, "--save")
                video = AnnotatedVideo(path, source.width, source.height, source.rate)
                stack.callback(video.abort)  # does nothing once the run has completed it
                outputs.videos.append(video)
                sinks.append(video)
            if csv is not None:
                table = CsvLines(_for_source(csv, name, several, source, "--csv"), name if several else "")
                stack.callback(table.abort)
                sinks.append(table)
        return outputs


class EngineChoice(NamedTuple):
    """The engine that the user asked for.

    Attributes:
        name: as `open_engine` takes it.
        threads: processor threads, or None.
        progress: shows the building of an engine.
    """

    name: str
    threads: int | None
    progress: Progress

    def open(self, bundle: Bundle, *, with_adapt: bool) -> Engine:
        """Start one."""
        return open_engine(bundle, self.name, threads=self.threads, with_adapt=with_adapt, progress=self.progress)


def adapters_for(
    path: Path,
    cameras: Mapping[str, FrameSource],
    stack: contextlib.ExitStack,
    adapt: str,
    engine: EngineChoice,
    settings: AdapterSettings,
    journals: Mapping[str, Journal],
) -> dict[str, Adapter]:
    """An adapter for each camera, with a state of its own, on one set of weights in memory.

    Live sources adapt in the background, so that no frame waits; files between two frames, so that a run can be
    repeated.
    """
    bundle = Bundle.load(path)
    if note := site_note(bundle.manifest, adapt):
        _logger.info("%s", note)
    adapters = {}
    for name, source in cameras.items():
        opened = engine.open(bundle, with_adapt=adapt != "off")
        stack.callback(opened.close)
        adapter = Adapter(
            bundle, opened, adapt=adapt, settings=settings, background=source.live, journal=journals.get(name)
        )
        adapters[name] = stack.enter_context(adapter)
    return adapters


@dataclass
class Views:
    """The server and the source model beside the adapted ones, where the user asked for a page.

    Attributes:
        server: answers since before the cameras were opened.
        frozen: the source model.
        state: the directory that histories lie in too.
        keepers: what saves the cameras' states.
    """

    server: LiveServer
    frozen: FrozenModel | None = None
    state: Path | None = None
    keepers: Mapping[str, StateKeeper] = field(default_factory=dict)

    def start(
        self,
        path: Path,
        adapters: Mapping[str, Adapter],
        engine: EngineChoice,
        stack: contextlib.ExitStack,
        state: Path | None,
        keepers: Mapping[str, StateKeeper],
    ) -> None:
        """Say what runs, and prepare the source model for comparison."""
        self.state, self.keepers = state, keepers
        first = next(iter(adapters.values()))
        self.frozen = FrozenModel(lambda: Adapter.open(path, engine=engine.name, adapt="off", threads=1))
        stack.callback(self.frozen.close)
        self.server.info |= {"engine": first.engine_name, "bundle": path.name, "bundle_id": first.bundle_id}

    def of_camera(self, name: str, adapter: Adapter, reader: Reader) -> CameraView:
        """What is known of one camera; its history lies beside its state."""
        return CameraView(
            name, adapter, reader, self.frozen, History(self.state, file_name(name)), self.keepers.get(name)
        )


def serving(listen: str | None, stack: contextlib.ExitStack, allowed_hosts: Sequence[str] = ()) -> Views | None:
    """The server, where one is asked for; it answers from now on, as not ready.

    Raises:
        UsageError: not `[HOST:]PORT`, an allowed host that is no name, or allowed hosts without a server.
        SinkError: the address cannot be used.
    """
    if listen is None:
        if allowed_hosts:
            raise UsageError("allow-host: expected with --serve [HOST:]PORT, found no page to allow it for")
        return None
    info = {"version": mgg_edge.__version__, "engine": "", "bundle": "", "bundle_id": ""}
    server = stack.enter_context(LiveServer(parse_listen(listen), info, allowed_hosts=allowed_hosts))
    _logger.info("live page: %s", server.address)
    return Views(server)


def lanes_for(
    cameras: Mapping[str, FrameSource],
    adapters: Mapping[str, Adapter],
    outputs: Outputs,
    display: RunDisplay,
    stack: contextlib.ExitStack,
    *,
    policy: Policy | None,
    limit: int | None,
    views: Views | None,
) -> list[Lane]:
    """Start a reader for each camera and join everything that belongs to it."""
    lanes, shown = [], []
    for name, source in cameras.items():
        reader = stack.enter_context(Reader(source, policy, limit=limit))
        sinks = list(outputs.sinks[name])
        lane = Lane(name, reader, adapters[name], sinks, display.of_source(name))
        if views is not None:
            view = views.of_camera(name, adapters[name], reader)
            shown.append(view)
            lane = Lane(name, reader, adapters[name], [*sinks, view], lane.progress, view.beat)
        lanes.append(lane)
    if views is not None:
        views.server.cameras = tuple(shown)
    return lanes


def _free(name: str, taken: Mapping[str, str]) -> str:
    if name not in taken:
        return name
    return next(f"{name}-{number}" for number in range(2, len(taken) + 3) if f"{name}-{number}" not in taken)


def _for_source(path: Path, name: str, several: bool, source: FrameSource, option: str) -> Path:
    target = path.with_name(f"{path.stem}-{name}{path.suffix}") if several else path
    read = getattr(source, "path", None)
    if read is not None and target.exists() and target.samefile(read):
        raise UsageError(f"{target}: {option} would overwrite the source; name another file")
    return target
