"""Statistics of batch normalisation against those of a clean scene: the rule, its measurement, and what it is for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

from mgg_edge.errors import UsageError  # noqa: E402
from mgg_edge.export import ExportRequest, Origins, compose, export_bundle  # noqa: E402
from mgg_edge.learn import AdaptStep, Objective, backbone, measure_statistics  # noqa: E402
from mgg_edge.learn.images import synthetic_frames  # noqa: E402
from mgg_edge.learn.norm_statistics import Reference, StatisticsNorm  # noqa: E402
from mgg_edge.learn.rules.statistics import Statistics  # noqa: E402
from mgg_edge.runtime import Adapter, open_engine  # noqa: E402
from mgg_edge.runtime.adaptation import site_statistics  # noqa: E402
from mgg_edge.runtime.adaptation.site_statistics import CLEAN, MOVING, with_clean_statistics, with_site_statistics  # noqa: E402
from mgg_edge.runtime.bundle.bundle import Bundle  # noqa: E402
from mgg_edge.state import AdaptState  # noqa: E402
from own_models import moving_net  # noqa: E402

pytestmark = pytest.mark.torch
SIZE, BATCH = 32, 8
LABELS = [f"class {index}" for index in range(10)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path, made = tmp_path_factory.mktemp("statistics") / "x.mgg", moving_net("mix:0.3")
    statistics = measure_statistics(made, synthetic_frames(64, SIZE, SIZE, 3).split(8))
    step = AdaptStep(made, Objective(), Statistics(), statistics, 1.0)
    origins = Origins("own", "", "synthetic")
    export_bundle(step, path, adapt_batch=BATCH, labels=LABELS, origins=origins, parity_steps=20)
    return Bundle.load(path)


def scene(count, seed=0):
    """Pictures of one scene, u8[n, H, W, 3]: a dim one with little colour, and small changes in it."""
    base = synthetic_frames(1, SIZE, SIZE, 77).numpy().astype(float)
    moving = np.random.default_rng(seed).normal(0, 18, (count, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    return np.clip(base * 0.5 + 20 + moving, 0, 255).astype(np.uint8)


def haze(pictures):
    return (0.4 * pictures.astype(float) + 120).astype(np.uint8)


def test_the_two_halves_call_them_the_same():
    assert (MOVING, CLEAN, site_statistics.STRENGTH) == (backbone.NORM_STATISTICS, backbone.CLEAN, backbone.STRENGTH)


def test_alignment_is_the_documented_formula():
    rng = np.random.default_rng(0)
    names = ("x.running_mean", "x.running_var")
    source, clean, moved = (dict(zip(names, torch.from_numpy(rng.uniform(0.5, 2, (2, 5))), strict=True)) for _ in "abc")
    mean, variance = (moved[name] for name in names)

    def align(reference, strength):
        return Reference(source, reference, torch.tensor(strength)).align("x", mean, variance, 1e-3)

    found_mean, found_variance = align(clean, 0.5)
    expected = source[names[0]] + 0.5 * (mean - clean[names[0]])
    ratio = ((variance + 1e-3) / (clean[names[1]] + 1e-3)) ** 0.5
    torch.testing.assert_close(found_mean, expected)
    torch.testing.assert_close(found_variance, (source[names[1]] + 1e-3) * ratio)
    for reference, strength, wanted in ((source, 1.0, moved), (clean, 0.0, source)):
        found = align(reference, strength)
        torch.testing.assert_close(found[0], wanted[names[0]])
        torch.testing.assert_close(found[1], wanted[names[1]] + 1e-3)


def test_the_rule_moves_statistics_and_nothing_else():
    made = moving_net("mix:0.3")
    statistics = measure_statistics(made, synthetic_frames(64, SIZE, SIZE, 3).split(8))
    step = AdaptStep(made, Objective(), Statistics(), statistics, 1.0)
    state = step.initial_state()
    output = step.adapt(torch.from_numpy(haze(scene(BATCH))), state, step.constants())
    assert torch.equal(output.state["theta"], state["theta"])
    assert (float(output.update_norm), float(output.gradient_norm), float(output.state["step"])) == (0, 0, 1)
    assert not torch.equal(output.state[MOVING], state[MOVING])


def test_a_model_without_moving_statistics_is_refused():
    for words in ({"norm_statistics": "source"}, {"backbone": "vit_tiny_patch16_224"}):
        options = {"backbone": "resnet18", "image_size": 32, "classes": 10, "rule": "statistics", **words}
        with pytest.raises(UsageError, match="'statistics' expected batch normalisation whose statistics move"):
            compose(ExportRequest(**options))


def statistics_under_source(pictures):
    """Mean and variance of what enters each norm, the source's statistics in all of them: packed as the state is."""
    made, seen = moving_net("mix:0.3"), {}
    for name, module in made.model.named_modules():
        if isinstance(module, StatisticsNorm):
            module.register_forward_pre_hook(lambda _, given, name=name: seen.setdefault(name, given[0]))
    with torch.no_grad():
        made.model((torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)
    parts = {}
    for name, value in seen.items():
        parts[f"{name}.running_mean"] = value.mean((0, 2, 3))
        parts[f"{name}.running_var"] = value.var((0, 2, 3), unbiased=False)
    return torch.cat([parts[name] for name in made.statistics.names]).numpy()


def test_a_clean_scene_is_measured_under_the_source_and_left_alone(bundle):
    clean, told = scene(64), []
    site = with_site_statistics(bundle, clean, "cpu", 1, lambda *stage: told.append(stage))
    assert told[-1] == ("clean statistics", len(told), len(told))
    np.testing.assert_allclose(site.weights[CLEAN], statistics_under_source(clean), rtol=0.1, atol=0.02)
    assert not np.allclose(site.weights[CLEAN], bundle.weights[CLEAN], rtol=0.1, atol=0.02)
    assert np.array_equal(site.initial_state[MOVING], site.weights[CLEAN])
    at_source, at_site = (open_engine(one, "cpu", threads=1, with_adapt=False) for one in (bundle, site))
    expected, found = (
        engine.infer(clean[:1], own.initial_state)[0] for engine, own in ((at_source, bundle), (at_site, site))
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def stray(bundle, pictures, truth):
    """Distance of the last logits from the clean ones, after the pictures have been adapted to one by one."""
    with Adapter(bundle, open_engine(bundle, "cpu", threads=1), adapt="window") as adapter:
        logits = np.stack([adapter(picture).logits for picture in pictures])
        assert adapter.counters.adapt_steps >= 5
        assert adapter.adapted
    return float(np.linalg.norm(logits[-16:] - truth[-16:]))


def test_haze_is_undone_against_the_scene_and_not_against_the_source(bundle):
    clean = scene(64)
    site = with_site_statistics(bundle, clean, "cpu", 1)
    engine = open_engine(bundle, "cpu", threads=1)
    pictures = scene(64, seed=1)
    truth = np.concatenate([engine.infer(one[None], bundle.initial_state)[0] for one in pictures])
    frozen = np.concatenate([engine.infer(haze(one)[None], bundle.initial_state)[0] for one in pictures])
    lost = float(np.linalg.norm(frozen[-16:] - truth[-16:]))
    assert stray(site, haze(pictures), truth) < 0.7 * lost
    assert stray(site, pictures, truth) < 0.15 * lost
    assert stray(bundle, pictures, truth) > 0.3 * lost  # the source's: a clean scene looks like weather


def test_canaries_are_judged_under_clean_statistics(bundle):
    source = bundle.initial_state
    moved = AdaptState({**source, MOVING: source[MOVING] + 1, "theta": source["theta"] + 1})
    judged = with_clean_statistics(moved, source)
    assert np.array_equal(judged[MOVING], source[MOVING])
    assert np.array_equal(judged["theta"], moved["theta"])
    plain = AdaptState({"theta": source["theta"]})
    assert with_clean_statistics(plain, plain) is plain


def test_a_bundle_in_which_nothing_moves_is_returned_as_it_is(bundle):
    still = dataclasses.replace(
        bundle, weights={name: value for name, value in bundle.weights.items() if name != CLEAN}
    )
    assert with_site_statistics(still, scene(32), "cpu", 1) is still
