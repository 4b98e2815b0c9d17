"""The manifest: strict JSON, every field checked by path, contradictions refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

import toy
from mgg_edge import schema
from mgg_edge.errors import ManifestError
from mgg_edge.manifest import Manifest, ParityInfo, ParityJudgement, ParityRow

FIELDS = [field.name for field in dataclasses.fields(Manifest) if field.default is dataclasses.MISSING]
LATER = {field.name: field.default for field in dataclasses.fields(Manifest) if field.name not in FIELDS}
NESTED = [
    f"{name}.{key}"
    for name, value in json.loads(toy.manifest().to_json()).items()
    if isinstance(value, dict) and name not in ("producer", "members")
    for key in value
]


def plain() -> dict[str, Any]:
    return json.loads(toy.manifest().to_json())


def parse(content: Any) -> Manifest:
    return Manifest.from_json(json.dumps(content).encode())


def assign(content: Any, path: str, value: Any) -> Any:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        content = content[part]
    content[last] = value
    return content


def remove(content: Any, path: str) -> None:
    *parents, last = path.split(".")
    for part in parents:
        content = content[part]
    del content[last]


def test_round_trip_is_exact():
    original = toy.manifest()
    assert Manifest.from_json(original.to_json()) == original
    assert Manifest.from_json(original.to_json()).to_json() == original.to_json()


def test_parity_round_trip():
    rows = (ParityRow(1, "logits", 1e-7, 2e-7),)
    fields = {field.name: None for field in dataclasses.fields(ParityInfo)}
    values: dict[str, Any] = {"rows": rows, "judged": (ParityJudgement("loss", 1e-7, 2e-7),)}
    for field in dataclasses.fields(ParityInfo):
        if field.name not in values:
            values[field.name] = {"int": 1, "float": 0.5, "str": "text", "bool": True}[str(field.type)]
    assert set(values) == set(fields)
    manifest = toy.manifest().replace(parity=ParityInfo(**values))
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("path", FIELDS + NESTED)
def test_every_field_is_required(path: str):
    content = plain()
    remove(content, path)
    with pytest.raises(ManifestError, match=rf"^manifest\.{path}: expected a value, found none$"):
        parse(content)


def test_fields_that_came_later_may_be_absent_and_are_when_they_say_nothing():
    assert LATER == {"precision": "float32", "half_parity": None}
    assert not LATER.keys() & plain().keys()
    assert parse({**plain(), **LATER}) == parse(plain())
    told = toy.manifest().replace(precision="bfloat16")
    assert Manifest.from_json(told.to_json()) == told


@pytest.mark.parametrize("path", [*FIELDS, *NESTED, *LATER])
def test_every_field_has_a_type(path: str):
    content = plain()
    assign(content, path, [{"wrong": []}])
    with pytest.raises(ManifestError, match=rf"^manifest\.{path}.*expected .*found ") as refusal:
        parse(content)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "parent", ["", "backbone", "preprocess", "objective", "rule", "statistics", "state.0", "norms.1"]
)
def test_unknown_fields_are_refused(parent: str):
    content = plain()
    assign(content, f"{parent}.surprise".lstrip("."), 1)
    with pytest.raises(ManifestError, match=r"surprise: unknown field; expected only "):
        parse(content)


OUT_OF_RANGE = {
    "schema": [0, 2, 99],
    "backbone.classes": [0, 1, -4, 10**9],
    "backbone.features": [0, -1, 10**9],
    "preprocess.height": [0, -8, 4097],
    "preprocess.width": [0, -8, 4097],
    "preprocess.resize": ["", "stretch"],
    "preprocess.crop_fraction": [0, -1, 1.01],
    "preprocess.interpolation": ["", "lanczos"],
    "preprocess.mean": [[], [0.5], [0.5] * 4, [0.5, 0.5, -1e4]],
    "preprocess.std": [[], [0.5] * 2, [0.5, 0.0, 0.5], [0.5, -1, 0.5]],
    "objective.entropy_weight": [-1, 1e9],
    "objective.discrepancy_weight": [-1, 1e9],
    "rule.learning_rate": [0, -1e-3, 1e9],
    "statistics.images": [0, 31, -1],
    "infer_batch": [0, -1, 1025],
    "adapt_batch": [0, 1, 1025],
    "opset": [0, 16, 99],
}


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in OUT_OF_RANGE.items() for value in values]
)
def test_ranges(path: str, value: Any):
    content = plain()
    assign(content, path, value)
    with pytest.raises(ManifestError, match=rf"^manifest\.{path}: expected .*, found "):
        parse(content)


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "labels-fewer-than-classes": (lambda m: m["labels"].pop(), r"labels: expected 4 names"),
    "labels-more-than-classes": (lambda m: m["labels"].append("boat"), r"labels: expected 4 names"),
    "no-norms": (lambda m: m.update(norms=[]), r"norms: .*at least one"),
    "norm-twice": (lambda m: m["norms"].append(copy.copy(m["norms"][0])), r"norms: .*more than once"),
    "norm-empty-shape": (lambda m: m["norms"][0].update(shape=[0]), r"norms: .*empty shape"),
    "norms-do-not-fill-theta": (lambda m: m["norms"].pop(), r"state\[0\]: expected .*\(6,\)"),
    "no-state": (lambda m: m.update(state=[]), r"state\[0\]: .*found nothing"),
    "theta-not-first": (lambda m: m["state"].reverse(), r"state\[0\]: expected .*theta"),
    "state-twice": (lambda m: m["state"].append(copy.copy(m["state"][1])), r"state\[1\]\.name: 'momentum' .*once"),
    "state-float64": (lambda m: m["state"][1].update(dtype="float64"), r"state\[1\]: expected float32"),
    "state-empty-shape": (lambda m: m["state"][1].update(shape=[0]), r"state\[1\]: expected .*positive shape"),
    "member-digest": (
        lambda m: m["members"].update({"state.safetensors": {"size": 1, "sha256": "xyz"}}),
        r"members\.state\.safetensors: expected a size and 64 hex digits",
    ),
    "member-size": (
        lambda m: m["members"].update({"state.safetensors": {"size": -1, "sha256": "0" * 64}}),
        r"members\.state\.safetensors: expected a size",
    ),
    "state-named-like-frames": (lambda m: m["state"][1].update(name="frames"), r"state\[1\]\.name: .*'frames'"),
    "state-named-like-an-output": (lambda m: m["state"][1].update(name="logits"), r"state\[1\]\.name: .*'logits'"),
    "state-named-like-a-state-output": (
        lambda m: m["state"][1].update(name="theta_out"),
        r"state\[1\]\.name: .*'theta_out'",
    ),
    "state-without-a-name": (lambda m: m["state"][1].update(name=""), r"state\[1\]\.name"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions(case: str):
    change, message = CONTRADICTIONS[case]
    content = plain()
    change(content)
    with pytest.raises(ManifestError, match=message):
        parse(content)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff\xfe", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (b'"text"', "expected an object"),
        (b'{"schema": NaN}', "expected finite numbers, found NaN"),
        (b'{"schema": -Infinity}', "expected finite numbers, found -Infinity"),
        (b'{"schema": 1, "schema": 1}', "'schema' appears more than once"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "expected JSON"),
    ],
    ids=["empty", "cut", "not-utf8", "deep", "list", "null", "string", "nan", "infinity", "twice", "huge-number"],
)
def test_broken_json(data: bytes, message: str):
    with pytest.raises(ManifestError, match=message):
        Manifest.from_json(data)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400], ids=["plus", "minus", "whole"])
def test_numbers_that_overflow_are_refused(number: str):
    data = toy.manifest().to_json().replace(b'"learning_rate": 0.05', b'"learning_rate": ' + number.encode())
    with pytest.raises(ManifestError, match=r"rule\.learning_rate: expected float"):
        Manifest.from_json(data)


def test_a_boolean_is_not_a_number():
    content = plain()
    content["infer_batch"] = True
    with pytest.raises(ManifestError, match=r"manifest\.infer_batch: expected int, found true"):
        parse(content)


def test_an_integer_is_a_float():
    content = plain()
    content["rule"]["learning_rate"] = 1
    assert parse(content).rule.learning_rate == 1.0


def test_nan_is_not_written():
    manifest = toy.manifest()
    object.__setattr__(manifest.rule, "learning_rate", float("nan"))
    with pytest.raises(ManifestError, match="not JSON compliant"):
        manifest.to_json()


def test_replace_validates_again():
    with pytest.raises(ManifestError, match=r"manifest\.opset"):
        toy.manifest().replace(opset=1)


def test_messages_stay_short():
    content = plain()
    content["infer_batch"] = "x" * 10_000
    with pytest.raises(ManifestError) as refusal:
        parse(content)
    assert len(str(refusal.value)) < 300


def test_schema_reads_other_dataclasses():
    @dataclasses.dataclass(frozen=True)
    class Point:
        x: float
        name: str | None

    with pytest.raises(ManifestError, match=r"manifest\.x"):
        schema.from_json(Point, b'{"x": "1", "name": null}')
