"""The device half: load a bundle, predict, adapt, guard. Needs neither PyTorch nor the onnx package.

    from mgg_edge.runtime import Adapter

    with Adapter.open("model.mgg") as adapter:
        for frame in frames:  # u8[H,W,3] RGB
            prediction = adapter(frame)

The inference engine and the video library are imported when they are first used.
"""

from __future__ import annotations

from mgg_edge.runtime.adaptation.adapter import Adapter, AdapterSettings, Counters, Prediction
from mgg_edge.runtime.adaptation.guard import StepLimits
from mgg_edge.runtime.bundle.bundle import Bundle
from mgg_edge.runtime.engines.engine import Diagnostics, Engine, open_engine

__all__ = [
    "Adapter",
    "AdapterSettings",
    "Bundle",
    "Counters",
    "Diagnostics",
    "Engine",
    "Prediction",
    "StepLimits",
    "open_engine",
]
