"""What a rule of cameras is worth on scenes and things it was never shown, in weathers it was never shown.

The fifteen kinds of the benchmark at severity 3, each seen by every camera: θ comes from a window of sixteen frames,
other things are named under it. Truth is what the frozen model says of the clear view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mgg_edge.learn.rules.forward_plus import ForwardPlus
from mgg_edge.learn.training.learner import Learner
from mgg_edge.learn.training.scene_map import agreement, theta_of
from mgg_edge.learn.training.stages import build_stages, draw_episode
from mgg_edge.scenes.corruptions import BENCHMARK_KINDS, corrupt
from mgg_edge.scenes.domains import Domain
from mgg_edge.scenes.objects import CutOut, Scene

__all__ = ["WeatherRow", "judge_rule", "verdict", "weather"]

SEVERITY = 3
WINDOW, AIM = 16, 16
MAX_CAMERAS = 8
VIEWS = 96
SEED = 555
MAX_CLEAR_LOST = 0.02


@dataclass(frozen=True)
class WeatherRow:
    """Shares of frames named as in clear weather. Attributes: weather; frozen; robust, under θ₀ + δ; adapted."""

    weather: str
    frozen: float
    robust: float
    adapted: float


def judge_rule(
    rule: ForwardPlus,
    learner: Learner,
    scenes: Sequence[Scene],
    cut_outs: Sequence[CutOut],
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> list[WeatherRow]:
    """A row for clear weather and one for each kind.

    Raises:
        UsageError: before no scene enough is recognised.
    """
    stages = build_stages(scenes, cut_outs, learner.frozen, VIEWS, SEED, progress)[:MAX_CAMERAS]
    theta, rows = learner.source.theta, []
    for number, kind in enumerate(("clear", *BENCHMARK_KINDS)):
        rng = np.random.default_rng([SEED, number])
        episodes = [draw_episode(stage, weather(kind, SEVERITY), theta, WINDOW, AIM, rng) for stage in stages]
        ways = (
            [theta for _ in episodes],
            [theta + rule.robust.detach() for _ in episodes],
            [theta_of(rule, learner, episode) for episode in episodes],
        )
        shares = (agreement(learner, list(zip(way, episodes, strict=True))) for way in ways)
        rows.append(WeatherRow(kind if kind == "clear" else f"{kind}@{SEVERITY}", *shares))
        progress("weathers", number + 1, 1 + len(BENCHMARK_KINDS))
    return rows


def verdict(rows: Sequence[WeatherRow]) -> str:
    """One sentence: whether it pays."""
    clear, weathers = rows[0], rows[1:]
    frozen, adapted = (float(np.mean([getattr(row, name) for row in weathers])) for name in ("frozen", "adapted"))
    worst = min(weathers, key=lambda row: row.adapted - row.frozen)
    found = (
        f"on scenes and things it has never seen, at severity {SEVERITY} from {WINDOW} frames: {100 * frozen:.1f} % "
        f"frozen, {100 * adapted:.1f} % adapted; clear pictures kept {100 * clear.adapted:.1f} %; worst is "
        f"{worst.weather}, {100 * (worst.adapted - worst.frozen):+.1f}"
    )
    pays = adapted > frozen and clear.frozen - clear.adapted <= MAX_CLEAR_LOST
    return f"it {'pays' if pays else 'does not pay'}: {found}"


def weather(kind: str, severity: int) -> Domain:
    """One of the benchmark's kinds at a severity from 1 to 5, or `clear`."""
    if kind == "clear":
        return Domain("clean", ())

    def apply(frames: NDArray[np.float32], _scale: float, rng: np.random.Generator) -> NDArray[np.float32]:
        return (corrupt(np.rint(frames * 255).astype(np.uint8), kind, severity, rng) / np.float32(255)).astype(
            np.float32
        )

    return Domain(kind, (apply,))
