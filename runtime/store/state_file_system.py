"""The few operations on files that saving a state is made of, so that tests can make each of them fail."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Protocol

__all__ = ["FileSystem", "RealFiles", "write_durably"]


class FileSystem(Protocol):
    """What saving and loading need; every method raises `OSError` as the operating system does."""

    def create(self, path: Path) -> int:
        """Open a file for writing, new or emptied; its handle."""

    def write(self, handle: int, data: memoryview) -> int:
        """Write some of the data; how many bytes."""

    def sync(self, handle: int) -> None:
        """Bring a file's content to the disk."""

    def close(self, handle: int) -> None:
        """Close a handle."""

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another's name, at once."""

    def sync_directory(self, path: Path) -> None:
        """Bring the names in a directory to the disk."""

    def remove(self, path: Path) -> None:
        """Delete a file."""

    def read(self, path: Path) -> bytes:
        """The content of a file."""


# What file systems answer that cannot sync a directory at all; a failing disk answers otherwise.
CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


class RealFiles:
    """The operating system's."""

    def create(self, path: Path) -> int:
        """Open a file for writing, new or emptied, readable by its owner and group."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)

    def write(self, handle: int, data: memoryview) -> int:
        """Write some of the data; how many bytes."""
        return os.write(handle, data)

    def sync(self, handle: int) -> None:
        """Bring a file's content to the disk."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """Close a handle."""
        os.close(handle)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another's name, at once."""
        os.replace(source, target)

    def sync_directory(self, path: Path) -> None:
        """Bring the names in a directory to the disk."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in CANNOT_SYNC:  # SMB and some FUSE systems write names through
                raise
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        """Delete a file."""
        path.unlink()

    def read(self, path: Path) -> bytes:
        """The content of a file."""
        return path.read_bytes()


def write_durably(files: FileSystem, path: Path, data: bytes) -> None:
    """Replace a file so that, whenever the power fails, it holds its old content or the new, and the new after return.

    Raises:
        OSError: it could not be done; the file holds its old content, or the new one if only the last operation failed.
    """
    temporary = path.with_name(f".{path.name}.new")  # one name: what a crash leaves is overwritten next time
    try:
        handle = files.create(temporary)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[files.write(handle, rest) :]
            files.sync(handle)
        finally:
            files.close(handle)
        files.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            files.remove(temporary)
        raise
    files.sync_directory(path.parent)
