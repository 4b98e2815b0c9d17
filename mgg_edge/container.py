"""The bundle file: a ZIP archive that any unzip tool can list, with nothing left unverified.

    member payloads, stored (not compressed), each with a fixed time and plain-file attributes
    ZIP directory
    ZIP comment: "sha256=" + 64 hex digits over every byte before the comment

The comment catches any altered byte, also in ZIP's own headers. The manifest repeats size and SHA-256
of each member, so members are bound to the manifest, and the manifest's SHA-256 is the bundle's identity.
The set of members is fixed; each has a size ceiling. Bytes are read once: what was verified is what is used.
"""

from __future__ import annotations

import hashlib
import io
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path

from mgg_edge.errors import BundleError, UsageError
from mgg_edge.files import write_whole
from mgg_edge.manifest import Manifest, MemberInfo

__all__ = [
    "GRAPHS",
    "LOWERINGS",
    "MEMBER_LIMITS",
    "describe_members",
    "graph_name",
    "read_container",
    "write_container",
]

MIB = 1 << 20
LOWERINGS = ("onnxruntime", "tensorrt")
GRAPHS = ("infer", "adapt")
MEMBER_LIMITS: dict[str, int] = {
    "manifest.json": 2 * MIB,
    "weights.safetensors": 2040 * MIB,
    "state.safetensors": 256 * MIB,
    "selftest.safetensors": 256 * MIB,
    **{f"{graph}.{lowering}.onnx": 64 * MIB for graph in GRAPHS for lowering in LOWERINGS},
}
MAX_FILE_BYTES = sum(MEMBER_LIMITS.values())
_PREFIX = b"sha256="
_COMMENT_LENGTH = len(_PREFIX) + 64
_PLAIN_FILE = (stat.S_IFREG | 0o644) << 16
_FIXED_TIME = (1980, 1, 1, 0, 0, 0)
_END_RECORD_LENGTH, _ZIP64_LOCATOR_LENGTH = 22, 20
MAX_DIRECTORY_BYTES = 1 << 16


def graph_name(graph: str, lowering: str) -> str:
    """Member name of a graph: `infer` or `adapt`, lowered for `onnxruntime` or `tensorrt`."""
    return f"{graph}.{lowering}.onnx"


def describe_members(members: Mapping[str, bytes]) -> dict[str, MemberInfo]:
    """Size and SHA-256 of each member, for `Manifest.members`."""
    return {name: MemberInfo(len(data), hashlib.sha256(data).hexdigest()) for name, data in members.items()}


def write_container(path: Path, manifest: Manifest, members: Mapping[str, bytes]) -> None:
    """Write a bundle file atomically: complete at `path`, or not there at all.

    Args:
        path: destination; replaced if it exists.
        manifest: its `members` must describe `members`.
        members: payloads of every member but the manifest.

    Raises:
        BundleError: the members do not match the manifest or exceed a ceiling.
        UsageError: the path is a directory, device or pipe.
        SinkError: the file cannot be written.
    """
    _check_members(manifest, members)
    write_whole(path, _pack({"manifest.json": manifest.to_json(), **members}), "the bundle")


def read_container(path: Path) -> tuple[Manifest, dict[str, bytes], str]:
    """Read and verify a bundle file.

    Returns:
        The manifest, the members by name (without the manifest), and the bundle id: SHA-256 of `manifest.json`.

    Raises:
        UsageError: there is no such file.
        BundleError: damaged, altered, oversized, or members missing, extra or of the wrong kind.
        ManifestError: the manifest breaks its schema.
    """
    members = _unpack(path, _read_verified(path))
    encoded = members.pop("manifest.json")
    manifest = Manifest.from_json(encoded)
    _check_members(manifest, members, where=f"{path}: ")
    return manifest, members, hashlib.sha256(encoded).hexdigest()


def _pack(payloads: Mapping[str, bytes]) -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name, data in payloads.items():
            info = zipfile.ZipInfo(name, _FIXED_TIME)
            info.create_system, info.external_attr = 3, _PLAIN_FILE
            archive.writestr(info, data)
        archive.comment = b"\0" * _COMMENT_LENGTH
    packed = bytearray(buffer.getbuffer())
    body = memoryview(packed)[:-_COMMENT_LENGTH]
    packed[-_COMMENT_LENGTH:] = _PREFIX + hashlib.sha256(body).hexdigest().encode()
    return packed


def _read_verified(path: Path) -> bytes:
    try:
        status = path.stat()  # before opening: opening a named pipe would block
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path}: expected a bundle file, found something that is not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise BundleError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {status.st_size}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such bundle; write one with 'mgg-edge export'") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise BundleError(f"{path}: cannot read the bundle: {getattr(error, 'strerror', None) or error}") from error
    body, comment = memoryview(data)[:-_COMMENT_LENGTH], data[-_COMMENT_LENGTH:]
    if not data.startswith(b"PK") or not comment.startswith(_PREFIX):
        raise BundleError(f"{path}: expected a .mgg bundle, found another kind of file or a truncated one")
    if comment[len(_PREFIX) :] != hashlib.sha256(body).hexdigest().encode():
        raise BundleError(f"{path}: the bundle is damaged or altered (SHA-256 differs); copy or export it again")
    return data


def _unpack(path: Path, data: bytes) -> dict[str, bytes]:
    _check_directory(path, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            for info in infos:
                _check_entry(path, info, len(data), names)
            if missing := sorted(set(MEMBER_LIMITS) - set(names)):
                raise BundleError(f"{path}: member '{missing[0]}' is missing")
            return {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise BundleError(f"{path}: the bundle's archive is malformed: {error}") from error


def _check_directory(path: Path, data: bytes) -> None:
    """Nine entries take a kilobyte; a ZIP library reads as many as the file claims, which may be millions."""
    end = data[-_COMMENT_LENGTH - _END_RECORD_LENGTH :]
    zip64_locator = data[-_COMMENT_LENGTH - _END_RECORD_LENGTH - _ZIP64_LOCATOR_LENGTH :]
    size = int.from_bytes(end[12:16], "little")
    if not end.startswith(b"PK\5\6") or zip64_locator.startswith(b"PK\6\7") or size > MAX_DIRECTORY_BYTES:
        raise BundleError(f"{path}: the bundle's archive is malformed: expected a directory of {len(MEMBER_LIMITS)}")


def _check_entry(path: Path, info: zipfile.ZipInfo, file_size: int, names: list[str]) -> None:
    name = info.filename
    if name not in MEMBER_LIMITS:
        raise BundleError(f"{path}: unexpected member {name!r}; expected only {', '.join(MEMBER_LIMITS)}")
    if names.count(name) > 1:
        raise BundleError(f"{path}: member '{name}' appears more than once")
    if info.external_attr != _PLAIN_FILE or info.flag_bits & 0x1:
        raise BundleError(f"{path}: member '{name}' expected a plain file, found attributes {info.external_attr:#x}")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise BundleError(f"{path}: member '{name}' expected stored bytes, found compressed ones")
    if info.file_size > min(MEMBER_LIMITS[name], file_size):
        raise BundleError(f"{path}: member '{name}' claims {info.file_size} bytes, more than its ceiling or the file")


def _check_members(manifest: Manifest, members: Mapping[str, bytes], where: str = "") -> None:
    expected = set(MEMBER_LIMITS) - {"manifest.json"}
    for found, what in ((set(members), "members"), (set(manifest.members), "manifest.members")):
        if found != expected:
            raise BundleError(f"{where}{what}: expected {sorted(expected)}, found {sorted(found)}")
    for name, info in describe_members(members).items():
        if info.size > MEMBER_LIMITS[name]:
            raise BundleError(f"{where}member '{name}' has {info.size} bytes, above its ceiling {MEMBER_LIMITS[name]}")
        if info != manifest.members[name]:
            raise BundleError(f"{where}member '{name}' does not match the manifest's size and SHA-256")
