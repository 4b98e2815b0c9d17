"""Calibration to a site: what is measured, what is written, what it guards against, and that each guard is needed."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from mgg_edge.cli.main import main
from mgg_edge.container import read_container
from mgg_edge.errors import UsageError
from mgg_edge.files import packaged_file
from mgg_edge.manifest import SiteRow
from mgg_edge.runtime import Adapter, Bundle, demo
from mgg_edge.runtime.adaptation import calibration
from mgg_edge.runtime.adaptation.adapter_step import Stepper
from mgg_edge.runtime.adaptation.calibration import calibrate, gather_frames, judge
from mgg_edge.runtime.adaptation.site import default_schedule, site_note
from mgg_edge.runtime.engines.engine import open_engine
from mgg_edge.runtime.engines.self_test import self_test
from mgg_edge.runtime.sources.source import IteratorSource
from mgg_edge.runtime.sources.source_demo import packaged_faces
from mgg_edge.scenes.courses import parse_weather
from mgg_edge.scenes.domains import OPERATIONS
from mgg_edge.scenes.sources import GlyphSource

FEW, REST = np.array([8]), np.array([*range(8), *range(9, 36)])  # a site that shows the letter I; all others


@pytest.fixture(scope="module")
def packaged():
    """Paths of the two default bundles, and the faces."""
    return packaged_file(demo.DEFAULT_BUNDLE), packaged_file(demo.MGG_BUNDLE), GlyphSource(packaged_faces())


def shot(source, classes, count, seed, weather="clean"):
    """What a camera sees that looks at some characters."""
    rng = np.random.default_rng(seed)
    return list(parse_weather(weather)(source.draw(rng.choice(classes, count), rng), rng))


def source_of(frames):
    return IteratorSource(frames, name="shot.mp4")


@pytest.fixture(scope="module")
def sites(packaged, tmp_path_factory):
    """The default bundle calibrated on one character, with what was found."""
    default, _, characters = packaged
    path = tmp_path_factory.mktemp("site") / "site.mgg"
    return path, calibrate(default, source_of(shot(characters, FEW, 160, 1)), path, threads=1)


def changed(bundle, frames, adapt="auto"):
    """Share of predictions that adapting changes, and the adapter's counters."""
    frozen, adapter = (Adapter.open(bundle, adapt=mode, threads=1) for mode in ("off", adapt))
    with frozen, adapter:
        different = [frozen(frame).index != adapter(frame).index for frame in frames]
        return float(np.mean(different)), adapter.counters


class TestBundle:
    def test_only_the_statistics_differ(self, packaged, sites):
        before, after = Bundle.load(packaged[0]), Bundle.load(sites[0])
        assert after.id != before.id
        assert after.manifest.site.parent == before.id
        assert dict(after.graphs) == dict(before.graphs)
        assert set(after.weights) == set(before.weights)
        different = {name for name in before.weights if not np.array_equal(before.weights[name], after.weights[name])}
        assert different == {"statistics.mean", "statistics.std", "statistics.clean_discrepancy"}
        assert after.manifest.statistics.source == "shot.mp4"

    def test_statistics_are_those_of_the_pictures(self, packaged, sites):
        bundle = Bundle.load(packaged[0])
        frames = shot(packaged[2], FEW, 160, 1)
        engine = open_engine(bundle, threads=1, with_adapt=False)
        features = np.concatenate([engine.infer(frame[None], bundle.initial_state)[1] for frame in frames])
        engine.close()
        weights = Bundle.load(sites[0]).weights
        # float32 of sums in float64, features of another batch size: relative 1e-5
        np.testing.assert_allclose(weights["statistics.mean"], features.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(weights["statistics.std"], features.std(0, ddof=1), rtol=1e-4, atol=1e-5)
        window = max(
            np.square(p.mean(0) - features.mean(0)).mean()
            + np.square(p.std(0, ddof=1) - features.std(0, ddof=1)).mean()
            for p in (features[start : start + 8] for start in range(0, 153, 2))
        )
        assert weights["statistics.clean_discrepancy"][2] == pytest.approx(window, rel=1e-3)

    def test_the_windows_are_those_the_rules_know(self):
        base = pytest.importorskip("mgg_edge.learn.rules.base", exc_type=ImportError)
        assert calibration.CLEAN_WINDOWS == base.CLEAN_WINDOWS

    def test_the_self_test_is_made_anew(self, sites):
        bundle = Bundle.load(sites[0])
        engine = open_engine(bundle, threads=1)
        assert self_test(bundle, engine).passed
        engine.close()
        assert bundle.self_test["canaries"].shape == (16, 32, 32, 3)

    def test_altered_site_facts_are_refused(self, sites, tmp_path):
        manifest, _, _ = read_container(sites[0])
        for change, message in (({"verdict": "maybe"}, "site.verdict"), ({"parent": "x"}, "site.parent")):
            with pytest.raises(Exception, match=message):
                manifest.replace(site=dataclasses.replace(manifest.site, **change))


class TestReport:
    def test_each_kind_is_judged_by_the_frozen_model_s_clean_predictions(self, sites):
        site = sites[1]
        assert len(site.rows) == calibration.REPORT_WEATHERS
        assert {part for row in site.rows for part in row.kind.split("+")} <= set(OPERATIONS)
        assert all(0 <= row.frozen <= 1 and 0 <= row.adapted <= 1 for row in site.rows)
        assert np.mean([row.frozen for row in site.rows]) < 0.95

    def test_what_adapting_is_worth_is_seen_on_footage_it_was_not_calibrated_on(self, packaged, monkeypatch, tmp_path):
        seen, drafts = [], []
        agreement = calibration._agreement

        def report(draft, clean, *_):
            seen.append(clean)
            drafts.append(Bundle.load(draft))
            return ()

        monkeypatch.setattr(calibration, "_report", report)
        monkeypatch.setattr(calibration, "_agreement", lambda *words: seen.append(words[1]) or agreement(*words))
        monkeypatch.setattr(calibration, "judge", lambda *_: "adapt")
        frames = shot(packaged[2], FEW, 60, 1)
        calibrate(packaged[0], source_of(frames), tmp_path / "site.mgg", threads=1)
        kept = gather_frames(source_of(frames), Bundle.load(packaged[0]).manifest)
        known = math.ceil(0.7 * len(kept))
        assert np.array_equal(seen[0], kept[known:])
        assert len(seen[1]) == len(kept)
        assert drafts[0].manifest.site.frames == known
        assert Bundle.load(tmp_path / "site.mgg").manifest.site.frames == len(kept)

    @pytest.mark.parametrize(
        ("gains", "clean", "verdict"),
        [
            ((0.1, 0.0, -0.02), 0.0, "adapt"),
            ((0.1, 0.0, -0.06), 0.0, "burst only"),
            ((0.1, 0.0, 0.02), 0.011, "do not adapt"),
            ((-0.01, 0.0, 0.0), 0.0, "do not adapt"),
            ((0.0, 0.0, 0.0), 0.0, "do not adapt"),
            ((0.1, 0.1, 0.1), float("nan"), "do not adapt"),
        ],
    )
    def test_the_verdict(self, gains, clean, verdict):
        assert judge([SiteRow("k", 0.5, 0.5 + gain) for gain in gains], clean) == verdict

    @pytest.mark.parametrize(
        ("verdict", "schedule"), [("adapt", "window"), ("burst only", "burst"), ("do not adapt", "off")]
    )
    def test_a_run_obeys_it_unless_told_otherwise(self, sites, verdict, schedule):
        manifest, _, _ = read_container(sites[0])
        manifest = manifest.replace(site=dataclasses.replace(manifest.site, verdict=verdict))
        assert default_schedule(manifest) == schedule
        note = site_note(manifest, "auto")
        assert (note is None) == (verdict == "adapt")
        assert site_note(manifest, "always") is None

    def test_a_run_without_a_site_says_so_once(self, packaged, capsys):
        with pytest.raises(SystemExit):
            main(["run", "--source", "demo", "--limit", "3", "--json"])
        assert " ".join(capsys.readouterr().err.split()).count("knows no site") == 1


class TestGuards:
    """Each figure is exceeded when the guard that holds it is taken out."""

    def test_a_clean_shot_is_left_alone(self, packaged, sites):
        share, counters = changed(sites[0], shot(packaged[2], FEW, 320, 5))
        assert share <= 0.01
        assert counters.rejected["calm"] >= 10

    def test_another_shot_without_weather_makes_the_guard_abstain(self, packaged, sites):
        share, counters = changed(sites[0], shot(packaged[2], REST, 320, 6))
        assert share <= 0.03
        assert counters.rejected["calm"] >= 10

    def test_positive_control_without_the_guard_another_shot_is_harmed(self, packaged, sites, monkeypatch):
        monkeypatch.setattr(Stepper, "_check_calm", lambda *_: None)
        monkeypatch.setattr(Stepper, "_verify", lambda *_: (None, False))
        share, _ = changed(sites[0], shot(packaged[2], REST, 320, 6))
        assert share > 0.03

    def test_positive_control_without_the_site_a_gradient_rule_touches_clean_frames(self, packaged):
        share, _ = changed(packaged[1], shot(packaged[2], FEW, 320, 5))
        assert share > 0.01

    def test_weather_is_adapted_to_all_the_same(self, packaged, sites):
        frames = shot(packaged[2], FEW, 320, 7, "gaussian_noise@4")
        share, counters = changed(sites[0], frames)
        assert counters.adapt_steps >= 10
        assert share > 0.03

    def test_when_the_weather_clears_the_source_returns(self, packaged, sites):
        with Adapter.open(sites[0], threads=1) as adapter:
            for frame in shot(packaged[2], FEW, 240, 7, "gaussian_noise@4"):
                adapter(frame)
            assert adapter(shot(packaged[2], FEW, 1, 8)[0]).adapted
            for frame in shot(packaged[2], FEW, 160, 9):
                last = adapter(frame)
            assert not last.adapted

    def test_a_candidate_that_changes_the_canaries_is_refused(self, packaged, sites):
        """Canaries under another name: as if the candidate had changed all of them."""
        with Adapter.open(sites[0], threads=1) as adapter:
            stepper = adapter._learner._stepper
            wrong = tuple((number + 1) % 36 for number in stepper.canaries.classes)
            stepper.canaries = dataclasses.replace(stepper.canaries, classes=wrong)
            for frame in shot(packaged[2], FEW, 80, 7, "gaussian_noise@4"):
                adapter(frame)
            assert adapter.counters.adapt_steps == 0
            assert adapter.counters.rejected["canary"] > 0


class TestFrames:
    def test_too_few_or_equal_pictures_are_refused(self, packaged):
        manifest = Bundle.load(packaged[0]).manifest
        frames = shot(packaged[2], FEW, 20, 0)
        with pytest.raises(UsageError, match=r"shot\.mp4: expected at least 32 pictures that differ, found 20"):
            gather_frames(source_of(frames), manifest)
        with pytest.raises(UsageError, match="found 1"):
            gather_frames(source_of(frames[:1] * 100), manifest)

    def test_they_are_spread_over_the_source(self, packaged):
        manifest = Bundle.load(packaged[0]).manifest
        frames = shot(packaged[2], FEW, 400, 0)
        kept = gather_frames(source_of(frames), manifest, limit=100)
        assert len(kept) == 100
        assert np.array_equal(kept[1], frames[4])

    def test_they_are_spread_over_the_minutes_of_a_camera(self, packaged):
        manifest = Bundle.load(packaged[0]).manifest
        frames, told = shot(packaged[2], FEW, 400, 0), []
        camera = IteratorSource(frames, name="camera", live=True, rate=10)  # 40 seconds
        kept = gather_frames(camera, manifest, limit=60, seconds=30, progress=lambda *words: told.append(words))
        assert len(kept) == 60
        assert np.array_equal(kept[1], frames[5])  # one each half second
        assert told[-1] == ("seconds of footage", 29, 30)

    def test_a_still_camera_ends_with_its_minutes(self, packaged):
        manifest = Bundle.load(packaged[0]).manifest
        taken = []
        frames = shot(packaged[2], FEW, 1, 0)

        def still():
            for number in range(10_000):
                taken.append(number)
                yield frames[0]

        with pytest.raises(UsageError, match="found 1: calibrate while something moves"):
            gather_frames(IteratorSource(still(), name="camera", live=True, rate=10), manifest, seconds=20)
        assert len(taken) < 210

    def test_asked_to_stop_it_makes_do_with_what_there_is(self, packaged):
        manifest = Bundle.load(packaged[0]).manifest
        frames, asked = shot(packaged[2], FEW, 100, 0), []
        kept = gather_frames(source_of(frames), manifest, stop=lambda: asked.append(1) or len(asked) > 40)
        assert len(kept) == 40


def test_the_command_prints_the_report_and_writes_the_bundle(packaged, tmp_path, capsys):
    folder = tmp_path / "clean"
    folder.mkdir()
    from PIL import Image

    for number, frame in enumerate(shot(packaged[2], FEW, 40, 3)):
        Image.fromarray(frame).save(folder / f"{number:03}.png")
    out = tmp_path / "site.mgg"
    words = ["calibrate", "--bundle", str(packaged[0]), "--source", str(folder), "--out", str(out), "--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    assert ended.value.code in (0, None)
    facts = json.loads(capsys.readouterr().out)
    assert facts["frames"] == 40
    assert facts["verdict"] in ("adapt", "burst only", "do not adapt")
    assert len(facts["rows"]) == calibration.REPORT_WEATHERS
    with pytest.raises(SystemExit):
        main(["inspect", str(out)])
    assert "verdict" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*words[:-4], "--out", str(tmp_path / "none" / "x.mgg")])
    assert ended.value.code == 1
