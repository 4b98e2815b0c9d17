"""Files that users name: written whole or not at all, through links, never over what is no file; those nobody named.

And those that the package brings.
"""

from __future__ import annotations

import importlib.resources
import os
import stat
import tempfile
from pathlib import Path

from mgg_edge.errors import SinkError, UsageError

__all__ = ["PRIVATE", "PUBLIC", "create_beside", "is_clutter", "output_target", "packaged_file", "write_whole"]

PUBLIC, PRIVATE = 0o644, 0o600  # permissions of a file: everybody reads, or nobody else does
# What file managers, archivers and cameras' storage leave in folders, beside names that begin with a dot.
CLUTTER = frozenset(
    {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)


def is_clutter(path: Path) -> bool:
    """Whether any part of a path is hidden or of a system, so that nobody means it as data."""
    return any(part.startswith(".") or part in CLUTTER for part in path.parts if part not in (".", ".."))


def packaged_file(name: str) -> Path:
    """A file that the package brings.

    Raises:
        UsageError: this build of the package lacks it.
    """
    path = Path(str(importlib.resources.files("mgg_edge.data") / name))
    if not path.is_file():
        raise UsageError(f"this build of the package holds no '{name}'; name a file")
    return path


def output_target(path: str | os.PathLike[str]) -> Path:
    """The file that writing to a path would make or replace, links followed.

    Raises:
        UsageError: a directory, device, pipe or socket.
        SinkError: the name cannot be used: too long, links in a circle, a folder that is absent or may not be entered.
    """
    target = Path(os.path.realpath(path))
    try:
        parent = target.parent.stat().st_mode
        mode = _mode(Path(path))
    except OSError as error:
        raise SinkError(f"{path}: cannot write here: {error.strerror}") from error
    if not stat.S_ISDIR(parent):
        raise SinkError(f"{path}: cannot write here: '{target.parent}' is not a directory")
    if not stat.S_ISREG(mode):
        found = "a directory" if stat.S_ISDIR(mode) else "a device or pipe"
        raise UsageError(f"{path}: expected a file to write, found {found}")
    return target


def _mode(path: Path) -> int:
    """Kind of what a path leads to; a regular file where there is nothing yet."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return stat.S_IFREG


def create_beside(target: Path, suffix: str = "", mode: int = PUBLIC) -> Path:
    """A new file in the target's directory, under a short name of its own, that takes the target's name when complete.

    Raises:
        SinkError: the directory cannot be written.
    """
    draft: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".mgg-edge-", suffix=suffix)
        os.close(handle)
        draft = Path(name)
        os.chmod(draft, mode)  # mkstemp lets nobody else read
    except OSError as error:
        if draft is not None:
            draft.unlink(missing_ok=True)
        raise SinkError(f"{target}: cannot write here: {error.strerror or error}") from error
    return draft


def write_whole(
    path: str | os.PathLike[str],
    data: bytes | bytearray | tuple[bytes, ...],
    what: str = "the file",
    mode: int = PUBLIC,
) -> None:
    """Write a file: complete at its path and on the disk, or not there at all.

    Args:
        path: where; what a link leads to is replaced, not the link.
        data: content, or parts of it that are written one after the other.
        what: it is, for messages.
        mode: its permissions.

    Raises:
        UsageError, SinkError: as `output_target`; the disk refuses.
    """
    target = output_target(path)
    draft = create_beside(target, mode=mode)
    try:
        with draft.open("wb") as file:
            file.writelines(data if isinstance(data, tuple) else (data,))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise SinkError(f"{path}: cannot write {what}: {error.strerror or error}") from error
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
