"""The reader: always drains, loses nothing silently, and cannot be hung."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgg_edge.errors import SourceError, UsageError
from mgg_edge.runtime import Adapter, session
from mgg_edge.runtime.pipeline import QUEUE_FRAMES, Reader
from mgg_edge.runtime.session_lanes import Lane, run_lanes
from mgg_edge.runtime.sources.source import ClosingSource, Frame, IteratorSource
from mgg_edge.runtime.sources.source_synthetic import SyntheticSource
from videos import pictures


class Gated(ClosingSource):
    """A live source that gives a picture whenever it is allowed to."""

    name, live, width, height, rate, frames_expected = "gated", True, 48, 32, 25, None

    def __init__(self, count: int = 1000) -> None:
        self.allowed, self.given, self.closed = threading.Semaphore(0), 0, 0
        self._count, self._ending = count, threading.Event()

    def __iter__(self) -> Iterator[Frame]:
        image = pictures(1)[0]
        while self.given < self._count:
            self.allowed.acquire()
            if self._ending.is_set():
                return
            self.given += 1
            yield Frame(self.given - 1, self.given / 25, image)

    def interrupt(self) -> None:
        self._ending.set()
        self.allowed.release()

    def close(self) -> None:
        self.closed += 1


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def adds_up(reader: Reader) -> bool:
    counts = reader.counts
    return counts.captured == counts.delivered + sum(counts.dropped.values()) + counts.waiting


@pytest.fixture
def adapter(toy_bundle: Path) -> Iterator[Adapter]:
    with Adapter.open(toy_bundle, threads=1) as opened:
        yield opened


# --- policies


def test_latest_hands_over_the_newest_frame_and_counts_the_others() -> None:
    source = Gated()
    with Reader(source) as reader:
        assert reader.policy == "latest"
        source.allowed.release(50)
        until(lambda: reader.counts.captured == 50)
        assert reader.take(1).index == 49
        assert reader.take(0.01) is None
        assert reader.counts.dropped == {"superseded": 49}
        source.allowed.release(3)
        until(lambda: reader.counts.captured == 53)
    assert reader.counts.dropped == {"superseded": 51, "left-over": 1}
    assert reader.counts.waiting == 0
    assert adds_up(reader)
    assert source.closed == 1


def test_latest_is_never_older_than_what_has_come() -> None:
    """Whatever the reader's pace, the frame in hand is the newest at the time it is taken."""
    source = Gated()
    with Reader(source) as reader:
        for burst in (1, 7, 30, 2):
            source.allowed.release(burst)
            until(lambda: reader.counts.captured == source.given and source.allowed._value == 0)
            assert reader.take(1).index == source.given - 1


def test_every_frame_waits_for_a_slow_taker_and_drops_none() -> None:
    source = SyntheticSource.parse("synthetic:frames=40")
    with Reader(source) as reader:
        assert reader.policy == "every-frame"
        time.sleep(0.1)
        assert reader.counts.captured == QUEUE_FRAMES
        assert [reader.take(1).index for _ in range(40)] == list(range(40))
        assert reader.take(1) is None
        assert reader.ended
    assert (reader.counts.captured, reader.counts.delivered, reader.counts.dropped) == (40, 40, {})


def test_a_limit_is_never_read_beyond() -> None:
    for limit in (0, 1, 7):
        with Reader(SyntheticSource.parse("synthetic:frames=40"), limit=limit) as reader:
            taken = [reader.take(1) for _ in range(limit + 1)]
            assert taken[-1] is None
        assert reader.counts.captured == reader.counts.delivered == limit


def test_a_stop_hands_over_what_was_read() -> None:
    with Reader(SyntheticSource.parse("synthetic:frames=1000")) as reader:
        until(lambda: reader.counts.waiting == QUEUE_FRAMES)
        reader.stop()
        rest = []
        while (frame := reader.take(1)) is not None:
            rest.append(frame.index)
        assert rest == list(range(len(rest)))
        assert len(rest) >= QUEUE_FRAMES
        assert reader.counts.captured == len(rest)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="expected one of latest, every-frame, found 'newest'"):
        Reader(Gated(), "newest")


# --- faults


def test_a_failing_source_is_told_after_its_last_frame() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield from pictures(3)
        raise SourceError("cut short")

    with Reader(IteratorSource(broken())) as reader:
        assert [reader.take(1).index for _ in range(3)] == [0, 1, 2]
        with pytest.raises(SourceError, match="cut short"):
            reader.take(1)
        assert reader.take(1) is None


def test_a_bug_in_a_source_is_not_swallowed() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield from pictures(1)
        raise ZeroDivisionError

    with Reader(IteratorSource(broken())) as reader:
        reader.take(1)
        with pytest.raises(ZeroDivisionError):
            reader.take(1)


def test_a_source_that_hangs_in_this_process_ends_the_run_and_not_the_patience(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hang = threading.Event()

    def hanging() -> Iterator[np.ndarray]:
        yield from pictures(2)
        hang.wait()

    reader = Reader(IteratorSource(hanging()), stall_timeout_s=0.3)
    for _ in range(2):
        reader.take(1)
    start_s = time.monotonic()
    with pytest.raises(SourceError, match=r"gave no picture for 0\.3 s: it hangs"):
        deque(iter(lambda: reader.take(0.1), "never"))
    assert 0.3 <= time.monotonic() - start_s < 10
    reader.close(timeout_s=0.1)
    assert "left behind" in caplog.text
    hang.set()
    reader._thread.join(5)


def test_a_frame_that_comes_after_the_end_is_not_counted() -> None:
    late = threading.Event()

    def slow() -> Iterator[np.ndarray]:
        yield from pictures(1)
        late.wait()
        yield from pictures(1)

    reader = Reader(IteratorSource(slow()))
    reader.take(1)
    reader.close(timeout_s=0.1)
    late.set()
    reader._thread.join(5)
    assert (reader.counts.captured, reader.counts.waiting) == (1, 0)


faults = st.lists(
    st.sampled_from(["black", "white", "frozen", "torn", "noise", "shape", "backwards", "disconnect"]), max_size=4
)


@settings(max_examples=40, deadline=None)
@given(
    faults,
    st.integers(0, 60),
    st.sampled_from(["latest", "every-frame"]),
    st.none() | st.integers(1, 40),
    st.integers(0, 99),
    st.none() | st.integers(0, 30),
)
def test_frames_add_up_under_random_faults(
    toy_bundle: Path, names: list[str], count: int, policy: str, limit: int | None, seed: int, stop_after: int | None
) -> None:
    text = f"synthetic:frames={count},width=9,height=7,seed={seed},share=0.3,faults={'+'.join(names)}"
    seen: list[int] = []
    with Adapter.open(toy_bundle, threads=1) as adapter:
        reader = Reader(SyntheticSource.parse(text) if count else Gated(0), policy, limit=limit)
        summary = session.run(
            reader,
            adapter,
            [],
            lambda frame, _: seen.append(frame.index),
            stop=lambda: stop_after is not None and len(seen) >= stop_after,
            limit=limit,
        )
        assert adapter.state().non_finite() is None
    assert summary.frames_read == summary.frames_inferred + summary.frames_dropped
    assert summary.frames_dropped == sum(summary.drops.values())
    assert summary.frames_inferred == len(seen)
    assert seen == sorted(set(seen))
    assert set(summary.drops) <= {"superseded", "left-over", "malformed"}
    assert ("malformed" in summary.drops) <= ("shape" in names)
    assert (summary.failure is not None) <= ("disconnect" in names)
    if policy == "every-frame" and summary.ending == "exhausted" and limit is None:
        assert summary.frames_read == count
    assert adds_up(reader)


def test_control_a_drop_nobody_counts_is_found() -> None:
    source = Gated()
    with Reader(source) as reader:
        source.allowed.release(5)
        until(lambda: reader.counts.captured == 5)
        with reader._changed:
            reader._frames.clear()
        assert not adds_up(reader)


def test_malformed_frames_are_dropped_and_said_once_each(adapter: Adapter, caplog: pytest.LogCaptureFixture) -> None:
    source = SyntheticSource.parse("synthetic:frames=60,faults=shape,every=5")
    summary = session.run(Reader(source), adapter)
    assert summary.drops == {"malformed": 11}
    assert (summary.frames_read, summary.frames_inferred, summary.failure) == (60, 49, None)
    assert len([record for record in caplog.records if "dropped" in record.getMessage()]) == 3


def test_ages_are_those_of_the_frames(adapter: Adapter) -> None:
    frames = [Frame(index, index / 25, image, time.monotonic() - 3) for index, image in enumerate(pictures(5))]
    summary = session.run(frames, adapter)
    assert 3000 <= summary.frame_age_ms.p50 < 4000


def test_a_hung_run_stops_when_asked(adapter: Adapter) -> None:
    source, start_s = Gated(), time.monotonic()
    summary = session.run(Reader(source), adapter, stop=lambda: time.monotonic() - start_s > 0.3)
    assert summary.ending == "stopped"
    assert time.monotonic() - start_s < session.DRAIN_S + 5  # and not for ever


# --- several cameras


class Named:
    """A sink that keeps labels and frames, and fails when told to."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.seen, self.ended = error, [], ""

    def write(self, frame: Frame, prediction: object) -> None:
        if self.error is not None and frame.index == 5:
            raise self.error
        self.seen.append((frame.index, prediction.label, prediction.step))

    def close(self) -> None:
        self.ended = "close"

    def abort(self) -> None:
        self.ended = "abort"


def lanes(toy_bundle: Path, texts: dict[str, str], sinks: dict[str, Named]) -> list[Lane]:
    return [
        Lane(
            name, Reader(SyntheticSource.parse(f"synthetic:{text}")), Adapter.open(toy_bundle, threads=1), [sinks[name]]
        )
        for name, text in texts.items()
    ]


def test_each_camera_learns_for_itself_whatever_the_others_do(toy_bundle: Path) -> None:
    texts = {"a": "frames=60,seed=1", "b": "frames=30,seed=2", "c": "frames=60,seed=1"}
    sinks = {name: Named() for name in texts}
    opened = lanes(toy_bundle, texts, sinks)
    total, parts = run_lanes(opened)
    states = {lane.name: lane.adapter.state().digest() for lane in opened}
    alone, sink = {}, {name: Named() for name in texts}
    for lane in lanes(toy_bundle, texts, sink):
        run_lanes([lane])
        alone[lane.name] = lane.adapter.state().digest()
        lane.adapter.close()
    assert states == alone
    assert states["a"] == states["c"] != states["b"]
    assert {name: one.seen for name, one in sinks.items()} == {name: one.seen for name, one in sink.items()}
    assert total.frames_inferred == 150 == sum(part.frames_inferred for part in parts.values())
    assert total.adapt_steps == sum(part.adapt_steps for part in parts.values()) > 20
    for lane in opened:
        lane.adapter.close()


def test_a_camera_that_fails_leaves_the_others_running(toy_bundle: Path) -> None:
    texts = {"bad": "frames=60,faults=disconnect,every=5", "good": "frames=60"}
    sinks = {name: Named() for name in texts}
    opened = lanes(toy_bundle, texts, sinks)
    total, parts = run_lanes(opened)
    assert (parts["bad"].ending, parts["good"].ending, total.ending) == ("failed", "exhausted", "failed")
    assert parts["good"].frames_inferred == 60
    assert "disconnected" in str(total.failure)
    for lane in opened:
        lane.adapter.close()


def test_a_reader_of_the_output_that_goes_away_ends_all(toy_bundle: Path) -> None:
    texts = {"a": "frames=20", "b": "frames=0"}
    sinks = {"a": Named(BrokenPipeError()), "b": Named()}
    opened = lanes(toy_bundle, texts, sinks)
    total, parts = run_lanes(opened)
    assert (parts["a"].ending, parts["b"].ending, total.failure) == ("reader-gone", "stopped", None)
    for lane in opened:
        lane.adapter.close()


def test_a_bug_in_one_camera_ends_all_and_is_not_swallowed(toy_bundle: Path) -> None:
    texts = {"a": "frames=20", "b": "frames=0"}
    sinks = {"a": Named(ZeroDivisionError()), "b": Named()}
    opened = lanes(toy_bundle, texts, sinks)
    with pytest.raises(ZeroDivisionError):
        run_lanes(opened)
    assert (sinks["a"].ended, sinks["b"].ended) == ("abort", "close")
    for lane in opened:
        lane.adapter.close()


def test_names_must_differ(toy_bundle: Path) -> None:
    opened = lanes(toy_bundle, {"a": "frames=1"}, {"a": Named()})
    for wrong in ([], opened * 2):
        with pytest.raises(UsageError, match="expected different names"):
            run_lanes(wrong)
    opened[0].reader.close()
    opened[0].adapter.close()
