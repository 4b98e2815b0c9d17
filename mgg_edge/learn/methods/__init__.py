"""Adaptation methods behind one interface: published baselines, and the project's own rules on its own loss."""

from mgg_edge.learn.methods.base import Classifier, Method, Source
from mgg_edge.learn.methods.registry import METHODS, MethodSpec, build_method, parse_method

__all__ = ["METHODS", "Classifier", "Method", "MethodSpec", "Source", "build_method", "parse_method"]
