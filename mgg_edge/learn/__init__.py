"""The PyTorch half: backbones, objective, update rules and everything that is learned."""

from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.objective import Objective
from mgg_edge.learn.rules import MGG, Adam, Forward, MGGState, Plus, Sgd, UpdateRule
from mgg_edge.learn.statistics import SourceStatistics, measure_statistics
from mgg_edge.learn.step import AdaptOutput, AdaptStep

__all__ = [
    "MGG",
    "Adam",
    "AdaptOutput",
    "AdaptStep",
    "Backbone",
    "Forward",
    "MGGState",
    "Objective",
    "Plus",
    "Sgd",
    "SourceStatistics",
    "UpdateRule",
    "measure_statistics",
]
