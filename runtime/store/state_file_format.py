"""The bytes of a state file.

    "MGGSTATE"            8 bytes
    length of the header  4 bytes, little endian
    header                JSON: format, bundle, camera, generation, the checkpoint's numbers, and the list of arrays
    arrays                one after the other, little endian, C order
    SHA-256               32 bytes over everything before

The checkpoint's states are often the same one (nothing has happened since it was verified): each is stored once, and
the header names which is which. Nothing in a state file is a picture, and nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import StateError
from mgg_edge.runtime.adaptation.adapter_checkpoint import Checkpoint
from mgg_edge.state import AdaptState

__all__ = ["SavedState", "decode_state", "encode_state"]

FORMAT = 1
_MAGIC, _DIGEST_BYTES = b"MGGSTATE", 32
MAX_HEADER_BYTES = 1 << 20
MAX_SCALARS = 1 << 28  # of one array; a gigabyte
_DTYPES = {"float32": "<f4", "float64": "<f8"}
_DRIFT = "drift_mean"


@dataclass(frozen=True)
class SavedState:
    """What a state file holds.

    Attributes:
        checkpoint: what a run goes on from.
        camera: whose it is.
        generation: saves before it, of this camera.
    """

    checkpoint: Checkpoint
    camera: str
    generation: int


def encode_state(saved: SavedState) -> bytes:
    """The bytes of a state file."""
    checkpoint = saved.checkpoint
    unique: dict[str, AdaptState] = {}
    arrays: dict[str, npt.NDArray[np.generic]] = {_DRIFT: checkpoint.drift_mean}

    def place(state: AdaptState) -> int:
        digest = state.digest()
        if digest not in unique:
            arrays.update({f"{len(unique)}.{name}": array for name, array in state.items()})
            unique[digest] = state
        return list(unique).index(digest)

    header = {
        "format": FORMAT,
        "bundle": checkpoint.bundle_id,
        "camera": saved.camera,
        "generation": saved.generation,
        "step": checkpoint.step,
        "state": place(checkpoint.state),
        "last_good": place(checkpoint.last_good),
        "older": place(checkpoint.older),
        "snapshots": [[place(state), fit] for state, fit in checkpoint.snapshots],
        "schedule": checkpoint.schedule,
        "schedule_numbers": dict(checkpoint.schedule_numbers),
        "ladder_numbers": dict(checkpoint.ladder_numbers),
        "drift_frames": checkpoint.drift_frames,
        "classes": list(checkpoint.classes),
        "counters": dict(checkpoint.counters),
    }
    header["arrays"] = [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()]
    text = json.dumps(header, allow_nan=False).encode()
    body = [_MAGIC, len(text).to_bytes(4, "little"), text]
    body += [array.astype(_DTYPES[str(array.dtype)]).tobytes() for array in arrays.values()]
    data = b"".join(body)
    return data + hashlib.sha256(data).digest()


def decode_state(data: bytes, where: str) -> SavedState:
    """Parse a state file; every byte is covered by its digest.

    Args:
        data: the file's bytes.
        where: its name, for messages.

    Raises:
        StateError: not a state file, truncated, altered, or of another format.
    """
    body = memoryview(data)[:-_DIGEST_BYTES]
    if not data.startswith(_MAGIC) or len(body) < len(_MAGIC) + 4:
        raise StateError(f"{where}: expected a state file, found something else or a truncated one")
    if hashlib.sha256(body).digest() != data[-_DIGEST_BYTES:]:
        raise StateError(f"{where}: the state file is damaged (SHA-256 differs)")
    start = len(_MAGIC) + 4
    length = int.from_bytes(data[len(_MAGIC) : start], "little")
    if not (length <= min(MAX_HEADER_BYTES, len(body) - start)):
        raise StateError(f"{where}: expected a header within the file, found one of {length} bytes")
    try:
        header = json.loads(bytes(body[start : start + length]))
        if header["format"] != FORMAT:
            raise StateError(f"{where}: expected format {FORMAT}, found {header['format']!r}; use the version it is of")
        arrays = _read_arrays(header["arrays"], body[start + length :], where)
        return _saved(header, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise StateError(f"{where}: the state file's header is malformed: {type(error).__name__}: {error}") from error


def _read_arrays(listed: Any, payload: memoryview, where: str) -> dict[str, npt.NDArray[np.generic]]:
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    offset = 0
    for name, dtype, shape in listed:
        if dtype not in _DTYPES or not all(type(extent) is int and 0 <= extent <= MAX_SCALARS for extent in shape):
            raise StateError(f"{where}: array '{name}' expected {' or '.join(_DTYPES)}, found {dtype}{shape}")
        kind = np.dtype(_DTYPES[dtype])
        size = math.prod(shape) * kind.itemsize
        if not (size <= len(payload) - offset):
            raise StateError(f"{where}: array '{name}' expected {size} bytes, found {len(payload) - offset}")
        arrays[name] = np.frombuffer(payload[offset : offset + size], kind).reshape(shape).astype(dtype)
        offset += size
    if offset != len(payload):
        raise StateError(f"{where}: expected {offset} bytes of arrays, found {len(payload)}")
    return arrays


def _saved(header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[np.generic]]) -> SavedState:
    def state(place: int) -> AdaptState:
        prefix = f"{place}."
        return AdaptState({name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)})

    checkpoint = Checkpoint(
        bundle_id=str(header["bundle"]),
        state=state(header["state"]),
        step=int(header["step"]),
        schedule=str(header["schedule"]),
        schedule_numbers={str(name): float(value) for name, value in header["schedule_numbers"].items()},
        ladder_numbers={str(name): int(value) for name, value in header["ladder_numbers"].items()},
        last_good=state(header["last_good"]),
        older=state(header["older"]),
        snapshots=tuple((state(place), float(fit)) for place, fit in header["snapshots"]),
        drift_mean=arrays[_DRIFT].astype(np.float64),
        drift_frames=int(header["drift_frames"]),
        classes=tuple(int(index) for index in header["classes"]),
        counters=dict(header["counters"]),
    )
    return SavedState(checkpoint, str(header["camera"]), int(header["generation"]))
