"""Logits, from whatever a network returns.

    logits           z as they are; LogSoftmax's are logits as well
    probabilities    p = softmax(z):  z = log p, up to a constant that no softmax sees
    sigmoid          s = σ(z), each class by itself:  z = log s − log(1 − s)

A network that ends in softmax is a trap: softmax of probabilities is nearly uniform, so every probability shown is
wrong and the entropy that adaptation lowers is near its maximum. It is recognised by what it returns.
"""

from __future__ import annotations

from torch import Tensor

from mgg_edge.errors import UsageError

__all__ = ["as_logits", "check_outputs"]

SMALLEST = 1e-12  # so that log p stays finite where p is 0
SUM_TOLERANCE = 1e-3


def as_logits(raw: Tensor, outputs: str) -> Tensor:
    """Logits f[B, C] of what a network returned f[B, C]."""
    if outputs == "probabilities":
        return raw.clamp(min=SMALLEST).log()
    if outputs == "sigmoid":
        return raw.clamp(min=SMALLEST).log() - (1 - raw).clamp(min=SMALLEST).log()
    return raw


def check_outputs(logits: Tensor, name: str) -> None:
    """Refuse logits f[B, C] that are probabilities; several pictures make a chance hit impossible.

    Raises:
        UsageError: all lie between 0 and 1, and they are not all equal.
    """
    if not bool(((logits >= 0) & (logits <= 1)).all()) or bool((logits == logits[0, 0]).all()):
        return  # equal for all classes: a last layer that is still zero
    sums = bool(((logits.sum(1) - 1).abs() < SUM_TOLERANCE).all())
    found, last = ("probabilities that sum to 1", "softmax") if sums else ("numbers from 0 to 1 alone", "sigmoid")
    raise UsageError(
        f"backbone: expected '{name}' to return logits, found {found}: return what comes before its {last}, or say "
        f"--outputs {'probabilities' if sums else last} (--outputs logits if they are logits all the same)"
    )
