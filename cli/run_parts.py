"""What `mgg-edge run` puts together: sources, and for each camera everything that belongs to it; the live page."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import mgg_edge
from mgg_edge.cli.display import RunDisplay
from mgg_edge.cli.run_calibration import Tap
from mgg_edge.cli.run_state import begin_record, keep_state, open_record
from mgg_edge.cli.run_words import CameraWords
from mgg_edge.errors import SinkError, UsageError
from mgg_edge.runtime.adaptation.adapter import Adapter, AdapterSettings
from mgg_edge.runtime.adaptation.site import site_note
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Engine, Progress, open_engine
from mgg_edge.runtime.outputs.events import EventSettings, EventSink
from mgg_edge.runtime.outputs.events_out import EventTarget, open_target
from mgg_edge.runtime.outputs.http_control import Control, read_token
from mgg_edge.runtime.outputs.http_frozen import FrozenModel
from mgg_edge.runtime.outputs.http_history import History
from mgg_edge.runtime.outputs.http_server import LiveServer, parse_listen
from mgg_edge.runtime.outputs.http_view import CameraView, connection_of
from mgg_edge.runtime.outputs.sinks import AnnotatedVideo, CsvLines, JsonLines, Sink
from mgg_edge.runtime.pipeline import Reader
from mgg_edge.runtime.session_lanes import Lane
from mgg_edge.runtime.sources.source import FrameSource
from mgg_edge.runtime.sources.source_live import LiveOptions
from mgg_edge.runtime.sources.source_open import open_source
from mgg_edge.runtime.store.state_file import file_name
from mgg_edge.runtime.store.state_file_keeper import StateKeeper

__all__ = ["Camera", "EngineChoice", "Models", "Targets", "Views", "open_sources", "serving"]

# What a person asks for, as the adapter calls it.
COMMANDS = {"pause": "pause", "freeze": "freeze", "resume": "go_on", "reset": "reset"}
_logger = logging.getLogger(__name__)


def open_sources(
    cameras: Sequence[CameraWords], options: LiveOptions | None = None, *, wait: bool = False
) -> dict[str, FrameSource]:
    """Open sources side by side.

    Of several, a camera or stream that is not there holds up none of the others: it is tried again while they run,
    unless it is `strict`.

    Args:
        cameras: at least one.
        options: patience beyond what the words say.
        wait: be content if none of them is there.

    Raises:
        UsageError: a source that does not exist.
        SourceError: one that cannot be read, or none of them is there.
    """

    def opened(camera: CameraWords) -> FrameSource:
        patience = replace(
            options or LiveOptions(),
            stall_timeout_s=camera.stall_timeout,
            max_reconnects=camera.max_reconnects,
            must_connect=camera.strict or (len(cameras) == 1 and not wait),
        )
        return open_source(camera.source, patience, strict=camera.strict)

    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(len(cameras)) as opening:
            futures = {camera.name: opening.submit(opened, camera) for camera in cameras}
            for future in futures.values():
                if future.exception() is None:
                    stack.callback(future.result().close)
        found = {name: future.result() for name, future in futures.items()}
        absent = {name: failure for name, source in found.items() if (failure := getattr(source, "failure", None))}
        if absent and len(absent) == len(found) and not wait:
            raise next(iter(absent.values()))
        for name, failure in absent.items():
            _logger.warning("camera %s is not there yet: %s; it is tried again", name, failure)
        stack.pop_all()
    return found


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


class Models:
    """Bundles in memory, each once, and the engine that runs them.

    Args:
        engine: that the user asked for.
        default: the bundle of cameras that name none.
    """

    def __init__(self, engine: EngineChoice, default: Path | None) -> None:
        self.engine, self._default = engine, default
        self._bundles: dict[Path, Bundle] = {}

    def path(self, camera: CameraWords) -> Path:
        """The bundle's file.

        Raises:
            UsageError: neither the camera nor anything else names one.
        """
        path = camera.bundle or self._default
        if path is None:
            raise UsageError(f"camera {camera.name}: expected a bundle, found none")
        return path

    def bundle(self, camera: CameraWords) -> Bundle:
        """The bundle in memory."""
        path = self.path(camera)
        if path not in self._bundles:
            self._bundles[path] = Bundle.load(path)
            if note := site_note(self._bundles[path].manifest, camera.adapt):
                _logger.info("%s", note)
        return self._bundles[path]


class Events(NamedTuple):
    """Targets of events, each with a thread of its own, and when a label counts."""

    targets: Sequence[EventTarget]
    settings: EventSettings

    @classmethod
    def open(cls, names: Sequence[str], settings: EventSettings, stack: contextlib.ExitStack) -> Events:
        """Open the targets; closed with the stack.

        Raises:
            UsageError, SinkError, MissingDependencyError: one cannot be used.
        """
        return cls([stack.enter_context(open_target(name)) for name in names], settings)

    def emit(self, event: Mapping[str, Any]) -> None:
        """Give an event to all of them."""
        for target in self.targets:
            target.emit(event)


@dataclass(frozen=True)
class Targets:
    """Where predictions and what is learned go: as the user named it, or `out-NAME.mp4` where there are several.

    Attributes:
        lines: JSON lines of all cameras.
        save, csv, record: files, or None.
        state: directory, or None.
        record_frames: directory of pictures beside the record, or None.
        record_frames_mb: megabytes that those of a camera may take.
        several: whether files are named by camera.
        events: where events go, and when a label counts.
        save_every_s: seconds between two saves of a state that changes.
    """

    lines: JsonLines | None
    save: Path | None
    csv: Path | None
    record: Path | None
    record_frames: Path | None
    record_frames_mb: int
    state: Path | None
    several: bool
    save_every_s: float
    events: Events

    def path(self, target: Path, camera: str, source: FrameSource, option: str) -> Path:
        """A camera's own file.

        Raises:
            UsageError: it is the source.
        """
        own = target.with_name(f"{target.stem}-{camera}{target.suffix}") if self.several else target
        read = getattr(source, "path", None)
        if read is not None and own.exists() and own.samefile(read):
            raise UsageError(f"{own}: {option} would overwrite the source; name another file")
        return own


class Camera:
    """Everything that belongs to one camera, opened in two steps, the cheap one first; closed together.

    Args:
        words: what the user said of it.
        source: opened; closed with this.
        targets: where its predictions go.

    Attributes:
        words: as given.
        tap: of its pictures, where it is live and may be told to calibrate.
        video: its annotated video, if there is one.

    Raises:
        UsageError: an output would overwrite the source, or cannot be what it is asked to be.
        SinkError: it cannot be created.
    """

    def __init__(self, words: CameraWords, source: FrameSource, targets: Targets) -> None:
        self.words, self._source, self._targets = words, source, targets
        self.video: AnnotatedVideo | None = None
        self._adapter: Adapter | None = None
        self._keeper: StateKeeper | None = None
        self.tap: Tap | None = None
        self._sinks: list[Sink] = []
        with contextlib.ExitStack() as stack:
            stack.callback(source.close)
            if targets.lines is not None:
                self._sinks.append(targets.lines.of_source(words.name))
            if targets.save is not None:
                path = targets.path(targets.save, words.name, source, "--save")
                self.video = AnnotatedVideo(path, source.width, source.height, source.rate)
                stack.callback(self.video.abort)  # does nothing once the run has completed it
                self._sinks.append(self.video)
            if targets.csv is not None:
                path = targets.path(targets.csv, words.name, source, "--csv")
                table = CsvLines(path, words.name if targets.several else "")
                stack.callback(table.abort)
                self._sinks.append(table)
            record = targets.record and targets.path(targets.record, words.name, source, "--record")
            pictures = targets.record_frames
            if pictures is not None and targets.several:
                pictures = pictures / file_name(words.name)
            self._recorder = open_record(record, pictures, targets.record_frames_mb, stack, live=source.live)
            self._stack = stack.pop_all()

    @property
    def frames_expected(self) -> int | None:
        """Of its source."""
        return self._source.frames_expected

    @property
    def record_failure(self) -> SinkError | None:
        """Why its record ended before its time."""
        if self._recorder is None or self._recorder.failure is None:
            return None
        return SinkError(f"{self._recorder.path}: the record is incomplete: {self._recorder.failure.strerror}")

    def start(self, models: Models, display: RunDisplay, views: Views | None, limit: int | None) -> Lane:
        """Load its model, go on from its state, and begin to read.

        Live sources adapt in the background, so that no frame waits; files between two frames, so that a run can be
        repeated.

        Raises:
            MggEdgeError: the bundle, the engine or the state cannot be used.
        """
        words, source, stack = self.words, self._source, self._stack
        bundle = models.bundle(words)
        engine = models.engine.open(bundle, with_adapt=words.adapt != "off")
        stack.callback(engine.close)
        settings = AdapterSettings(budget_ms=words.adapt_budget_ms)
        adapter = stack.enter_context(
            Adapter(
                bundle, engine, adapt=words.adapt, settings=settings, background=source.live, journal=self._recorder
            )
        )
        self._adapter = adapter
        self._keeper = keeper = keep_state(adapter, self._targets.state, words.name, self._targets.save_every_s, stack)
        begin_record(self._recorder, adapter, source, models.engine.threads)
        reader = stack.enter_context(Reader(source, words.policy, limit=limit))
        lane = Lane(words.name, reader, adapter, self._sinks, display.of_source(words.name))
        if (events := self._targets.events).targets:
            connection = functools.partial(connection_of, reader)
            teller = EventSink(words.name, adapter, connection, events.settings, events.emit)
            lane = replace(lane, sinks=[*lane.sinks, teller], heartbeats=[*lane.heartbeats, teller.beat])
        if views is None:
            return lane
        if views.control is not None and source.live:
            self.tap = Tap(words.name)
            lane = replace(lane, sinks=[*lane.sinks, self.tap])
        history = History(self._targets.state, file_name(words.name))
        frozen = views.frozen(models.path(words), models.engine)
        view = CameraView(words.name, adapter, reader, frozen, history, keeper)
        views.show(view, models.path(words))
        return replace(lane, sinks=[*lane.sinks, view], heartbeats=[*lane.heartbeats, view.beat])

    def command(self, action: str) -> str:
        """Do what a person asked for; a line that says what was done.

        Raises:
            UsageError: it cannot be done now.
        """
        if self._adapter is None:
            raise UsageError(f"camera {self.words.name}: not started yet")
        if action == "snapshot":
            if self._keeper is None:
                raise UsageError("snapshot: expected a run with --state DIR, found none")
            return f"snapshot kept as {self._keeper.snapshot().name}"
        if self._adapter.schedule_name == "off" and action != "reset":
            raise UsageError(f"{action}: expected a camera that adapts, found --adapt off")
        getattr(self._adapter, COMMANDS[action])()
        return f"{action}: {self._adapter.held or 'adapts'}"

    def close(self) -> None:
        """Save its state and release all it holds; safe to call twice."""
        self._stack.close()


@dataclass
class Views:
    """The live page, and the source models beside the adapted ones: one for each bundle.

    Attributes:
        server: answers since before the cameras were opened.
        control: who may tell cameras something.
    """

    server: LiveServer
    stack: contextlib.ExitStack
    control: Control | None = None
    _frozen: dict[Path, FrozenModel] = field(default_factory=dict)

    def frozen(self, path: Path, engine: EngineChoice) -> FrozenModel:
        """The source model of a bundle, for comparison."""
        if path not in self._frozen:
            self._frozen[path] = FrozenModel(lambda: Adapter.open(path, engine=engine.name, adapt="off", threads=1))
            self.stack.callback(self._frozen[path].close)
        return self._frozen[path]

    def show(self, view: CameraView, path: Path) -> None:
        """Show one more camera."""
        info = {"engine": view.adapter.engine_name, "bundle": path.name, "bundle_id": view.adapter.bundle_id}
        self.server.info |= info if not self.server.cameras else {}
        self.server.cameras = (*self.server.cameras, view)

    def hide(self, name: str) -> None:
        """Show a camera no more; its history is kept."""
        for view in self.server.cameras:
            if view.name == name:
                view.history.save()
        self.server.cameras = tuple(view for view in self.server.cameras if view.name != name)


def serving(
    listen: str | None, stack: contextlib.ExitStack, allowed_hosts: Sequence[str] = (), token_file: Path | None = None
) -> Views | None:
    """The server, where one is asked for; it answers from now on, as not ready.

    Args:
        listen: `[HOST:]PORT`.
        stack: closes it.
        allowed_hosts: names by which a proxy asks.
        token_file: of the token by which cameras are told something; none lets nobody.

    Raises:
        UsageError: not `[HOST:]PORT`, an allowed host that is no name, or allowed hosts without a server.
        SinkError: the address cannot be used.
    """
    if listen is None:
        if allowed_hosts:
            raise UsageError("allow-host: expected with --serve [HOST:]PORT, found no page to allow it for")
        if token_file is not None:
            raise UsageError("control: expected with --serve [HOST:]PORT, found no page to control cameras by")
        return None
    control = None if token_file is None else Control(read_token(token_file))
    info = {"version": mgg_edge.__version__, "engine": "", "bundle": "", "bundle_id": ""}
    server = stack.enter_context(LiveServer(parse_listen(listen), info, control=control, allowed_hosts=allowed_hosts))
    _logger.info("live page: %s", server.address)
    return Views(server, stack, control)
