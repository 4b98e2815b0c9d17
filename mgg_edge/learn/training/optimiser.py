"""Adam on the learned numbers of a rule, in groups of their own rates, refusing what is not finite.

Each group's gradient is clipped at twice its running norm. The running norm starts at the first gradient, never at 0:
a map whose second factor is still 0 has no gradient at first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mgg_edge.errors import WeightsError

__all__ = ["RULE_RATES", "MetaOptimiser"]

MOMENT_DECAYS = (0.9, 0.99)
NORM_DECAY = 0.9
CLIP_RATIO = 2.0
WARMUP_STEPS = 10
# Peak rates by the last part of a parameter's name; everything else, the MGG's 164 numbers, at the last.
RULE_RATES: dict[str, float] = {
    "write": 1e-3,
    "read": 1e-3,
    "log_gain": 3e-2,
    "log_schedule": 3e-2,
    "log_map_schedule": 3e-2,
    "log_scale": 1e-2,
    "log_gate": 5e-2,
    "robust": 2e-3,
    "log_threshold": 2e-2,
    "log_slope": 2e-2,
    "": 1e-2,
}


class MetaOptimiser:
    """Optimises the parameters of a rule that want a gradient.

    Args:
        rule: its parameters are changed in place.
        updates: how many updates will be made; the rates follow a cosine to zero over them, after ten of warm-up.
        rates: peak rates, see `RULE_RATES`.
    """

    def __init__(self, rule: nn.Module, updates: int, rates: Mapping[str, float] = RULE_RATES) -> None:
        self.parameters = {name: value for name, value in rule.named_parameters() if value.requires_grad}
        groups: dict[str, list[str]] = {}
        for name in self.parameters:
            last = name.rpartition(".")[2]
            groups.setdefault(last if last in rates else "", []).append(name)
        self._groups, self._rates, self._updates = groups, dict(rates), updates
        self._norms = dict.fromkeys(groups, 0.0)
        self.made = 0
        self._adam = torch.optim.Adam(
            [{"params": [self.parameters[name] for name in names]} for names in groups.values()], betas=MOMENT_DECAYS
        )

    def step(self) -> None:
        """One update with the gradients the parameters hold; they are cleared.

        Raises:
            WeightsError: a gradient that is not finite: nothing is changed.
        """
        self._check()
        progress = self.made / self._updates
        factor = min(1.0, (self.made + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))
        for group, (key, names) in zip(self._adam.param_groups, self._groups.items(), strict=True):
            group["lr"] = self._rates[key] * factor
            values = [self.parameters[name] for name in names]
            norm = float(torch.nn.utils.get_total_norm([value.grad for value in values if value.grad is not None]))
            known = self._norms[key]
            if known > 0:
                torch.nn.utils.clip_grads_with_norm_(values, CLIP_RATIO * known, torch.tensor(norm))
            self._norms[key] = norm if known == 0 else NORM_DECAY * known + (1 - NORM_DECAY) * min(norm, 2 * known)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.made += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on."""
        state = {"made": torch.tensor(self.made)}
        for name, parameter in self.parameters.items():
            entry = self._adam.state.get(parameter, {})
            state |= {f"{key}.{name}": torch.as_tensor(value).clone() for key, value in entry.items()}
        return state | {f"norm.{key}": torch.tensor(value, dtype=torch.float64) for key, value in self._norms.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            KeyError: a part is missing.
        """
        self.made = int(state["made"])
        self._norms = {key: float(state[f"norm.{key}"]) for key in self._groups}
        for name, parameter in self.parameters.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in state]
            self._adam.state[parameter] = {
                key: state[f"{key}.{name}"].to(parameter.device if key != "step" else "cpu") for key in keys
            }

    def _check(self) -> None:
        for name, value in self.parameters.items():
            if value.grad is not None and not bool(torch.isfinite(value.grad).all()):
                raise WeightsError(
                    f"meta-training: the gradient of '{name}' is not finite at update {self.made}; nothing was changed"
                )
