"""The cameras of a run, and how a file of cameras that has changed becomes the run's: on SIGHUP, without a restart.

Cameras whose words are the same go on untouched. What cannot be done is said in one line each, and leaves the others
running: a file that cannot be read changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mgg_edge.cli.display import RunDisplay
from mgg_edge.cli.run_calibration import Calibration, each_done
from mgg_edge.cli.run_parts import Camera, Models, Targets, Views, open_sources
from mgg_edge.cli.run_words import CameraWords, read_cameras
from mgg_edge.compat import Self
from mgg_edge.errors import MggEdgeError, SinkError, UsageError
from mgg_edge.runtime.outputs.sinks import AnnotatedVideo
from mgg_edge.runtime.session_lanes import Lane, Lanes
from mgg_edge.runtime.sources.source import FrameSource
from mgg_edge.runtime.store.state_file import StateStore, file_name

__all__ = ["Fleet", "Reload"]

_logger = logging.getLogger(__name__)


class Fleet:
    """Cameras by name; those there are at the end are closed together.

    Args:
        targets: where predictions go.
        models: what they run.
        display: what people see.
        views: the live page, if there is one.
        limit: number of frames of each camera.
    """

    def __init__(
        self, targets: Targets, models: Models, display: RunDisplay, views: Views | None, limit: int | None
    ) -> None:
        self._targets, self._models, self._display, self._views = targets, models, display, views
        self._limit = limit
        self._cameras: dict[str, Camera] = {}
        self._calibrations: dict[str, Calibration] = {}

    @property
    def words(self) -> Mapping[str, CameraWords]:
        """What was said of each camera."""
        return {name: camera.words for name, camera in self._cameras.items()}

    @property
    def videos(self) -> list[AnnotatedVideo]:
        """Annotated videos."""
        return [camera.video for camera in self._cameras.values() if camera.video is not None]

    @property
    def record_failure(self) -> SinkError | None:
        """Why the first of the records that are incomplete is so."""
        return next(filter(None, (camera.record_failure for camera in self._cameras.values())), None)

    @property
    def frames_expected(self) -> list[int | None]:
        """Of each camera's source."""
        return [camera.frames_expected for camera in self._cameras.values()]

    def open(self, cameras: Sequence[CameraWords], sources: Mapping[str, FrameSource]) -> None:
        """Take over sources and open the outputs; all sources are closed if one camera's cannot be opened.

        Raises:
            UsageError, SinkError: as `Camera`.
        """
        with contextlib.ExitStack() as stack:
            for source in sources.values():
                stack.callback(source.close)
            for words in cameras:
                self._cameras[words.name] = Camera(words, sources[words.name], self._targets)
            stack.pop_all()

    def start(self, name: str) -> Lane:
        """Load a camera's model and begin to read.

        Raises:
            MggEdgeError: its bundle, engine or state cannot be used.
        """
        return self._cameras[name].start(self._models, self._display, self._views, self._limit)

    def obey(self) -> list[Callable[[Lanes], None]]:
        """Do what people say from now on, where the run allows it; what has to be called while cameras run."""
        control = None if self._views is None else self._views.control
        if control is None:
            return []
        control.commander = self
        return [self.attend]

    def command(self, camera: str, action: str, minutes: float | None = None, /) -> str:
        """Do to a camera what a person asked for, on whatever thread; see `Commander`."""
        asked = self._cameras[camera]
        return asked.command(action) if action != "calibrate" else self._calibrate(asked, minutes)

    def _calibrate(self, camera: Camera, minutes: float | None) -> str:
        name, folder = camera.words.name, self._targets.state
        if folder is None:
            raise UsageError("calibrate: expected a run with --state DIR, where the new bundle goes, found none")
        if camera.tap is None:
            raise UsageError(
                f"calibrate: expected a camera or stream; of a file use `mgg-edge calibrate`, found {name}"
            )
        if name in self._calibrations:
            raise UsageError(f"calibrate: camera {name} is being calibrated already")
        found = Calibration(self._models.path(camera.words), camera.tap, folder, minutes, self._models.engine.threads)
        self._calibrations[name] = found
        return f"calibrate: from the next {found.seconds:.0f} s of pictures; used as soon as it is there: {found.out}"

    def attend(self, lanes: Lanes) -> None:
        """Swap in the bundles of calibrations that are done."""
        each_done(self._calibrations, functools.partial(self._swap, lanes))

    def _swap(self, lanes: Lanes, calibration: Calibration) -> None:
        name, folder = calibration.name, self._targets.state
        if name not in self._cameras or folder is None:
            return  # it has ended meanwhile
        words = replace(self._cameras[name].words, bundle=calibration.out)
        self.end(name, lanes)
        _report(name, "state not set aside", lambda: StateStore(folder, file_name(name), "").set_aside(".former"))
        if self.begin(words, lanes):
            _logger.info("camera %s: runs on %s; name it as its bundle to keep it", name, calibration.out)

    def begin(self, words: CameraWords, lanes: Lanes) -> bool:
        """Run one more camera; whether it could, which is said if not."""

        def begin() -> None:
            self.open([words], open_sources([words], wait=not words.strict))
            try:
                lanes.begin(self.start(words.name))
            except BaseException:
                self.remove(words.name)
                raise

        return _report(words.name, "cannot begin", begin)

    def end(self, name: str, lanes: Lanes) -> None:
        """End a camera after what is in hand, and close it."""
        lanes.end(name)
        _report(name, "cannot be closed", functools.partial(self.remove, name))

    def remove(self, name: str) -> None:
        """Close a camera, its state saved."""
        if self._views is not None:
            self._views.hide(name)
        self._display.forget(name)
        self._cameras.pop(name).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:
            for camera in self._cameras.values():
                stack.callback(camera.close)
            for calibration in self._calibrations.values():
                stack.callback(calibration.end)


class Reload:
    """Reads the file of cameras anew on SIGHUP while its context lasts.

    Args:
        path: of the file.
        common: words of the command line.
        fleet: the cameras that run.
    """

    def __init__(self, path: Path, common: CameraWords, fleet: Fleet) -> None:
        self._path, self._common, self._fleet = path, common, fleet
        self._asked = threading.Event()

    def attend(self, lanes: Lanes) -> None:
        """Make the changes that were asked for since the last time."""
        if not self._asked.is_set():
            return
        self._asked.clear()
        try:
            wanted = {words.name: words for words in read_cameras(self._path, self._common)}
        except MggEdgeError as error:
            _logger.error("cameras not read anew, all go on as they are: %s", error)
            return
        before = self._fleet.words
        over = [name for name, words in before.items() if wanted.get(name) != words]
        new = [words for name, words in wanted.items() if before.get(name) != words]
        for name in over:
            self._fleet.end(name, lanes)
        begun = sum(self._fleet.begin(words, lanes) for words in new)
        kept = len(wanted) - len(new)
        _logger.info("cameras read anew: %d go on, %d ended, %d begun", kept, len(over), begun)

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGHUP, lambda *_: self._asked.set())
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGHUP, self._previous)


def _report(name: str, what: str, action: Callable[[], object]) -> bool:
    """Do something to a camera; whether it worked, which is said if not."""
    try:
        action()
    except MggEdgeError as error:
        _logger.error("camera %s: %s: %s", name, what, error)
        return False
    return True
