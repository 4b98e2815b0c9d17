"""The learned rules around the MGG: each against its equation, its file, its bounds, its export."""

from __future__ import annotations

import itertools
import json
import math

import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

import onnx  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from mgg_edge.errors import UsageError, WeightsError  # noqa: E402
from mgg_edge.export.bundle import Origins, export_bundle  # noqa: E402
from mgg_edge.export.restore import restore_step  # noqa: E402
from mgg_edge.learn import (  # noqa: E402
    MGG,
    Adam,
    AdaptStep,
    Backbone,
    Forward,
    Objective,
    Plus,
    measure_statistics,
)
from mgg_edge.learn.reader import READER_NAME  # noqa: E402
from mgg_edge.learn.rules.base import CLEAN_WINDOWS, Evidence, SourceNumbers, knot_weights  # noqa: E402
from mgg_edge.learn.rules.files import LEARNED_RULES, RULES, load_rule, save_rule, untrained_rule  # noqa: E402
from mgg_edge.learn.rules.plus import BASE_RATE, SCHEDULE_KNOTS  # noqa: E402
from mgg_edge.runtime import Bundle  # noqa: E402
from mgg_edge.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine  # noqa: E402
from mgg_edge.scenes.glyphs import CHARACTERS  # noqa: E402
from vit import frames, small_step  # noqa: E402

pytestmark = pytest.mark.torch

N, D = 10, 6
ONE = torch.tensor(1.0, dtype=torch.float64)
CLEAN = torch.tensor([0.5 / window for window in CLEAN_WINDOWS], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def source():
    normal = torch.randn(N, generator=generator(1), dtype=torch.float64)
    return SourceNumbers(
        normal, torch.linspace(-1, 1, D, dtype=torch.float64), torch.full((D,), 0.8, dtype=torch.float64), CLEAN
    )


def forward_rule(**options):
    """A rule with numbers that matter."""
    rule = Forward(N, D, rank=4, seed=3, **options)
    with torch.no_grad():
        rule.write.mul_(300)
        rule.log_scale.copy_(torch.linspace(-0.3, 0.2, 5))
        rule.shift_scale.copy_(torch.linspace(0.5, 2, 2 * D))
    return rule


def features(count, seed, shift=0.7):
    return torch.randn(count, D, generator=generator(seed), dtype=torch.float64) * 0.8 + shift


def run(rule, batches, rate=ONE):
    state, numbers = rule.init(N, torch.float64), source()
    theta = numbers.theta
    for batch in batches:
        evidence = Evidence(None, batch, torch.zeros(()))
        theta, _, state = rule.step(theta, evidence, state, numbers, rate)
    return theta


class TestKnots:
    @pytest.mark.parametrize("place", [1.0, 2.0, 3.0, 4.0, 11.3, 32.0, 500.0])
    def test_interpolation_is_linear_in_the_logarithm_and_flat_outside(self, place):
        weights = knot_weights(torch.tensor(place, dtype=torch.float64), (2, 4, 8, 16, 32))
        values = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)  # log₂ of the knots
        assert float(weights.sum()) == pytest.approx(1)
        assert float((weights * values).sum()) == pytest.approx(min(max(math.log2(place), 1), 5))

    def test_clean_discrepancy_between_known_windows(self):
        assert float(source().clean_at(torch.tensor(24.0, dtype=torch.float64))) == pytest.approx(
            math.exp(math.log(0.5 / 16) + math.log2(24 / 16) * (math.log(0.5 / 32) - math.log(0.5 / 16)))
        )


class TestForward:
    def test_the_equation(self):
        rule, numbers, batch = forward_rule(), source(), features(8, 0)
        shift = torch.cat([batch.mean(0) - numbers.mean, batch.std(0) - numbers.std])
        discrepancy = shift[:D].square().mean() + shift[D:].square().mean()
        excess = max(0.0, float(discrepancy / numbers.clean_discrepancy[2]) - 1)
        gate = excess / (excess + math.exp(rule.log_gate.item()))
        hidden = torch.tanh(rule.read.double() @ (shift / rule.shift_scale.double())).detach()
        change = gate * math.exp(rule.log_scale[1].item()) * (rule.write.double() @ hidden)
        torch.testing.assert_close(run(rule, [batch]), numbers.theta - change, rtol=1e-9, atol=1e-9)
        assert change.abs().max() > 0.01

    def test_it_depends_on_the_frames_in_the_window_alone(self):
        rule = forward_rule(window_batches=3)
        last = [features(4, seed) for seed in (1, 2, 3)]
        after_weather = [features(4, seed, shift=5.0) for seed in range(10, 20)] + last
        torch.testing.assert_close(run(rule, after_weather), run(rule, last))
        assert (run(rule, after_weather[:-1]) - run(rule, last)).abs().max() > 1e-3

    def test_a_window_of_batches_is_a_window_of_their_frames(self):
        rule = forward_rule(window_batches=4)
        frames_seen = features(16, 5)
        torch.testing.assert_close(run(rule, frames_seen.split(4)), run(rule, [frames_seen]))

    def test_clean_frames_lead_to_theta_0_exactly(self):
        numbers = source()
        exact = torch.randn(32, D, generator=generator(7), dtype=torch.float64)
        exact = (exact - exact.mean(0)) / exact.std(0) * numbers.std + numbers.mean
        assert torch.equal(run(forward_rule(), [exact]), numbers.theta)

    def test_a_window_beyond_those_of_the_training_is_scaled_like_the_longest(self):
        """A knot that no training reached would stay at 1 while the others shrink, and the map leap."""
        rule = forward_rule()
        with torch.no_grad():
            rule.log_scale.fill_(-3.0)
        batch = features(64, 3)
        long = torch.cat([batch, batch])
        numbers = source()
        ratio = (run(rule, [long]) - numbers.theta).norm() / (run(rule, [batch]) - numbers.theta).norm()
        assert float(ratio.detach()) == pytest.approx(1, abs=0.1)

    def test_no_step_is_larger_than_its_bound(self):
        rule = forward_rule()
        bound = rule.largest_update(0.5)
        extremes = [features(8, seed, shift=50.0 * (-1) ** seed) for seed in range(8)]
        path = [run(rule, extremes[: count + 1], 0.5 * ONE) for count in range(8)]
        steps = [(after - before).abs().max().item() for before, after in itertools.pairwise(path)]
        assert 0 < max(steps) <= bound

    def test_the_exported_graph_has_no_backward(self, tmp_path):
        counts = {}
        for name in ("forward", "sgd"):
            step = small_step(name)
            labels = [str(index) for index in range(10)]
            export_bundle(
                step, tmp_path / "x.mgg", adapt_batch=4, labels=labels, origins=Origins("r", "u", "s"), parity_steps=5
            )
            graphs = Bundle.load(tmp_path / "x.mgg").graphs
            counts[name] = {
                key: sum(node.op_type in ("MatMul", "Gemm") for node in onnx.load_from_string(data).graph.node)
                for key, data in graphs.items()
            }
        for lowering in ("onnxruntime", "tensorrt"):
            infer, forward = (counts["forward"][f"{graph}.{lowering}.onnx"] for graph in ("infer", "adapt"))
            assert forward == infer + 2  # P and Q
            assert counts["sgd"][f"adapt.{lowering}.onnx"] > 1.8 * infer


class TestPlus:
    def evidence(self, seed, ratio):
        gradient = torch.randn(N, generator=generator(seed), dtype=torch.float64)
        return Evidence(gradient, features(8, seed), ratio * CLEAN[2])

    def rule(self):
        rule = Plus("adam", N, rank=4, seed=2)
        with torch.no_grad():
            rule.write.mul_(100)
            rule.log_gain.copy_(torch.linspace(-1, 1, N))
            rule.gradient_scale.copy_(torch.linspace(0.5, 2, N))
        return rule

    def test_the_equation(self):
        rule, numbers = self.rule(), source()
        theta, state = numbers.theta, rule.init(N, torch.float64)
        adam, adam_state, mean = Adam(beta2=0.99), Adam().init(N, torch.float64), None
        for step in range(1, 41):
            ratio = 1.2 + 0.3 * math.sin(step)
            evidence = self.evidence(step, ratio)
            found = rule.step(theta, evidence, state, numbers, 0.5 * ONE)
            direction, adam_state = adam.update(evidence.gradient, adam_state)
            mean = ratio if mean is None else 0.7 * mean + 0.3 * ratio
            excess = max(0.0, mean - 1)
            gate = excess / (excess + math.exp(rule.log_gate.item()))
            knots = torch.stack([rule.log_schedule, rule.log_map_schedule]).tolist()
            place = min(math.log2(step), 5)
            low = min(int(place), 4)
            s, s_map = (math.exp(own[low] + (place - low) * (own[low + 1] - own[low])) for own in knots)
            tail = min(1.0, (32 / step) ** 1.5)
            mapped = rule.write.double() @ torch.tanh(
                rule.read.double() @ (evidence.gradient / rule.gradient_scale.double())
            )
            gain = rule.log_gain.double().exp()
            expected = 0.5 * gate * tail * (BASE_RATE * gain * s * direction + s_map * mapped)
            torch.testing.assert_close(found.update, expected, rtol=1e-6, atol=1e-9)
            assert expected.abs().max() < rule.largest_update(0.5)
            theta, state = found.theta, found.state

    def test_a_clean_stream_is_left_alone(self):
        rule, numbers = self.rule(), source()
        found = rule.step(numbers.theta, self.evidence(0, 0.99), rule.init(N, torch.float64), numbers, ONE)
        assert torch.equal(found.theta, numbers.theta)

    def test_episodes_side_by_side_are_the_same_as_one_after_the_other(self):
        rule = Plus("mgg", N, rank=4, seed=2)
        gradients = torch.randn(3, N, generator=generator(0))
        ratios = torch.tensor([1.5, 2.0, 0.5])
        together, _ = rule.scaled_update(gradients.flatten(), ratios, rule.init(3 * N))
        alone = [rule.scaled_update(gradients[i], ratios[i], rule.init(N))[0] for i in range(3)]
        torch.testing.assert_close(together.reshape(3, N), torch.stack(alone))
        assert not together.reshape(3, N)[2].any()

    def test_the_tail_decays(self):
        rule = self.rule()
        sizes = []
        for step in (32.0, 128.0):
            schedule, _ = rule._schedules(torch.tensor(step, dtype=torch.float64), ONE)
            sizes.append(schedule.item())
        assert sizes[1] == pytest.approx(sizes[0] * 4**-1.5)
        assert SCHEDULE_KNOTS[-1] == 32

    def test_other_bases_are_refused(self):
        with pytest.raises(ValueError, match="expected mgg or adam"):
            Plus("sgd", N)


class TestFiles:
    @pytest.mark.parametrize("name", LEARNED_RULES)
    def test_a_rule_comes_back_as_it_was_saved(self, tmp_path, name):
        rule = untrained_rule(name, N, D, seed=5)
        rule.default_learning_rate = 0.25
        save_rule(tmp_path / "r.safetensors", rule, {"updates": 3})
        found = load_rule(tmp_path / "r.safetensors", N, D)
        assert (found.name, found.options()) == (rule.name, rule.options())
        assert (found.default_learning_rate, found.max_learning_rate) == (0.25, 0.25)
        for key, value in rule.state_dict().items():
            assert torch.equal(found.state_dict()[key], value)

    def test_the_164_numbers_fit_every_backbone_and_the_rest_only_its_own(self, tmp_path):
        save_rule(tmp_path / "m.safetensors", MGG(0))
        assert isinstance(load_rule(tmp_path / "m.safetensors", 999, 7), MGG)
        for name in ("forward", "mgg+"):
            save_rule(tmp_path / "r.safetensors", untrained_rule(name, N, D))
            with pytest.raises(WeightsError, match=rf"'{name.replace('+', '.')}' was learned for N = 10"):
                load_rule(tmp_path / "r.safetensors", N + 1, D)

    def test_what_is_no_rule_is_refused(self, tmp_path):
        path = tmp_path / "r.safetensors"
        with pytest.raises(UsageError, match="no such file of a learned rule"):
            load_rule(path, N, D)
        path.write_bytes(b"junk")
        with pytest.raises(WeightsError, match="expected a rule of format"):
            load_rule(path, N, D)
        save_file({"x": torch.zeros(1)}, path)
        with pytest.raises(WeightsError, match="expected a rule of format"):
            load_rule(path, N, D)

    @pytest.mark.parametrize("fault", ["nan", "shape", "missing"])
    def test_numbers_that_do_not_fit_are_named(self, tmp_path, fault):
        path = tmp_path / "r.safetensors"
        rule = Forward(N, D)
        save_rule(path, rule)
        tensors = load_file(path)
        if fault == "nan":
            tensors["write"][0, 0] = math.nan
        elif fault == "shape":
            tensors["write"] = tensors["write"].T.contiguous()
        else:
            del tensors["write"]
        header = {"format": "mgg-edge.rule 1", "name": "forward", "learning_rate": "1.0"}
        save_file(tensors, path, {**header, "options": json.dumps(rule.options())})
        with pytest.raises(WeightsError, match="write"):
            load_rule(path, N, D)

    def test_names_are_the_documented_ones(self):
        assert RULES == ("mgg", "mgg+", "adam+", "forward", "forward+", "adam", "sgd", "statistics")


@pytest.mark.parametrize("name", ["mgg+", "adam+", "forward", "forward+"])
def test_a_bundle_of_a_learned_rule_passes_parity_and_is_restored(tmp_path, name):
    backbone = Backbone.create(READER_NAME)
    statistics = measure_statistics(backbone, frames(64, 7).split(32))
    rule = untrained_rule(name, backbone.norms.size, backbone.features)
    step, path, labels = AdaptStep(backbone, Objective(), rule, statistics, 1.0), tmp_path / "x.mgg", list(CHARACTERS)
    manifest = export_bundle(step, path, adapt_batch=4, labels=labels, origins=Origins("r", "u", "s"), parity_steps=5)
    assert manifest.rule.name == name
    assert manifest.rule.max_update == pytest.approx(step.rule.largest_update(1.0))
    assert manifest.rule.schedule == ("window" if name.startswith("forward") else "burst")
    bundle = Bundle.load(path)
    engine, restored = OnnxRuntimeEngine(bundle), restore_step(bundle)
    state, constants = restored.initial_state(), restored.constants()
    for seed in range(3):
        batch = frames(4, seed)
        state = restored.adapt(batch, state, constants).state
        _, diagnostics = engine.adapt(batch.numpy())
        engine.commit()
    moved = engine.state()["theta"] - bundle.initial_state["theta"]
    expected = (state["theta"] - restored.backbone.theta()).detach().numpy()
    # Updates of two float32 implementations: relative L2.
    assert abs(moved - expected).max() <= 1e-3 * abs(expected).max() + 1e-6
    assert (diagnostics.gradient_norm == 0) == name.startswith("forward")
