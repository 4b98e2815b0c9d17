"""The decoding process: reads one source until its end, its failure or its death. Started by `decoder.Decoder`.

It may hang in a driver or crash in a decoder at any time: nothing depends on it ending well. It ends with its parent,
by the end of its standard input and, on Linux, by a signal of the kernel's.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from typing import Any

from mgg_edge.errors import MggEdgeError
from mgg_edge.runtime.sources.decoder_link import SLOTS, PixelMemory, pack_message
from mgg_edge.runtime.sources.decoder_read import DecodedPicture, open_reader
from mgg_edge.runtime.sources.source_address import redact

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_ALIGNMENT = 4096


class _Link:
    """This side of the link: waits for free slots, writes pixels, tells of them."""

    def __init__(self, memory: PixelMemory, messages: int) -> None:
        self._memory, self._messages = memory, messages
        self._free = threading.Semaphore(SLOTS)
        self._slot, self._slot_bytes = 0, 0

    def watch_parent(self) -> None:
        """Count the slots that come back; end the process when the parent is gone."""
        while returned := os.read(0, 64):
            self._free.release(len(returned))
        os._exit(0)

    def say(self, **message: Any) -> None:
        """Send a message whole."""
        data = pack_message(message)
        while data:
            data = data[os.write(self._messages, data) :]

    def send(self, picture: DecodedPicture) -> None:
        """Hand one picture over; waits for a free slot."""
        image = picture.image
        if image.nbytes > self._slot_bytes:
            self._grow(image.nbytes)
        self._free.acquire()
        offset = self._slot * self._slot_bytes
        self._memory.write(offset, image)
        self._slot = (self._slot + 1) % SLOTS
        height, width = image.shape[:2]
        self.say(
            kind="frame",
            offset=offset,
            height=height,
            width=width,
            time_s=picture.time_s,
            captured_s=picture.captured_s,
        )

    def _grow(self, size_bytes: int) -> None:
        # No picture may be on its way when places move: all slots are waited for.
        for _ in range(SLOTS):
            self._free.acquire()
        self._slot_bytes = -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
        self._memory.reserve(SLOTS * self._slot_bytes)
        self._free.release(SLOTS)


def main() -> None:
    """Serve the request on standard input; the argument is the descriptor of the shared memory."""
    _die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they go to the whole group: the parent decides
    messages = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # libraries print, and what they print may hold a password
        os.dup2(null, stream)
    os.close(null)
    request = json.loads(_read_line())
    link = _Link(PixelMemory(int(sys.argv[1])), messages)
    threading.Thread(target=link.watch_parent, daemon=True).start()
    link.say(kind="started")  # from here on the source may be waited for; what came before is the machine's own time
    try:
        _serve(request, link)
    except BrokenPipeError:
        os._exit(0)
    except MggEdgeError as error:
        link.say(kind="error", code=error.code, text=redact(str(error)))
    except Exception as error:  # noqa: BLE001 - the parent reports it: there is nobody else to tell
        link.say(kind="error", code="source", text=redact(f"{type(error).__name__}: {error}")[:1000])
    os._exit(0)  # without waiting for threads of a decoder


def _serve(request: dict[str, Any], link: _Link) -> None:
    reader = open_reader(request)
    link.say(kind="opened", rate=[reader.rate.numerator, reader.rate.denominator], finite=reader.finite)
    for picture in reader.pictures:
        link.send(picture)
    link.say(kind="end")


def _read_line() -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):  # byte by byte: what follows the line is counted elsewhere
        byte = os.read(0, 1)
        if not byte:
            os._exit(0)
        line += byte
    return bytes(line)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
