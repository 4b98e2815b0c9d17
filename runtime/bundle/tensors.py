"""Reads safetensors bytes into numpy arrays, with every number checked to be finite."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import safetensors

from mgg_edge.errors import BundleError, WeightsError

__all__ = ["read_tensors"]

DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "|u1", "BOOL": "|b1"}
MAX_HEADER_BYTES = 8 << 20  # some 10⁵ tensors; more would only cost time


def read_tensors(data: bytes, where: str) -> dict[str, npt.NDArray[np.generic]]:
    """Parse a safetensors file held in memory.

    Args:
        data: the file's bytes.
        where: its name, for messages.

    Returns:
        Read-only, C-contiguous arrays by name, independent of `data`.

    Raises:
        BundleError: not a safetensors file, or an element type the run time does not use.
        WeightsError: a tensor holds NaN or Inf.
    """
    if not (int.from_bytes(data[:8], "little") <= MAX_HEADER_BYTES):
        raise BundleError(f"{where}: expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, found more")
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise BundleError(f"{where}: expected safetensors, found damaged data ({_one_line(error)})") from error
    return {name: _array(name, entry["dtype"], entry["shape"], entry["data"], where) for name, entry in entries}


def _array(name: str, dtype: str, shape: list[int], data: bytes, where: str) -> npt.NDArray[np.generic]:
    if dtype not in DTYPES:
        raise BundleError(f"{where}: '{name}' expected one of the types {', '.join(DTYPES)}, found {dtype}")
    array: npt.NDArray[np.generic] = np.frombuffer(data, DTYPES[dtype], count=math.prod(shape)).reshape(shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise WeightsError(f"{where}: '{name}' expected finite numbers, found NaN or Inf")
    array.flags.writeable = False
    return array


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
