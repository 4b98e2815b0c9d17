"""`statistics+`: statistics of batch normalisation, moved as far as each has learned to be, behind a gate."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

from mgg_edge.errors import UsageError, WeightsError  # noqa: E402
from mgg_edge.export import ExportRequest, Origins, compose, export_bundle  # noqa: E402
from mgg_edge.learn import AdaptStep, Objective, measure_statistics  # noqa: E402
from mgg_edge.learn.backbone import CLEAN, NORM_STATISTICS, SOURCE  # noqa: E402
from mgg_edge.learn.images import synthetic_frames  # noqa: E402
from mgg_edge.learn.rules.files import load_rule, save_rule  # noqa: E402
from mgg_edge.learn.rules.statistics_plus import WEIGHT, StatisticsPlus  # noqa: E402
from mgg_edge.runtime import Adapter, open_engine  # noqa: E402
from mgg_edge.runtime.adaptation.site_statistics import with_site_statistics  # noqa: E402
from mgg_edge.runtime.bundle.bundle import Bundle  # noqa: E402
from own_models import moving_net  # noqa: E402

pytestmark = pytest.mark.torch
SIZE, BATCH = 32, 8
LABELS = [f"class {index}" for index in range(10)]


def a_step(gate_at: float = -100.0) -> AdaptStep:
    """With learned-looking numbers and a gate that opens from this log d on."""
    made = moving_net(f"mix:{WEIGHT}")
    assert made.statistics is not None
    rule = StatisticsPlus(made.norms.size, made.features, made.statistics.size, rank=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        rule.strength.copy_(torch.rand(made.statistics.size, generator=generator))
        rule.log_threshold.fill_(gate_at)
    statistics = measure_statistics(made, synthetic_frames(64, SIZE, SIZE, 3).split(8))
    return AdaptStep(made, Objective(), rule, statistics, 1.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    path = tmp_path_factory.mktemp("statistics+") / "x.mgg"
    origins = Origins("own", "", "synthetic")
    export_bundle(a_step(), path, adapt_batch=BATCH, labels=LABELS, origins=origins, parity_steps=20)
    return Bundle.load(path)


def test_an_open_gate_takes_over_all_that_is_learned():
    step, frames = a_step(), synthetic_frames(BATCH, SIZE, SIZE, 9)
    made, state, constants = step.backbone, step.initial_state(), step.constants()
    with torch.no_grad():
        after = step.adapt(frames, state, constants).state
        strength = constants["rule.strength"]
        norms = made.split(constants["source_theta"])
        moved = made.forward_moving(frames, norms, constants, constants[CLEAN], strength=strength).moved
    torch.testing.assert_close(after["theta"], constants["source_theta"])
    torch.testing.assert_close(after["moved"], moved[NORM_STATISTICS])
    torch.testing.assert_close(after[NORM_STATISTICS], moved[NORM_STATISTICS])
    again = step.adapt(frames, after, constants).state  # the same frames once more: three quarters of the way
    with torch.no_grad():
        whole = made.forward_moving(frames, norms, constants, constants[CLEAN], 1.0, strength).moved[NORM_STATISTICS]
    first = slice(0, 8)  # means of the first layer, which nothing before it aligns
    torch.testing.assert_close(again["moved"][first], constants[CLEAN][first].lerp(whole[first], 0.75))


def test_a_closed_gate_leaves_the_source_alone():
    step, frames = a_step(gate_at=100.0), synthetic_frames(BATCH, SIZE, SIZE, 9)
    state, constants = step.initial_state(), step.constants()
    after = step.adapt(frames, state, constants).state
    torch.testing.assert_close(after["theta"], constants["source_theta"])
    torch.testing.assert_close(after[NORM_STATISTICS], constants[CLEAN])
    assert (after["moved"] - constants[CLEAN]).abs().max() > 0.01  # seen, not used
    plain = step.backbone.forward(frames, step.backbone.split(state["theta"]), constants)
    torch.testing.assert_close(step.infer(frames, after, constants)[0], plain[0])


def test_inference_normalises_by_each_strength():
    step, frames = a_step(), synthetic_frames(BATCH, SIZE, SIZE, 9)
    constants = step.constants()
    state = step.initial_state() | {NORM_STATISTICS: constants[CLEAN] + 0.5}
    none = constants | {"rule.strength": torch.zeros_like(constants["rule.strength"])}
    source = step.infer(frames, step.initial_state(), constants)[0]
    torch.testing.assert_close(step.infer(frames, state, none)[0], source)
    assert (step.infer(frames, state, constants)[0] - source).abs().max() > 1e-3


def test_the_bundle_computes_the_same(bundle):
    """Parity is checked at export; here: what inference reads, and what a step leaves there."""
    step, frames = a_step(), synthetic_frames(BATCH, SIZE, SIZE, 9)
    assert bundle.manifest.infer_state == ("theta", NORM_STATISTICS)
    engine = open_engine(bundle, threads=1)
    engine.adapt(frames.numpy())
    expected = step.adapt(frames, step.initial_state(), step.constants()).state
    for name, value in engine.candidate.items():
        np.testing.assert_allclose(value, expected[name].detach().numpy(), rtol=1e-4, atol=1e-5)
    engine.commit()
    logits = step.infer(frames[:1], expected, step.constants())[0].detach().numpy()
    np.testing.assert_allclose(engine.infer(frames[:1].numpy())[0], logits, rtol=1e-3, atol=1e-4)
    engine.close()


def test_a_site_is_measured_by_what_the_rule_sees(bundle):
    """Not by what it lets through: the gate is closed while the scene is clean."""
    scene = np.clip(synthetic_frames(64, SIZE, SIZE, 21).numpy() * 0.4 + 20, 0, 255).astype(np.uint8)
    closed = dataclasses.replace(
        bundle, weights={**bundle.weights, "rule.log_threshold": np.full(5, 100.0, np.float32)}
    )
    measured = with_site_statistics(closed, scene, "cpu", 1)
    clean, source = measured.weights[CLEAN], bundle.weights[SOURCE]
    assert np.abs(clean - source).max() > 0.05
    np.testing.assert_array_equal(measured.initial_state[NORM_STATISTICS], clean)
    step = a_step()
    norms, constants = step.backbone.split(step.constants()["source_theta"]), step.constants()
    with torch.no_grad():
        whole = step.backbone.forward_moving(torch.from_numpy(scene), norms, constants, weight=1.0).moved
    means = slice(0, 8)
    np.testing.assert_allclose(clean[means], whole[NORM_STATISTICS].numpy()[means], atol=0.05)


def test_it_runs_and_comes_back(bundle):
    """Weather moves it; nothing it does is refused."""
    weather = np.clip(synthetic_frames(96, SIZE, SIZE, 30).numpy() * 0.3 + 150, 0, 255).astype(np.uint8)
    with Adapter.open(bundle.path, threads=1) as adapter:
        assert adapter.schedule_name == "window"
        for frame in weather:
            adapter(frame)
        assert adapter.counters.adapt_steps > 3
        assert adapter.adapted


class TestComposing:
    def test_it_needs_batch_normalisation_that_moves(self):
        with pytest.raises(UsageError, match=r"'statistics\+' expected batch normalisation whose statistics move"):
            compose(ExportRequest("vit_tiny_patch16_224", rule="statistics+", image_size=64))
        with pytest.raises(UsageError, match="found none"):
            compose(ExportRequest("resnet10t", rule="statistics+", image_size=64, norm_statistics="source"))

    def test_it_moves_as_it_was_learned_to(self):
        step, _, _ = compose(ExportRequest("resnet10t", rule="statistics+", image_size=64))
        assert step.backbone.norm_statistics == f"mix:{WEIGHT}"

    def test_of_another_backbone_it_is_refused(self, tmp_path):
        rule = StatisticsPlus(6, 4, 8, rank=2)
        save_rule(tmp_path / "x.safetensors", rule)
        assert load_rule(tmp_path / "x.safetensors", 6, 4, 8).options() == rule.options()
        with pytest.raises(WeightsError, match="learned for M = 8 moving statistics; the backbone has M = 10"):
            load_rule(tmp_path / "x.safetensors", 6, 4, 10)
