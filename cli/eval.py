"""`mgg-edge eval`: adaptation methods on streams of labelled pictures."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgg_edge.compat import StrEnum

if TYPE_CHECKING:
    from mgg_edge.learn.evaluation import Row, Summary

__all__ = ["EngineName", "ExecutorName", "eval"]

INTERRUPTED = 130


class EngineName(StrEnum):
    """What computes the step."""

    TORCH = "torch"
    ONNXRUNTIME = "onnxruntime"


class ExecutorName(StrEnum):
    """Where jobs run."""

    PROCESSES = "processes"
    RAY = "ray"


def eval(  # noqa: A001 (what the command is called)
    data: Annotated[Path, typer.Option(help="Glyph file or ImageFolder directory to draw streams from.")],
    out: Annotated[Path, typer.Option(help="Folder for results; a sweep it holds is gone on with.")],
    methods: Annotated[str, typer.Option(help="Names with options, such as none,tent:rate_factor=0.1,mgg.")] = (
        "none,tent,mgg"
    ),
    streams: Annotated[str, typer.Option(help="Streams, such as iid:fog,continual.")] = "clean",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")] = 1,
    backbone: Annotated[str | None, typer.Option(help="timm model name, or torchvision/NAME.")] = None,
    weights: Annotated[str, typer.Option(help="FILE (.safetensors, .pth), 'pretrained' or 'random'.")] = "pretrained",
    bundle: Annotated[Path | None, typer.Option(help="Bundle (.mgg) instead of a backbone.")] = None,
    mgg: Annotated[Path | None, typer.Option(help="Learned MGG (.safetensors) for the method mgg.")] = None,
    source_data: Annotated[Path | None, typer.Option(help="Clean pictures of the source domain.")] = None,
    engine: Annotated[EngineName, typer.Option(help="onnxruntime runs a bundle's exported step.")] = EngineName.TORCH,
    batch: Annotated[int, typer.Option(min=1, help="Frames of a batch.")] = 16,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a stream.")] = 2000,
    held_out: Annotated[int, typer.Option(min=0, help="Frames kept apart for each domain; 0 for none.")] = 500,
    source_images: Annotated[int, typer.Option(min=32, help="Clean images that methods may know.")] = 512,
    norm_statistics: Annotated[
        str, typer.Option(help="Statistics of batch normalisation: source, batch or mix:ALPHA.")
    ] = "mix:0.1",
    jobs: Annotated[int, typer.Option(min=0, help="Jobs at a time; 0 for one a processor.")] = 0,
    executor: Annotated[ExecutorName, typer.Option(help="This machine's processes, or a Ray cluster.")] = (
        ExecutorName.PROCESSES
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Compare adaptation methods on streams: accuracy, calibration, accuracy after few updates, time, memory.

    Results are kept as they come in; the same command goes on where it was interrupted.
    """
    from mgg_edge.cli.display import Stages, log_to_terminal
    from mgg_edge.export.evaluation import EvaluationRequest, plan_jobs, run_job
    from mgg_edge.learn.evaluation import run_sweep
    from mgg_edge.learn.evaluation.outcome import write_outcome

    console = log_to_terminal()
    request = EvaluationRequest(
        str(data), backbone, weights, _text(bundle), _text(source_data), _text(mgg), engine.value, batch, frames,
        held_out, source_images, norm_statistics,
    )  # fmt: skip
    with _interruptible() as stopping:
        planned = plan_jobs(request, methods.split(","), streams.split(","), range(seeds))
        workers = jobs or len(os.sched_getaffinity(0))
        with Stages(console) as progress:
            rows = run_sweep(
                planned, run_job, out, executor_name=executor.value, workers=workers, stop=stopping.is_set,
                progress=progress,
            )  # fmt: skip
    if stopping.is_set() and len(rows) < len(planned):
        console.print(f"interrupted: {len(rows)} of {len(planned)} jobs are kept; the same command goes on")
        raise typer.Exit(INTERRUPTED)
    _report(rows, write_outcome(out, rows, _facts(request, out)), as_json=as_json)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _facts(request: Any, out: Path) -> dict[str, str]:
    model = request.bundle or f"{request.backbone} ({request.weights})"
    facts = {
        "model": str(model),
        "engine": request.engine,
        "data": request.data,
        "batch": f"{request.batch} frames, {request.frames} a stream",
        "kept apart": f"{request.held_out} frames a domain",
        "folder": str(out),
    }
    return {**facts, "mgg": request.mgg} if request.mgg else facts


def _report(rows: list[Row], summaries: list[Summary], *, as_json: bool) -> None:
    from mgg_edge.cli.display import print_table
    from mgg_edge.learn.evaluation import summary_table

    if as_json:
        sys.stdout.write(json.dumps({"summary": [entry.to_dict() for entry in summaries], "jobs": len(rows)}) + "\n")
    else:
        print_table(*summary_table(summaries))


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Set on the first SIGINT or SIGTERM; a second one ends the command at once."""
    stopping = threading.Event()

    def note(_number: int, _frame: Any) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
