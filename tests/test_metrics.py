"""What Prometheus makes of a run: its tool finds a scrape in order; alarms and dashboard look at what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mgg_edge.runtime import Adapter
from mgg_edge.runtime.adaptation.guard import BreachCode
from mgg_edge.runtime.outputs.http_view import CameraView
from mgg_edge.runtime.outputs.metrics import render
from mgg_edge.runtime.pipeline import Reader
from mgg_edge.runtime.session import DROP_REASONS, run
from mgg_edge.runtime.sources.source_live import LiveOptions
from mgg_edge.runtime.sources.source_open import open_source
from mgg_edge.runtime.store.state_file import StateStore
from mgg_edge.runtime.store.state_file_keeper import StateKeeper
from test_http import INFO, figures

DEPLOY = Path(__file__).parent.parent / "deploy"
ALARMS, DASHBOARD = DEPLOY / "alarms.yml", DEPLOY / "grafana.json"
SERIES = re.compile(r"mgg_edge_\w+")


@pytest.fixture(scope="module")
def view(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CameraView]:
    """A live camera that has adapted, was lost once, and keeps its state."""
    state = tmp_path_factory.mktemp("state")
    source = open_source(
        "synthetic:live=1,frames=0,rate=200,faults=disconnect,every=50", LiveOptions(open_timeout_s=20)
    )
    with Adapter.open(toy_bundle, threads=1) as adapter, Reader(source, "every-frame") as reader:
        keeper = StateKeeper(adapter, StateStore(state, "door", adapter.bundle_id))
        found = CameraView("door", adapter, reader, keeper=keeper)
        with keeper:
            run(reader, adapter, [found], stop=lambda: found.connection["reconnects"] >= 1)
        yield found


@pytest.fixture(scope="module")
def scrape(view: CameraView) -> dict[str, float]:
    return figures(render([view], INFO))


def promtool(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (apt install prometheus)")
    return subprocess.run([program, *words], input=text, capture_output=True, text=True, timeout=60, check=False)


def test_counters_begin_at_zero_for_every_reason(scrape: dict[str, float]) -> None:
    for reason in DROP_REASONS:
        assert f'mgg_edge_frames_dropped_total{{camera="door",reason="{reason}"}}' in scrape
    rejected = {name: value for name, value in scrape.items() if name.startswith("mgg_edge_adapt_rejected_total")}
    assert len(rejected) == len(BreachCode) - 1
    assert not any("calm" in name for name in rejected)
    assert sum(name.startswith("mgg_edge_rollbacks_total") for name in scrape) == 4


def test_times_have_a_number_and_a_sum(view: CameraView, scrape: dict[str, float]) -> None:
    count, total_ms = view.adapter.infer_totals
    assert scrape['mgg_edge_infer_seconds_count{camera="door"}'] == count == view.adapter.counters.frames_inferred
    assert scrape['mgg_edge_infer_seconds_sum{camera="door"}'] == pytest.approx(total_ms / 1e3)
    assert total_ms == pytest.approx(sum(view.adapter.infer_times_ms))
    count, total_ms = view.adapter.adapt_totals
    assert scrape['mgg_edge_adapt_seconds_count{camera="door"}'] == count > 0
    assert total_ms == pytest.approx(sum(view.adapter.adapt_times_ms))


def test_downtime_and_states_are_told(view: CameraView, scrape: dict[str, float]) -> None:
    assert scrape['mgg_edge_source_down_seconds_total{camera="door"}'] > 0
    assert scrape['mgg_edge_source_reconnects_total{camera="door"}'] >= 1
    assert scrape['mgg_edge_state_saves_total{camera="door"}'] == view.keeper.saves >= 1
    assert scrape['mgg_edge_state_save_failures_total{camera="door"}'] == 0


def test_the_time_without_a_connection_ends_with_it(view: CameraView) -> None:
    stats = view._reader.source.stats
    if stats.connected:
        assert stats.downtime_s == stats.down_s
    assert 0 < stats.downtime_s < 60


def test_being_calm_is_not_refused(view: CameraView, monkeypatch: pytest.MonkeyPatch) -> None:
    rejected = {BreachCode.CALM: 3, BreachCode.CANARY: 2}
    counters = replace(view.adapter.counters, adapt_rejected=5, rejected=rejected)
    monkeypatch.setattr(type(view.adapter), "counters", property(lambda _: counters))
    found = figures(render([view], INFO))
    assert (view.refused, view.calm) == (2, 3)
    assert sum(value for name, value in found.items() if "adapt_rejected_total" in name) == 2
    assert found['mgg_edge_adapt_calm_total{camera="door"}'] == 3


def test_a_scrape_is_in_order(view: CameraView) -> None:
    found = promtool("check", "metrics", text=render([view], INFO))
    assert (found.returncode, found.stderr) == (0, "")


def test_the_alarms_fire_and_stay_silent() -> None:
    assert promtool("check", "rules", str(ALARMS)).returncode == 0
    found = promtool("test", "rules", str(Path(__file__).parent / "alarms_test.yml"))
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_alarm_is_shown_to_fire_and_to_stay_silent() -> None:
    alarms = set(re.findall(r"alert: (\w+)", ALARMS.read_text()))
    cases = re.findall(r"alertname: (\w+), exp_alerts: \[(.?)", (Path(__file__).parent / "alarms_test.yml").read_text())
    assert {name for name, first in cases if first == "]"} == alarms
    assert {name for name, first in cases if first == "{"} == alarms


@pytest.mark.parametrize(
    "path", [ALARMS, DASHBOARD, Path(__file__).parent / "alarms_test.yml"], ids=lambda path: path.name
)
def test_what_is_looked_at_exists(scrape: dict[str, float], path: Path) -> None:
    known = {re.sub(r"\{.*", "", name) for name in scrape}
    optional = {"mgg_edge_drift"}  # where a schedule or a rule measures it
    named = set(SERIES.findall(path.read_text()))
    assert len(named) > 8
    assert named <= known | optional, named - known


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 10
    assert all(target["expr"] for panel in panels for target in panel["targets"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
