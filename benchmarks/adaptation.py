"""Accuracy of the update rules on corruptions they have never seen: the tables of docs/RESULTS.md.

    scripts/bench adaptation                    everything, about half an hour on two cores; finished parts are kept

Each of the 15 kinds at severity 5 is adapted to on its own, in pictures of unseen type families; then `FRESH` other
pictures of the kind are read. Rates of SGD and Adam are chosen on held-out random weathers, never on the kinds.
Parts are kept in .cache/results, one file for each rule and seed, and made again when their inputs change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import adaptation_tables, kinds_table, sensitivity_table
from torch import Tensor

from mgg_edge.learn import Adam, Backbone, Objective, Sgd
from mgg_edge.learn.checkpoint import read_state_dict
from mgg_edge.learn.reader import READER_NAME
from mgg_edge.learn.rules.base import UpdateRule
from mgg_edge.learn.rules.files import load_rule
from mgg_edge.learn.rules.forward import Forward
from mgg_edge.learn.training.gradient import rule_update
from mgg_edge.learn.training.learner import Learner
from mgg_edge.learn.training.rules import source_statistics
from mgg_edge.learn.training.worlds import World
from mgg_edge.scenes.corruptions import BENCHMARK_KINDS, corrupt
from mgg_edge.scenes.glyphs import load_glyphs
from mgg_edge.scenes.sources import GlyphSource

SEEDS = (0, 1, 2)
FRESH, PART = 300, 60
UPDATES = (1, 5, 10, 25)
BATCHES = {0: (4, 8, 16, 64), 1: (16,), 2: (16,)}  # of each seed: batches other than 16 cost more than they tell
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
WINDOWS = (4, 8, 16, 32, 64, 128)
SEVERITY = 5
RATES = {"sgd": (3e-3, 1e-2, 3e-2), "adam": (3e-3, 1e-2, 2e-2, 4e-2)}


class Kinds:
    """Pictures of the 15 kinds side by side: an episode a kind."""

    def __init__(self, source: GlyphSource, seed: int) -> None:
        self._source, self.seed = source, seed

    def draw(self, count: int, number: int) -> tuple[Tensor, Tensor]:
        """Frames u8[15, count, H, W, 3] and labels i64[15, count]; the same for the same number."""
        frames, labels = [], []
        for index, kind in enumerate(BENCHMARK_KINDS):
            rng = np.random.default_rng([self.seed, number, index])
            chosen = rng.choice(self._source.available, count)
            frames.append(torch.from_numpy(corrupt(self._source.draw(chosen, rng), kind, SEVERITY, rng)))
            labels.append(torch.from_numpy(chosen))
        return torch.stack(frames), torch.stack(labels)

    def clean(self, count: int, number: int) -> tuple[Tensor, Tensor]:
        """Clean pictures, as one episode."""
        rng = np.random.default_rng([self.seed, number, 99])
        chosen = rng.choice(self._source.available, count)
        return torch.from_numpy(self._source.draw(chosen, rng))[None], torch.from_numpy(chosen)[None]


def accuracy(learner: Learner, theta: Tensor, fresh: tuple[Tensor, Tensor]) -> list[float]:
    """Accuracy of each episode on the fresh pictures."""
    right = torch.zeros(len(theta))
    for start in range(0, fresh[0].shape[1], PART):
        frames, labels = (part[:, start : start + PART] for part in fresh)
        with torch.no_grad():
            right += (learner.forward(theta, frames)[0].argmax(2) == labels).sum(1)
    return [round(float(value) / fresh[0].shape[1], 4) for value in right]


def adapt(
    rule: UpdateRule,
    rate: Callable[[int], float],
    learner: Learner,
    draw: Callable[[int], Tensor],
    episodes: int,
    updates: tuple[int, ...],
) -> dict[int, Tensor]:
    """θ f[E, N] after some updates on batches that `draw` gives by number."""
    theta, found = learner.start(episodes), {}
    state = rule.init(theta.numel())
    for number in range(1, max(updates) + 1):
        frames = draw(number)
        gradient, discrepancy = learner.loss_gradient(theta, frames)
        with torch.no_grad():
            clean = learner.source.clean_at(learner.scalar(frames.shape[1]))
            update, state = rule_update(rule, gradient, discrepancy / clean, state, rate(number))
        theta = theta - update
        if number in updates:
            found[number] = theta
    return found


def forward_theta(rule: Forward, learner: Learner, frames: Tensor) -> Tensor:
    """θ f[E, N] of `forward` from frames u8[E, M, H, W, 3]."""
    features = learner.features(frames) - learner.source.mean
    sums = torch.stack([features.sum(1), features.square().sum(1)], dim=1)
    with torch.no_grad():
        window = rule.statistics(sums, learner.scalar(frames.shape[1]), learner.source)
        return learner.source.theta - rule.change(window, learner.source)


def measure_gradient_rule(
    rule: UpdateRule, rate: Callable[[int], float], learner: Learner, kinds: Kinds
) -> dict[str, Any]:
    """Accuracy after updates, by batch; and what is lost on clean pictures."""
    fresh, clean = kinds.draw(FRESH, 0), kinds.clean(1000, 0)
    result: dict[str, Any] = {"kinds": {}, "clean": {}}
    for batch in BATCHES[kinds.seed]:
        thetas = adapt(rule, rate, learner, lambda n, b=batch: kinds.draw(b, 1000 * b + n)[0], 15, UPDATES)
        result["kinds"][batch] = {count: accuracy(learner, theta, fresh) for count, theta in thetas.items()}
    thetas = adapt(rule, rate, learner, lambda n: kinds.clean(16, n)[0], 1, (10, 50))
    result["clean"] = {count: accuracy(learner, theta, clean)[0] for count, theta in thetas.items()}
    if kinds.seed == 0:
        result["sensitivity"] = measure_sensitivity(rule, rate(1), learner, kinds)
    return result


def measure_sensitivity(rule: UpdateRule, rate: float, learner: Learner, kinds: Kinds) -> dict[str, float]:
    """Mean accuracy after 10 updates of batch 16 at multiples of a rate, as far as the rule allows them."""
    fresh, found = kinds.draw(FRESH, 0), {}
    for factor in FACTORS:
        if rate * factor <= rule.max_learning_rate:
            own = rate * factor
            theta = adapt(rule, lambda _n, r=own: r, learner, lambda n: kinds.draw(16, 16_000 + n)[0], 15, (10,))[10]
            found[str(factor)] = round(float(np.mean(accuracy(learner, theta, fresh))), 4)
    return found


def measure_forward(rule: Forward, learner: Learner, kinds: Kinds) -> dict[str, Any]:
    """Accuracy from M frames; and what is lost on clean pictures."""
    fresh, clean = kinds.draw(FRESH, 0), kinds.clean(1000, 0)
    found = {m: accuracy(learner, forward_theta(rule, learner, kinds.draw(m, m)[0]), fresh) for m in WINDOWS}
    left = {m: accuracy(learner, forward_theta(rule, learner, kinds.clean(m, m)[0]), clean)[0] for m in (16, 64, 128)}
    return {"kinds": found, "clean": left}


def measure_oracle(learner: Learner, kinds: Kinds) -> dict[str, Any]:
    """The frozen model, and norms trained with labels (Adam 1.2e-2, cosine, 150 batches of 32)."""
    fresh, clean = kinds.draw(FRESH, 0), kinds.clean(1000, 0)
    frozen = {
        "kinds": accuracy(learner, learner.start(15), fresh),
        "clean": accuracy(learner, learner.start(1), clean)[0],
    }
    theta, rule = learner.start(15), Adam()
    state, steps = rule.init(theta.numel()), 150
    for number in range(steps):
        frames, labels = kinds.draw(32, 500_000 + number)
        moving = theta.detach().requires_grad_()
        logits, _ = learner.forward(moving, frames)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 32
        (gradient,) = torch.autograd.grad(loss, moving)
        direction, state = rule.update(gradient.flatten(), state)
        theta = theta - 1.2e-2 * 0.5 * (1 + np.cos(np.pi * number / steps)) * direction.reshape(theta.shape)
    return {"frozen": frozen, "oracle": {"kinds": accuracy(learner, theta, fresh)}}


def choose_rate(make: Callable[[], UpdateRule], rates: tuple[float, ...], learner: Learner, world: World) -> float:
    """The rate that reads held-out random weathers best after 10 updates."""
    rng = np.random.default_rng(1234)
    weathers = [world.weather(rng, clean_share=0.0) for _ in range(24)]

    def draw(count: int, number: int) -> tuple[Tensor, Tensor]:
        parts = [weather.draw(count, np.random.default_rng([7, number, i])) for i, weather in enumerate(weathers)]
        return torch.stack([part.frames for part in parts]), torch.stack([part.targets for part in parts])

    fresh = draw(64, 0)
    scores = {}
    for rate in rates:
        theta = adapt(make(), lambda _n, r=rate: r, learner, lambda n: draw(16, n)[0], len(weathers), (10,))[10]
        scores[rate] = float(np.mean(accuracy(learner, theta, fresh)))
    print(f"   rates on held-out weathers: {scores}", flush=True)
    return max(scores, key=scores.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=Path(".cache/default"), help="glyphs, reader and rules")
    parser.add_argument("--kept", type=Path, default=Path(".cache/results"), help="finished parts")
    parser.add_argument("--only", default="", help="rules to measure, comma-separated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.kept.mkdir(parents=True, exist_ok=True)
    glyphs = load_glyphs(arguments.parts / "glyphs.safetensors")
    backbone = Backbone.create(READER_NAME, read_state_dict(arguments.parts / "reader.safetensors"))
    statistics = source_statistics(backbone, GlyphSource(glyphs.select("source-train")), 0)
    learner = Learner(backbone, Objective(), statistics, torch.device("cpu"))
    held_out = World(GlyphSource(glyphs.select("source-validation")), learner.predictions, "predictions", 0.0)
    wanted = [name for name in arguments.only.split(",") if name]
    rules = sorted(arguments.parts.glob("*.safetensors"))
    rules = [path for path in rules if path.stem not in ("glyphs", "reader")]
    names = wanted or ["source", "sgd", "sgd-1/t", "adam", *(path.stem for path in rules)]
    for name in names:
        path = arguments.parts / f"{name}.safetensors"
        key = hashlib.sha256(path.read_bytes() if path.exists() else name.encode()).hexdigest()[:12]
        for seed in SEEDS:
            kept = arguments.kept / f"{name.replace('/', '-')}.{seed}.{key}.json"
            if kept.exists():
                continue
            started, kinds = time.monotonic(), Kinds(GlyphSource(glyphs.select("test")), seed)
            result = measure(name, path, learner, held_out, kinds)
            kept.write_text(json.dumps({"name": name, "seed": seed, **result}))
            print(f"-- {name}, seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"{adaptation_tables(arguments.kept)}\n\n{kinds_table(arguments.kept, BENCHMARK_KINDS)}\n")
    print(sensitivity_table(arguments.kept))


def measure(name: str, path: Path, learner: Learner, held_out: World, kinds: Kinds) -> dict[str, Any]:
    """What one rule does on one seed's streams."""
    if name == "source":
        return measure_oracle(learner, kinds)
    if name == "sgd-1/t":
        return measure_gradient_rule(Sgd(0.0), lambda n: 0.1 / n, learner, kinds)
    if name in ("sgd", "adam"):
        make: Callable[[], UpdateRule] = Adam if name == "adam" else Sgd
        rate = choose_rate(make, RATES[name], learner, held_out)
        return {"rate": rate, **measure_gradient_rule(make(), lambda _n: rate, learner, kinds)}
    rule = load_rule(path, learner.backbone.norms.size, learner.backbone.features)
    if isinstance(rule, Forward):
        return measure_forward(rule, learner, kinds)
    return measure_gradient_rule(rule, lambda _n: rule.default_learning_rate, learner, kinds)


if __name__ == "__main__":
    main()
