"""State files: what a camera has learned outlives the process, a kill and a power cut.

A camera has two files, `<camera>.0.mggstate` and `<camera>.1.mggstate`. A save goes to the one that is not the newest
valid generation, through a temporary file: written, synced, renamed, directory synced. So the newest valid generation
is never touched, and at every moment at least one of the two is whole. Loading takes the newest that is whole; one that
is not is reported and passed over.

The files are bound to a bundle: θ of one model is noise in another.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgg_edge.errors import SinkError, StateError, UsageError
from mgg_edge.runtime.adaptation.adapter_checkpoint import Checkpoint
from mgg_edge.runtime.store.state_file_format import SavedState, decode_state, encode_state
from mgg_edge.runtime.store.state_file_system import FileSystem, RealFiles, write_durably

__all__ = ["SUFFIX", "StateStore", "camera_name", "cameras_in", "file_name", "newest_state"]

SUFFIX = ".mggstate"
GENERATIONS = 2
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_logger = logging.getLogger(__name__)


class StateStore:
    """The state files of one camera.

    Args:
        directory: where they are; made if it is not there.
        camera: letters, digits, `.`, `_`, `-`; see `camera_name`.
        bundle_id: the bundle in use.
        files: the file system.

    Raises:
        UsageError: a name that cannot be a file's.
        SinkError: the directory cannot be made.
    """

    def __init__(
        self, directory: str | os.PathLike[str], camera: str, bundle_id: str, files: FileSystem | None = None
    ) -> None:
        if not _NAME.fullmatch(camera):
            raise UsageError(
                f"camera: expected up to 100 letters, digits, '.', '_' or '-', starting with one of the first two, "
                f"found {camera!r}"
            )
        self.directory, self.camera = Path(directory), camera
        self._bundle_id, self._files = bundle_id, files or RealFiles()
        self._generation, self._slot, self._loaded = 0, 0, False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SinkError(f"{directory}: cannot make the state directory: {error.strerror or error}") from error

    def paths(self) -> tuple[Path, ...]:
        """The camera's files, whether they exist or not."""
        return _paths(self.directory, self.camera)

    def load(self) -> Checkpoint | None:
        """The newest whole generation, or None if the camera has no files.

        Raises:
            StateError: it belongs to another bundle, or there are files and none is whole.
        """
        saved = newest_state(self.directory, self.camera, self._files)
        if saved is None:
            self._generation, self._slot, self._loaded = 0, 0, True
            return None
        if saved.checkpoint.bundle_id != self._bundle_id:
            raise StateError(
                f"{self.directory}: the state of camera '{self.camera}' belongs to bundle "
                f"{saved.checkpoint.bundle_id}, not to bundle {self._bundle_id} in use; use the other bundle, another "
                f"--state directory, or 'mgg-edge state reset'"
            )
        self._generation = saved.generation + 1
        self._slot, self._loaded = self._generation % GENERATIONS, True
        return saved.checkpoint

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the next generation; when this returns, it survives a power cut.

        Raises:
            StateError: the files present are not this bundle's.
            SinkError: the disk refuses; the generation before is untouched.
        """
        if not self._loaded:
            self.load()
        path = self.paths()[self._slot]
        data = encode_state(SavedState(checkpoint, self.camera, self._generation))
        try:
            write_durably(self._files, path, data)
        except OSError as error:
            # The next try goes to the same file: the other one is known to be whole.
            raise SinkError(f"{path}: cannot save the state: {error.strerror or error}") from error
        self._generation += 1
        self._slot = self._generation % GENERATIONS

    def keep(self, checkpoint: Checkpoint, moment: str) -> Path:
        """Write a checkpoint under a name of its own, beside the generations, which it never gives way to.

        Args:
            checkpoint: what to keep.
            moment: part of the name, such as `20261128T101500Z`.

        Raises:
            SinkError: the disk refuses.
        """
        path = self.directory / f"{self.camera}.{moment}{SUFFIX}"
        try:
            write_durably(self._files, path, encode_state(SavedState(checkpoint, self.camera, self._generation)))
        except OSError as error:
            raise SinkError(f"{path}: cannot keep the state: {error.strerror or error}") from error
        return path

    def is_damaged(self) -> bool:
        """Whether there are files and none is whole."""
        try:
            newest_state(self.directory, self.camera, self._files)
        except StateError:
            return True
        return False

    def set_aside(self, suffix: str = ".damaged") -> list[Path]:
        """Rename the camera's files, so that it can begin anew; where they are now.

        Raises:
            SinkError: the disk refuses.
        """
        moved = []
        for path in self.paths():
            if path.exists():
                target = path.with_suffix(suffix)
                try:
                    self._files.replace(path, target)
                except OSError as error:
                    raise SinkError(f"{path}: cannot be renamed: {error.strerror or error}") from error
                moved.append(target)
        return moved

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing these files; a killed process keeps nothing locked.

        Raises:
            StateError: another process does so already.
            SinkError: the directory cannot be written, or has no locks.
        """
        path = self.directory / f"{self.camera}.lock"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise SinkError(f"{path}: cannot be created: {error.strerror or error}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise StateError(
                f"{path}: the state of camera '{self.camera}' is in use by another process; stop it, or use another "
                f"--state directory"
            ) from error
        except OSError as error:
            os.close(handle)
            raise SinkError(
                f"{path}: this file system has no locks ({error.strerror or error}), so two processes could write one "
                "state; use a --state directory on a local disk"
            ) from error
        try:
            yield
        finally:
            os.close(handle)


def newest_state(directory: Path, camera: str, files: FileSystem | None = None) -> SavedState | None:
    """The newest whole generation of a camera, of whichever bundle; None if it has no files.

    Raises:
        StateError: there are files and none is whole.
    """
    whole: list[SavedState] = []
    faults: list[str] = []
    for path in _paths(directory, camera):
        try:
            data = (files or RealFiles()).read(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            faults.append(f"{path}: cannot be read: {error.strerror or error}")
            continue
        try:
            whole.append(decode_state(data, str(path)))
        except StateError as error:
            faults.append(str(error))
    if not whole and faults:
        raise StateError(f"{'; '.join(faults)}; begin anew with 'mgg-edge state reset'")
    for fault in faults:
        _logger.warning("%s: using the other generation", fault)
    return max(whole, key=lambda saved: saved.generation, default=None)


def cameras_in(directory: Path) -> list[str]:
    """Names of the cameras with state files in a directory, sorted."""
    names = (path.name.removesuffix(SUFFIX).rpartition(".") for path in directory.glob(f"*{SUFFIX}"))
    return sorted({camera for camera, _, slot in names if camera and slot in map(str, range(GENERATIONS))})


def camera_name(source: str) -> str:
    """A name for the camera behind a source, such as `rtsp-gate-3-live-1a2b3c4d`; equal for equal sources.

    Args:
        source: how the source is called; without credentials.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    words = re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[-60:].strip("-")
    return f"{words}-{digest}" if words else digest


def file_name(camera: str) -> str:
    """A camera's name if it can be a file's, else a name made of it."""
    return camera if _NAME.fullmatch(camera) else camera_name(camera)


def _paths(directory: Path, camera: str) -> tuple[Path, ...]:
    return tuple(Path(directory) / f"{camera}.{slot}{SUFFIX}" for slot in range(GENERATIONS))
