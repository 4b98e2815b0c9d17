"""Canaries, collapse and the ladder; each with a case that passes and the neighbouring one that does not."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from mgg_edge.errors import UsageError
from mgg_edge.runtime.adaptation.guard import BreachCode
from mgg_edge.runtime.adaptation.guard_canary import CanarySet, CanarySettings, check_canaries, probabilities
from mgg_edge.runtime.adaptation.guard_collapse import ClassWindow, CollapseSettings, check_collapse, effective_classes
from mgg_edge.runtime.adaptation.guard_ladder import Ladder, LadderSettings, Rung
from mgg_edge.state import AdaptState

FRAME = np.zeros((4, 4, 3), np.uint8)


def logits(index: int, probability: float, classes: int = 5) -> np.ndarray:
    """Logits whose softmax gives one class a probability and shares the rest equally."""
    rest = (1 - probability) / (classes - 1)
    row = np.full(classes, math.log(rest), np.float32)
    row[index] = math.log(probability)
    return row


def canaries(*classes: int) -> CanarySet:
    chosen = CanarySet()
    for index in classes:
        chosen = chosen.offer(FRAME, logits(index, 0.95))
    return chosen


class TestCanaries:
    def test_only_certain_frames_are_chosen(self):
        assert CanarySet().offer(FRAME, logits(2, 0.89)).classes == ()
        assert CanarySet().offer(FRAME, logits(2, 0.91)).classes == (2,)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_logits_that_are_not_finite_choose_nothing(self, value: float):
        row = logits(2, 0.95)
        row[0] = value
        assert CanarySet().offer(FRAME, row).classes == ()

    def test_few_of_a_class_and_few_in_all(self):
        assert canaries(1, 1, 1, 2, 2, 2).classes == (1, 1, 2, 2)
        many = CanarySet(CanarySettings(capacity=3))
        for index in range(5):
            many = many.offer(FRAME, logits(index, 0.95))
        assert many.classes == (0, 1, 2)
        assert many.is_full

    def test_a_canary_s_picture_is_its_own(self):
        picture = FRAME.copy()
        chosen = CanarySet().offer(picture, logits(1, 0.95))
        picture[:] = 9
        assert chosen.frames[0].max() == 0

    @pytest.mark.parametrize(
        ("least", "kept", "passes"),
        [(0.5, 4, True), (0.5, 2, True), (0.5, 1, False), (0.5, 0, False), (0.9, 4, True), (0.9, 3, False)],
    )
    def test_as_many_as_agreed_must_keep_their_class(self, least: float, kept: int, passes: bool):
        chosen = replace(canaries(0, 1, 2, 3), settings=CanarySettings(min_agreement=least))
        found = np.stack([logits(index if index < kept else 4, 0.9) for index in range(4)])
        breach = check_canaries(chosen, lambda _: found, 4)
        assert (breach is None) is passes
        assert breach is None or breach == (BreachCode.CANARY, f"only {kept} of 4 canaries keep their class")

    @pytest.mark.parametrize("batch", [1, 2, 3])
    @pytest.mark.parametrize("least", [0.0, 0.5, 0.75, 1.0])
    def test_the_verdict_is_that_of_all_and_no_more_are_asked_than_decide_it(self, least: float, batch: int):
        numbered = [np.full_like(FRAME, number) for number in range(4)]
        chosen = replace(canaries(0, 1, 2, 3), frames=tuple(numbered), settings=CanarySettings(min_agreement=least))
        for pattern in itertools.product((True, False), repeat=4):
            asked: list[int] = []

            def infer(frames: np.ndarray, pattern=pattern, asked=asked) -> np.ndarray:
                asked += frames[:, 0, 0, 0].tolist()
                return np.stack([logits(number if pattern[number] else 4, 0.9) for number in asked[-len(frames) :]])

            breach = check_canaries(chosen, infer, batch)
            assert (breach is None) is (sum(pattern) >= 4 * least)
            assert asked == list(range(len(asked)))
            before = (len(asked) - 1) // batch * batch  # asked when the last batch was not
            kept = sum(pattern[:before])
            assert kept < 4 * least or before == 0
            assert kept + 4 - before >= 4 * least

    def test_too_few_judge_nothing(self):
        def wrong(frames: np.ndarray) -> np.ndarray:
            return np.stack([logits(4, 0.9)] * len(frames))

        assert check_canaries(canaries(0, 1), wrong) is None
        assert check_canaries(canaries(0, 1, 2), wrong) is not None

    def test_nan_is_no_agreement(self):
        found = np.stack([logits(index, 0.9) for index in range(3)])
        found[0, 4] = math.nan
        assert check_canaries(canaries(0, 1, 2), lambda _: found, 3) is not None

    @pytest.mark.parametrize("change", [{"min_agreement": 1.1}, {"min_probability": math.nan}, {"capacity": -1}])
    def test_settings(self, change: dict):
        with pytest.raises(UsageError, match=r"canary\."):
            CanarySettings(**change)

    def test_probabilities_of_extreme_logits(self):
        np.testing.assert_allclose(probabilities(np.array([[1e30, -1e30]], np.float32)), [[1, 0]])


class TestCollapse:
    def test_effective_classes(self):
        assert effective_classes(np.array([3, 3, 3])) == pytest.approx(1)
        assert effective_classes(np.array([0, 1, 2, 3])) == pytest.approx(4)
        assert 1 < effective_classes(np.array([0, 0, 0, 1])) < 2

    def test_suspicion_needs_a_full_window_of_nearly_one_class(self):
        settings = CollapseSettings(window=10, max_share=0.9)
        window = ClassWindow(settings)
        for index in [1] * 9:
            window = window.add(index)
        assert not window.is_suspicious
        assert window.add(2).is_suspicious
        assert not window.add(2).add(3).is_suspicious
        assert len(window.add(2).add(3).classes) == 10

    def rows(self, *pairs: tuple[int, float]) -> np.ndarray:
        return np.stack([logits(*pair) for pair in pairs])

    def test_one_class_where_the_source_sees_several(self):
        source = self.rows((0, 0.8), (1, 0.8), (2, 0.8), (3, 0.8))
        adapted = self.rows(*[(0, 0.99)] * 4)
        breach = check_collapse(adapted, source, CollapseSettings())
        assert breach is not None
        assert breach.code is BreachCode.COLLAPSE
        assert check_collapse(source, source, CollapseSettings()) is None

    def test_a_camera_that_looks_at_one_thing(self):
        same = self.rows(*[(0, 0.9)] * 4)
        assert check_collapse(same, same, CollapseSettings()) is None

    def test_guesses_of_the_source_do_not_count(self):
        guesses = self.rows((0, 0.4), (1, 0.4), (2, 0.4), (3, 0.4))
        assert check_collapse(self.rows(*[(0, 0.99)] * 4), guesses, CollapseSettings()) is None
        mixed = self.rows((0, 0.8), (1, 0.8), (2, 0.4), (3, 0.4))
        assert check_collapse(self.rows(*[(0, 0.99)] * 4), mixed, CollapseSettings()) is None, "two are too few"

    def test_some_loss_of_diversity_is_allowed(self):
        source = self.rows((0, 0.8), (1, 0.8), (2, 0.8), (3, 0.8))
        adapted = self.rows((0, 0.9), (1, 0.9), (2, 0.9), (2, 0.9))
        assert check_collapse(adapted, source, CollapseSettings()) is None

    @pytest.mark.parametrize("change", [{"max_share": 1.1}, {"min_fraction": math.nan}, {"window": 0}])
    def test_settings(self, change: dict):
        with pytest.raises(UsageError, match=r"collapse\."):
            CollapseSettings(**change)


def state(value: float) -> AdaptState:
    return AdaptState({"theta": np.full(3, value, np.float32)})


SOURCE, GOOD, LATER, BAD = state(0), state(1), state(2), state(9)
LADDER = Ladder.start(SOURCE, LadderSettings(verify_every=3, older_every=2, refusals=4, freeze_frames=5))


class TestLadder:
    def test_every_third_commit_is_verified(self):
        ladder, due = LADDER, []
        for _ in range(7):
            due.append(ladder.verification_due)
            ladder = ladder.verified(GOOD) if ladder.verification_due else ladder.committed()
        assert due == [False, False, True] * 2 + [False]

    def test_a_verification_that_had_nothing_to_judge_by_proves_nothing(self):
        ladder, _ = LADDER.verified(GOOD).climb(BAD)
        ladder = ladder.after_commit(LATER, False).after_commit(LATER, False)
        assert ladder.verification_due
        ladder = ladder.after_commit(LATER, False)
        assert (ladder.last_good, ladder.rung, ladder.verification_due) == (GOOD, Rung.OLDER, False)
        assert ladder.after_commit(LATER, True).last_good is LATER

    def test_the_rungs_in_order(self):
        ladder = LADDER.verified(GOOD).verified(GOOD).verified(LATER)
        assert (ladder.last_good, ladder.older) == (LATER, GOOD)
        found = []
        for _ in range(4):
            ladder, rung = ladder.climb(BAD)
            found.append((rung, ladder.target(rung)))
        assert found == [(Rung.LAST_GOOD, LATER), (Rung.OLDER, GOOD), (Rung.SOURCE, SOURCE), (Rung.FROZEN, SOURCE)]
        assert ladder.is_frozen

    def test_frozen_for_a_while_then_one_step_from_it(self):
        ladder = LADDER.verified(GOOD)
        for _ in range(4):
            ladder, _ = ladder.climb(BAD)
        for _ in range(5):
            assert ladder.is_frozen
            ladder = ladder.frame()
        assert not ladder.is_frozen
        assert ladder.frame() is ladder
        assert ladder.climb(BAD)[1] is Rung.SOURCE

    def test_rungs_that_would_change_nothing_are_left_out(self):
        assert LADDER.climb(SOURCE)[1] is Rung.FROZEN
        assert LADDER.climb(BAD)[1] is Rung.LAST_GOOD
        copy = AdaptState({"theta": GOOD["theta"].copy()})
        assert LADDER.verified(GOOD).climb(copy)[1] is Rung.OLDER

    def test_a_passed_verification_goes_one_rung_down(self):
        ladder, _ = LADDER.verified(GOOD).climb(BAD)
        assert ladder.rung is Rung.OLDER
        assert ladder.committed().rung is Rung.OLDER
        assert ladder.verified(LATER).rung is Rung.LAST_GOOD
        assert LADDER.verified(GOOD).rung is Rung.LAST_GOOD

    def test_single_refusals_do_not_climb_and_a_commit_forgives_them(self):
        ladder = LADDER.verified(GOOD)
        rungs = []
        for _ in range(3):
            ladder, rung = ladder.refuse(BAD)
            rungs.append(rung)
        assert rungs == [None] * 3
        assert ladder.committed().refuse(BAD)[1] is None
        ladder, rung = ladder.refuse(BAD)
        assert (rung, ladder.refused) == (Rung.LAST_GOOD, 0)

    def test_a_state_from_outside_is_the_new_ground(self):
        ladder = LADDER.verified(GOOD).committed().rebase(LATER)
        assert (ladder.last_good, ladder.older, ladder.commits) == (LATER, SOURCE, 0)

    @pytest.mark.parametrize("name", ["verify_every", "older_every", "refusals", "freeze_frames"])
    def test_settings(self, name: str):
        with pytest.raises(UsageError, match=rf"ladder\.{name}: expected a number of at least 1, found 0"):
            LadderSettings(**{name: 0})

    def test_labels(self):
        assert [rung.label for rung in Rung] == ["last-good", "older", "source", "frozen"]
