"""What `mgg-edge run` keeps of a camera: its state file and its record."""

from __future__ import annotations

import contextlib
import importlib.metadata
from pathlib import Path

from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.adapter import Adapter
from mgg_edge.runtime.sources.source import FrameSource
from mgg_edge.runtime.store.record import RunRecorder
from mgg_edge.runtime.store.record_pictures import PictureKeeper
from mgg_edge.runtime.store.state_file import StateStore, file_name
from mgg_edge.runtime.store.state_file_keeper import StateKeeper

__all__ = ["begin_record", "keep_state", "open_record"]


def keep_state(
    adapter: Adapter, directory: Path | None, camera: str, every_s: float, stack: contextlib.ExitStack
) -> StateKeeper | None:
    """Let a camera go on from its state in the directory, and save it there every so many seconds and at the end.

    Raises:
        StateError: a state of another bundle, or one in use by another process.
        SinkError: the directory cannot be written.
    """
    if directory is None:
        return None
    store = StateStore(directory, file_name(camera), adapter.bundle_id)
    return stack.enter_context(StateKeeper(adapter, store, every_s))


def open_record(
    path: Path | None, pictures: Path | None, pictures_mb: int, stack: contextlib.ExitStack, *, live: bool
) -> RunRecorder | None:
    """A recorder; none without a path.

    Args:
        path: of the record.
        pictures: directory that some of the pictures are kept in, or None.
        pictures_mb: megabytes that they may take.
        stack: closes it.
        live: whether frames do not wait for pictures to be written.

    Raises:
        UsageError: the directory holds something else, or there is no record to keep pictures for.
        SinkError: the file or the directory cannot be created.
    """
    if path is None:
        if pictures is not None:
            raise UsageError("record-frames: expected with --record FILE, found no record to keep pictures for")
        return None
    keeper = None if pictures is None else PictureKeeper(pictures, pictures_mb * 1_000_000, wait=not live)
    recorder = RunRecorder(path, keeper)
    stack.callback(recorder.close)
    return recorder


def begin_record(recorder: RunRecorder | None, adapter: Adapter, source: FrameSource, threads: int | None) -> None:
    """Write the first line of a record; from here on everything is recorded."""
    if recorder is None:
        return
    facts = {
        "source": source.name,
        "threads": threads,
        "av": importlib.metadata.version("av"),
        "numpy": importlib.metadata.version("numpy"),
    }
    recorder.begin(adapter, facts)
