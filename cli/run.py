"""`mgg-edge run`: videos, pictures and cameras through a bundle, predictions out."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgg_edge.cli.bundle_name import bundle_option, default_bundle
from mgg_edge.cli.engine_name import ENGINE_HELP, EngineName
from mgg_edge.cli.stop_request import StopRequest
from mgg_edge.compat import StrEnum
from mgg_edge.errors import UsageError

if TYPE_CHECKING:
    from mgg_edge.runtime.outputs.sinks import AnnotatedVideo, JsonLines
    from mgg_edge.runtime.pipeline import Policy
    from mgg_edge.runtime.session_summary import Percentiles, Summary

__all__ = ["AdaptMode", "LogFormat", "run"]

INTERRUPTED = 130
_POLICY: dict[bool, Policy] = {True: "latest", False: "every-frame"}
_logger = logging.getLogger(__name__)


class AdaptMode(StrEnum):
    """When to adapt."""

    AUTO = "auto"
    WINDOW = "window"
    BURST = "burst"
    ALWAYS = "always"
    OFF = "off"


class LogFormat(StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


def run(
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="Video, picture, folder, 'pattern*', list.txt, camera number, /dev/video0, rtsp:// http(s):// udp:// "
            "address, - for standard input, or GStreamer pipeline; NAME=… names it; again for each further camera.",
            envvar="MGG_EDGE_SOURCE",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="CAMERAS.TOML",
            help="Cameras of a file instead, each with its own words; read anew on SIGHUP.",
            show_default=False,
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        bundle_option("Bundle (.mgg) to run; the package's, 'default', when not given."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON lines: one object a frame, the summary last.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Labels in a JSON line, the most probable ones.")] = 1,
    save: Annotated[
        Path | None, typer.Option(help="Write the annotated video here (.mp4, .mov, .mkv or .avi).")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the predictions here as a table.")] = None,
    serve: Annotated[
        str | None,
        typer.Option(metavar="[HOST:]PORT", help="Live page, /metrics and /healthz; on this machine only by default."),
    ] = None,
    events: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET",
            help="What happens, as few events: label changes, adaptation, camera lost and back. FILE, http://… or "
            "mqtt://… (https, mqtts); again for each further target.",
            envvar="MGG_EDGE_EVENTS",
            show_default=False,
        ),
    ] = None,
    event_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Probability, smoothed, below which a label is 'unknown' in events.")
    ] = 0.5,
    event_frames: Annotated[
        float, typer.Option(min=0, max=10_000, help="Frames over which labels are smoothed for events, about.")
    ] = 5.0,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Answer a proxy in front of the live page that asks by this name.", show_default=False),
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Let whoever knows the token in this file (made if absent) pause, freeze, reset, save and calibrate "
            "cameras, by the live page and HTTP.",
            envvar="MGG_EDGE_CONTROL",
            show_default=False,
        ),
    ] = None,
    adapt: Annotated[
        AdaptMode,
        typer.Option(help="Adapt on every full batch of diverse frames; in bursts, when the scene drifts; or never."),
    ] = AdaptMode.AUTO,
    adapt_budget_ms: Annotated[
        float | None,
        typer.Option(min=1, help="Leave out adaptation steps that would take longer.", show_default=False),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="Keep what each camera learns in this directory, and go on from there.", show_default=False),
    ] = None,
    save_every: Annotated[
        float, typer.Option(min=1, max=86400, help="Seconds between two saves of a state that changes.")
    ] = 60.0,
    record: Annotated[
        Path | None,
        typer.Option(help="Write a record (.mggrun) that 'mgg-edge replay' can check.", show_default=False),
    ] = None,
    record_frames: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Beside the record keep the pictures that steps learned from, and those around changes, so that a "
            "camera's run can be replayed.",
            show_default=False,
        ),
    ] = None,
    record_frames_mb: Annotated[
        int, typer.Option(min=10, help="Room for --record-frames, megabytes a camera; the oldest pictures go.")
    ] = 500,
    latest: Annotated[
        bool | None,
        typer.Option(
            "--latest/--every-frame",
            help="Skip frames that a newer one has overtaken, or wait for each. Cameras and streams skip by default.",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with an error at the first picture that a video file has lost.")
    ] = False,
    stall_timeout: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds without a picture before a camera's decoder is replaced.")
    ] = 5.0,
    max_reconnects: Annotated[
        int | None, typer.Option(min=0, help="Give up a camera after so many attempts in a row; never by default.")
    ] = None,
    engine: Annotated[EngineName, typer.Option(help=ENGINE_HELP)] = EngineName.AUTO,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine; all cores by default.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many frames (of each source).")] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Log lines for people, or JSON for a collector.")] = (
        LogFormat.TEXT
    ),
) -> None:
    """Classify videos or cameras while the model adapts to each.

    Ctrl-C, SIGTERM and a hang-up end the run after the frame in hand; outputs are completed and the summary is printed.
    """
    from mgg_edge.cli.display import RunDisplay, Stages, log_to_terminal
    from mgg_edge.cli.output import stoppable
    from mgg_edge.cli.run_fleet import Fleet, Reload
    from mgg_edge.cli.run_parts import EngineChoice, Events, Models, Targets, open_sources, serving
    from mgg_edge.cli.run_words import CameraWords, named, read_cameras
    from mgg_edge.runtime.outputs.events import EventSettings
    from mgg_edge.runtime.outputs.sinks import JsonLines
    from mgg_edge.runtime.session_lanes import run_lanes

    _require_one_of(source, config)
    console = log_to_terminal(as_json=log_format is LogFormat.JSON)
    common = CameraWords("", "", bundle, adapt.value, adapt_budget_ms, latest, strict, stall_timeout, max_reconnects)
    with contextlib.ExitStack() as stack:
        stopper = stack.enter_context(StopRequest(reloads=config is not None))
        lines = JsonLines(stoppable(sys.stdout, lambda: stopper.signal is not None), top=top) if json else None
        # Cheapest first: what is wrong with the arguments shows before the model is loaded.
        views = serving(serve, stack, allow_host or (), control)
        words = named(source or (), common) if config is None else read_cameras(config, common)
        default = None if all(one.bundle for one in words) else default_bundle()
        told = Events.open(events or (), EventSettings(event_threshold, event_frames), stack)
        several = len(words) > 1 or config is not None
        targets = Targets(lines, save, csv, record, record_frames, record_frames_mb, state, several, save_every, told)
        sources = open_sources(words)
        with Stages(console) as stages:
            models = Models(EngineChoice(engine.value, threads, stages), default)
            display = RunDisplay(console)
            fleet = stack.enter_context(Fleet(targets, models, display, views, limit))
            fleet.open(words, sources)
            lanes = [fleet.start(one.name) for one in words]
            attends = fleet.obey()
        display.expect(_total(fleet.frames_expected, limit))
        if config is not None:
            attends.append(stack.enter_context(Reload(config, common, fleet)).attend)
        with display:
            total, parts = run_lanes(lanes, stop=lambda: stopper.signal is not None, limit=limit, attend=attends)
        at_end = lines or (JsonLines(sys.stdout) if log_format is LogFormat.JSON else None)
        _report(total, parts, at_end, display.labels, fleet.videos)
    if failure := total.failure or fleet.record_failure:
        raise failure
    if stopper.signal == signal.SIGINT:
        raise typer.Exit(INTERRUPTED)


def _require_one_of(source: list[str] | None, config: Path | None) -> None:
    if (config is None) == (not source):
        set_by = " (MGG_EDGE_SOURCE is set)" if "MGG_EDGE_SOURCE" in os.environ else ""
        raise UsageError(f"run: expected either --source or --config, found {'both' if source else 'neither'}{set_by}")


def _total(expected: list[int | None], limit: int | None) -> int | None:
    counts = [min(filter(None, (count, limit)), default=None) for count in expected]
    return None if None in counts else sum(filter(None, counts))


def _report(
    total: Summary,
    parts: Mapping[str, Summary],
    lines: JsonLines | None,
    labels: Counter[tuple[str, int]],
    videos: list[AnnotatedVideo],
) -> None:
    from mgg_edge.cli.display import print_facts

    if lines is not None:
        each = {"sources": {name: part.to_dict() for name, part in parts.items()}} if len(parts) > 1 else {}
        lines.summary(total.to_dict() | each)
    else:
        print_facts(_facts(total, parts, labels, videos))
    sys.stdout.flush()


def _facts(
    total: Summary, parts: Mapping[str, Summary], labels: Counter[tuple[str, int]], videos: list[AnnotatedVideo]
) -> dict[str, str]:
    refused = f", {total.adapt_rejected} refused" if total.adapt_rejected else ""
    names = Counter(label for label, _ in labels)  # two classes may have one name, such as ImageNet's crane
    common = ", ".join(
        f"{label}{f' #{index}' if names[label] > 1 else ''} ({count / labels.total():.0%})"
        for (label, index), count in labels.most_common(3)
    )
    facts = {
        "frames": _frames(total),
        "inference": _latency(total.infer_ms),
        "adaptation": f"{total.adapt_steps} steps{refused}; {_latency(total.adapt_ms)}",
        "labels": common or "none",
        "engine": total.engine,
    }
    if total.frames_dropped or total.reconnects:
        facts["frame age"] = _latency(total.frame_age_ms)
    if len(parts) > 1:
        facts |= {f"camera {name}": f"{_frames(part)}; {part.adapt_steps} steps" for name, part in parts.items()}
    if saved := [str(video.path) for video in videos if video.completed]:
        facts["saved"] = ", ".join(saved)
    return facts


def _frames(summary: Summary) -> str:
    rate = summary.frames_inferred / summary.wall_s if summary.wall_s > 0 else 0.0
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.drops.items())
    dropped = f", {summary.frames_dropped} dropped ({reasons})" if summary.frames_dropped else ""
    again = f", {summary.reconnects} reconnections" if summary.reconnects else ""
    return f"{summary.frames_inferred}{dropped} in {summary.wall_s:.1f} s ({rate:.1f} frames/s){again}"


def _latency(times: Percentiles) -> str:
    if times.p50 is None:
        return "not measured"
    return f"{times.p50:.1f} ms median, {times.p95:.1f} ms p95, {times.p99:.1f} ms p99"
