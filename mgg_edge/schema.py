"""Strict conversion between JSON and frozen dataclasses.

Every refusal names the field by its path, what was expected and what was found. Errors are unknown keys, absent keys of
fields without a default (a field with one came later than files that lack it), booleans where numbers belong, NaN and
infinities.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import types
import typing
from collections import Counter
from typing import Any, TypeVar

from mgg_edge.errors import ManifestError

__all__ = ["from_json", "to_json"]

T = TypeVar("T")


def to_json(value: object) -> bytes:
    """Serialise a dataclass as canonical JSON: UTF-8, keys in field order, no NaN, one trailing newline.

    A field that has its default is left out.

    Raises:
        ManifestError: a number is NaN or infinite.
    """
    plain = _plain(value)
    try:
        return (json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise ManifestError(f"manifest: {error}") from error


def from_json(cls: type[T], data: bytes) -> T:
    """Parse JSON bytes into the frozen dataclass `cls`.

    Raises:
        ManifestError: not JSON, or the first field that does not fit, by its path.
    """
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # also bad UTF-8, and whole numbers of thousands of digits
        raise ManifestError(f"manifest: expected JSON, found {error}") from error
    return typing.cast(T, _convert(cls, value, "manifest"))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: field.default for field in dataclasses.fields(value)}
        kept = {name: getattr(value, name) for name, default in fields.items() if getattr(value, name) != default}
        return {name: _plain(part) for name, part in kept.items()}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _refuse_constant(name: str) -> None:
    raise ManifestError(f"manifest: expected finite numbers, found {name}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ManifestError(f"manifest: key '{repeated}' appears more than once")
    return unique


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(typing.cast(type, kind), value, path)
    if origin is tuple:
        items = _expect(list, value, path)
        return tuple(_convert(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(items))
    if origin is dict:
        entries = _expect(dict, value, path)
        return {key: _convert(arguments[1], item, f"{path}.{key}") for key, item in entries.items()}
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, path)
    return _convert_scalar(kind, value, path)


def _convert_dataclass(cls: type, value: Any, path: str) -> Any:
    entries = _expect(dict, value, path)
    hints = _hints(cls)
    required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    if missing := [name for name in hints if name in required and name not in entries]:
        raise ManifestError(f"{path}.{missing[0]}: expected a value, found none")
    if unknown := [name for name in entries if name not in hints]:
        raise ManifestError(f"{path}.{unknown[0]}: unknown field; expected only {', '.join(hints)}")
    found = {name: _convert(hint, entries[name], f"{path}.{name}") for name, hint in hints.items() if name in entries}
    return cls(**found)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _convert_union(arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    for kind in arguments:
        if kind in (str, bool, int, float) and _is_scalar(kind, value):
            return value
    others = [kind for kind in arguments if kind is not type(None)]
    return _convert(others[0], value, path)


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    if not _is_scalar(kind, value):
        raise ManifestError(f"{path}: expected {kind.__name__}, found {_describe(value)}")
    return float(value) if kind is float else value


def _is_scalar(kind: Any, value: Any) -> bool:
    if kind is float:
        # The bound comes first: a whole number beyond float64 cannot be asked whether it is finite.
        return type(value) in (int, float) and abs(value) <= sys.float_info.max and math.isfinite(value)
    return type(value) is kind


def _expect(kind: type[T], value: Any, path: str) -> T:
    if not isinstance(value, kind):
        noun = {"list": "a list", "dict": "an object"}[kind.__name__]
        raise ManifestError(f"{path}: expected {noun}, found {_describe(value)}")
    return value


def _describe(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
