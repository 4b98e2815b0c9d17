"""Saves states until it is killed, again and again; run by test_state_file in a process of its own, which may fork.

python kill_saver.py DIRECTORY KILLS     prints one JSON object: kills, unreadable states, and lost ones
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from checkpoints import BUNDLE, checkpoint
from mgg_edge.errors import MggEdgeError
from mgg_edge.runtime.store.state_file import StateStore
from mgg_edge.runtime.store.state_file_format import SavedState, encode_state


def save_for_ever(directory: Path, first: int, acknowledge: int) -> None:
    store = StateStore(directory, "camera", BUNDLE)
    for number in range(first, first + 1_000_000):
        store.save(checkpoint(number))
        os.write(acknowledge, number.to_bytes(4, "little"))


def save_in_place(directory: Path) -> None:
    data = encode_state(SavedState(checkpoint(1), "camera", 1))
    path = StateStore(directory, "camera", BUNDLE).paths()[0]
    while True:
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(data), 64):
                file.write(data[start : start + 64])


def kill_once(directory: Path, first: int, saves: int, spins: int, in_place: bool) -> int:
    """Kill the saver once it has done so many saves, a little into the next one.

    Returns:
        The last save that was acknowledged before the kill, or first − 1.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            if in_place:
                save_in_place(directory)
            save_for_ever(directory, first, writing)
        finally:
            os._exit(1)
    os.close(writing)
    data = _wait_for(directory, reading, saves, in_place)
    for _ in range(spins):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while part := os.read(reading, 1 << 16):
        data += part
    os.close(reading)
    return int.from_bytes(data[len(data) // 4 * 4 - 4 :][:4], "little") if len(data) >= 4 else first - 1


def _wait_for(directory: Path, reading: int, saves: int, in_place: bool) -> bytes:
    """Acknowledgements until there are so many; in place, until the file is there in part."""
    data = b""
    if in_place:
        whole, path = (
            len(encode_state(SavedState(checkpoint(1), "camera", 1))),
            StateStore(directory, "camera", BUNDLE).paths()[0],
        )
        while not (path.exists() and 0 < path.stat().st_size < whole):
            time.sleep(0)
    while not in_place and len(data) < 4 * saves:
        data += os.read(reading, 4 * saves - len(data))
    return data


def main(directory: Path, kills: int, in_place: bool) -> None:
    chance, unreadable, lost, saves = random.Random(0), 0, 0, 0  # noqa: S311
    number = 0
    for _ in range(kills):
        acknowledged = kill_once(directory, number, chance.randrange(4), chance.randrange(60_000), in_place)
        try:
            found = StateStore(directory, "camera", BUNDLE).load()
        except MggEdgeError:
            unreadable += 1
            continue
        step = -1 if found is None else found.step
        # The save in hand may have been done without its acknowledgement.
        whole = found is None or found.state.digest() == checkpoint(step).state.digest()
        lost += not (whole and step in (acknowledged, acknowledged + 1))
        saves += acknowledged + 1 - number
        number = max(step, acknowledged) + 1
    json.dump({"kills": kills, "unreadable": unreadable, "lost": lost, "saves": saves}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "--in-place" in sys.argv)
