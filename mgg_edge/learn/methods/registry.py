"""Methods by name, with options as text.

NAME[:OPTION=VALUE]…        such as `tent`, `tent:rate_factor=0.1` or `mgg:weights=mgg.safetensors`
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mgg_edge.errors import UsageError
from mgg_edge.learn.backbone import Backbone
from mgg_edge.learn.methods.base import Classifier, Method, RateOptions, SourceKnowledge
from mgg_edge.learn.methods.cotta import Cotta, CottaOptions
from mgg_edge.learn.methods.deyo import Deyo, DeyoOptions
from mgg_edge.learn.methods.discrepancy import RuleOptions, build_rule_method
from mgg_edge.learn.methods.eata import Eata, EataOptions, RDumb
from mgg_edge.learn.methods.memo import Memo, MemoOptions
from mgg_edge.learn.methods.outputs import T3A, Foa, FoaOptions, Lame, LameOptions, T3AOptions
from mgg_edge.learn.methods.roid import Roid, RoidOptions
from mgg_edge.learn.methods.sar import Sar, SarOptions
from mgg_edge.learn.methods.tent import Tent
from mgg_edge.learn.methods.unadapted import AlphaOptions, AlphaStatistics, BatchStatistics, NoAdaptation
from mgg_edge.learn.rules.files import RULES

__all__ = ["METHODS", "NEED_SOURCE", "MethodSpec", "build_method", "method_options", "parse_method"]


@dataclass(frozen=True)
class NoOptions:
    """A method without settings."""


@dataclass(frozen=True)
class _Entry:
    options: Any
    build: Callable[[Classifier, Any, SourceKnowledge], Method]


@dataclass(frozen=True)
class RDumbOptions(EataOptions):
    """EATA's settings without its Fisher term, and the reset of arXiv 2306.05401."""

    fisher_weight: float = 0.0
    reset_steps: int = 1000


_ENTRIES: dict[str, _Entry] = {
    "none": _Entry(NoOptions, lambda classifier, _options, _source: NoAdaptation(classifier)),
    "bn": _Entry(NoOptions, lambda classifier, _options, _source: BatchStatistics(classifier)),
    "alpha-bn": _Entry(AlphaOptions, lambda classifier, options, _source: AlphaStatistics(classifier, options)),
    "tent": _Entry(RateOptions, lambda classifier, options, _source: Tent(classifier, options)),
    "eata": _Entry(EataOptions, Eata),
    "rdumb": _Entry(RDumbOptions, RDumb),
    "sar": _Entry(SarOptions, lambda classifier, options, _source: Sar(classifier, options)),
    "deyo": _Entry(DeyoOptions, lambda classifier, options, _source: Deyo(classifier, options)),
    "cotta": _Entry(CottaOptions, Cotta),
    "roid": _Entry(RoidOptions, lambda classifier, options, _source: Roid(classifier, options)),
    "memo": _Entry(MemoOptions, lambda classifier, options, _source: Memo(classifier, options)),
    "lame": _Entry(LameOptions, lambda classifier, options, _source: Lame(classifier, options)),
    "t3a": _Entry(T3AOptions, lambda classifier, options, _source: T3A(classifier, options)),
    "foa": _Entry(FoaOptions, Foa),
    **{rule: _Entry(RuleOptions, lambda *parts, name=rule: build_rule_method(name, *parts)) for rule in RULES},
}
METHODS = tuple(_ENTRIES)
# Those that look at clean images of the source domain.
NEED_SOURCE = ("eata", "cotta", "foa")


@dataclass(frozen=True)
class MethodSpec:
    """A method as the user wrote it.

    Attributes:
        text: `NAME[:OPTION=VALUE]…`.
        name: which method.
        options: its settings.
    """

    text: str
    name: str
    options: Any


def parse_method(text: str, **defaults: Any) -> MethodSpec:
    """Read `NAME[:OPTION=VALUE]…`.

    Args:
        text: what to read.
        defaults: options for methods that have them and whose text does not set them.

    Raises:
        UsageError: no such method or option, or a value of another type.
    """
    name, *settings = text.split(":")
    if name not in _ENTRIES:
        raise UsageError(f"method: expected one of {', '.join(METHODS)}, found '{name}'")
    options = _ENTRIES[name].options
    fields = {field.name for field in dataclasses.fields(options)}
    values = {key: value for key, value in defaults.items() if key in fields}
    hints = typing.get_type_hints(options)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in fields:
            known = f"options {', '.join(sorted(fields))}" if fields else "no options"
            raise UsageError(f"method '{name}': has {known}, found '{setting}'")
        values[key] = _value(f"method '{name}': {key}", hints[key], value)
    return MethodSpec(text, name, options(**values))


def build_method(spec: MethodSpec | str, backbone: Backbone, source: SourceKnowledge) -> Method:
    """The method for a backbone.

    Args:
        spec: as `parse_method` gives it, or its text.
        backbone: the source model.
        source: what may be known of the source domain.

    Raises:
        UsageError: see `parse_method`.
        UnsupportedError: the method needs what the backbone lacks; the message says what.
    """
    chosen = parse_method(spec) if isinstance(spec, str) else spec
    return _ENTRIES[chosen.name].build(Classifier(backbone), chosen.options, source)


def method_options() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every method's name, and its options with their defaults."""
    for name, entry in _ENTRIES.items():
        yield name, {field.name: getattr(entry.options(), field.name) for field in dataclasses.fields(entry.options)}


def _value(where: str, hint: Any, text: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(each for each in kinds if each is not type(None))
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{where}: expected {kind.__name__}, found '{text}'") from error
