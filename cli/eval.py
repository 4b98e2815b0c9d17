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


class ProtocolName(StrEnum):
    """Whose settings the methods have."""

    OWN = "own"
    PUBLISHED = "published"


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
        str, typer.Option(help="Names with options, such as none,mgg or alpha-bn:alpha=0.2; see --list.")
    ] = "none,tent,mgg",
    streams: Annotated[
        str | None,
        typer.Option(
            help="Streams, such as clean,drift or iid:fog+contrast; see --list. [default: clean]", show_default=False
        ),
    ] = None,
    imagenet_c: Annotated[
        Path | None,
        typer.Option(
            help="ImageNet-C, or any tree KIND/SEVERITY/CLASS: one pass over each of its kinds.", show_default=False
        ),
    ] = None,
    severity: Annotated[int, typer.Option(min=1, max=5, help="Of --imagenet-c.")] = 5,
    imagenet_r: Annotated[Path | None, typer.Option(help="ImageNet-R: one pass.", show_default=False)] = None,
    imagenet_a: Annotated[Path | None, typer.Option(help="ImageNet-A: one pass.", show_default=False)] = None,
    imagenet_sketch: Annotated[Path | None, typer.Option(help="ImageNet-Sketch: one pass.", show_default=False)] = None,
    protocol: Annotated[
        ProtocolName,
        typer.Option(
            help="published: the options, batch and statistics that the methods' authors set, and nothing kept apart "
            "(docs/METHODS.md); what is given beside it wins."
        ),
    ] = ProtocolName.OWN,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")] = 1,
    backbone: Annotated[
        str | None,
        typer.Option(help="timm NAME or NAME.TAG, local-dir:FOLDER, torchvision/NAME or your own MODULE:FACTORY."),
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
    batch: Annotated[
        int | None, typer.Option(min=1, help="Frames of a batch. [default: 16, published: 64]", show_default=False)
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a stream.")] = 2000,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Frames kept apart for each domain; 0 for none. [default: 500, published: 0]",
            show_default=False,
        ),
    ] = None,
    source_images: Annotated[
        int | None,
        typer.Option(
            min=32, help="Clean images that methods may know. [default: 512, published: 2000]", show_default=False
        ),
    ] = None,
    norm_statistics: Annotated[
        str | None,
        typer.Option(
            help="Statistics of batch normalisation: source, batch or mix:ALPHA. [default: mix:0.1, published: batch]",
            show_default=False,
        ),
    ] = None,
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
    from mgg_edge.learn.methods import published as published_settings

    console = log_to_terminal()
    if bundle is None and backbone is None:
        raise UsageError("evaluation: expected --bundle or --backbone; --bundle default is the package's reader")
    packaged = None if bundle is None else str(packaged_path(str(bundle)))
    benchmarks = {"c": imagenet_c, "r": imagenet_r, "a": imagenet_a, "sketch": imagenet_sketch}
    shown, passes = _benchmark({name: path for name, path in benchmarks.items() if path is not None}, data, severity)
    chosen = tuple((streams or ",".join(passes) or "clean").split(","))
    published, whole = protocol is ProtocolName.PUBLISHED, bool(passes)
    preset = published_settings.SETTINGS if published else {"held_out": 0} if whole else {}
    asked = {
        "batch": batch, "held_out": held_out, "source_images": source_images, "norm_statistics": norm_statistics,
    }  # fmt: skip
    request = EvaluationRequest(
        str(shown or packaged_path("characters")), backbone, weights, packaged, _text(source_data), _text(mgg),
        engine.value, frames=frames, labels=_text(labels), classes_file=_text(classes_file),
        class_order=class_order.value, mask=mask, protocol=protocol.value, own_source=not (published or whole),
        **{**preset, **{name: value for name, value in asked.items() if value is not None}},
    )  # fmt: skip
    with _interruptible() as stopping:
        planned = plan_jobs(request, methods.split(","), chosen, range(seeds))
        workers = jobs or len(os.sched_getaffinity(0))
        with Stages(console) as progress:
            rows = run_sweep(
                planned, run_job, out, executor_name=executor.value, workers=workers, stop=stopping.is_set,
                progress=progress,
            )  # fmt: skip
    if stopping.is_set() and len(rows) < len(planned):
        console.print(f"interrupted: {len(rows)} of {len(planned)} jobs are kept; the same command goes on")
        raise typer.Exit(INTERRUPTED)
    facts, mapping = describe(request, chosen)
    samples = draw_samples_of(request, chosen)
    _report(rows, write_outcome(out, rows, {**facts, "folder": str(out)}, samples, mapping), as_json=as_json)


def _benchmark(named: dict[str, Path], data: Path | None, severity: int) -> tuple[Path | None, tuple[str, ...]]:
    """The data and streams of a benchmark that is named in one word; of none the data as it is."""
    from mgg_edge.export.evaluation import corruption_streams

    if not named:
        return data, ()
    if len(named) > 1 or data is not None:
        given = ", ".join(["--data"] * (data is not None) + [f"--imagenet-{name}" for name in named])
        raise UsageError(f"evaluation: expected one of --data and the --imagenet options, found {given}")
    ((name, path),) = named.items()
    return path, corruption_streams(path, severity) if name == "c" else ("one-pass",)


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
    from mgg_edge.learn.evaluation import means, summary_table, verdicts

    if as_json:
        entries = [entry.to_dict() for entry in summaries]
        found = {"summary": entries, "means": means(summaries), "verdicts": verdicts(summaries), "jobs": len(rows)}
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        print_table(*summary_table(summaries))
        if len(means(summaries)) < len(summaries):
            rows_of_means = [(name, f"{100 * mean:.1f} %") for name, mean in means(summaries).items()]
            print_table(("method", "online accuracy, mean of the streams"), rows_of_means)
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
