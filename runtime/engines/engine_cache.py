"""Built engines on this device's disk.

    <cache>/device.key              32 random bytes, readable by their owner alone
    <cache>/<key>.engine            magic ‖ MAC (32) ‖ length of the facts (8, little-endian) ‖ facts ‖ payload
    <cache>/<library>.timing        measured kernel times in the same format
    <cache>/.lock                   held by the one process that builds an engine

An engine is machine code. The MAC (HMAC-SHA256 over everything after it) is keyed by device.key *and* the machine's
identity, so that neither an altered file nor one from another device, nor a whole disk image of one, is ever loaded.
An engine is found by its key: everything it depends on, hashed. Facts hold the same in words, so that a person can be
told why an engine was built again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgg_edge.errors import EngineError, SinkError, UsageError
from mgg_edge.files import PRIVATE, write_whole
from mgg_edge.runtime.engines.engine_key import EngineKey

__all__ = ["CACHE_VARIABLE", "EngineCache", "Entry", "default_cache"]

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MGG_EDGE_ENGINES"
DEFAULT_LIMIT_BYTES = 4 << 30
MAGIC = b"mgg-edge.engine 1\n"
SECRET_BYTES, MAC_BYTES, LENGTH_BYTES = 32, 32, 8
MAX_FACTS_BYTES = 1 << 16
MACHINE_ID = Path("/etc/machine-id")


@dataclass(frozen=True)
class Entry:
    """One engine on the disk.

    Attributes:
        path: its file.
        key: what it was built from.
        bundle: file name of the bundle it was built for.
        size_bytes: of the file.
        used: time of last use, seconds since the epoch.
        trusted: the MAC is this device's.
    """

    path: Path
    key: EngineKey
    bundle: str
    size_bytes: int
    used: float
    trusted: bool


def default_cache() -> Path:
    """`$MGG_EDGE_ENGINES`, or `mgg-edge/engines` in the user's cache directory."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path("~/.cache").expanduser()) / "mgg-edge" / "engines"
    except RuntimeError as error:  # a user without an entry and without $HOME
        raise UsageError(f"engines: this user has no home directory; name a folder with {CACHE_VARIABLE}") from error


class EngineCache:
    """Engines by key, at most so many bytes of them; the longest unused go first.

    Args:
        root: directory; made when something is put there.
        limit_bytes: of all engines together.
        machine_id: file with the machine's identity.
    """

    def __init__(self, root: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES, machine_id: Path = MACHINE_ID) -> None:
        self.root, self._limit, self._machine_id = root, limit_bytes, machine_id

    def get(self, key: EngineKey) -> bytes | None:
        """The engine of a key; None if there is none, or none that this device made."""
        path = self.path(key)
        found = self._read(path)
        if found is None:
            return None
        facts, payload, trusted = found
        if not trusted:
            logger.warning("%s: built or altered elsewhere, not loaded; 'mgg-edge engines add' takes it on", path)
            return None
        if facts["key"] != dataclasses.asdict(key):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return payload

    def put(self, key: EngineKey, engine: bytes, bundle: str) -> Path:
        """Keep an engine; returns its file.

        Raises:
            SinkError: the directory cannot be written.
        """
        path = self.path(key)
        self._write(path, {"key": dataclasses.asdict(key), "bundle": bundle}, engine)
        self._shrink(path)
        return path

    def add(self, source: Path) -> Path:
        """Take on an engine that another device built: from now on it is trusted here.

        Raises:
            EngineError: not an engine file.
            SinkError: the directory cannot be written.
        """
        found = self._read(source)
        if found is None or not isinstance(found[0].get("key"), dict):
            raise EngineError(f"{source}: expected an engine written by mgg-edge, found something else")
        facts, payload, _ = found
        return self.put(EngineKey(**facts["key"]), payload, str(facts["bundle"]))

    def timing(self, name: str) -> bytes:
        """Kernel times of a library and device; nothing if there are none that this device measured."""
        found = self._read(self.root / f"{name}.timing")
        return found[1] if found is not None and found[2] else b""

    def put_timing(self, name: str, data: bytes) -> None:
        """Keep kernel times.

        Raises:
            SinkError: the directory cannot be written.
        """
        self._write(self.root / f"{name}.timing", {"key": None}, data)

    def path(self, key: EngineKey) -> Path:
        """Where the engine of a key is, or would be."""
        return self.root / f"{key.digest[:32]}.engine"

    def entries(self) -> tuple[Entry, ...]:
        """All engines, the last used first."""
        found = []
        for path in self.root.glob("*.engine"):
            if (read := self._read(path)) is not None:
                status, (facts, _, trusted) = path.stat(), read
                key = EngineKey(**facts["key"])
                found.append(Entry(path, key, str(facts["bundle"]), status.st_size, status.st_mtime, trusted))
        return tuple(sorted(found, key=lambda entry: -entry.used))

    def nearest(self, key: EngineKey) -> Entry | None:
        """The trusted engine of the same graph kind that differs in the fewest facts."""
        same = [entry for entry in self.entries() if entry.key.graph == key.graph and entry.trusted]
        return min(same, key=lambda entry: len(entry.key.differences(key)), default=None)

    def clear(self) -> int:
        """Delete every engine and kernel time; how many files."""
        files = [*self.root.glob("*.engine"), *self.root.glob("*.timing")]
        for path in files:
            path.unlink(missing_ok=True)
        return len(files)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Be the only one that builds: a build takes the whole device, and who waits often finds it done.

        Raises:
            SinkError: the directory cannot be written.
        """
        with self._writable():
            handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process builds an engine; waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _secret(self) -> bytes:
        """The device's key, mixed with the machine's identity; made when there is none."""
        path = self.root / "device.key"
        if not path.exists():
            fresh = secrets.token_bytes(SECRET_BYTES)
            with tempfile.NamedTemporaryFile(dir=self.root) as file:  # mode 0600
                file.write(fresh)
                file.flush()
                with contextlib.suppress(FileExistsError):
                    os.link(file.name, path)  # the first one wins, whole
        secret = path.read_bytes()
        try:
            identity = self._machine_id.read_bytes().strip()
        except OSError:
            identity = b""
        return hashlib.sha256(secret + identity).digest()

    def _mac(self, body: bytes) -> bytes:
        return hmac.new(self._secret(), body, hashlib.sha256).digest()

    def _write(self, path: Path, facts: Mapping[str, object], payload: bytes) -> None:
        encoded = json.dumps(facts, sort_keys=True).encode()
        body = len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded + payload
        with self._writable():
            write_whole(path, (MAGIC, self._mac(body), body), "the engine", PRIVATE)

    def _read(self, path: Path) -> tuple[dict[str, Any], bytes, bool] | None:
        """Facts, payload and whether the MAC is this device's; None if it is no such file."""
        try:
            data = path.read_bytes()
            body = data[len(MAGIC) + MAC_BYTES :]
            length = int.from_bytes(body[:LENGTH_BYTES], "little")
            if not data.startswith(MAGIC) or not 0 < length <= min(MAX_FACTS_BYTES, len(body) - LENGTH_BYTES):
                return None
            mac, known = data[len(MAGIC) : len(MAGIC) + MAC_BYTES], (self.root / "device.key").exists()
            trusted = known and hmac.compare_digest(mac, self._mac(body))
            facts = json.loads(body[LENGTH_BYTES : LENGTH_BYTES + length])
            return (facts, body[LENGTH_BYTES + length :], trusted) if _is_facts(facts) else None
        except (OSError, ValueError):
            return None

    def _shrink(self, newest: Path) -> None:
        total = newest.stat().st_size
        others = [(path, path.stat()) for path in self.root.glob("*.engine") if path != newest]
        for path, status in sorted(others, key=lambda one: -one[1].st_mtime):
            total += status.st_size
            if total > self._limit:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            yield
        except (OSError, SinkError) as error:
            reason = error if isinstance(error, SinkError) else f"{self.root}: {error.strerror or error}"
            raise SinkError(f"cannot keep engines: {reason}; name another directory in {CACHE_VARIABLE}") from error


def _is_facts(facts: object) -> bool:
    if not isinstance(facts, dict):
        return False
    key, names = facts.get("key"), {field.name for field in dataclasses.fields(EngineKey)}
    return key is None or (
        isinstance(key, dict)
        and set(key) == names
        and all(isinstance(value, str) for value in key.values())
        and isinstance(facts.get("bundle"), str)
    )
