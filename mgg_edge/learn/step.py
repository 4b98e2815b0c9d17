"""One adaptation step as a pure function: backbone × objective × update rule.

    adapt(frames, state, constants) -> (logits, diagnostics, new state)

        logits, z, S = f(frames; θ, S)    g = ∂L(logits, z)/∂θ          θ, rule state = rule(θ, g, z, rule state)

The logits returned are those before the update. A rule that needs no gradient gets z under θ₀, in place of θ, and no g:
its step is one forward pass of the source model, whose logits are returned. S, the statistics of batch normalisation,
are there only where they move; see `norm_statistics`.

Everything the step needs beside frames and state is an entry of `constants`, so that the traced graph has
no baked-in weights and the same function runs in float32 and float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from mgg_edge.learn.backbone import NORM_STATISTICS, Backbone, BackboneOutput
from mgg_edge.learn.objective import Objective, ObjectiveTerms
from mgg_edge.learn.rules.base import Evidence, Proposal, SourceNumbers, UpdateRule
from mgg_edge.learn.statistics import SourceStatistics

__all__ = ["AdaptOutput", "AdaptStep"]

RULE_PREFIX = "rule."


class AdaptOutput(NamedTuple):
    """Result of one step.

    Attributes:
        logits: f[B, C], before the update.
        entropy, discrepancy, loss: f[], see `Objective`.
        gradient_norm: f[], ‖g‖₂; 0 for a rule that takes no gradient.
        update_norm: f[], ‖Δθ‖₂.
        state: the new state by name, `theta` first.
    """

    logits: Tensor
    entropy: Tensor
    discrepancy: Tensor
    loss: Tensor
    gradient_norm: Tensor
    update_norm: Tensor
    state: dict[str, Tensor]


@dataclass(frozen=True)
class AdaptStep:
    """The parts of a step and the numbers they need.

    Attributes:
        backbone: the classifier.
        objective: the loss.
        rule: the update rule.
        statistics: μ_S and σ_S.
        learning_rate: α.
        loss_scale: the loss is differentiated after being multiplied by it, and the gradient divided by it: a power of
            two, for arithmetic of too small a range.
    """

    backbone: Backbone
    objective: Objective
    rule: UpdateRule
    statistics: SourceStatistics
    learning_rate: float
    loss_scale: float = 1.0

    def constants(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Everything that stays fixed, by the names used in graphs and files."""
        learned = {f"{RULE_PREFIX}{name}": value.detach().to(dtype) for name, value in self.rule.named_parameters()}
        rest = {
            "learning_rate": torch.tensor(self.learning_rate, dtype=dtype),
            "source_theta": self.backbone.theta(dtype),
        }
        return {**self.backbone.constants(dtype), **self.statistics.constants(dtype), **learned, **rest}

    def initial_state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The backbone's state at the source and the rule's first state, by name."""
        with torch.no_grad():
            rule_state = self.rule.init(self.backbone.norms.size, dtype)
        return {**self.backbone.initial_state(dtype), **rule_state._asdict()}

    def infer(
        self, frames: Tensor, state: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits f[B, C] and features f[B, D] of frames u8[B, H, W, 3]; reads `backbone.infer_state` of the state."""
        norms = self.backbone.split(state["theta"])
        return self.backbone.forward(frames, norms, constants, state.get(NORM_STATISTICS))

    def adapt(self, frames: Tensor, state: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> AdaptOutput:
        """One step on frames u8[B, H, W, 3], B ≥ 2; `state` is not changed.

        Raises:
            ValueError: B < 2.
        """
        theta, source = state["theta"], _source(constants)
        norms = self.backbone.split(theta if self.rule.needs_gradient else source.theta)

        def loss(norms: dict[str, Tensor]) -> tuple[Tensor, tuple[BackboneOutput, ObjectiveTerms]]:
            output = self.backbone.forward_moving(frames, norms, constants, state.get(NORM_STATISTICS))
            terms = self.objective(output.logits, output.features, source.mean, source.std)
            return terms.loss if self.loss_scale == 1 else terms.loss * self.loss_scale, (output, terms)

        gradient: Tensor | None = None
        if self.rule.needs_gradient:
            gradients, (output, terms) = torch.func.grad(loss, has_aux=True)(norms)
            gradient = torch.cat([gradients[name].flatten() for name in self.backbone.norms.names])  # [N]
            if self.loss_scale != 1:
                gradient = gradient / self.loss_scale
        else:
            _, (output, terms) = loss(norms)
        proposal = self._apply_rule(theta, Evidence(gradient, output.features, terms.discrepancy), state, constants)
        return AdaptOutput(
            logits=output.logits,
            entropy=terms.entropy,
            discrepancy=terms.discrepancy,
            loss=terms.loss,
            gradient_norm=theta.new_zeros(()) if gradient is None else _norm(gradient),
            update_norm=_norm(proposal.update),
            state={"theta": proposal.theta, **output.moved, **proposal.state._asdict()},
        )

    def _apply_rule(
        self, theta: Tensor, evidence: Evidence, state: Mapping[str, Tensor], constants: Mapping[str, Tensor]
    ) -> Proposal:
        learned = {
            name.removeprefix(RULE_PREFIX): value for name, value in constants.items() if name.startswith(RULE_PREFIX)
        }
        template = self.rule.init(1)
        rule_state = type(template)(**{name: state[name] for name in template._fields})
        arguments = (theta, evidence, rule_state, _source(constants), constants["learning_rate"])
        proposal: Proposal = functional_call(self.rule, learned, arguments)
        return proposal


def _source(constants: Mapping[str, Tensor]) -> SourceNumbers:
    statistics = (constants[f"statistics.{name}"] for name in ("mean", "std", "clean_discrepancy"))
    return SourceNumbers(constants["source_theta"], *statistics)


def _norm(vector: Tensor) -> Tensor:
    return vector.square().sum().sqrt()
