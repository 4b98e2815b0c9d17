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

from mgg_edge.cli.model_words import ClassesFile, ClassOrderName, Labels
from mgg_edge.compat import StrEnum
from mgg_edge.errors import UsageError

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
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with one folder a class, or a glyph file; the package's characters by default."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results; a sweep it holds is gone on with.")] = Path(
        "evaluation"
    ),
    methods: Annotated[
        str, typer.Option(help="Names with options, such as none,tent:rate_factor=0.1,mgg; see --list.")
    ] = "none,tent,mgg",
    streams: Annotated[str, typer.Option(help="Streams, such as iid:fog,drift:fog+contrast; see --list.")] = "clean",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")] = 1,
    backbone: Annotated[
        str | None,
        typer.Option(help="timm NAME or NAME.TAG, local-dir:FOLDER, torchvision/NAME or package.module:factory."),
    ] = None,
    weights: Annotated[str, typer.Option(help="FILE (.safetensors, .pth), 'pretrained' or 'random'.")] = "pretrained",
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle (.mgg) instead of a backbone; 'default' is the package's reader.")
    ] = None,
    mgg: Annotated[Path | None, typer.Option(help="Learned MGG (.safetensors) for the method mgg.")] = None,
    source_data: Annotated[
        Path | None,
        typer.Option(help="Clean pictures of the source domain, for methods that look at some; else a part of --data."),
    ] = None,
    labels: Labels = None,
    classes_file: ClassesFile = None,
    class_order: Annotated[
        ClassOrderName, typer.Option(help="Folders are classes by their names, or sorted as classes 0, 1, ….")
    ] = ClassOrderName.NAMES,
    mask: Annotated[
        bool, typer.Option(help="Where folders are some of the classes, answers are chosen among those alone.")
    ] = True,
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
    show_list: Annotated[
        bool, typer.Option("--list", help="Say which methods and streams there are, with their options, and end.")
    ] = False,
) -> None:
    """Compare adaptation methods on streams: accuracy, calibration, accuracy after few updates, time, memory.

    Results are kept as they come in; the same command goes on where it was interrupted. Folders of pictures are matched
    to the model's classes by name.
    """
    if show_list:
        _print_list()
        return
    from mgg_edge.cli.display import Stages, log_to_terminal
    from mgg_edge.export.evaluation import (
        EvaluationRequest,
        describe,
        draw_samples_of,
        packaged_path,
        plan_jobs,
        run_job,
    )
    from mgg_edge.learn.evaluation import run_sweep
    from mgg_edge.learn.evaluation.outcome import write_outcome

    console = log_to_terminal()
    if bundle is None and backbone is None:
        raise UsageError("evaluation: expected --bundle or --backbone; --bundle default is the package's reader")
    packaged = None if bundle is None else str(packaged_path(str(bundle)))
    request = EvaluationRequest(
        str(data or packaged_path("characters")), backbone, weights, packaged,
        _text(source_data), _text(mgg), engine.value, batch, frames, held_out, source_images, norm_statistics,
        _text(labels), _text(classes_file), class_order.value, mask,
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
    facts, mapping = describe(request)
    samples = draw_samples_of(request, streams.split(","))
    _report(rows, write_outcome(out, rows, {**facts, "folder": str(out)}, samples, mapping), as_json=as_json)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _print_list() -> None:
    from mgg_edge.cli.display import print_table
    from mgg_edge.learn.methods import method_options
    from mgg_edge.scenes.corruptions import KINDS
    from mgg_edge.scenes.courses import STREAM_NAMES

    options = {name: ", ".join(f"{key}={value}" for key, value in found.items()) for name, found in method_options()}
    print_table(("method", "options and their defaults: NAME:OPTION=VALUE:…"), list(options.items()))
    print_table(("stream",), [(name,) for name in STREAM_NAMES])
    sys.stdout.write(f"KINDS is KIND[@SEVERITY] or several joined by +. KIND is one of {', '.join(KINDS)}\n")


def _report(rows: list[Row], summaries: list[Summary], *, as_json: bool) -> None:
    from mgg_edge.cli.display import print_table
    from mgg_edge.learn.evaluation import summary_table, verdicts

    if as_json:
        entries = [entry.to_dict() for entry in summaries]
        sys.stdout.write(json.dumps({"summary": entries, "verdicts": verdicts(summaries), "jobs": len(rows)}) + "\n")
    else:
        print_table(*summary_table(summaries))
        sys.stdout.writelines(f"{sentence}\n" for sentence in verdicts(summaries))


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
