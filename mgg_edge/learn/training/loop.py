"""The loop around meta-training: progress, label-free selection, resuming.

Every `score_every` updates the rule is scored on fixed held-out weathers by agreement with what the frozen model says
of the clean pictures; no label is looked at. The numbers with the best score are what training ends with. All chance of
update n comes from (seed, n), so that an interrupted training goes on; rounds of several windows begin anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from mgg_edge.errors import UsageError, WeightsError
from mgg_edge.files import write_whole
from mgg_edge.learn.rules.base import UpdateRule
from mgg_edge.learn.training.optimiser import MetaOptimiser

__all__ = ["LoopRecipe", "Progress", "RuleTrainer", "meta_train"]

FORMAT = "mgg-edge.meta-training 1"


class RuleTrainer(Protocol):
    """What the loop needs of a trainer."""

    @property
    def rule(self) -> UpdateRule:
        """What is trained, in place."""

    @property
    def rates(self) -> Mapping[str, float]:
        """Peak rates of its numbers, see `RULE_RATES`."""

    def prepare(self, rng: np.random.Generator) -> None:
        """Set what is measured, not learned."""

    def backward(self, rng: np.random.Generator) -> float:
        """Leave gradients in the rule's parameters; returns the loss."""

    def finish(self, rng: np.random.Generator) -> None:
        """Measure what depends on the learned numbers."""


@dataclass(frozen=True)
class LoopRecipe:
    """How long, and from which chance.

    Attributes:
        updates: meta-updates.
        seed: of everything drawn.
        score_every: updates between two scores.
    """

    updates: int
    seed: int = 0
    score_every: int = 50

    def __post_init__(self) -> None:
        if min(self.updates, self.score_every) < 1:
            raise UsageError(f"meta-training: expected counts of at least 1, found {self}")


class Progress(NamedTuple):
    """Updates made, moving mean of the loss, the last score if this update measured one, and the best so far."""

    made: int
    loss: float
    score: float | None
    best: float


def meta_train(
    trainer: RuleTrainer,
    score: Callable[[], float],
    recipe: LoopRecipe,
    resume: Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Progress]:
    """Train a rule in place, update by update; at the end it holds the numbers with the best score.

    Args:
        trainer: of the rule.
        score: measures the rule as it is; more is better.
        recipe: how long.
        resume: file the state is kept in, written with every score; if it is there, training goes on from it.
        facts: what else decides what is learned; a file written under others is refused.

    Raises:
        WeightsError: a gradient or loss that is not finite, nothing is changed; or `resume` is of another training.
        SinkError: `resume` cannot be written.
    """
    run = _Run(trainer, recipe, resume, facts or {})
    if not run.load():
        trainer.prepare(np.random.default_rng([recipe.seed, 0]))
        run.note(score())
    while run.optimiser.made < recipe.updates:
        loss = trainer.backward(np.random.default_rng([recipe.seed, run.optimiser.made + 1]))
        if not np.isfinite(loss):
            raise WeightsError(f"meta-training: the loss is {loss} at update {run.optimiser.made}; nothing was changed")
        run.optimiser.step()
        run.loss = loss if run.loss is None else 0.95 * run.loss + 0.05 * loss
        made, found = run.optimiser.made, None
        if made % recipe.score_every == 0 or made == recipe.updates:
            found = score()
            run.note(found)
            run.save()
        yield Progress(made, run.loss, found, run.best)
    run.finish()
    trainer.finish(np.random.default_rng([recipe.seed, 0]))


class _Run:
    """What an interrupted training is gone on with from."""

    def __init__(self, trainer: RuleTrainer, recipe: LoopRecipe, path: Path | None, facts: Mapping[str, Any]) -> None:
        self.rule, self._path = trainer.rule, path
        self.optimiser = MetaOptimiser(trainer.rule, recipe.updates, trainer.rates)
        self.loss: float | None = None
        self.best = -1.0
        self._best_numbers: dict[str, Tensor] = {}
        described = {"recipe": vars(recipe), "rule": [trainer.rule.name, trainer.rule.options()], "facts": dict(facts)}
        self._key = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()

    def note(self, found: float) -> None:
        """Keep the numbers if they are the best so far."""
        if found > self.best:
            self.best = found
            self._best_numbers = {name: value.clone() for name, value in self.rule.state_dict().items()}

    def finish(self) -> None:
        """Take the best numbers; remove the file."""
        self.rule.load_state_dict(self._best_numbers)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def save(self) -> None:
        """Write everything the next update depends on."""
        if self._path is None:
            return
        parts = {
            "rule": self.rule.state_dict(),
            "best": self._best_numbers,
            "optimiser": self.optimiser.state_dict(),
            "loop": {"best": torch.tensor(self.best, dtype=torch.float64), "loss": torch.tensor(self.loss or 0.0)},
        }
        tensors = {f"{part}/{name}": value.contiguous() for part, own in parts.items() for name, value in own.items()}
        write_whole(self._path, save(tensors, {"format": FORMAT, "key": self._key}))

    def load(self) -> bool:
        """Whether there was a state to go on from."""
        if self._path is None or not self._path.exists():
            return False
        try:
            with safetensors.safe_open(self._path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if header.get("format") != FORMAT:
                raise KeyError("format")
            if header.get("key") != self._key:
                raise WeightsError(
                    f"{self._path}: cannot resume: it belongs to another training (recipe, rule, model or data); "
                    "remove it, or give the same arguments"
                )
            parts: dict[str, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                part, _, own = name.partition("/")
                parts.setdefault(part, {})[own] = value
            self.rule.load_state_dict(parts["rule"])
            self.optimiser.load_state_dict(parts["optimiser"])
            self._best_numbers, loop = parts["best"], parts["loop"]
            self.best, self.loss = float(loop["best"]), float(loop["loss"])
        except (OSError, safetensors.SafetensorError, KeyError, RuntimeError) as error:
            raise WeightsError(f"{self._path}: cannot resume: expected a state of meta-training: {error}") from error
        return True
