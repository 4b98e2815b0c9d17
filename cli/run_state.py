"""What `mgg-edge run` keeps of a run: state files and records."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.adapter import Adapter
from mgg_edge.runtime.sources.source import FrameSource
from mgg_edge.runtime.store.record import RunRecorder
from mgg_edge.runtime.store.state_file import StateStore, file_name
from mgg_edge.runtime.store.state_file_keeper import StateKeeper

__all__ = ["begin_records", "keep_states", "open_records"]


def keep_states(
    adapters: Mapping[str, Adapter], directory: Path | None, stack: contextlib.ExitStack
) -> dict[str, StateKeeper]:
    """Let each camera go on from its state in the directory, and save it there now and then and at the end.

    Returns:
        What saves each camera's state; nothing without a directory.

    Raises:
        StateError: a state of another bundle, or one in use by another process.
        SinkError: the directory cannot be written.
    """
    if directory is None:
        return {}
    return {
        name: stack.enter_context(StateKeeper(adapter, StateStore(directory, file_name(name), adapter.bundle_id)))
        for name, adapter in adapters.items()
    }


def open_records(
    cameras: Mapping[str, FrameSource], path: Path | None, stack: contextlib.ExitStack
) -> dict[str, RunRecorder]:
    """A recorder for each camera, `run-NAME.mggrun` where there are several; none without a path.

    Raises:
        UsageError: the record would overwrite a source.
        SinkError: a file cannot be created.
    """
    if path is None:
        return {}
    recorders = {}
    for name, source in cameras.items():
        target = path.with_name(f"{path.stem}-{name}{path.suffix}") if len(cameras) > 1 else path
        read = getattr(source, "path", None)
        if read is not None and target.exists() and target.samefile(read):
            raise UsageError(f"{target}: --record would overwrite the source; name another file")
        recorders[name] = RunRecorder(target)
        stack.callback(recorders[name].close)
    return recorders


def begin_records(
    recorders: Mapping[str, RunRecorder],
    adapters: Mapping[str, Adapter],
    cameras: Mapping[str, FrameSource],
    threads: int | None,
) -> None:
    """Write the first line of each record; from here on everything is recorded."""
    for name, recorder in recorders.items():
        facts = {
            "source": cameras[name].name,
            "threads": threads,
            "av": importlib.metadata.version("av"),
            "numpy": importlib.metadata.version("numpy"),
        }
        recorder.begin(adapters[name], facts)
