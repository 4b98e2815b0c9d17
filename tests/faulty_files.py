"""A file system in memory that forgets what was not synced, fails when told to, and can be cut off at any operation."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path


class PowerCut(Exception):
    """The machine stopped here."""


class _Content:
    """A file's bytes in the page cache, and those on the disk."""

    def __init__(self) -> None:
        self.cached = bytearray()
        self.durable = b""


class FaultyFiles:
    """Implements `mgg_edge.runtime.store.state_file_system.FileSystem`.

    Attributes:
        operations: operations begun so far.
        fail_at: number of the operation that fails, from 0, or None.
        error: errno of that failure; None cuts the power instead.
        syncs: False makes both kinds of sync do nothing, as a disk that lies.
        short_writes: writes take at most so many bytes.
    """

    def __init__(self, *, short_writes: int = 1 << 30) -> None:
        self.operations, self.fail_at, self.error = 0, None, errno.EIO
        self.syncs, self.short_writes = True, short_writes
        self._cached: dict[Path, _Content] = {}
        self._durable: dict[Path, _Content] = {}
        self._handles: dict[int, _Content] = {}

    def create(self, path: Path) -> int:
        self._operation()
        content = self._cached.get(path)
        if content is None:
            content = self._cached[path] = _Content()
        content.cached = bytearray()
        handle = max(self._handles, default=2) + 1
        self._handles[handle] = content
        return handle

    def write(self, handle: int, data: memoryview) -> int:
        content = self._handles[handle]
        part = bytes(data[: self.short_writes])
        try:
            self._operation()
        except OSError:
            content.cached += part[: len(part) // 2]  # a disk that fills up takes what fits
            raise
        content.cached += part
        return len(part)

    def sync(self, handle: int) -> None:
        self._operation()
        if self.syncs:
            content = self._handles[handle]
            content.durable = bytes(content.cached)

    def close(self, handle: int) -> None:
        del self._handles[handle]
        self._operation()

    def replace(self, source: Path, target: Path) -> None:
        self._operation()
        self._cached[target] = self._cached.pop(source)

    def sync_directory(self, path: Path) -> None:
        self._operation()
        if self.syncs:
            self._durable = dict(self._cached)

    def remove(self, path: Path) -> None:
        self._operation()
        if path not in self._cached:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        del self._cached[path]

    def read(self, path: Path) -> bytes:
        if path not in self._cached:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return bytes(self._cached[path].cached)

    @property
    def open_handles(self) -> int:
        return len(self._handles)

    def after_power_cut(self) -> Iterator[FaultyFiles]:
        """What may be on the disk: names and contents reach it on their own, in any order, unless synced."""
        for names in (self._durable, self._cached):
            for keep in ("durable", "cached", "half"):
                yield self._booted(names, keep)

    def _booted(self, names: dict[Path, _Content], keep: str) -> FaultyFiles:
        other = FaultyFiles(short_writes=self.short_writes)
        for path, content in names.items():
            survived = {
                "durable": content.durable,
                "cached": bytes(content.cached),
                # A file whose tail never reached the disk; what was synced stays.
                "half": content.durable or bytes(content.cached[: len(content.cached) // 2]),
            }[keep]
            found = other._cached[path] = other._durable[path] = _Content()
            found.cached, found.durable = bytearray(survived), survived
        return other

    def _operation(self) -> None:
        number, self.operations = self.operations, self.operations + 1
        if number == self.fail_at:
            if self.error is None:
                raise PowerCut
            raise OSError(self.error, os.strerror(self.error))
