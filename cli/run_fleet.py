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
from pathlib import Path

from mgg_edge.cli.display import RunDisplay
from mgg_edge.cli.run_parts import Camera, Models, Targets, Views, open_sources
from mgg_edge.cli.run_words import CameraWords, read_cameras
from mgg_edge.compat import Self
from mgg_edge.errors import MggEdgeError, SinkError
from mgg_edge.runtime.outputs.sinks import AnnotatedVideo
from mgg_edge.runtime.session_lanes import Lane, Lanes
from mgg_edge.runtime.sources.source import FrameSource

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

    def command(self, camera: str, action: str) -> str:
        """Do to a camera what a person asked for, on whatever thread; see `Commander`."""
        return self._cameras[camera].command(action)

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
            lanes.end(name)
            _report(name, "cannot be closed", functools.partial(self._fleet.remove, name))
        begun = sum(self._begin(words, lanes) for words in new)
        kept = len(wanted) - len(new)
        _logger.info("cameras read anew: %d go on, %d ended, %d begun", kept, len(over), begun)

    def _begin(self, words: CameraWords, lanes: Lanes) -> bool:
        def begin() -> None:
            self._fleet.open([words], open_sources([words], wait=not words.strict))
            try:
                lanes.begin(self._fleet.start(words.name))
            except BaseException:
                self._fleet.remove(words.name)
                raise

        return _report(words.name, "cannot begin", begin)

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGHUP, lambda *_: self._asked.set())
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGHUP, self._previous)


def _report(name: str, what: str, action: Callable[[], None]) -> bool:
    """Do something to a camera; whether it worked, which is said if not."""
    try:
        action()
    except MggEdgeError as error:
        _logger.error("camera %s: %s: %s", name, what, error)
        return False
    return True
