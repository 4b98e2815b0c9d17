"""How soon a rule of cameras pays: test cameras, windows of 4, 8, 16 and 64 pictures, three seeds. In docs/RESULTS.md.

    scripts/build_objects                    first: scenes and cut-outs, two minutes
    scripts/bench windows                    half an hour on one core

Beside `objects`, which runs the whole product on a stream, this asks the rule alone, in PyTorch: what is known of the
clear scene comes from half of the things, θ from one window of a quarter in one of the fifteen kinds of weather, and
sixteen pictures of yet others are named under it. Rows: frozen; the robust θ behind its gate; `forward+`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from objects import PACKAGED, SIDE
from rich.console import Console
from rich.progress import track

from mgg_edge.export.compose import ExportRequest, compose_backbone
from mgg_edge.learn.rules.files import load_rule
from mgg_edge.learn.rules.forward_plus import ForwardPlus
from mgg_edge.learn.training.cameras import learner_of
from mgg_edge.learn.training.cameras_judge import weather
from mgg_edge.learn.training.scene_map import agreement, theta_of
from mgg_edge.learn.training.stages import Stage, build_stages, draw_episode
from mgg_edge.scenes.corruptions import BENCHMARK_KINDS
from mgg_edge.scenes.objects import TEST, load_cut_outs, load_scenes

WINDOWS, AIM, VIEWS = (4, 8, 16, 64), 16, 128
ROWS = ("frozen", "robust", "forward+")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path(".cache/objects"), help="what scripts/build_objects made")
    parser.add_argument("--rule", type=Path, default=PACKAGED, help="learned forward+; the package's by default")
    parser.add_argument("--severities", default="3,5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cameras", type=int, default=8, help="at most")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone = compose_backbone(
        ExportRequest("efficientnet_lite0", "package", image_size=SIDE, norm_statistics="source")
    )
    learner = learner_of(backbone)
    rule = load_rule(arguments.rule, backbone.norms.size, backbone.features)
    assert isinstance(rule, ForwardPlus)
    gated = copy.deepcopy(rule)
    torch.nn.init.zeros_(gated.write)
    parts = (
        load_scenes(arguments.pictures / "scenes", SIDE, SIDE, TEST),
        load_cut_outs(arguments.pictures / "stamps", TEST),
    )
    stages = build_stages(*parts, learner.frozen, VIEWS, 0)
    stages = sorted(stages, key=lambda stage: -len(stage.frames))[: arguments.cameras]
    print(f"{len(stages)} cameras: {', '.join(stage.name for stage in stages)}", flush=True)

    def shares(stage: Stage, kind: str, severity: int, window: int, seed: int) -> list[float]:
        rng = np.random.default_rng([seed, severity, window, *kind.encode()])
        episode = draw_episode(stage, weather(kind, severity), learner.source.theta, window, AIM, rng)
        ways = (episode.source.theta, theta_of(gated, learner, episode), theta_of(rule, learner, episode))
        return [agreement(learner, [(way, episode)]) for way in ways]

    lines = ["| severity | pictures | " + " | ".join(ROWS) + " |", f"|---|---|{'---|' * len(ROWS)}"]
    for severity in (0, *map(int, arguments.severities.split(","))):
        kinds = BENCHMARK_KINDS if severity else ("clear",)
        for window in track(WINDOWS, f"severity {severity}", console=Console(file=sys.stderr)):
            found = np.array(
                [
                    [[shares(stage, kind, severity, window, seed) for kind in kinds] for seed in range(arguments.seeds)]
                    for stage in stages
                ]
            ).mean(2)  # cameras, seeds, rows
            cells = [
                f"{100 * found[..., row].mean():.1f} ± {100 * found[..., row].mean(1).std(ddof=1):.1f}"
                for row in range(len(ROWS))
            ]
            lines.append(f"| {severity or 'clear'} | {window} | {' | '.join(cells)} |")
    print("\n".join(lines))
    print(json.dumps({"cameras": len(stages), "seeds": arguments.seeds}))


if __name__ == "__main__":
    main()
