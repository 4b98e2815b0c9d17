"""What lies beside weights is followed, pictures are prepared by one rule, and outputs are what they are taken for."""

from __future__ import annotations

import json
import logging

import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

import numpy as np  # noqa: E402
import timm  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from timm.data import create_transform  # noqa: E402
from torch import nn  # noqa: E402

from mgg_edge.errors import UnsupportedError, UsageError, WeightsError  # noqa: E402
from mgg_edge.export.compose import ExportRequest, class_labels, compose_backbone  # noqa: E402
from mgg_edge.learn.backbone import Backbone  # noqa: E402
from mgg_edge.learn.checkpoint import assign_weights  # noqa: E402
from mgg_edge.learn.imagenet import imagenet_labels  # noqa: E402
from mgg_edge.learn.images import fit_image, synthetic_frames  # noqa: E402
from mgg_edge.learn.model_config import Preparation  # noqa: E402
from mgg_edge.manifest import PreprocessInfo  # noqa: E402
from mgg_edge.runtime.preprocess import fit  # noqa: E402

pytestmark = pytest.mark.torch

HALF = (0.5,) * 3
CONFIG = {
    "architecture": "resnet10t",
    "num_classes": 3,
    "label_names": ["bus", "car", "tram"],
    "model_args": {"num_classes": 3, "global_pool": "max"},
    "pretrained_cfg": {
        "tag": "c3_in1k", "input_size": [3, 96, 96], "interpolation": "bilinear", "crop_pct": 1.0,
        "crop_mode": "center", "mean": list(HALF), "std": list(HALF), "num_classes": 3, "pool_size": [3, 3],
        "first_conv": "conv1.0", "classifier": "fc",
    },
}  # fmt: skip


class TestOneRuleForPictures:
    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    @pytest.mark.parametrize(("resize", "mode"), [("shortest-side", "center"), ("squash", "squash")])
    @pytest.mark.parametrize("crop", [1.0, 0.875])
    @pytest.mark.parametrize("model", [(64, 64), (36, 64), (48, 64), (64, 32)], ids=str)
    def test_timms_own_transform_pixel_by_pixel(self, model, crop, resize, mode, interpolation):
        rng = np.random.default_rng(0)
        info = PreprocessInfo(*model, resize, crop, interpolation, HALF, HALF)
        transform = create_transform(
            (3, *model), crop_pct=crop, crop_mode=mode, interpolation=interpolation, normalize=False
        )
        for height, width in ((100, 100), (90, 160), (120, 160), (200, 100), (101, 97), (31, 43)):
            picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            expected = transform(picture).permute(1, 2, 0)
            assert torch.equal(fit_image(picture, info), expected), (height, width)

    @pytest.mark.parametrize("model", [(64, 64), (36, 64), (48, 64), (64, 32)], ids=str)
    def test_the_camera_sees_what_training_saw(self, model):
        y, x = np.mgrid[0:120, 0:160] / 30.0
        picture = np.stack([127 + 100 * np.sin(x + k * y) for k in range(3)], -1).astype(np.uint8)
        info = PreprocessInfo(*model, "shortest-side", 0.9, "bicubic", HALF, HALF)
        learned = fit_image(Image.fromarray(picture), info).numpy().astype(int)
        assert np.abs(learned - fit(picture, info)).mean() < 0.6
        already = np.zeros((*model, 3), np.uint8)  # a picture of the model's size has been prepared
        already[0, 0] = 255
        assert np.array_equal(fit_image(Image.fromarray(already), info).numpy(), already)
        assert np.array_equal(fit(already, info), already)


@pytest.fixture
def hub_folder(tmp_path):
    """A model as timm and the hub keep it."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3, global_pool="max")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


class TestConfigurations:
    @pytest.mark.parametrize("form", ["file beside it", "folder", "local-dir"])
    def test_the_configuration_beside_the_weights_is_followed(self, hub_folder, form):
        request = {
            "file beside it": ExportRequest("resnet10t", str(hub_folder / "model.safetensors")),
            "folder": ExportRequest("resnet10t", str(hub_folder)),
            "local-dir": ExportRequest(f"local-dir:{hub_folder}", "pretrained"),
        }[form]
        backbone = compose_backbone(request)
        info = backbone.preprocess
        assert (info.height, info.width, info.crop_fraction, info.interpolation) == (96, 96, 1.0, "bilinear")
        assert (info.mean, info.std, backbone.name) == (HALF, HALF, "resnet10t")
        assert class_labels(request, backbone) == ("bus", "car", "tram")
        assert backbone.model.global_pool.pool_type == "max"

    def test_what_the_user_says_comes_first(self, hub_folder):
        said = Preparation(mean=(0.4,), std=(0.2, 0.3, 0.4), crop_fraction=0.9, interpolation="bicubic")
        info = compose_backbone(ExportRequest("resnet10t", str(hub_folder), preparation=said)).preprocess
        assert (info.mean, info.std) == ((0.4,) * 3, (0.2, 0.3, 0.4))
        assert (info.crop_fraction, info.interpolation, info.height) == (0.9, "bicubic", 96)

    def test_a_configuration_of_another_model_is_refused(self, hub_folder, tmp_path):
        with pytest.raises(
            UsageError, match=r"config.json beside the weights is of 'resnet10t', found --backbone resn"
        ):
            compose_backbone(ExportRequest("resnet18", str(hub_folder)))
        (hub_folder / "config.json").write_text("{")
        with pytest.raises(WeightsError, match="cannot read the model's configuration"):
            compose_backbone(ExportRequest("resnet10t", str(hub_folder)))

    def test_one_that_is_not_timms_is_said_and_not_followed(self, hub_folder, caplog):
        (hub_folder / "config.json").write_text('{"model_type": "resnet"}')
        with caplog.at_level(logging.INFO):
            backbone = compose_backbone(ExportRequest("resnet10t", str(hub_folder)))
        assert "not a configuration of timm" in caplog.text
        assert backbone.preprocess.mean != HALF

    def test_folders_without_what_is_needed(self, tmp_path):
        with pytest.raises(UsageError, match=r"expected a folder with one of model.safetensors"):
            compose_backbone(ExportRequest("resnet10t", str(tmp_path)))
        with pytest.raises(UsageError, match=r"expected a folder with a config.json of timm"):
            compose_backbone(ExportRequest(f"local-dir:{tmp_path}", "pretrained"))

    def test_tags_say_how_pictures_are_prepared(self):
        tagged = Backbone.create("mobilenetv3_large_100.miil_in21k_ft_in1k", img_size=64).preprocess
        plain = Backbone.create("mobilenetv3_large_100", img_size=64).preprocess
        assert (tagged.mean, tagged.std) == ((0.0,) * 3, (1.0,) * 3)
        assert plain.mean != tagged.mean
        with pytest.raises(UsageError, match=r"'resnet50' has no weights 'mine'; it has resnet50.a1_in1k"):
            Backbone.create("resnet50.mine")

    def test_imagenets_names_are_for_imagenets_weights(self, tmp_path):
        torch.manual_seed(0)
        save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "x.safetensors")
        unknown = ExportRequest("resnet10t", str(tmp_path / "x.safetensors"), image_size=32)
        backbone = compose_backbone(unknown)
        assert class_labels(unknown, backbone)[:2] == ("class 0", "class 1")
        said = ExportRequest("resnet10t", "random", labels=type(tmp_path)("imagenet"))
        assert class_labels(said, backbone) == imagenet_labels()


class TestScaling:
    def test_a_mean_of_0_to_255_is_refused_with_the_sentence_that_helps(self):
        message = r"belong to 0…255; divide both by 255: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
        with pytest.raises(UsageError, match=message):
            Backbone.create("own_models:scaled_to_255")
        said = Preparation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
        assert Backbone.create("own_models:scaled_to_255", preparation=said).preprocess.mean == said.mean

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ({"mean": (0.1, 0.2)}, "mean: expected one number or three"),
            ({"crop_fraction": 1.5}, r"crop: expected a fraction in \(0, 1\]"),
            ({"interpolation": "nearest"}, "interpolation: expected one of bicubic, bilinear"),
        ],
    )
    def test_what_no_picture_can_be_prepared_by(self, words, message):
        with pytest.raises(UsageError, match=message):
            Preparation(**words)

    def test_a_deviation_of_nothing(self):
        with pytest.raises(UsageError, match="expected std above 0"):
            Backbone.create("own_models:net_of_mine", preparation=Preparation(std=(0.0,)))


class TestOutputs:
    def test_probabilities_are_noticed(self):
        with pytest.raises(UsageError, match=r"found probabilities that sum to 1.*--outputs probabilities"):
            compose_backbone(ExportRequest("own_models:ends_in_softmax"))
        with pytest.raises(UsageError, match=r"found numbers from 0 to 1 alone.*--outputs sigmoid"):
            compose_backbone(ExportRequest("own_models:ends_in_sigmoid"))
        assert compose_backbone(ExportRequest("own_models:ends_in_softmax", outputs="logits")).classes == 5

    def test_and_taken_for_what_they_are(self):
        frames = synthetic_frames(4, 48, 40, 0)

        def logits(name, outputs=None):
            backbone = compose_backbone(ExportRequest(f"own_models:{name}", outputs=outputs))
            found = backbone.forward(frames, backbone.split(backbone.theta()), backbone.constants())[0]
            return found.detach()

        plain = logits("net_of_mine")
        for name, outputs in (("ends_in_softmax", "probabilities"), ("ends_in_log_softmax", None)):
            assert torch.allclose(logits(name, outputs).softmax(1), plain.softmax(1), atol=1e-5), name
        assert torch.allclose(logits("ends_in_sigmoid", "sigmoid"), plain, atol=1e-3)


class TestModules:
    @pytest.mark.parametrize("name", ["compiled", "in_parallel"])
    def test_what_training_wraps_around_a_module_is_taken_off(self, name):
        wrapped, plain = (Backbone.create(f"own_models:{each}") for each in (name, "net_of_mine"))
        assert wrapped.norms.names == plain.norms.names
        frames = synthetic_frames(2, 48, 40, 0)
        one, other = (each.forward(frames, each.split(each.theta()), each.constants())[0] for each in (wrapped, plain))
        assert torch.equal(one, other)

    @pytest.mark.parametrize("name", ["Counting", "Reassigning"])
    def test_a_buffer_changed_in_forward_is_named(self, name):
        with pytest.raises(UnsupportedError, match=f"{name} changes its buffer 'calls' in forward"):
            Backbone.create(f"own_models:{name}")

    def test_a_factory_is_called_with_what_it_takes(self):
        assert Backbone.create("own_models:net_of_mine", num_classes=5, img_size=40).classes == 5
        with pytest.raises(
            UsageError, match=r"expected 'own_models:net_of_mine' to make a model of 7 classes, found 5"
        ):
            Backbone.create("own_models:net_of_mine", num_classes=7)


class TestCheckpoints:
    def net(self):
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def test_counters_of_batches_may_be_absent(self):
        weights = {name: torch.rand_like(value.float()) for name, value in self.net().state_dict().items()}
        del weights["1.num_batches_tracked"]
        net = self.net()
        assign_weights(net, weights, "x")
        assert torch.equal(net[1].running_mean, weights["1.running_mean"])

    def test_a_prefix_with_others_beside_it(self, caplog):
        weights = {f"model.{name}": torch.ones_like(value) for name, value in self.net().state_dict().items()}
        weights |= {"criterion.weight": torch.ones(3), "teacher.0.weight": torch.ones(4, 3, 1, 1)}
        net = self.net()
        with caplog.at_level(logging.INFO):
            assign_weights(net, weights, "x.ckpt")
        assert bool((net[0].weight == 1).all())
        assert "taking the weights below 'model.'; left out are 'criterion.weight', 'teacher.0.weight'" in caplog.text

    def test_two_whole_models_in_one_file_are_not_chosen_between(self):
        weights = {f"{place}.{name}": value for place in "ab" for name, value in self.net().state_dict().items()}
        with pytest.raises(WeightsError, match=r"missing '0.bias'"):
            assign_weights(self.net(), weights, "x")
