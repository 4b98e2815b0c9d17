"""SGD, Adam and the MGG on the project's own loss: the step that is exported, on PyTorch.

A few frames say little about a standard deviation, and one frame nothing: they are answered at once and collected until
there are enough for one step, as on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mgg_edge.errors import UsageError
from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.methods.base import Classifier, SourceKnowledge
from mgg_edge.learn.objective import Objective
from mgg_edge.learn.rules.base import UpdateRule
from mgg_edge.learn.rules.classic import Sgd
from mgg_edge.learn.rules.files import LEARNED_RULES, load_rule, untrained_rule
from mgg_edge.learn.step import AdaptStep

__all__ = ["RuleMethod", "RuleOptions", "RuleState", "build_rule_method"]


@dataclass(frozen=True)
class RuleOptions:
    """Settings.

    Attributes:
        learning_rate: α; None for the rule's own.
        rate_factor: multiplies α.
        entropy_weight: w_H of the loss.
        discrepancy_weight: λ of the loss.
        momentum: of SGD.
        weights: file of the MGG's learned numbers; untrained without.
        least_batch: frames of one step, at least; 2 or more.
        seed: of an untrained MGG.
    """

    learning_rate: float | None = None
    rate_factor: float = 1.0
    entropy_weight: float = 1.0
    discrepancy_weight: float = Objective().discrepancy_weight
    momentum: float = 0.9
    weights: str = ""
    least_batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        if not (rate > 0.0 and self.rate_factor > 0.0 and self.least_batch >= 2):
            raise UsageError(f"rule: expected positive learning rates and a least batch of 2 or more, found {self}")
        if not (self.entropy_weight >= 0.0 and self.discrepancy_weight >= 0.0 and 0.0 <= self.momentum < 1.0):
            raise UsageError(f"rule: expected weights of at least 0 and a momentum in [0, 1), found {self}")


class RuleState(NamedTuple):
    """Attributes: tensors of the step by name; waiting: u8[n, H, W, 3], frames collected for the next step."""

    tensors: dict[str, Tensor]
    waiting: Tensor


class RuleMethod:
    """An adaptation step as a method.

    Attributes:
        name: of the rule.

    Args:
        step: the step.
        least_batch: frames of one step, at least.
    """

    def __init__(self, step: AdaptStep, least_batch: int) -> None:
        self._step, self._least, self._constants = step, least_batch, step.constants()
        self.name: str = step.rule.name

    def init(self) -> RuleState:
        """The source model and an empty memory."""
        size = self._step.backbone.preprocess
        return RuleState(self._step.initial_state(), torch.zeros(0, size.height, size.width, 3, dtype=torch.uint8))

    def step(self, frames: Tensor, state: RuleState) -> tuple[Tensor, RuleState]:
        """Logits f[B, C] before the update, and the next state.

        The answer is inference under the state, as on the device. The step's own logits are another thing: those of a
        rule without a gradient are the source model's.
        """
        answer, batch = self.predict(frames, state), torch.cat([state.waiting, frames])
        if len(batch) < self._least:
            return answer, RuleState(state.tensors, batch)
        output = self._step.adapt(batch, state.tensors, self._constants)
        return answer, RuleState({name: value.detach() for name, value in output.state.items()}, batch[:0])

    def predict(self, frames: Tensor, state: RuleState) -> Tensor:
        """Logits f[B, C] of the adapted model."""
        with torch.no_grad():
            return self._step.infer(frames, state.tensors, self._constants)[0]


def build_rule_method(name: str, classifier: Classifier, options: RuleOptions, source: SourceKnowledge) -> RuleMethod:
    """The method of an update rule.

    Raises:
        UsageError: a weights file for a rule that learns nothing, or no such file.
        WeightsError: a weights file that does not fit.
    """
    if options.weights and name not in LEARNED_RULES:
        raise UsageError(f"{name}: takes no weights file")
    rule = _rule(name, classifier.backbone, options)
    rate = (
        rule.default_learning_rate if options.learning_rate is None else options.learning_rate
    ) * options.rate_factor
    objective = Objective(options.entropy_weight, options.discrepancy_weight)
    step = AdaptStep(classifier.backbone, objective, rule, source.statistics, rate)
    return RuleMethod(step, options.least_batch)


def _rule(name: str, backbone: Backbone, options: RuleOptions) -> UpdateRule:
    size, features = backbone.norms.size, backbone.features
    if options.weights:
        return load_rule(Path(options.weights), size, features)
    return Sgd(options.momentum) if name == "sgd" else untrained_rule(name, size, features, options.seed)
