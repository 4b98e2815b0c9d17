"""Update rules: the classic ones, the MGG, its learned extension, and the maps from feature statistics to θ."""

from mgg_edge.learn.rules.base import Evidence, GradientRule, Proposal, SourceNumbers, UpdateRule
from mgg_edge.learn.rules.classic import Adam, Sgd
from mgg_edge.learn.rules.forward import Forward
from mgg_edge.learn.rules.forward_plus import ForwardPlus
from mgg_edge.learn.rules.mgg import MGG, MGGState
from mgg_edge.learn.rules.plus import Plus

__all__ = [
    "MGG",
    "Adam",
    "Evidence",
    "Forward",
    "ForwardPlus",
    "GradientRule",
    "MGGState",
    "Plus",
    "Proposal",
    "Sgd",
    "SourceNumbers",
    "UpdateRule",
]
