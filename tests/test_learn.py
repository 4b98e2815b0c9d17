"""Backbone, objective, statistics, rules, images, checkpoints: the pieces of the step, each against its definition."""

from __future__ import annotations

import argparse
import copy
import io
import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

import huggingface_hub.constants  # noqa: E402
import timm  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from timm.data import create_transform, resolve_data_config  # noqa: E402
from torch import nn  # noqa: E402

from mgg_edge.errors import SourceError, UnsupportedError, UsageError, WeightsError  # noqa: E402
from mgg_edge.learn import (  # noqa: E402
    Adam,
    Backbone,
    Objective,
    Sgd,
    backbone_models,
    measure_statistics,
)
from mgg_edge.learn.backbone import discover_norms  # noqa: E402
from mgg_edge.learn.checkpoint import assign_weights, read_state_dict  # noqa: E402
from mgg_edge.learn.images import find_images, fit_image, load_images, synthetic_frames  # noqa: E402
from mgg_edge.learn.objective import RELEASED_DIVISOR, RELEASED_WEIGHT  # noqa: E402
from mgg_edge.learn.statistics import FeatureMoments  # noqa: E402
from vit import NAME, OPTIONS, SIZE, frames, small_backbone, small_step  # noqa: E402

pytestmark = pytest.mark.torch


def normalised(backbone, batch):
    """What timm's own transform does after resizing: ToTensor, Normalize."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (backbone.preprocess.mean, backbone.preprocess.std))
    return (batch.permute(0, 3, 1, 2) / 255 - mean) / std


# Backbone --------------------------------------------------------------------------------------------------


def test_logits_equal_the_model_s_own():
    backbone, batch = small_backbone(), frames(3)
    logits, features = backbone.forward(batch, backbone.split(backbone.theta()), backbone.constants())
    with torch.no_grad():
        expected = backbone.model(normalised(backbone, batch))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert features.shape == (3, backbone.features)


def test_features_are_cls_tokens_after_the_next_norm():
    backbone, batch = small_backbone(), frames(2)
    _, features = backbone.forward(batch, backbone.split(backbone.theta()), backbone.constants())
    model = backbone.model
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(normalised(backbone, batch)))))
        expected = []
        for index, block in enumerate(model.blocks):
            tokens = block(tokens)
            following = model.blocks[index + 1].norm1 if index + 1 < len(model.blocks) else model.norm
            expected.append(following(tokens)[:, 0])
    torch.testing.assert_close(features, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


def test_theta_replaces_the_norm_parameters_and_nothing_else():
    backbone, batch = small_backbone(), frames(2)
    theta = backbone.theta() + 0.1 * torch.randn(backbone.norms.size, generator=torch.Generator().manual_seed(0))
    logits, _ = backbone.forward(batch, backbone.split(theta), backbone.constants())
    model = copy.deepcopy(backbone.model)
    model.load_state_dict(backbone.split(theta), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(normalised(backbone, batch)), rtol=1e-5, atol=1e-6)


def test_norms_of_a_vision_transformer():
    layout = discover_norms(timm.create_model("vit_tiny_patch16_224"))
    assert layout.size == 25 * 2 * 192
    assert layout.names[:2] == ("blocks.0.norm1.weight", "blocks.0.norm1.bias")
    assert layout.names[-1] == "norm.bias"


class RmsNormLookalike(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def test_norms_are_found_by_type_and_by_name():
    names = discover_norms(nn.Sequential(nn.RMSNorm(4), RmsNormNamed(), nn.Linear(4, 4), nn.LayerNorm(4))).names
    assert names == ("0.weight", "1.weight", "3.weight", "3.bias")


class RmsNormNamed(RmsNormLookalike):
    pass


RmsNormNamed.__name__ = "SomeRMSNorm"


def test_batch_norm_is_named():
    with pytest.raises(UnsupportedError, match="'1' is BatchNorm2d"):
        discover_norms(nn.Sequential(nn.LayerNorm(3), nn.BatchNorm2d(3)))


def test_unknown_models_get_near_matches():
    with pytest.raises(UsageError, match=r"did you mean .*vit_tiny_patch16_224"):
        Backbone.create("vit_tiny_patch16_223")


def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = Backbone.create(NAME, seed=4, **OPTIONS).constants()
    assert torch.equal(torch.rand(1), expected)
    second = Backbone.create(NAME, seed=4, **OPTIONS).constants()
    third = Backbone.create(NAME, seed=5, **OPTIONS).constants()
    name = "backbone.blocks.0.attn.qkv.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], third[name])


def test_preprocessing_equals_timm_s_transform(tmp_path):
    backbone = Backbone.create("vit_tiny_patch16_224")
    pixels = synthetic_frames(1, 300, 401, seed=5)[0].numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    batch = next(load_images(find_images(tmp_path), backbone.preprocess, batch=8))
    transform = create_transform(**resolve_data_config({}, model=backbone.model), is_training=False)
    expected = transform(Image.open(tmp_path / "a.png"))[None]
    scaled = backbone.constants()["preprocess.scale"] * batch + backbone.constants()["preprocess.shift"]
    torch.testing.assert_close(scaled.permute(0, 3, 1, 2), expected, rtol=0, atol=2e-6)  # float32 rounding


# Objective -------------------------------------------------------------------------------------------------


def test_objective_is_the_released_form_on_vit_base():
    generator = torch.Generator().manual_seed(0)
    logits, features = torch.randn(8, 10, generator=generator), torch.randn(8, 9_216, generator=generator)
    mean, std = torch.randn(9_216, generator=generator), torch.rand(9_216, generator=generator)
    terms = Objective()(logits, features, mean, std)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    batch_std, batch_mean = torch.std_mean(features, dim=0)
    released = (
        RELEASED_WEIGHT / RELEASED_DIVISOR * ((batch_std - std).square().sum() + (batch_mean - mean).square().sum())
    )
    torch.testing.assert_close(terms.entropy, entropy)
    torch.testing.assert_close(terms.loss, entropy + released)


def test_objective_of_equal_frames_has_a_finite_gradient():
    features = torch.ones(4, 6, requires_grad=True)
    terms = Objective()(torch.zeros(4, 3), features, torch.zeros(6), torch.ones(6))
    terms.loss.backward()
    assert bool(features.grad.isfinite().all())
    assert bool(terms.loss.isfinite())


def entropy_gradient(entropy, logits):
    return torch.func.grad(entropy)(logits).double()


def test_the_entropy_gradient_is_exact_where_all_classes_are_nearly_equally_likely():
    def by_the_chain_rule(logits):
        log_probability = logits.log_softmax(1)
        return -(log_probability.exp() * log_probability).sum(1).mean()

    def as_it_is(logits):
        return Objective()(logits, features, features.mean(0), features.std(0)).entropy

    logits, features = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)).double(), torch.eye(8)
    for scale in (1e-3, 3.0):
        exact = entropy_gradient(by_the_chain_rule, logits * scale)
        torch.testing.assert_close(entropy_gradient(as_it_is, logits * scale), exact, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(as_it_is(logits * scale), by_the_chain_rule(logits * scale))
    single, exact = (logits * 1e-3).float(), entropy_gradient(by_the_chain_rule, (logits * 1e-3).float().double())
    assert (entropy_gradient(as_it_is, single) - exact).norm() < 1e-6 * exact.norm()
    assert (entropy_gradient(by_the_chain_rule, single) - exact).norm() > 3e-5 * exact.norm()  # what it is for


def test_objective_refuses_a_single_frame():
    with pytest.raises(ValueError, match="at least 2 frames, found 1"):
        Objective()(torch.zeros(1, 3), torch.zeros(1, 6), torch.zeros(6), torch.ones(6))


# Statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(40,), (1, 39), (8, 8, 8, 8, 8), (13, 27)], ids=str)
def test_streaming_moments_equal_those_of_all_at_once(sizes):
    features = 1e3 + torch.randn(40, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = features.split(list(sizes))
    moments = FeatureMoments.of(parts[0])
    for part in parts[1:]:
        moments = moments.merge(FeatureMoments.of(part))
    std, mean = torch.std_mean(features, dim=0)
    torch.testing.assert_close(moments.mean, mean, rtol=1e-13, atol=0)
    torch.testing.assert_close((moments.squares / 39).sqrt(), std, rtol=1e-10, atol=0)


def test_statistics_need_32_images():
    with pytest.raises(UsageError, match="at least 32 images, found 31"):
        measure_statistics(small_backbone(), [frames(31)])
    assert measure_statistics(small_backbone(), [frames(32)]).images == 32


# Rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "optimiser"),
    [
        (Sgd(0.0), lambda theta: torch.optim.SGD([theta], lr=1e-2)),
        (Sgd(0.9), lambda theta: torch.optim.SGD([theta], lr=1e-2, momentum=0.9)),
        (Adam(), lambda theta: torch.optim.Adam([theta], lr=1e-2)),
    ],
    ids=["sgd", "momentum", "adam"],
)
def test_updates_equal_torch_optim(rule, optimiser):
    generator = torch.Generator().manual_seed(0)
    theta = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    reference, state = optimiser(theta), rule.init(50, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.randn(50, generator=generator, dtype=torch.float64)
        before = theta.detach().clone()
        theta.grad = gradient
        reference.step()
        direction, state = rule.update(gradient, state)
        torch.testing.assert_close(1e-2 * direction, before - theta.detach(), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("build", [lambda: Sgd(1.0), lambda: Adam(beta1=-0.1), lambda: Adam(epsilon=0.0)])
def test_rules_refuse_settings_out_of_range(build):
    with pytest.raises(ValueError, match="expected a"):
        build()


# Step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mgg", "adam", "sgd", "sgd0"])
def test_step_is_gradient_then_rule_then_learning_rate(rule):
    step, batch = small_step(rule), frames(4)
    constants, state = step.constants(), step.initial_state()
    output = step.adapt(batch, state, constants)

    theta = state["theta"].clone().requires_grad_()
    logits, features = step.backbone.forward(batch, step.backbone.split(theta), constants)
    terms = step.objective(logits, features, step.statistics.mean.float(), step.statistics.std.float())
    (gradient,) = torch.autograd.grad(terms.loss, theta)
    with torch.no_grad():
        direction, _ = step.rule.update(gradient, step.rule.init(len(theta)))
    update = step.learning_rate * direction
    relative = (state["theta"] - output.state["theta"] - update).norm() / update.norm()
    assert relative < 1e-3, "θ ≈ 1 in float32 resolves an update of 1e-3 to about 1e-4"
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, terms.loss)
    torch.testing.assert_close(output.gradient_norm, gradient.norm())
    torch.testing.assert_close(output.update_norm, update.norm())


@pytest.mark.parametrize("rule", ["mgg", "adam", "sgd"])
def test_steps_lower_the_loss_on_their_batch(rule):
    step, batch = small_step(rule), frames(8)
    state, constants, losses = step.initial_state(), step.constants(), []
    for _ in range(10):
        output = step.adapt(batch, state, constants)
        state = output.state
        losses.append(float(output.loss))
    assert losses[-1] < losses[0]


def test_step_of_equal_frames_stays_finite():
    step = small_step()
    output = step.adapt(frames(1).expand(4, -1, -1, -1), step.initial_state(), step.constants())
    assert all(bool(value.isfinite().all()) for value in output.state.values())


# Images ----------------------------------------------------------------------------------------------------


def test_synthetic_frames_are_seeded_and_varied():
    first, again, other = frames(4, seed=1), frames(4, seed=1), frames(4, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, SIZE, SIZE, 3)
    assert first.dtype == torch.uint8
    assert first.float().std() > 20


def test_source_images_errors(tmp_path):
    with pytest.raises(UsageError, match="directory of images"):
        find_images(tmp_path / "missing")
    with pytest.raises(UsageError, match="found no images"):
        find_images(tmp_path)
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(SourceError, match=r"a\.png: not a readable picture"):
        list(load_images(find_images(tmp_path), small_backbone().preprocess, 4))


def test_squash_ignores_the_aspect_ratio():
    from dataclasses import replace

    info = replace(small_backbone().preprocess, resize="squash")
    assert fit_image(Image.new("RGB", (100, 50)), info).shape == (SIZE, SIZE, 3)


# Checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod.", "model.module._orig_mod."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_state_dicts_are_read_from_both_formats(tmp_path, prefix, suffix):
    tensors = {f"{prefix}a.weight": torch.ones(2), f"{prefix}a.bias": torch.zeros(2)}
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": tensors, "epoch": 3}, path)
    else:
        save_file(tensors, path)
    assert set(read_state_dict(path)) == {"a.weight", "a.bias"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model": nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear"),
        ({"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
    ],
    ids=["model", "arguments"],
)
def test_pickled_code_is_refused_by_name_with_what_to_do(tmp_path, content, named):
    torch.save(content, tmp_path / "model.pth")
    pattern = rf"found a pickled '{named}'.*torch\.save\(model\.state_dict\(\)"
    with pytest.raises(WeightsError, match=pattern) as refused:
        read_state_dict(tmp_path / "model.pth")
    assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize("name", ["x.pth.tar", "x.ckpt", "x.bin"])
def test_of_two_state_dicts_the_moving_average_is_taken_and_said(tmp_path, caplog, name):
    plain, average = ({"a": torch.full((2,), value)} for value in (1.0, 2.0))
    torch.save({"state_dict": plain, "state_dict_ema": average, "epoch": 1}, tmp_path / name)
    with caplog.at_level(logging.INFO):
        assert read_state_dict(tmp_path / name)["a"].tolist() == [2.0, 2.0]
    assert "of 'state_dict_ema', 'state_dict' taking 'state_dict_ema'" in caplog.text


def test_an_averaged_model_is_read(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    torch.save(averaged.state_dict(), tmp_path / "x.pth")
    assert set(read_state_dict(tmp_path / "x.pth")) == {"weight", "bias"}


def test_half_precision_weights_fit(tmp_path):
    model = nn.Linear(2, 2)
    torch.save({name: value.half() for name, value in model.state_dict().items()}, tmp_path / "x.pth")
    assign_weights(model, read_state_dict(tmp_path / "x.pth"), "x")
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("none.pth", None, UsageError, "no such weights"),
        ("a.pth", b"", WeightsError, "expected a PyTorch file, found a damaged one"),
        ("a.pt", b"\n <!DOCTYPE html><html>", WeightsError, "found a web page; download the file itself"),
        ("a.safetensors", b"abc", WeightsError, "expected safetensors"),
        ("a.onnx", b"abc", UsageError, r"expected a \.safetensors"),
    ],
)
def test_files_that_are_not_weights(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("bias"), "missing 'bias'"),
        (lambda weights: weights.update(extra=torch.ones(1)), "unexpected 'extra'"),
        (lambda weights: weights.update(bias=torch.ones(3)), r"'bias' expected \[2\], found \[3\]"),
        (lambda weights: weights.update(bias=torch.tensor([1.0, np.inf])), "'bias' holds NaN or Inf"),
    ],
    ids=["missing", "unexpected", "mis-shaped", "infinite"],
)
def test_weights_that_do_not_fit_are_named(change, message):
    weights = dict(nn.Linear(2, 2).state_dict())
    change(weights)
    with pytest.raises(WeightsError, match=message):
        assign_weights(nn.Linear(2, 2), weights, where="linear")


@pytest.mark.parametrize(
    ("reachable", "proxy", "offline"), [(False, {}, True), (True, {}, False), (False, {"https": "x"}, False)]
)
def test_the_hub_is_not_asked_again_and_again_where_it_cannot_be_reached(monkeypatch, reachable, proxy, offline):
    def connect(*_arguments):
        if not reachable:
            raise OSError("Name or service not known")
        return io.BytesIO()

    monkeypatch.setattr(backbone_models.socket, "create_connection", connect)
    monkeypatch.setattr(backbone_models.urllib.request, "getproxies", lambda: proxy)
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with backbone_models.quick_when_offline():
        assert offline == huggingface_hub.constants.HF_HUB_OFFLINE
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE
