"""The flat vector θ of all adaptable normalisation parameters.

θ is the concatenation of the parameters in layout order, each flattened row-major:

    θ = [ p₀.ravel(), p₁.ravel(), … ] ∈ R^N

Nothing else in the product knows which parameter a scalar belongs to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import StateError

__all__ = ["NormLayout", "NormParameter"]


@dataclass(frozen=True)
class NormParameter:
    """One adaptable parameter.

    Attributes:
        name: dotted name in the model's state dict, such as `blocks.0.norm1.weight`.
        shape: its shape; all entries at least 1.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class NormLayout:
    """Maps parameter names to places in the flat vector θ of N scalars.

    Attributes:
        parameters: the adaptable parameters, in the order they stand in θ.

    Raises:
        StateError: no parameters, a repeated name or an empty shape entry.
    """

    parameters: tuple[NormParameter, ...]

    def __post_init__(self) -> None:
        if not self.parameters:
            raise StateError("norm layout: expected at least one parameter, found none")
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise StateError(f"norm layout: parameter '{repeated[0]}' appears more than once")
        for parameter in self.parameters:
            if any(extent < 1 for extent in parameter.shape):
                raise StateError(f"norm layout: '{parameter.name}' has an empty shape {parameter.shape}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Parameter names in θ order."""
        return tuple(parameter.name for parameter in self.parameters)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Scalars of each parameter, in θ order."""
        return tuple(parameter.size for parameter in self.parameters)

    @property
    def size(self) -> int:
        """N, the length of θ."""
        return sum(self.sizes)

    def flatten(self, arrays: Mapping[str, npt.NDArray[np.floating]]) -> npt.NDArray[np.floating]:
        """Pack named arrays into θ [N], in their common dtype.

        Raises:
            StateError: a parameter is missing, unknown or of another shape.
        """
        if unknown := sorted(set(arrays) - set(self.names)):
            raise StateError(f"norm layout: unknown parameter '{unknown[0]}'")
        for parameter in self.parameters:
            if parameter.name not in arrays:
                raise StateError(f"norm layout: parameter '{parameter.name}' is missing")
            found = arrays[parameter.name].shape
            if found != parameter.shape:
                raise StateError(f"norm layout: '{parameter.name}' expected shape {parameter.shape}, found {found}")
        return np.concatenate([arrays[name].ravel() for name in self.names])

    def unflatten(self, theta: npt.NDArray[np.floating]) -> dict[str, npt.NDArray[np.floating]]:
        """Views of θ [N] under their names and shapes; writing to a view writes to θ.

        Raises:
            StateError: θ does not have shape [N].
        """
        if theta.shape != (self.size,):
            raise StateError(f"theta: expected shape ({self.size},), found {theta.shape}")
        views, offset = {}, 0
        for parameter in self.parameters:
            views[parameter.name] = theta[offset : offset + parameter.size].reshape(parameter.shape)
            offset += parameter.size
        return views
