"""How each core ATen operator is said in ONNX (opset 17): the rules of all modules.

An operator without a rule cannot be exported; nothing is approximated.
"""

from __future__ import annotations

from mgg_edge.export import (
    rules_convolution,
    rules_elementwise,
    rules_linear,
    rules_pooling,
    rules_resampling,
    rules_shape,
)
from mgg_edge.export.lowering_rule import RULES, Value, numpy_dtype

__all__ = ["FAMILIES", "RULES", "Value", "numpy_dtype"]

FAMILIES = (rules_convolution, rules_elementwise, rules_linear, rules_pooling, rules_resampling, rules_shape)
