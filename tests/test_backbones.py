"""Families of classifiers through the export: convolutional, hierarchical, transformers of all kinds, torchvision."""

import importlib.util
import itertools
import json

import numpy as np
import pytest

pytest.importorskip("torch", exc_type=ImportError)

from mgg_edge.cli.main import main
from mgg_edge.runtime import Adapter
from mgg_edge.runtime.sources.video import VideoSource
from videos import sample_video

pytestmark = pytest.mark.torch
HAS_TENSORRT = importlib.util.find_spec("tensorrt_rtx_bindings") is not None

SMALL = ["--weights", "random", "--batch", "4", "--classes", "10", "--rule", "adam", "--json"]
# Name, pixels, and whether statistics of batch normalisation are part of what adapts.
FAST = [("convnext_atto", 64, False)]
SLOW = [
    ("mobilenetv3_small_100", 64, True),
    ("mobilenetv3_large_100", 64, True),
    ("efficientnet_lite0", 64, True),
    ("efficientvit_b0", 64, True),
    ("fastvit_t8", 64, True),
    ("mobilevit_xs", 64, True),
    ("resnet18", 64, True),
    ("resnet50", 64, True),
    ("resnet50_gn", 64, False),
    ("torchvision/resnet18", 64, True),
    ("torchvision/resnet50", 64, True),
    ("torchvision/convnext_tiny", 64, False),
    ("convnext_tiny", 64, False),
    ("swin_tiny_patch4_window7_224", 224, False),
    ("vit_small_patch16_224", 64, False),
    ("vit_base_patch16_224", 64, False),
    ("vit_base_patch16_gap_224", 64, False),
    ("vit_small_patch14_reg4_dinov2", 56, False),
    ("deit3_small_patch16_224", 64, False),
    ("deit_tiny_distilled_patch16_224", 64, False),
    ("eva02_tiny_patch14_224", 56, False),
]
CASES = [
    pytest.param(*case, 5, id=case[0]) for case in FAST
] + [
    pytest.param(*case, 20, marks=pytest.mark.slow, id=case[0]) for case in SLOW
]  # fmt: skip


@pytest.mark.parametrize(("backbone", "size", "moving", "steps"), CASES)
def test_a_family_keeps_parity_builds_for_two_targets_and_adapts_on_a_film(
    tmp_path, capsys, monkeypatch, backbone, size, moving, steps
):
    monkeypatch.setenv("MGG_EDGE_ENGINES", str(tmp_path / "engines"))
    out, engine = tmp_path / "x.mgg", ["--engine", "tensorrt:sm86,sm120"] if HAS_TENSORRT else []
    words = ["--image-size", str(size), *SMALL, "--parity-steps", str(steps), "--out", str(out), *engine]
    with pytest.raises(SystemExit) as ended:
        main(["export", "--backbone", backbone, *words])
    captured = capsys.readouterr()
    assert ended.value.code in (0, None), captured.err
    assert len(json.loads(captured.out)["engines"]) == (4 if HAS_TENSORRT else 0)
    with pytest.raises(SystemExit):
        main(["inspect", str(out), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert ("norm_statistics" in facts["infer_state"]) == moving

    with VideoSource(sample_video("bikes.mp4")) as video, Adapter.open(out, adapt="always", threads=1) as adapter:
        logits = [adapter(frame.image).logits for frame in itertools.islice(video, 24)]
        assert np.isfinite(logits).all()
        assert (adapter.counters.adapt_steps, adapter.counters.adapt_rejected) == (6, 0)
        theta = adapter.state()["theta"]
    assert np.isfinite(theta).all()
