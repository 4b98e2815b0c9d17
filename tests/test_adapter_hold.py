"""A person's word: pause, freeze, go on, reset. Inference never stops, and what was learned is not lost by a pause."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import toy
from mgg_edge.runtime import Adapter
from mgg_edge.runtime.store.record import RunRecorder
from mgg_edge.runtime.store.record_file import Record
from mgg_edge.runtime.store.record_replay import Replay
from mgg_edge.state import AdaptState

FRAMES = toy.frames(240)


@pytest.fixture(params=[False, True], ids=["between frames", "background"])
def adapter(toy_bundle: Path, request):
    with Adapter.open(toy_bundle, threads=1, adapt="always", background=request.param) as opened:
        yield opened


def learn(adapter: Adapter, frames=FRAMES[:80]) -> str:
    """Hash of the state after some frames."""
    for frame in frames:
        adapter(frame)
    adapter.drain()
    return adapter.state().digest()


def goes_on_learning(adapter: Adapter, before: str) -> bool:
    """Whether further frames change the state; of single steps the guard may refuse any."""
    return any(learn(adapter, FRAMES[160:]) != before for _ in range(20))


def test_a_pause_shows_the_source_and_keeps_what_was_learned(adapter: Adapter, toy_bundle: Path):
    before = learn(adapter)
    adapter.pause()
    assert adapter.held == "paused"
    kept = adapter.checkpoint().state.digest()
    shown = [adapter(frame) for frame in FRAMES[80:160]]
    with Adapter.open(toy_bundle, threads=1, adapt="off") as source:
        expected = [source(frame) for frame in FRAMES[80:160]]
    for found, plain in zip(shown, expected, strict=True):
        np.testing.assert_allclose(found.logits, plain.logits, atol=1e-5)  # one of them may be folded
    assert not any(prediction.adapted for prediction in shown)
    adapter.go_on()
    assert adapter.held is None
    assert kept == adapter.state().digest() == before
    assert goes_on_learning(adapter, before)


def test_frozen_infers_by_what_it_is_and_learns_nothing(adapter: Adapter):
    before = learn(adapter)
    adapter.freeze()
    steps = adapter.counters.adapt_steps
    assert all(adapter(frame).adapted for frame in FRAMES[80:160])
    adapter.drain()
    assert (adapter.state().digest(), adapter.counters.adapt_steps, adapter.held) == (before, steps, "frozen")
    adapter.go_on()
    assert goes_on_learning(adapter, before)


def test_a_pause_within_a_freeze_and_back(adapter: Adapter):
    before = learn(adapter)
    adapter.freeze()
    adapter.pause()
    assert not adapter.adapted
    adapter.freeze()  # of what the pause gave back, not of the source
    assert adapter.state().digest() == before
    adapter.go_on()
    adapter.go_on()  # nothing to end: nothing happens
    assert adapter.held is None


def test_a_step_that_is_being_made_is_void(toy_bundle: Path):
    """Its batch was taken before the word; it is finished after it."""
    with Adapter.open(toy_bundle, threads=1, adapt="always") as adapter:
        before, learner = adapter.state().digest(), adapter._learner
        perform, learner.perform = learner.perform, lambda work: (adapter.freeze(), perform(work))
        learn(adapter)
        assert adapter.held == "frozen"
        assert adapter.state().digest() == before


def test_reset_forgets(adapter: Adapter, loaded_toy):
    learn(adapter)
    adapter.pause()
    adapter.reset()
    assert adapter.state().digest() == loaded_toy.initial_state.digest()
    assert (adapter.held, adapter.adapted) == (None, False)
    assert adapter.counters.frames_inferred == 80
    watch = adapter._learner.watch
    assert watch.bank.snapshots == ()
    assert watch.ladder.last_good.digest() == loaded_toy.initial_state.digest()
    learn(adapter, FRAMES[80:])
    assert adapter.counters.adapt_steps > 0


def test_a_loaded_state_ends_a_pause(adapter: Adapter):
    learn(adapter)
    adapter.pause()
    state = AdaptState({name: array + np.float32(0) for name, array in adapter.checkpoint().state.items()})
    adapter.load_state(state)
    assert adapter.held is None
    assert adapter.state().digest() == state.digest()


def test_every_word_is_in_the_record_and_replayed(toy_bundle: Path, loaded_toy, toy_engine, tmp_path: Path):
    recorder = RunRecorder(tmp_path / "run.mggrun")
    words = {60: "pause", 100: "go_on", 120: "freeze", 150: "go_on", 200: "reset"}
    with Adapter.open(toy_bundle, threads=1, adapt="always", journal=recorder) as adapter:
        recorder.begin(adapter, {"threads": 1, "av": "1.0"})
        for number, frame in enumerate(FRAMES):
            adapter(frame, number / 25)
            getattr(adapter, words.get(number, "drain"))()
    recorder.close()
    record = Record.read(recorder.path)
    said = [event.event for event in record.events if event.event in ("pause", "freeze", "resume", "reset")]
    assert said == ["pause", "resume", "freeze", "resume", "reset"]
    assert {line.refused for line in record.frames[61:101]} == {"paused"}
    report = Replay(record, loaded_toy, toy_engine).run(FRAMES)
    assert report.difference is None
    assert report.frames == len(FRAMES)
