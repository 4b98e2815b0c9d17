"""Metrics, the evaluation of one method on one stream, tables, plots and the report."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import mmap
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

from mgg_edge.errors import UsageError  # noqa: E402
from mgg_edge.learn.evaluation import Checks, evaluate, rows_as_csv, summarise, summary_table, verdicts  # noqa: E402
from mgg_edge.learn.evaluation.memory import peak_memory_mb, reset_peak_memory  # noqa: E402
from mgg_edge.learn.evaluation.metrics import (  # noqa: E402
    calibration_error,
    confidences,
    correct,
    timeline,
    worst_window,
)
from mgg_edge.learn.evaluation.plots import draw_plots  # noqa: E402
from mgg_edge.learn.evaluation.report import html_report  # noqa: E402
from sweep_jobs import Batch, ToyStream, row  # noqa: E402

pytestmark = pytest.mark.torch


class Counting:
    """Reads the label from the picture and is right from its third step on; its state is the number of steps."""

    name = "counting"

    def __init__(self, start=3):
        self.start, self.asked = start, []

    def init(self):
        return 0

    def step(self, frames, state):
        return self.predict(frames, state), state + 1

    def predict(self, frames, state):
        self.asked.append((len(frames), state))
        answer = frames[:, 0, 0, 0].long() + (state < self.start)
        return torch.nn.functional.one_hot(answer % 10, 10).float() * 20


def held_out(domain):
    return next(iter(ToyStream(1, 10, seed=len(domain))))


def test_accuracy_counts_answers_that_are_not_finite_as_wrong():
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [np.nan, 0.0], [np.inf, 0.0]])
    assert correct(logits, np.array([0, 0, 0, 0])).tolist() == [True, False, False, False]
    assert confidences(np.array([[0.0, 0.0, np.nan, 0.0], [100.0, 0.0, 0.0, 0.0]])).tolist() == [0.25, 1.0]


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.97, 0.55, 1.0])
    right = np.array([True, False, True, True])
    # Bins of 1/15: 0.95, 0.97 and 1.0 share the last one, 0.55 is alone.
    expected = (abs(2 - (0.95 + 0.97 + 1.0)) + abs(1 - 0.55)) / 4
    assert calibration_error(confidence, right) == pytest.approx(expected)


def test_the_worst_window_is_the_worst_of_all_places():
    right = np.ones(1200, bool)
    right[350:700] = False
    assert worst_window(right) == pytest.approx(150 / 500)
    assert worst_window(right, 350) == 0.0
    assert worst_window(right[:500]) == pytest.approx(350 / 500)
    assert worst_window(right[:499]) is None


def test_the_timeline_keeps_order_and_length():
    assert timeline(np.array([True, True, False, False]), 2) == [1.0, 0.0]
    assert timeline(np.array([True, False]), 100) == [1.0, 0.0]


def test_online_accuracy_and_accuracy_after_n_batches():
    method = Counting()
    stream = ToyStream(batches=8, batch=4, domains=("dark", "fog"))
    result = evaluate(method, stream, Checks(held_out, held_out("clean"), checkpoints=(1, 3, 5, 25)))
    assert (result.frames, result.batches) == (32, 8)
    assert result.accuracy == 20 / 32  # steps with 3, 4, … updates made
    assert result.accuracy_after == {"0": 0.0, "1": 0.0, "3": 1.0, "5": 1.0, "all": 1.0}
    assert result.domains == {"dark": 0.25, "fog": 1.0}
    assert result.timeline == [0.0] * 12 + [1.0] * 20
    assert result.clean_accuracy_after == 1.0
    assert result.worst_window is None
    assert result.non_finite == 0
    # Held-out frames are asked in batches as the stream's, before the first batch and after each checkpoint.
    assert [entry for entry in method.asked if entry[1] == 0] == [(4, 0), (4, 0), (2, 0), (4, 0)]


def test_held_out_frames_are_those_of_the_batchs_domain():
    asked = []

    def remember(domain):
        asked.append(domain)
        return held_out(domain)

    evaluate(Counting(), ToyStream(8, domains=("dark", "fog")), Checks(remember, checkpoints=(1, 4, 5)))
    assert asked == ["dark", "dark", "dark", "fog", "fog"]


def test_without_checks_nothing_is_measured_beside_the_stream():
    result = evaluate(Counting(), ToyStream())
    assert result.accuracy_after == {}
    assert result.clean_accuracy_after is None
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == result.to_dict()


def test_answers_that_are_not_finite_are_counted_and_wrong():
    class Broken(Counting):
        def predict(self, frames, state):
            return super().predict(frames, 3) * (float("nan") if state == 2 else 1.0)

    result = evaluate(Broken(), ToyStream(batches=4, batch=4))
    assert (result.non_finite, result.accuracy) == (4, 0.75)
    json.dumps(result.to_dict(), allow_nan=False)


def test_an_empty_stream_is_refused():
    with pytest.raises(UsageError, match="at least one batch, found none"):
        evaluate(Counting(), [])


def test_time_is_that_of_the_steps_alone(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("mgg_edge.learn.evaluation.trial.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    result = evaluate(Counting(), ToyStream(batches=3, batch=4), Checks(held_out))
    assert result.frame_ms == 1000 / 4  # each step takes one tick


def test_peak_memory_is_that_since_the_reset():
    reset_peak_memory()
    before = peak_memory_mb()
    with mmap.mmap(-1, 30_000_000) as block:  # fresh pages: an allocator would hand out what it has kept
        block.write(b"1" * 30_000_000)
        assert peak_memory_mb() - before > 20
    held = peak_memory_mb()
    reset_peak_memory()
    if peak_memory_mb() == held:
        pytest.skip("this system cannot reset the peak")
    assert peak_memory_mb() < held - 20


def rows():
    return [
        {"method": method, "stream": stream, "seed": seed, **row(0.5 + 0.1 * seed)}
        for stream in ("iid:fog", "continual")
        for method in ("none", "tent")
        for seed in (0, 2)
    ]


def test_summaries_are_means_and_deviations_over_seeds():
    summaries = summarise(rows())
    assert [(entry.stream, entry.method, entry.seeds) for entry in summaries] == [
        ("iid:fog", "none", 2),
        ("iid:fog", "tent", 2),
        ("continual", "none", 2),
        ("continual", "tent", 2),
    ]
    assert summaries[0].mean["accuracy"] == pytest.approx(0.6)
    assert summaries[0].std["accuracy"] == pytest.approx(0.1 * 2**0.5)
    assert summaries[0].mean["accuracy_after_5"] == 0.5
    assert summaries[0].mean["accuracy_after_25"] is None
    assert summaries[0].mean["worst_window"] is None
    header, lines = summary_table(summaries)
    assert header[:5] == ["stream", "method", "seeds", "online %", "ECE %"]
    assert "worst 500 %" not in header
    assert lines[0][3] == "60.0 ±14.1"
    partly = [*rows(), {"method": "none", "stream": "iid:fog", "seed": 5, **row(after={})}]
    assert summarise(partly)[0].mean["accuracy_after_5"] is None  # never the mean of some seeds


def test_the_csv_has_a_line_for_every_job():
    table = list(csv.DictReader(io.StringIO(rows_as_csv(rows()))))
    assert len(table) == 8
    assert table[1]["accuracy"] == "0.7"
    assert table[1]["accuracy_after_25"] == table[1]["worst_window"] == ""
    assert (table[1]["stream"], table[1]["method"], table[1]["seed"]) == ("iid:fog", "none", "2")


def test_plots_are_pictures():
    from PIL import Image

    plots = draw_plots(rows())
    assert set(plots) == {"accuracy_over_time", "accuracy_against_updates", "accuracy_by_domain"}
    for data in plots.values():
        picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert picture.std() > 5
    bare = [{**entry, "accuracy_after": {}} for entry in rows()]
    assert set(draw_plots(bare)) == {"accuracy_over_time", "accuracy_by_domain"}


def test_the_plot_against_updates_shows_the_numbers(monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda self, *data, **style: drawn.append(data) or plot(self, *data, **style))
    draw_plots(rows()[:2])
    _, values, bars = drawn[-1]
    assert list(values) == pytest.approx([40.0, 45.0, 50.0, 55.0])
    assert bars is None or len(bars) == 4


def test_the_report_needs_nothing_else():
    class Reader(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.links, self.cells = [], 0

        def handle_starttag(self, tag, attributes):
            self.links += [value for name, value in attributes if name in ("src", "href", "action")]
            self.cells += tag == "td"
            assert tag not in ("script", "link", "iframe", "snow")

    summaries = summarise([{**entry, "method": f"<snow>{entry['method']}"} for entry in rows()])
    page = html_report(
        "a <b> title", {"data": "<snow> & ice"}, summaries, {"accuracy_over_time": b"png"}, {"a<b": "0 x"}
    )
    reader = Reader()
    reader.feed(page)
    assert reader.links == ["data:image/png;base64,cG5n"]
    assert reader.cells == 4 * len(summary_table(summaries)[0]) + 2
    assert "<td>a&lt;b</td><td>0 x</td>" in page
    assert "&lt;snow&gt; &amp; ice" in page
    assert "http" not in page


def test_the_verdict_names_the_best_and_says_how_sure_it_is():
    def row(method, seed, accuracy):
        return {**rows()[0], "stream": "clean", "method": method, "seed": seed, "accuracy": accuracy}

    first = verdicts(summarise([row("none", 0, 0.5), row("tent", 0, 0.6)]))
    assert first == [
        "On clean tent answers best online: 60.0 %. That is +10.0 points on none (one seed says nothing about chance)."
    ]
    noisy = [row("none", 0, 0.50), row("none", 1, 0.54), row("tent", 0, 0.51), row("tent", 1, 0.55)]
    assert "That is +1.0 points on none (spread 4.0), within what chance does." in verdicts(summarise(noisy))[0]
    assert verdicts(summarise([row("none", 0, 0.5), row("tent", 0, 0.4)])) == [
        "On clean no method is better online than none: 50.0 %."
    ]


def test_batches_of_the_toy_stream_repeat():
    for one, other in zip(ToyStream(seed=3), ToyStream(seed=3), strict=True):
        assert isinstance(one, Batch)
        assert np.array_equal(one.frames, other.frames)
