"""Train the default backbone on its source domain: clean, rendered glyphs of the training families.

    loss = cross-entropy with label smoothing; AdamW; learning rate: linear warm-up, then a cosine to zero

Pictures are rendered as they are needed, so no two epochs show the same. There is no corruption augmentation: what
the source model has not seen is what adaptation is for. All randomness comes from the recipe's seed and the epoch's
number, so a run that was interrupted goes on exactly as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mgg_edge.errors import UsageError, WeightsError
from mgg_edge.learn.training.state import read_training_state, write_training_state
from mgg_edge.scenes.sources import ImageSource, LabelledFrames

__all__ = ["SourceProgress", "SourceRecipe", "accuracy", "normalise", "train_source"]

CHUNK_BATCHES = 20  # batches rendered ahead at once
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class SourceRecipe:
    """How to train.

    Attributes:
        epochs: passes of `images_per_epoch` pictures; the model is measured and saved after each.
        images_per_epoch: pictures rendered for one epoch.
        batch: pictures of one step.
        learning_rate: peak rate of AdamW.
        warmup_steps: steps of linear warm-up.
        weight_decay: of AdamW, on matrices alone.
        label_smoothing: share of the target spread over all classes.
        average_decay: of the moving average of the weights, which is what is measured and saved; 0 for none.
        seed: of everything drawn.
    """

    epochs: int = 10
    images_per_epoch: int = 40_000
    batch: int = 64
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    average_decay: float = 0.995
    seed: int = 0

    def __post_init__(self) -> None:
        positive = (self.epochs, self.images_per_epoch // max(self.batch, 1), self.batch, self.learning_rate)
        shares = (self.label_smoothing, self.average_decay)
        if not (all(value > 0 for value in positive) and all(0 <= share < 1 for share in shares)):
            raise UsageError(f"source training: expected positive counts and rates, shares in [0, 1), found {self}")
        if not (self.warmup_steps >= 0 and self.weight_decay >= 0):
            raise UsageError(f"source training: expected warm-up and weight decay of at least 0, found {self}")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of one epoch."""
        return self.images_per_epoch // self.batch

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        rest = max(self.epochs * self.steps_per_epoch - self.warmup_steps, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - self.warmup_steps) / rest)))


class SourceProgress(NamedTuple):
    """Where training stands: steps made, moving mean of the loss, and the last accuracy if this step measured one."""

    step: int
    loss: float
    accuracy: float | None


def normalise(frames: Tensor, mean: float = 0.5, std: float = 0.5) -> Tensor:
    """Inputs f32[B, 3, H, W] of frames u8[B, H, W, 3]."""
    return (frames.permute(0, 3, 1, 2).float() / 255 - mean) / std


def accuracy(model: nn.Module, pictures: LabelledFrames) -> float:
    """Share of pictures a classifier with mean = std = 0.5 names right; the model is left in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    with torch.inference_mode():
        for start in range(0, len(pictures.labels), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            logits = model(normalise(torch.from_numpy(pictures.frames[part]).to(device)))
            right += int((logits.argmax(1).cpu() == torch.from_numpy(pictures.labels[part])).sum())
    return right / len(pictures.labels)


def train_source(
    model: nn.Module,
    source: ImageSource,
    validation: LabelledFrames,
    recipe: SourceRecipe,
    resume: Path | None = None,
) -> Iterator[SourceProgress]:
    """Train a model in place, step by step.

    Args:
        model: classifier of inputs f32[B, 3, H, W]; at the end it holds the averaged weights.
        source: training pictures.
        validation: pictures of other families, measured after every epoch.
        recipe: how to train.
        resume: file the training state is kept in, written after every epoch; if it is there, training goes on from it.

    Yields:
        Progress after each step.

    Raises:
        WeightsError: the loss or a gradient is not finite: nothing is applied; or `resume` belongs to another recipe.
    """
    trainer = _Trainer(model, recipe)
    first = trainer.load(resume) if resume is not None and resume.exists() else 0
    loss_mean = math.nan
    for epoch in range(first, recipe.epochs):
        for frames, labels in _epoch_batches(source, recipe, epoch):
            loss = trainer.step(frames, labels)
            loss_mean = loss if math.isnan(loss_mean) else 0.98 * loss_mean + 0.02 * loss
            if trainer.steps % recipe.steps_per_epoch:
                yield SourceProgress(trainer.steps, loss_mean, None)
        if resume is not None:
            trainer.save(resume, epoch + 1)
        yield SourceProgress(trainer.steps, loss_mean, accuracy(trainer.average, validation))
    model.load_state_dict(trainer.average.state_dict())
    model.eval()


class _Trainer:
    """Model, optimiser and averaged weights."""

    def __init__(self, model: nn.Module, recipe: SourceRecipe) -> None:
        import copy

        self.model, self.recipe, self.steps = model.train().requires_grad_(True), recipe, 0
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self.parameters = dict(model.named_parameters())
        matrices = [value for value in self.parameters.values() if value.ndim > 1]
        vectors = [value for value in self.parameters.values() if value.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate)

    def step(self, frames: Tensor, labels: Tensor) -> float:
        """One update; refuses numbers that are not finite before anything is changed."""
        self.model.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.rate(self.steps)
        self.optimiser.zero_grad(set_to_none=True)
        logits = self.model(normalise(frames.to(self.device)))
        loss = functional.cross_entropy(logits, labels.to(self.device), label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        value = float(loss.detach())
        if not (math.isfinite(value) and bool(torch.isfinite(norm))):
            raise WeightsError(
                f"source training: loss {value}, gradient norm {float(norm)} at step {self.steps}: expected finite "
                "numbers; lower the learning rate"
            )
        self.optimiser.step()
        self.steps += 1
        decay = min(self.recipe.average_decay, self.steps / (self.steps + 10))
        with torch.no_grad():
            for slow, fast in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
                slow.lerp_(fast, 1 - decay) if slow.is_floating_point() else slow.copy_(fast)
        return value

    def save(self, path: Path, epochs: int) -> None:
        """Everything the next epoch depends on, in place of the file's former content."""
        write_training_state(
            path, {"model": self.model, "average": self.average}, self.optimiser, self.parameters,
            {"epochs": epochs, "steps": self.steps, "recipe": asdict(self.recipe)},
        )  # fmt: skip

    def load(self, path: Path) -> int:
        """Epochs made; model, average and optimiser as they were then."""
        found = read_training_state(
            path, {"model": self.model, "average": self.average}, self.optimiser, self.parameters, asdict(self.recipe)
        )
        self.steps = int(found["steps"])
        return int(found["epochs"])


def _epoch_batches(source: ImageSource, recipe: SourceRecipe, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch; while one chunk is used the next is rendered."""
    sizes = [CHUNK_BATCHES] * (recipe.steps_per_epoch // CHUNK_BATCHES)
    if rest := recipe.steps_per_epoch % CHUNK_BATCHES:
        sizes.append(rest)

    def chunk(number: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([recipe.seed, epoch, number])
        labels = rng.choice(source.available, sizes[number] * recipe.batch)
        return torch.from_numpy(source.draw(labels, rng)), torch.from_numpy(labels)

    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(chunk, 0)
        for number in range(len(sizes)):
            frames, labels = ahead.result()
            if number + 1 < len(sizes):
                ahead = worker.submit(chunk, number + 1)
            yield from zip(frames.split(recipe.batch), labels.split(recipe.batch), strict=True)
