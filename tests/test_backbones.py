"""Families of classifiers through the export: convolutions, batch normalisation, hierarchies, torchvision."""

import importlib.util
import json

import pytest

pytest.importorskip("torch", exc_type=ImportError)

from mgg_edge.cli.main import main

pytestmark = pytest.mark.torch
HAS_TENSORRT = importlib.util.find_spec("tensorrt_rtx_bindings") is not None

SMALL = ["--weights", "random", "--batch", "4", "--classes", "10", "--parity-steps", "2", "--rule", "adam", "--json"]
# Name, pixels, and whether statistics of batch normalisation are part of what adapts.
FAST = [("convnext_atto", 64, False)]
SLOW = [
    ("mobilenetv3_small_100", 64, True),
    ("efficientnet_lite0", 64, True),
    ("resnet18", 64, True),
    ("resnet50", 64, True),
    ("torchvision/resnet18", 64, True),
    ("resnet50_gn", 64, False),
    ("swin_tiny_patch4_window7_224", 224, False),
    ("vit_base_patch16_gap_224", 64, False),
]


@pytest.mark.parametrize(
    ("backbone", "size", "moving"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)], ids=str
)
def test_a_family_is_exported_with_its_parity_check_and_builds_for_two_targets(
    tmp_path, capsys, monkeypatch, backbone, size, moving
):
    monkeypatch.setenv("MGG_EDGE_ENGINES", str(tmp_path / "engines"))
    out, engine = tmp_path / "x.mgg", ["--engine", "tensorrt:sm86,sm120"] if HAS_TENSORRT else []
    with pytest.raises(SystemExit) as ended:
        main(["export", "--backbone", backbone, "--image-size", str(size), *SMALL, "--out", str(out), *engine])
    captured = capsys.readouterr()
    assert ended.value.code in (0, None), captured.err
    assert len(json.loads(captured.out)["engines"]) == (4 if HAS_TENSORRT else 0)
    with pytest.raises(SystemExit):
        main(["inspect", str(out), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert ("norm_statistics" in facts["infer_state"]) == moving
