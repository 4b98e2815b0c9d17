"""What people see while a command works: logs, progress and tables. Standard error, unless it is the result."""

from __future__ import annotations

import logging
import sys
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mgg_edge.cli.log_lines import JsonHandler, shown
from mgg_edge.compat import Self
from mgg_edge.errors import printable

if TYPE_CHECKING:
    from mgg_edge.manifest import ParityInfo, ParityJudgement, ParityRow
    from mgg_edge.runtime.adaptation.adapter import Prediction
    from mgg_edge.runtime.demo import Scores
    from mgg_edge.runtime.sources.source_demo import DemoFrame
    from mgg_edge.runtime.sources.video import Frame

__all__ = [
    "DemoDisplay",
    "RunDisplay",
    "Stages",
    "TrainingDisplay",
    "log_to_terminal",
    "print_facts",
    "print_parity",
    "print_table",
    "sparkline",
]

BLOCKS = "▁▂▃▄▅▆▇█"
HISTORY = 40  # frames in the sparkline
REFRESHES_PER_S = 10


class _ConsoleHandler(logging.Handler):
    """Log lines above a live display rather than through it."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        self._console.print(prefix + shown(record), markup=False, highlight=False, soft_wrap=True)


def log_to_terminal(*, as_json: bool = False) -> Console:
    """A console on standard error that also shows the package's log from level INFO on, without credentials."""
    console = Console(stderr=True, quiet=as_json)  # no display between the lines of a log for programs
    logger = logging.getLogger("mgg_edge")
    logger.setLevel(logging.INFO)
    logger.handlers[:] = [JsonHandler(logging.INFO) if as_json else _ConsoleHandler(console)]
    return console


class _LiveView(ABC):
    """Something redrawn on a terminal while a `with` statement lasts; silent elsewhere."""

    def __init__(self, console: Console) -> None:
        self._live = (
            Live(get_renderable=self._render, console=console, refresh_per_second=REFRESHES_PER_S, transient=True)
            if console.is_terminal
            else None
        )

    @abstractmethod
    def _render(self) -> Group:
        """What to show now."""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


class RunDisplay(_LiveView):
    """Live progress of a run: bar, rate, current predictions, sparklines of the entropy. Silent off a terminal.

    Several sources may tell it of predictions at once, each from its own thread.

    Args:
        console: where to show it.

    Attributes:
        labels: how often each label, with its index, was predicted.
    """

    def __init__(self, console: Console) -> None:
        self.labels: Counter[tuple[str, int]] = Counter()
        self._entropies: dict[str, deque[float]] = {}
        self._last: dict[str, Prediction] = {}
        self._lock = threading.Lock()
        self._progress = Progress(
            TextColumn("{task.completed} frames"), BarColumn(), _Rate(), TimeRemainingColumn(), console=console
        )
        self._task = self._progress.add_task("run", total=None)
        super().__init__(console)

    def expect(self, total: int | None) -> None:
        """Show how far it is to so many frames; None when nobody knows."""
        self._progress.update(self._task, total=total)

    def forget(self, name: str) -> None:
        """Show a source no more."""
        with self._lock:
            self._last.pop(name, None)
            self._entropies.pop(name, None)

    def of_source(self, name: str) -> Callable[[Frame, Prediction], None]:
        """What is told of the predictions of one of several sources."""
        return lambda _, prediction: self._note(name, prediction)

    def _note(self, name: str, prediction: Prediction) -> None:
        with self._lock:
            self.labels[prediction.label, prediction.index] += 1
            self._entropies.setdefault(name, deque(maxlen=HISTORY)).append(prediction.entropy)
            self._last[name] = prediction
            self._progress.advance(self._task)

    def _render(self) -> Group:
        with self._lock:
            lines = [line for name in self._last for line in self._lines(name)]
        return Group(self._progress, *lines)

    def _lines(self, name: str) -> tuple[Text, Text]:
        last, entropies = self._last[name], self._entropies[name]
        state = ("source", "bright_black") if not last.adapted else (f"adapted (step {last.step})", "green")
        title = (f"{name}  " if len(self._last) > 1 else "", "bright_black")
        label = (f"{last.probability:5.1%} {printable(last.label)}  ", "bold")
        line = Text.assemble(title, label, ("● ", state[1]), state)
        return line, Text.assemble((f"entropy {last.entropy:.2f} ", "yellow"), (sparkline(entropies), "yellow"))


class Stages:
    """Progress of work with named stages, each a bar with its rate. Silent off a terminal.

    Args:
        console: where to show it.
    """

    def __init__(self, console: Console) -> None:
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            _Rate("/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how much of a stage is done."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class DemoDisplay(_LiveView):
    """Live progress of the demonstration: a bar, the weather, and how well each reader has read lately.

    Args:
        console: where to show it; silent off a terminal.
        scores: who read right, kept by the caller.
        total: frames to come.
    """

    def __init__(self, console: Console, scores: Scores, total: int) -> None:
        self._scores, self._weather = scores, ""
        self._progress = Progress(TextColumn("{task.completed} frames"), BarColumn(), _Rate(), console=console)
        self._task = self._progress.add_task("demo", total=total)
        super().__init__(console)

    def __call__(self, frame: DemoFrame) -> None:
        """Take note of one frame."""
        self._weather = frame.weather
        self._progress.advance(self._task)

    def _render(self) -> Group:
        lines = [Text.assemble(("weather  ", "bright_black"), (self._weather, "bold"))]
        for name in self._scores.right:
            share = self._scores.recent(name)
            bar = "█" * round(40 * share)
            lines.append(Text.assemble((f"{name:8} ", "bright_black"), (f"{bar:40} ", "green"), f"{share:4.0%}"))
        return Group(self._progress, *lines)


class TrainingDisplay:
    """Progress of a training: a bar with its rate, the loss, and how the rule does on held-out weathers.

    Off a terminal, a line whenever a score was measured.

    Args:
        console: where to show it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages = Stages(console)

    def __call__(self, made: int, total: int, loss: float, score: float | None, best: float) -> None:
        """Show how much is done, the moving loss, the score if one was measured now, and the best so far."""
        self._stages("learning", made, total)
        if score is not None:
            self._console.print(
                f"update {made:5}  loss {loss:.3f}  held-out agreement {score:.3f}  best {best:.3f}", highlight=False
            )

    def __enter__(self) -> Self:
        self._stages.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stages.__exit__(kind, error, trace)


class _Rate(ProgressColumn):
    def __init__(self, unit: str = " frames/s") -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}{self._unit}")


def sparkline(values: Sequence[float] | deque[float]) -> str:
    """Values as block characters, scaled from 0 to the largest of them."""
    top = max(values, default=0.0)
    if not top > 0.0:
        return BLOCKS[0] * len(values)
    return "".join(BLOCKS[min(int(value / top * len(BLOCKS)), len(BLOCKS) - 1)] for value in values)


def print_facts(facts: Mapping[str, str]) -> None:
    """Facts by name, two columns, on standard output."""
    print_table((), [(name, value) for name, value in facts.items()])


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; off a terminal, plain columns that are never cut or wrapped."""
    console = Console(file=sys.stdout)
    rows = [tuple(map(printable, row)) for row in rows]
    if console.is_terminal:
        table = Table(box=None, show_header=bool(header), pad_edge=False, header_style="bright_black")
        for index in range(max(map(len, rows), default=0)):
            title = header[index] if header else ""
            table.add_column(
                title,
                style="" if header or index else "bright_black",
                overflow="fold",
                min_width=max(map(len, title.split()), default=None),  # a title is never broken within a word
            )
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        console.print()
        return
    lines = [*([header] if header else []), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    sys.stdout.write("\n")


def print_parity(parity: ParityInfo | None) -> None:
    """The numeric check of an export: distances from the float64 reference, and their ratio."""
    if parity is None:
        print_facts({"parity": "not checked"})
        return
    judged: list[tuple[str, ParityJudgement | ParityRow]] = [("one step", row) for row in parity.judged]
    parted: list[tuple[str, ParityJudgement | ParityRow]] = [(f"{row.step}, apart", row) for row in parity.rows]
    print_table(
        ("steps", "quantity", "torch float32", "engine", "ratio"),
        [
            (
                steps,
                row.quantity,
                f"{row.torch_float32:.2e}",
                f"{row.engine:.2e}",
                f"{row.engine / row.torch_float32:.2f}" if row.torch_float32 > 0 else "-",
            )
            for steps, row in [*judged, *parted]
        ],
    )
    print_facts({"parity": f"{parity.engine}, {parity.steps} steps, largest logit difference {parity.logits_max:.2e}"})
