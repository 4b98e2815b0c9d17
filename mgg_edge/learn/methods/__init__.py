"""Adaptation methods behind one interface: published baselines, and the project's own rules on its own loss."""

from mgg_edge.learn.methods.base import Classifier, Method, Source
from mgg_edge.learn.methods.registry import METHODS, NEED_SOURCE, MethodSpec, build_method, method_options, parse_method

__all__ = [
    "METHODS",
    "NEED_SOURCE",
    "Classifier",
    "Method",
    "MethodSpec",
    "Source",
    "build_method",
    "method_options",
    "parse_method",
]
