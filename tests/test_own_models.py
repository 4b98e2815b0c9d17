"""A module of one's own: by name on the command line, and as an object."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

import own_models  # noqa: E402
from mgg_edge.cli.main import main  # noqa: E402
from mgg_edge.errors import UsageError  # noqa: E402
from mgg_edge.export import Origins, export_bundle  # noqa: E402
from mgg_edge.learn import Adam, AdaptStep, Backbone, Objective, measure_statistics  # noqa: E402
from mgg_edge.learn.images import synthetic_frames  # noqa: E402
from mgg_edge.learn.wrappers import every_place  # noqa: E402
from mgg_edge.runtime import Adapter  # noqa: E402
from mgg_edge.runtime.engines import onnxruntime_engine  # noqa: E402

pytestmark = pytest.mark.torch
SHORT = ["--weights", "random", "--batch", "4", "--parity-steps", "20", "--rule", "adam", "--json"]


def export(capsys, name, out, *words):
    with pytest.raises(SystemExit) as ended:
        main(["export", "--backbone", name, "--out", str(out), *SHORT, *words])
    return ended.value.code or 0, capsys.readouterr()


def test_a_factory_is_exported_by_its_name(tmp_path, capsys):
    code, captured = export(capsys, "own_models:Net", tmp_path / "x.mgg")
    assert code == 0, captured.err
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "x.mgg"), "--json"])
    facts = json.loads(capsys.readouterr().out)
    preprocess = facts["preprocess"]
    assert (preprocess["height"], preprocess["width"], preprocess["mean"]) == (48, 40, [0.5, 0.4, 0.3])
    assert [tap["name"] for tap in facts["taps"]] == ["stem.1", "block.1"]
    with Adapter.open(tmp_path / "x.mgg", adapt="always") as adapter:
        for frame in np.random.default_rng(0).integers(0, 256, (4, 60, 60, 3), np.uint8):
            assert 0 <= adapter(frame).index < 5


@pytest.mark.parametrize("kind", ["multihead", "encoder", "masked", "plain"])
def test_pytorchs_own_attention(tmp_path, capsys, kind):
    code, captured = export(capsys, f"own_models:attends_{kind}", tmp_path / "x.mgg")
    assert code == 0, captured.err


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
def test_transformers_of_torchvision_lower(name):
    from mgg_edge.export.lower import lower
    from mgg_edge.export.trace import trace

    backbone = Backbone.create(f"torchvision/{name}", img_size=64, num_classes=4)
    constants = backbone.constants()

    def gradient(named):
        def loss(norms):
            return backbone.forward(named["frames"], norms, {name: named[name] for name in constants})[0].square().sum()

        return torch.func.grad(loss)(backbone.split(named["theta"]))

    inputs = {"frames": synthetic_frames(2, 64, 64, 0), "theta": backbone.theta()}
    traced = trace(gradient, {**inputs, **constants})
    for lowering in ("onnxruntime", "tensorrt"):
        lower(traced, "test", lowering, weights=())


@pytest.mark.parametrize("least_shared", [onnxruntime_engine.LEAST_SHARED_SCALARS, 1])
def test_a_weight_that_the_optimiser_turns_keeps_its_values(tmp_path, capsys, monkeypatch, least_shared):
    monkeypatch.setattr(onnxruntime_engine, "LEAST_SHARED_SCALARS", least_shared)
    code, captured = export(capsys, "own_models:scaled", tmp_path / "x.mgg")
    assert code == 0, captured.err


def test_options_reach_the_factory_that_takes_them(tmp_path, capsys):
    code, captured = export(capsys, "own_models:Net", tmp_path / "x.mgg", "--classes", "3", "--image-size", "32")
    assert code == 0, captured.err
    with Adapter.open(tmp_path / "x.mgg", adapt="off") as adapter:
        assert len(adapter(np.zeros((32, 32, 3), np.uint8)).logits) == 3
        assert adapter.manifest.preprocess.height == 32


def test_the_working_directory_is_a_place_to_import_from(tmp_path, monkeypatch, capsys):
    (tmp_path / "nets_of_mine.py").write_text("from own_models import Net as make\n")
    monkeypatch.chdir(tmp_path)
    assert export(capsys, "nets_of_mine:make", tmp_path / "x.mgg")[0] == 0


def test_a_module_of_torchvision_by_a_colon(tmp_path):
    backbone = Backbone.create("torchvision:resnet18", num_classes=4, img_size=32)
    assert backbone.classes == 4


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("own_models:absent", 2, "expected a function 'absent' in 'own_models', found NoneType"),
        ("nowhere:make", 2, "cannot import 'nowhere' for 'nowhere:make': No module named 'nowhere'"),
        ("own_models:no_model", 2, "expected 'own_models:no_model' to return a torch.nn.Module, found int"),
        ("own_models:broken", 2, "'own_models:broken' cannot build a model: no such layer"),
        ("own_models:by_value", 1, "Net, in 'stem.0', decides by the values of a picture"),
        ("own_models:exotic", 1, "backbone 'own_models:exotic': no ONNX lowering for aten."),
    ],
)
def test_what_cannot_be_taken_is_named(tmp_path, capsys, name, code, message):
    found, captured = export(capsys, name, tmp_path / "x.mgg")
    assert found == code
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_module_as_an_object(tmp_path):
    torch.manual_seed(0)
    backbone = Backbone.from_module(own_models.Net(3), input_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, name="mine")
    statistics = measure_statistics(backbone, synthetic_frames(32, 32, 32, 0).split(8))
    step = AdaptStep(backbone, Objective(), Adam(), statistics, 1e-3)
    labels = ["a", "b", "c"]
    origins = Origins("memory", "", "synthetic")
    manifest = export_bundle(step, tmp_path / "x.mgg", adapt_batch=4, labels=labels, origins=origins, parity_steps=5)
    assert manifest.backbone.name == "mine"
    with Adapter.open(tmp_path / "x.mgg") as adapter:
        assert adapter(np.zeros((32, 32, 3), np.uint8)).label in labels


def test_blocks_side_by_side_are_supported():
    """They have no `norm1`; timm lists them as features."""
    for name in ("vit_base_patch16_xp_224", "vit_small_patch16_18x2_224"):
        backbone = Backbone.create(name, img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=4)
        assert [tap.name for tap in backbone.taps] == ["blocks.0", "blocks.1"]


def test_a_size_the_model_cannot_take_is_said():
    with pytest.raises(UsageError, match="cannot take images of"):
        Backbone.create("own_models:fixed_size", img_size=32)


class Remembers(torch.nn.Module):
    """Keeps what it has computed of a parameter for the next call, as attention of LeViT's kind does."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4)
        self.bias, self.attention_bias_cache = torch.nn.Parameter(torch.zeros(4)), {}

    def forward(self, x):
        if str(x.device) not in self.attention_bias_cache:
            self.attention_bias_cache[str(x.device)] = 2 * self.bias
        return self.norm(self.conv(x)).mean((2, 3)) + self.attention_bias_cache[str(x.device)]


def test_nothing_is_kept_from_one_call_for_the_next():
    backbone = Backbone.from_module(Remembers(), input_size=16)
    frames, constants = synthetic_frames(2, 16, 16, 0), backbone.constants()
    norms = backbone.split(backbone.theta())
    before = backbone.forward(frames, norms, constants)[0]
    other = constants | {"backbone.bias": constants["backbone.bias"] + 1}
    torch.testing.assert_close(backbone.forward(frames, norms, other)[0], before + 2)


class Settles(torch.nn.Module):
    """Fills a buffer that is not kept with the weights in its first call for a size, as ConViT's positions are."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4)
        self.register_buffer("places", torch.zeros(1), persistent=False)

    def forward(self, x):
        if len(self.places) != x.shape[-1] - 2:
            self.places = torch.arange(x.shape[-1] - 2.0, device=self.places.device)
        return (self.norm(self.conv(x)) * self.places).mean((2, 3))


def test_a_buffer_may_be_computed_once_for_a_size():
    backbone = Backbone.from_module(Settles(), input_size=16)
    assert torch.equal(backbone.constants()["backbone.places"], torch.arange(14.0))


class UsedTwice(torch.nn.Module):
    """One module under three names, and one parameter in two modules."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.Linear(4, 4)
        self.one = self.two = self.three = torch.nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x):
        pooled = self.norm(self.conv(x)).mean((2, 3))
        return self.one(pooled) + self.two(pooled) + self.three(pooled) + self.other(pooled)


def test_a_module_may_be_used_under_several_names():
    module = UsedTwice()
    frames = synthetic_frames(2, 16, 16, 0)
    backbone = Backbone.from_module(module, input_size=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert not any(parameter.is_meta for parameter in module.parameters())
    constants, norms = backbone.constants(), backbone.split(backbone.theta())
    expected = module(frames.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(backbone.forward(frames, norms, constants)[0], expected)
    nothing = {name: torch.zeros_like(value) for name, value in constants.items() if name.startswith("backbone.o")}
    assert set(nothing) == {"backbone.other.weight", "backbone.other.bias", "backbone.one.bias"}
    assert not backbone.forward(frames, norms, constants | nothing)[0].any()
    with pytest.raises(KeyError, match="nowhere"):
        every_place(module, {"nowhere": torch.zeros(1)})


@pytest.mark.parametrize("name", ["coat_tiny", "crossvit_tiny_240", "efficientvim_m1"])
def test_families_whose_stages_give_several_tensors_are_read_at_their_norms(name):
    backbone = Backbone.create(name, norm_statistics="source")
    norms = {parameter.rpartition(".")[0] for parameter in backbone.norms.names}
    assert {tap.name for tap in backbone.taps} <= norms
    assert len(backbone.taps) >= 2


class Quarters(torch.nn.Module):
    """A norm of the four quarters of a picture, as rows of a batch of their own, and one of the whole."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.LayerNorm(12), torch.nn.LayerNorm(12)
        self.head = torch.nn.Linear(12, 3)

    def forward(self, images):
        quarters = images.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 1, 3, 5).reshape(-1, 1, 12)
        return self.head(self.outer(self.inner(quarters).reshape(len(images), 4, 12)).mean(1))


def test_features_are_read_where_a_row_is_an_image():
    def create(taps=None):
        return Backbone.from_module(Quarters(), input_size=4, mean=(0.5,) * 3, std=(0.5,) * 3, taps=taps)

    assert [tap.name for tap in create().taps] == ["outer"]
    with pytest.raises(UsageError, match=r"'inner' expected one output .* with a row an image"):
        create("inner")
