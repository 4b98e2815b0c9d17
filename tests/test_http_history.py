"""A camera's last day: minutes made of looks, on the disk and back, and the one camera whose frozen model is asked."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from browser import Browser
from mgg_edge.runtime.outputs import http_server
from mgg_edge.runtime.outputs.http_history import History, Point, Sample
from mgg_edge.runtime.outputs.http_server import LiveServer
from test_http import INFO, Running, ask


def sample(frames: int = 0, **values: object) -> Sample:
    return Sample(**{"frames": frames, "updates": 0, "refused": 0, "rollbacks": 0, "disconnects": 0, **values})


def test_a_minute_is_the_mean_of_its_looks_and_the_difference_of_its_counters() -> None:
    history = History()
    history.add(600.0, sample(100, updates=7, entropy=9.0))  # counters from before are no events of this minute
    history.add(601.0, sample(110, updates=9, entropy=1.0, drift=0.5, agreed=True))
    history.add(659.9, sample(130, updates=9, refused=1, rollbacks=1, disconnects=2, agreed=False))
    assert history.points() == [
        Point(600, frames=30, entropy=5.0, drift=0.5, agreement=0.5, updates=2, refused=1, rollbacks=1, disconnects=2)
    ]


def test_events_between_two_minutes_are_the_later_one_s_and_none_is_lost() -> None:
    history = History()
    for second in range(0, 300, 7):
        history.add(60_000.0 + second, sample(second * 3, updates=second // 20))
    points = history.points()
    assert [point.time for point in points] == [60_000 + 60 * minute for minute in range(5)]
    assert sum(point.frames for point in points) == 294 * 3
    assert sum(point.updates for point in points) == 294 // 20
    assert points[0].entropy is points[0].agreement is None


def test_a_counter_that_begins_anew_counts_nothing_backwards() -> None:
    history = History()
    history.add(0.0, sample(100))
    history.add(1.0, sample(3))
    assert history.points()[0].frames == 0


def test_a_history_has_an_end() -> None:
    history = History(length=3)
    for minute in range(10):
        history.add(60.0 * minute, sample())
    assert [point.time for point in history.points()] == [360, 420, 480, 540]  # three whole ones, and this one


def test_a_history_goes_on_after_a_restart(tmp_path: Path) -> None:
    history = History(tmp_path, "door")
    for minute in range(5):
        history.add(60.0 * minute, sample(minute, entropy=0.25, agreed=True))
    history.save()
    again = History(tmp_path, "door")
    assert again.points() == history.points()
    again.add(900.0, sample())
    assert [point.time for point in again.points()] == [0, 60, 120, 180, 240, 900]
    assert [path.name for path in tmp_path.iterdir()] == ["door.history.json"]


GOOD = asdict(Point(60))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{}",
        b"[1]",
        b"[" * 100_000,
        json.dumps([{"time": 60}]).encode(),
        json.dumps([GOOD | {"entropy": "x"}]).encode(),
        json.dumps([GOOD | {"time": None}]).encode(),
        json.dumps([GOOD | {"frames": 1e300}]).encode(),
        b"[" + json.dumps(GOOD)[:-1].encode() + b', "more": 1}]',
    ],
)
def test_what_is_no_history_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    (tmp_path / "door.history.json").write_bytes(content)
    history = History(tmp_path, "door")
    assert history.points() == []
    assert "door.history.json: not a history, begun anew" in caplog.text
    history.add(0.0, sample())
    history.save()
    assert len(History(tmp_path, "door").points()) == 1


def test_a_disk_that_refuses_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = History(tmp_path / "absent", "door")
    history.add(0.0, sample())
    history.save()
    assert "cannot write here" in caplog.text
    assert len(history.points()) == 1


def test_the_server_looks_at_its_cameras_and_keeps_what_it_saw(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "SAMPLE_S", 0.05)
    run = Running(toy_bundle)
    run.view.history = History(tmp_path, "door")
    try:
        deadline_s = time.monotonic() + 20
        while not sum(point.updates for point in run.view.history.points()):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        code, _, body = ask(run.server, "/history/door")
        assert code == 200
        points = json.loads(body)["points"]
        assert points[-1]["frames"] > 0
        assert points[-1]["entropy"] > 0
        assert ask(run.server, "/history/none")[0] == 404
    finally:
        run.close()
    assert (tmp_path / "door.history.json").exists()


def test_one_camera_s_frozen_model_is_asked_at_a_look_whatever_their_number(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "SAMPLE_S", 3600.0)
    run = Running(toy_bundle)
    asked: list[tuple[int, bool]] = []
    looks = 0

    class Eye:
        """A view that only counts."""

        ended, silence_s, prediction_age_s = False, 0.0, 0.0
        history = History()

        def __init__(self, index: int) -> None:
            self.index = index

        def sample(self, _: float, *, compare: bool) -> None:
            asked.append((self.index, compare))

    try:
        with LiveServer(("127.0.0.1", 0), INFO) as server:
            server.cameras = tuple(Eye(index) for index in range(3))
            waits = iter([False] * 6)

            def wait(_: float) -> bool:
                nonlocal looks
                looks += 1
                return next(waits, True)

            monkeypatch.setattr(server.closing, "wait", wait)
            server._sample()
    finally:
        run.close()
    assert looks == 7
    assert [index for index, compare in asked if compare] == [0, 1, 2, 0, 1, 2]
    assert len(asked) == 18


def test_a_model_that_has_not_moved_agrees_with_the_frozen_one_without_being_asked(toy_bundle: Path) -> None:
    run = Running(toy_bundle)
    try:
        run.stop()
        before = run.view.compared
        frame, prediction, at_s = run.view._latest
        opinions: list[np.ndarray] = []
        ask_frozen = run.frozen.ask
        run.frozen.ask = lambda image: opinions.append(image) or ask_frozen(image)
        run.view._latest = (frame, replace(prediction, adapted=False), at_s)
        run.view._opinion = None
        run.view.sample(0.0, compare=True)
        assert (run.view.compared, opinions) == (before + 1, [])
        run.view.sample(1.0, compare=True)  # the same picture: nothing new
        assert run.view.compared == before + 1
        run.view._latest = (replace(frame, index=frame.index + 1), replace(prediction, adapted=True), at_s)
        run.view.sample(2.0, compare=True)
        assert len(opinions) == 1
    finally:
        run.close()


def test_the_page_draws_the_day(toy_bundle: Path, tmp_path: Path) -> None:
    points = [Point(60 * minute, 9, 0.5, 1.5, 0.9, updates=minute % 2) for minute in range(30)]
    (tmp_path / "door.history.json").write_text(json.dumps([asdict(point) for point in points]))
    run = Running(toy_bundle)
    run.view.history = History(tmp_path, "door")
    try:
        with Browser(tmp_path / "profile") as browser:
            browser.open(run.server.address)
            browser.wait_for("document.getElementById('day')?.hidden === false")
            legend = browser.evaluate("[...document.querySelectorAll('.legend i')].map(item => item.textContent)")
            assert [text.split()[1] for text in legend] == ["entropy", "drift", "agreement", "updates"]
            chart = "document.getElementById('history')"
            pixels = f"[...{chart}.getContext('2d').getImageData(0, 0, {chart}.width, {chart}.height).data]"
            painted = browser.evaluate(f"{pixels}.filter((value, at) => at % 4 === 3 && value).length")
            assert painted > 200
            assert not browser.errors
    finally:
        run.close()
