r"""`mgg+` and `adam+`: a gradient rule with what can be learned about one backbone around it.

    θ ← θ − rate · gate · [ α · exp(c) ⊙ s_t · u_t  +  s'_t · P tanh(Q (g ⊘ ρ)) ]

    u_t       direction of the base rule, MGG or Adam
    c [N]     log gain of each scalar
    s, s'     schedules, exp of knots at t = 1, 2, 4 … 32, linear in log₂ t; then both fall as (32/t)^1.5, because what
              has been learned on short bursts must not run on for ever
    P, Q      [N, r] and [r, N]: a low-rank map of the gradient, ρ [N] its root mean square over random domains at θ₀
    gate      e / (e + k), e = max(0, Ē − 1), Ē the moving mean of Δ/Δ_clean(B): a clean stream is left alone

Rates are part of what is learned: `rate` may only lower them.
"""

from __future__ import annotations

import math
from collections import namedtuple
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mgg_edge.learn.rules.base import (
    Evidence,
    GradientRule,
    Proposal,
    SourceNumbers,
    UpdateRule,
    knot_weights,
    require_gradient,
)
from mgg_edge.learn.rules.classic import Adam
from mgg_edge.learn.rules.mgg import MGG

__all__ = ["SCHEDULE_KNOTS", "Plus"]

RANK = 32
BASE_RATE = 1e-2  # α
SCHEDULE_KNOTS = (1, 2, 4, 8, 16, 32)
TAIL_POWER = 1.5
EXCESS_DECAY = 0.7
UNTRAINED_SCALE = 1e-4


class Plus(UpdateRule):
    """A learned extension of a gradient rule.

    Args:
        base: `mgg` or `adam`.
        size: N, scalars of θ.
        rank: r of the low-rank map.
        seed: of the untrained numbers.

    Raises:
        ValueError: another base.
    """

    default_learning_rate = 1.0
    max_learning_rate = 1.0

    def __init__(self, base: str, size: int, rank: int = RANK, seed: int = 0) -> None:
        super().__init__()
        if base not in ("mgg", "adam"):
            raise ValueError(f"base: expected mgg or adam, found {base!r}")
        self.base_name, self.size, self.rank = base, size, rank
        self.base: GradientRule = MGG(seed) if base == "mgg" else Adam(beta2=0.99)
        generator = torch.Generator().manual_seed(seed)
        knots = torch.tensor([math.log(step) for step in SCHEDULE_KNOTS])
        self.log_gain = nn.Parameter(torch.zeros(size))
        self.log_schedule = nn.Parameter(-0.5 * knots)
        self.log_map_schedule = nn.Parameter(-knots)
        self.read = nn.Parameter(torch.randn(rank, size, generator=generator) / math.sqrt(size))
        self.write = nn.Parameter(UNTRAINED_SCALE * torch.randn(size, rank, generator=generator))
        self.log_gate = nn.Parameter(torch.tensor(math.log(0.1)))
        self.gradient_scale = nn.Parameter(torch.ones(size), requires_grad=False)

    @property
    def name(self) -> str:  # type: ignore[override]
        """`mgg+` or `adam+`."""
        return f"{self.base_name}+"

    def init(self, size: int, dtype: torch.dtype = torch.float32) -> Any:
        """State of the base rule, and the moving mean Ē f[]."""
        state = self.base.init(size, dtype)
        return _state_type(state._fields)(*state, torch.zeros((), dtype=dtype))

    def step(self, theta: Tensor, evidence: Evidence, state: Any, source: SourceNumbers, rate: Tensor) -> Proposal:
        """One step; see the equation above."""
        frames = theta.new_full((), evidence.features.shape[0])
        ratio = evidence.discrepancy / source.clean_at(frames)
        update, state = self.scaled_update(require_gradient(evidence), ratio, state)
        update = rate * update
        return Proposal(theta - update, update, state)

    def scaled_update(self, gradient: Tensor, ratio: Tensor, state: Any) -> tuple[Tensor, Any]:
        """What is taken from θ at rate 1.

        Args:
            gradient: f[N], or f[E·N] of E episodes side by side, each with the same step count.
            ratio: Δ/Δ_clean f[], or f[E].
            state: of the same size.
        """
        base_state = self.base.init(1)._replace(**{name: getattr(state, name) for name in state._fields[:-1]})
        direction, base_state = self.base.update(gradient, base_state)
        # The first batch's ratio is the mean so far.
        kept = EXCESS_DECAY * state.step.clamp(max=1)
        mean_ratio = kept * state.mean_ratio + (1 - kept) * ratio
        excess = torch.relu(mean_ratio - 1)
        gate = excess / (excess + self._number("log_gate", gradient).exp())
        schedule, map_schedule = self._schedules(base_state.step, gradient)
        gain = BASE_RATE * self._number("log_gain", gradient).exp() * schedule  # [N]
        rows = gradient.reshape(-1, self.size) / self._number("gradient_scale", gradient)  # [E, N]
        mapped = torch.tanh(rows @ self._number("read", gradient).T) @ self._number("write", gradient).T
        update = gate.reshape(-1, 1) * (gain * direction.reshape(-1, self.size) + map_schedule * mapped)
        return update.reshape(gradient.shape), type(state)(*base_state, mean_ratio)

    def options(self) -> dict[str, float | str]:
        """Base and sizes."""
        return {"base": self.base_name, "size": self.size, "rank": self.rank}

    def largest_update(self, rate: float) -> float:
        """Both terms at their largest."""
        base = self.base.largest_update(BASE_RATE) or math.inf
        gain = float((self.log_gain.detach().max() + self.log_schedule.detach().max()).exp())
        mapped = float(self.write.detach().abs().sum(dim=1).max() * self.log_map_schedule.detach().max().exp())
        return rate * (base * gain + mapped)

    def _schedules(self, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """s_t and s'_t at step t f[], counted from 1."""
        weights = knot_weights(step, SCHEDULE_KNOTS)
        tail = torch.exp(-TAIL_POWER * torch.relu((step / SCHEDULE_KNOTS[-1]).log()))
        first = (weights * self._number("log_schedule", like)).sum().exp()
        second = (weights * self._number("log_map_schedule", like)).sum().exp()
        return tail * first, tail * second

    def _number(self, name: str, like: Tensor) -> Tensor:
        value: Tensor = getattr(self, name)
        return value.to(like.dtype)


@cache
def _state_type(fields: tuple[str, ...]) -> Any:
    return namedtuple("PlusState", (*fields, "mean_ratio"))  # noqa: PYI024 - its fields are those of the base
