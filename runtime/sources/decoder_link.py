"""How a decoding process hands pictures over: pixels through shared memory, everything else as short messages.

    child  → parent   length u32 little-endian, then a JSON object:
                      {"kind": "started" | "opened" | "frame" | "error" | "end", …}
    parent → child    first a line of JSON, the request; then one byte for each slot that is free again

The memory has no name (an unlinked file, sealed against shrinking where the system can): it is gone with the two
processes however they end. It grows when larger pictures come; the parent never trusts a place outside of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import struct
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import SourceError
from mgg_edge.runtime.sources.source_picture import MAX_PIXELS

__all__ = ["MAX_MESSAGE_BYTES", "SLOTS", "PixelMemory", "pack_message", "take_message"]

SLOTS = 3  # one being filled, one on its way, one being copied
MAX_MESSAGE_BYTES = 1 << 16
_LENGTH = struct.Struct("<I")


class PixelMemory:
    """Memory shared by the two processes.

    Args:
        handle: file descriptor to take over; None makes new memory.
    """

    def __init__(self, handle: int | None = None) -> None:
        self.handle = _create() if handle is None else handle
        self._map: mmap.mmap | None = None

    def reserve(self, size_bytes: int) -> None:
        """Make the memory at least this large; for the writing side, with no picture on its way."""
        if os.fstat(self.handle).st_size < size_bytes:
            os.ftruncate(self.handle, size_bytes)

    def write(self, offset: int, image: npt.NDArray[np.uint8]) -> None:
        """Copy a picture to its place."""
        target = np.frombuffer(self._mapped(offset + image.nbytes), np.uint8, image.nbytes, offset)
        np.copyto(target.reshape(image.shape), image)

    def read(self, offset: int, height: int, width: int) -> npt.NDArray[np.uint8]:
        """A copy of the picture u8[height,width,3] at a place.

        Raises:
            SourceError: the place is not within the memory.
        """
        size = height * width * 3
        if not (height > 0 < width and size <= 3 * MAX_PIXELS and 0 <= offset <= os.fstat(self.handle).st_size - size):
            raise SourceError(f"decoder: a picture of {width}x{height} at {offset} is not within the shared memory")
        view = np.frombuffer(self._mapped(offset + size), np.uint8, size, offset)
        return view.reshape(height, width, 3).copy()

    def close(self) -> None:
        """Release the memory; safe to call twice."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1

    def _mapped(self, size_bytes: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size_bytes:
            if self._map is not None:
                self._map.close()
            self._map = mmap.mmap(self.handle, os.fstat(self.handle).st_size)
        return self._map


def pack_message(message: Mapping[str, Any]) -> bytes:
    """A message as it goes over the pipe."""
    body = json.dumps(message).encode()
    return _LENGTH.pack(len(body)) + body


def take_message(received: bytearray) -> dict[str, Any] | None:
    """Remove the first whole message from what was received; None if there is none yet.

    Raises:
        SourceError: this is no message of ours.
    """
    if len(received) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(received)
    if not length <= MAX_MESSAGE_BYTES:
        raise SourceError(f"decoder: expected a message of at most {MAX_MESSAGE_BYTES} bytes, found {length}")
    if len(received) < _LENGTH.size + length:
        return None
    body = bytes(received[_LENGTH.size : _LENGTH.size + length])
    del received[: _LENGTH.size + length]
    try:
        message = json.loads(body)
    except ValueError as error:
        raise SourceError("decoder: expected a JSON message, found something else") from error
    if not isinstance(message, dict):
        raise SourceError(f"decoder: expected a JSON object, found {type(message).__name__}")
    return message


def _create() -> int:
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("mgg-edge-pictures", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with contextlib.suppress(OSError):
            # A reader of memory that is cut off under it dies of SIGBUS.
            fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return handle
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
