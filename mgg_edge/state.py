"""The adaptation state: θ and whatever the update rule remembers, as named arrays.

The names are the same in PyTorch, in the ONNX graphs, in numpy and in files:

    theta f32[N]        normalisation parameters
    m, v  f32[N]        first and second moment of the gradient            (adam, mgg)
    momentum f32[N]     velocity                                           (sgd with momentum)
    memory f32[2,8,N]   S, what the gradient memory layer has written      (mgg)
    memory_bias f32[8,N] s, the written part of its bias                   (mgg)
    step  f32[]         updates made so far                                (adam, mgg)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mgg_edge.errors import StateError

__all__ = ["AdaptState", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor.

    Attributes:
        name: what it is called in graphs, files and code.
        dtype: numpy name of the element type, such as `float32`.
        shape: fixed shape; () is a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class AdaptState(Mapping[str, npt.NDArray[np.generic]]):
    """Immutable, ordered mapping from name to array; arrays are read-only and C-contiguous.

    Args:
        arrays: named arrays; copied only where they are not contiguous.

    Raises:
        StateError: there is no array called `theta`.
    """

    __slots__ = ("_arrays",)

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        if "theta" not in arrays:
            raise StateError(f"state: expected an array 'theta', found {sorted(arrays)}")
        self._arrays = {name: _read_only(array) for name, array in arrays.items()}

    def __getitem__(self, name: str) -> npt.NDArray[np.generic]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Name, dtype and shape of every array, in order."""
        return tuple(TensorSpec(name, str(array.dtype), array.shape) for name, array in self.items())

    @property
    def size_bytes(self) -> int:
        """Bytes held by all arrays."""
        return sum(array.nbytes for array in self.values())

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes: equal if and only if the states are bit-identical."""
        hasher = hashlib.sha256()
        for name, array in self.items():
            hasher.update(f"{name}:{array.dtype}:{array.shape};".encode())
            hasher.update(array.data)
        return hasher.hexdigest()

    def non_finite(self) -> str | None:
        """Name of the first array holding NaN or Inf, or None."""
        return next((name for name, array in self.items() if not np.isfinite(array).all()), None)

    def check(self, expected: Sequence[TensorSpec]) -> None:
        """Compare with expected names, dtypes and shapes.

        Raises:
            StateError: the first difference, with what was expected and found.
        """
        if tuple(self) != (names := tuple(spec.name for spec in expected)):
            raise StateError(f"state: expected arrays {list(names)}, found {list(self)}")
        for spec, found in zip(expected, self.specs, strict=True):
            if spec != found:
                raise StateError(
                    f"state: '{spec.name}' expected {spec.dtype}{list(spec.shape)}, "
                    f"found {found.dtype}{list(found.shape)}"
                )


def _read_only(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    # asarray also takes numpy's scalars, which arithmetic on shape () gives; ascontiguousarray would make them (1,).
    view = np.asarray(array, order="C").view()
    view.flags.writeable = False
    return view
