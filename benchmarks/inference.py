"""What inference and the step cost beside plain ONNX Runtime, for common nets; the tables of docs/PERFORMANCE.md.

    scripts/bench inference           exports and measures them, half an hour on two cores; bundles are kept

Each net with random weights, `adam`, batch 8, the source's statistics of batch normalisation; `mgg-edge bench` measures
it in a process of its own, on one thread and on two. Prints a table for each and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from _export import export_if_stale

NETS = {
    "efficientnet_lite0": 160,
    "mobilenetv3_large_100": 224,
    "resnet50": 224,
    "vit_tiny_patch16_224": 224,
    "vit_small_patch16_224": 224,
    "convnext_atto": 224,
    "swin_tiny_patch4_window7_224": 224,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--kept", type=Path, default=Path(".cache/inference"), help="bundles")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name in options.nets.split(","):
        words = ["--backbone", name, "--weights", "random", "--image-size", NETS[name], "--rule", "adam", "--batch", 8]
        bundle = export_if_stale(options.kept / f"{name}.mgg", [*words, "--norm-statistics", "source"], None)
        found += [measure(bundle, threads, options.rounds) for threads in options.threads]
    for threads in options.threads:
        print(f"\n{threads} threads, {options.rounds} rounds, medians (minima)\n")
        print("| net | plain, ms | θ at rest | θ moving | step | floor | verification, ms | p99 beside folding |")
        print("|---|---|---|---|---|---|---|---|")
        for one in found:
            if one["threads"] == threads:
                print(row(one))
    print(json.dumps(found))


def measure(bundle: Path, threads: int, rounds: int) -> dict[str, Any]:
    words = ["--bundle", bundle, "--threads", threads, "--rounds", rounds, "--limit", 100, "--json"]
    program = "from mgg_edge.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "bench", *map(str, words)], stdout=subprocess.PIPE, text=True, check=True
    )
    print(done.stdout, end="", file=sys.stderr, flush=True)
    return json.loads(done.stdout)


def row(one: dict[str, Any]) -> str:
    def ratio(key: str) -> str:
        median, least = (one[f"{key}{end}"] / one[f"plain_forward_ms{end}"] for end in ("", "_min"))
        return f"{median:.2f} ({least:.2f})"

    step = one["step_ms"] / (one["plain_forward_ms"] * one["adapt_batch"] / one["batch"])
    swap = "" if one["swap_p99_ratio"] is None else f"{one['swap_p99_ratio']:.2f}"
    return (
        f"| {one['backbone']} | {one['plain_forward_ms']:.1f} ({one['plain_forward_ms_min']:.1f}) | "
        f"{ratio('settled_forward')} | {ratio('forward')} | {step:.2f} | {one['floor']:.2f} | "
        f"{one['verification_ms']:.0f} | {swap} |"
    )


if __name__ == "__main__":
    main()
