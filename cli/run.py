"""`mgg-edge run`: a video through a bundle, predictions out."""

from __future__ import annotations

import contextlib
import enum
import importlib.resources
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Self

import typer

from mgg_edge.errors import UsageError

if TYPE_CHECKING:
    from mgg_edge.runtime.session import Percentiles, Summary
    from mgg_edge.runtime.sinks import AnnotatedVideo, JsonLines
    from mgg_edge.runtime.video import VideoSource

__all__ = ["AdaptMode", "default_bundle", "run"]

INTERRUPTED = 130
_logger = logging.getLogger(__name__)


class AdaptMode(enum.StrEnum):
    """When to adapt."""

    ALWAYS = "always"
    OFF = "off"


def run(
    source: Annotated[Path, typer.Option(help="Video file to read.", show_default=False)],
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle (.mgg) to run; the one shipped with the package when not given.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON lines: one object a frame, the summary last.")] = False,
    save: Annotated[
        Path | None, typer.Option(help="Write the annotated video here (.mp4, .mov, .mkv or .avi).")
    ] = None,
    adapt: Annotated[AdaptMode, typer.Option(help="Adapt on every full batch of distinct frames, or never.")] = (
        AdaptMode.ALWAYS
    ),
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine; all cores by default.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames.")] = None,
) -> None:
    """Classify a video while the model adapts to it.

    Ctrl-C and SIGTERM end the run after the frame in hand; outputs are completed and the summary is printed.
    """
    from mgg_edge.cli.display import RunDisplay, log_to_terminal
    from mgg_edge.runtime import session
    from mgg_edge.runtime.adapter import Adapter
    from mgg_edge.runtime.sinks import JsonLines
    from mgg_edge.runtime.video import VideoSource

    console = log_to_terminal()
    lines = JsonLines(sys.stdout) if json else None
    with contextlib.ExitStack() as stack:
        stopper = stack.enter_context(_StopRequest())
        # Cheapest first: what is wrong with the arguments shows before the model is loaded.
        path = bundle if bundle is not None else stack.enter_context(default_bundle())
        video = stack.enter_context(VideoSource(source))
        saved = _open_save(save, video, stack) if save is not None else None
        adapter = stack.enter_context(Adapter.open(path, adapt=adapt.value, threads=threads))
        expected = min(filter(None, (video.frames_expected, limit)), default=None)
        with RunDisplay(console, expected) as display:
            summary = session.run(
                video,
                adapter,
                [sink for sink in (lines, saved) if sink is not None],
                display,
                stop=lambda: stopper.signal is not None,
                limit=limit,
            )
        _report(summary, lines, display.labels, saved)
    if summary.failure is not None:
        raise summary.failure
    if stopper.signal == signal.SIGINT:
        raise typer.Exit(INTERRUPTED)


@contextlib.contextmanager
def default_bundle() -> Iterator[Path]:
    """The bundle shipped with the package, as a file while the context lasts.

    Raises:
        UsageError: this build of the package ships none.
    """
    resource = importlib.resources.files("mgg_edge.data") / "default.mgg"
    if not resource.is_file():
        raise UsageError("no default bundle is installed: name one with --bundle")
    _logger.info("no --bundle given: using the default bundle of the package")
    with importlib.resources.as_file(resource) as path:
        yield path


class _StopRequest:
    """Turns the first SIGINT or SIGTERM into a wish the run can grant between two frames; a second one is prompt.

    Attributes:
        signal: the signal received, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def _open_save(path: Path, video: VideoSource, stack: contextlib.ExitStack) -> AnnotatedVideo:
    from mgg_edge.runtime.sinks import AnnotatedVideo

    if path.exists() and path.samefile(video.path):
        raise UsageError(f"{path}: --save would overwrite the source; name another file")
    saved = AnnotatedVideo(path, video.width, video.height, video.rate)
    stack.callback(saved.abort)  # does nothing once the run has completed it
    return saved


def _report(summary: Summary, lines: JsonLines | None, labels: Counter[str], saved: AnnotatedVideo | None) -> None:
    from mgg_edge.cli.display import print_facts

    try:
        if lines is not None:
            lines.summary(summary.to_dict())
        else:
            print_facts(_facts(summary, labels, saved))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has what it wanted. Python would flush once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _facts(summary: Summary, labels: Counter[str], saved: AnnotatedVideo | None) -> dict[str, str]:
    rate = summary.frames_inferred / summary.wall_s if summary.wall_s > 0 else 0.0
    dropped = f", {summary.frames_dropped} dropped" if summary.frames_dropped else ""
    refused = f", {summary.adapt_rejected} refused" if summary.adapt_rejected else ""
    common = ", ".join(f"{label} ({count / labels.total():.0%})" for label, count in labels.most_common(3))
    facts = {
        "frames": f"{summary.frames_inferred}{dropped} in {summary.wall_s:.1f} s ({rate:.1f} frames/s)",
        "inference": _latency(summary.infer_ms),
        "adaptation": f"{summary.adapt_steps} steps{refused}; {_latency(summary.adapt_ms)}",
        "labels": common or "none",
        "engine": summary.engine,
    }
    if saved is not None and saved.completed:
        facts["saved"] = str(saved.path)
    return facts


def _latency(times: Percentiles) -> str:
    if times.p50 is None:
        return "not measured"
    return f"{times.p50:.1f} ms median, {times.p95:.1f} ms p95, {times.p99:.1f} ms p99"
