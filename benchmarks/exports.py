"""Sixty sound exports, none of which may be refused: twenty common nets under three rules. docs/BACKBONES.md's figure.

    scripts/bench exports                                     an hour on one core; finished exports are kept
    PYTHONPATH=. python benchmarks/exports.py --only vit,swin     those whose name contains one of these

Every export is one that is right: whatever refuses it is chance. Random weights from three seeds and PyTorch on one
or two threads take turns, pictures are small, the parity check makes twenty steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

from _export import EXPORTED, try_export
from rich.console import Console
from rich.progress import track

TIMEOUT_S = 1800
STEPS, BATCH = 20, 4
RULES = ("sgd", "adam", "mgg")
SEEDS, THREADS = 3, 2
SIDE, SIDES = 64, {"swin_tiny_patch4_window7_224": 224, "torchvision/vit_b_32": 224, "vgg11_bn": 96}
NETS = (
    "resnet18", "resnet50", "resnet10t", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100",
    "efficientnet_b0", "efficientnet_lite0", "densenet121", "vgg11_bn", "regnety_004", "convnext_atto",
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "torchvision/resnet18",
    "torchvision/mobilenet_v3_small", "torchvision/efficientnet_b0", "torchvision/shufflenet_v2_x1_0",
    "torchvision/vit_b_32",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/results/exports"), help="a file for each export")
    parser.add_argument("--only", default="", help="comma-separated parts of the names of nets")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = [
        (number, net, rule) for number, (net, rule) in enumerate(product(NETS, RULES))
        if any(part in net for part in arguments.only.split(","))
    ]  # fmt: skip
    refused: list[dict[str, Any]] = []
    for number, net, rule in track(wanted, "exports", console=Console(stderr=True)):
        part = arguments.out / f"{net.replace('/', '-')}-{rule}.json"
        if not part.exists():
            seed, threads = (number // len(RULES) + number) % SEEDS, 1 + number % THREADS
            words = ["--backbone", net, "--weights", "random", "--seed", seed, "--rule", rule, "--batch", BATCH]
            words += ["--image-size", SIDES.get(net, SIDE), "--parity-steps", STEPS]
            found = try_export(words, TIMEOUT_S, threads)
            part.write_text(json.dumps({"net": net, "rule": rule, "seed": seed, "threads": threads, **found}))
        row = json.loads(part.read_text())
        if row["result"] != EXPORTED:
            refused.append(row)
    for row in refused:
        print(f"{row['net']}, {row['rule']}, seed {row['seed']}, {row['threads']} threads: {row['said']}")
    print(json.dumps({"exports": len(wanted), "refused": len(refused)}))
    sys.exit(bool(refused))


if __name__ == "__main__":
    main()
