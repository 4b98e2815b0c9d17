"""Cameras that do not wait for each other: one that is not there at the start, one that is lost for good."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgg_edge.cli.main import main
from mgg_edge.cli.run_parts import open_sources
from mgg_edge.cli.run_words import CameraWords, named
from mgg_edge.errors import MissingDependencyError, SourceError, UsageError
from mgg_edge.runtime import Adapter
from mgg_edge.runtime.pipeline import Reader
from mgg_edge.runtime.session_lanes import Lane, run_lanes
from mgg_edge.runtime.sources import source_live
from mgg_edge.runtime.sources.source import FrameSource
from mgg_edge.runtime.sources.source_backoff import Backoff
from mgg_edge.runtime.sources.source_live import LiveOptions
from streams import HttpStream, free_port

QUICK = LiveOptions(open_timeout_s=20, stall_timeout_s=1.0, backoff=Backoff(first_s=0.1, limit_s=0.5))
FILM = "synthetic:frames=30"


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def open_named(
    specs: list[str], options: LiveOptions, stack: contextlib.ExitStack, *, strict: bool = False
) -> dict[str, FrameSource]:
    """Sources of a command line."""
    patience = {"stall_timeout": options.stall_timeout_s, "max_reconnects": options.max_reconnects}
    opened = open_sources(named(specs, CameraWords("", "", strict=strict, **patience)), options)
    for source in opened.values():
        stack.callback(source.close)
    return opened


def nobody() -> str:
    return f"http://127.0.0.1:{free_port()}/live"


def lanes(sources, bundle: Path, stack: contextlib.ExitStack) -> list[Lane]:
    return [
        Lane(name, Reader(source), stack.enter_context(Adapter.open(bundle, threads=1)))
        for name, source in sources.items()
    ]


def test_a_camera_that_comes_later_is_taken_up(toy_bundle: Path, stack, caplog):
    port = free_port()
    with caplog.at_level(logging.INFO):
        sources = open_named(
            [f"late=http://127.0.0.1:{port}/live", "film=synthetic:frames=0,rate=30,paced=1"], QUICK, stack
        )
        late = sources["late"]
        assert not late.stats.connected
        assert "camera late is not there yet" in caplog.text
        stack.enter_context(HttpStream("mpegts", port))
        begun_s = time.monotonic()
        total, parts = run_lanes(
            lanes(sources, toy_bundle, stack),
            stop=lambda: (late.stats.connected and time.monotonic() - begun_s > 2) or time.monotonic() - begun_s > 60,
        )
    assert parts["late"].frames_inferred > 0
    assert parts["film"].frames_inferred > 0
    assert (late.width, late.height, late.failure) == (64, 48, None)
    assert late.stats.reconnects == 0  # a first connection is none
    assert total.failure is None


def test_a_run_does_not_wait_for_ever_for_one_that_never_comes(toy_bundle: Path, stack, caplog):
    sources = open_named([f"never={nobody()}", f"film={FILM}"], QUICK, stack)
    total, parts = run_lanes(lanes(sources, toy_bundle, stack))
    assert parts["film"].frames_inferred == 30
    assert parts["never"].frames_inferred == 0
    assert (total.failure, parts["never"].ending) == (None, "stopped")
    assert "never there: never; the run ends with the others" in caplog.text


def test_one_lost_for_good_is_said_at_once_and_leaves_the_others(toy_bundle: Path, stack, caplog):
    options = LiveOptions(open_timeout_s=20, backoff=QUICK.backoff, max_reconnects=1)
    sources = open_named([f"gone={nobody()}", "film=synthetic:frames=0,rate=30,paced=1"], options, stack)
    limit_s = time.monotonic() + 60

    def said_or_late() -> bool:
        return "camera gone ended" in caplog.text or time.monotonic() > limit_s

    total, parts = run_lanes(lanes(sources, toy_bundle, stack), stop=said_or_late)
    assert parts["film"].failure is None
    assert isinstance(total.failure, SourceError)
    (said,) = [record.message for record in caplog.records if record.message.startswith("camera gone ended")]
    assert "lost after 1 attempts" in said


def test_all_of_them_absent_is_an_error(stack):
    with pytest.raises(SourceError, match="Connection refused"):
        open_named([nobody(), nobody()], QUICK, stack)


def test_strict_wants_every_one_of_them(stack):
    with pytest.raises(SourceError, match="Connection refused"):
        open_named([f"a={nobody()}", f"b={FILM}"], QUICK, stack, strict=True)


def test_one_camera_alone_must_be_there(stack):
    with pytest.raises(SourceError, match="Connection refused"):
        open_named([nobody()], QUICK, stack)


@pytest.mark.parametrize("spec", ["nowhere.mp4", "v4l2:///dev/../sda"])
def test_what_cannot_be_meant_is_still_refused(stack, spec: str):
    with pytest.raises(UsageError):
        open_named([spec, FILM], QUICK, stack)


def test_a_missing_package_is_no_absent_camera(stack, monkeypatch):
    def connect(self):
        raise MissingDependencyError("no decoder")

    monkeypatch.setattr(source_live.LiveSource, "_connect", connect)
    with pytest.raises(MissingDependencyError, match="no decoder"):
        open_named([nobody(), FILM], QUICK, stack)


def test_they_are_opened_side_by_side(stack, monkeypatch):
    from threading import Barrier

    together = Barrier(3, timeout=20)  # three that open one after the other would never meet here
    real = source_live.LiveSource._connect

    def connect(self):
        together.wait()
        return real(self)

    monkeypatch.setattr(source_live.LiveSource, "_connect", connect)
    names = open_named([f"{name}=synthetic:frames=5,live=1" for name in "abc"], QUICK, stack)
    assert list(names) == ["a", "b", "c"]


def test_on_the_command_line_the_others_end_well(toy_bundle: Path, capfd):
    words = ["run", "--bundle", toy_bundle, "--source", f"dead={nobody()}", "--source", f"one={FILM}", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*words, "--source", f"two={FILM}"]])
    out, err = capfd.readouterr()
    assert (ended.value.code or 0) == 0
    summary = json.loads(out.splitlines()[-1])["summary"]
    assert {name: part["frames_inferred"] for name, part in summary["sources"].items()} == {
        "dead": 0,
        "one": 30,
        "two": 30,
    }
    assert "camera dead is not there yet" in err
