"""The last layer of a classifier, for methods that work on what goes into it.

logits = e(x) Wᵀ + b        e f[B, E] the embedding, W f[C, E]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mgg_edge.errors import UnsupportedError
from mgg_edge.learn.backbone import PREFIX
from mgg_edge.learn.methods.base import Classifier

__all__ = ["Head"]


class Head:
    """A linear last layer.

    Attributes:
        weight: W f[C, E].
        bias: b f[C], zeros where the layer has none.

    Args:
        classifier: the model.
        method: who asks, for the message.

    Raises:
        UnsupportedError: the logits do not come out of a linear layer of one vector an image.
    """

    def __init__(self, classifier: Classifier, method: str) -> None:
        self._classifier = classifier
        backbone = classifier.backbone
        linears = [
            (name, module)
            for name, module in backbone.model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == backbone.classes
        ]
        if not linears:
            raise UnsupportedError(
                f"{method}: expected a linear last layer of {backbone.classes} classes, '{backbone.name}' has none"
            )
        name, self._module = linears[-1]
        self.weight = classifier.constants[f"{PREFIX}{name}.weight"]
        bias = classifier.constants.get(f"{PREFIX}{name}.bias")
        self.bias = torch.zeros(backbone.classes) if bias is None else bias
        size = backbone.preprocess
        logits, embedding = self(torch.zeros(1, size.height, size.width, 3, dtype=torch.uint8))
        if embedding.ndim != 2 or not torch.allclose(self.logits(embedding), logits, rtol=1e-4, atol=1e-4):
            raise UnsupportedError(
                f"{method}: expected the logits of '{backbone.name}' to come from its linear layer '{name}'"
            )

    def __call__(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits f[B, C] and embeddings f[B, E] of the source model on frames u8[B, H, W, 3]."""
        found: list[Tensor] = []

        def keep(_module: nn.Module, inputs: Any) -> None:
            found.append(inputs[0])

        handle = self._module.register_forward_pre_hook(keep)
        try:
            logits = self._classifier.frozen(frames, self._classifier.theta, None)
        finally:
            handle.remove()
        return logits, found[-1]

    def logits(self, embedding: Tensor) -> Tensor:
        """Logits f[B, C] of embeddings f[B, E]."""
        return embedding @ self.weight.T + self.bias
