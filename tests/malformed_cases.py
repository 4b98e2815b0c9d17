"""Malformed bundles by layer: bytes of the file, the error it must give, and what its message must match.

Whatever is broken inside carries correct digests around it, so that the inner guard has to refuse.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

import toy
from mgg_edge.container import MEMBER_LIMITS
from mgg_edge.errors import BundleError, EngineError, ManifestError, MggEdgeError, WeightsError
from test_graphs import PLACES
from test_manifest import CONTRADICTIONS, FIELDS, NESTED, OUT_OF_RANGE, assign, remove
from toy import Packing, Parts

PARTS = toy.parts()
VALID = toy.pack(PARTS)
WEIGHTS, STATE, SELF_TEST = "weights.safetensors", "state.safetensors", "selftest.safetensors"
INFER, ADAPT, INFER_TENSORRT = "infer.onnxruntime.onnx", "adapt.onnxruntime.onnx", "infer.tensorrt.onnx"
FLIPPED = [0, 1, 3, 7, *range(30, len(VALID), len(VALID) // 24), len(VALID) - 72, len(VALID) - 71, len(VALID) - 1]
LENGTHS = [
    1,
    2,
    4,
    21,
    70,
    71,
    72,
    93,
    100,
    len(VALID) // 4,
    len(VALID) // 2,
    len(VALID) - 72,
    len(VALID) - 71,
    len(VALID) - 1,
]

Case = tuple[bytes, type[MggEdgeError], str]


def flipped(position: int) -> Case:
    data = bytearray(VALID)
    data[position] ^= 0x10
    return bytes(data), BundleError, r"damaged or altered|another kind of file"


def case(data: Parts | bytes, kind: type[MggEdgeError], message: str, **packing: Any) -> Case:
    return (data if isinstance(data, bytes) else toy.pack(data, Packing(**packing))), kind, message


def bundle_error(data: Parts | bytes, message: str, **packing: Any) -> Case:
    return case(data, BundleError, message, **packing)


# --- the ZIP layer -------------------------------------------------------------------------------------------


def central(body: bytearray, name: str) -> int:
    """Offset of a member's record in the ZIP directory."""
    position = body.index(b"PK\1\2")
    while body[position + 46 : position + 46 + len(name)] != name.encode():
        position = body.index(b"PK\1\2", position + 4)
    return position


def patch(name: str, offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    """Overwrite one field of a member's directory record."""
    return lambda body: struct.pack_into(layout, body, central(body, name) + offset, value)


def patch_local(name: str, offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    """Overwrite one field of a member's local header."""

    def change(body: bytearray) -> None:
        (start,) = struct.unpack_from("<I", body, central(body, name) + 42)
        struct.pack_into(layout, body, start + offset, value)

    return change


def patch_end(offset: int, layout: str, value: int) -> Callable[[bytearray], None]:
    """Overwrite one field of the ZIP's end record."""
    return lambda body: struct.pack_into(layout, body, len(body) - 22 + offset, value)


def rename_local(body: bytearray) -> None:
    position = body.index(b"weights.safetensors")
    body[position : position + 1] = b"W"


def with_zip64_locator(body: bytearray) -> None:
    body[-22:-22] = b"PK\6\7" + struct.pack("<IQI", 0, 0, 1)


def resigned(data: bytes) -> bytes:
    """Any bytes with a correct outer digest."""
    return data + b"sha256=" + hashlib.sha256(data).hexdigest().encode()


def altered_member(body: bytearray) -> None:
    """A payload changed together with its ZIP checksum: only the manifest can tell."""
    payload = PARTS.members[WEIGHTS]
    position = body.index(payload)
    body[position + len(payload) - 1] ^= 1
    checksum = zlib.crc32(body[position : position + len(payload)])
    patch(WEIGHTS, 16, "<I", checksum)(body)
    patch_local(WEIGHTS, 14, "<I", checksum)(body)


NAMES = {
    "extra": "notes.txt",
    "traversal": "../../etc/cron.d/job",
    "traversal-to-a-member": "../weights.safetensors",
    "dot": "./weights.safetensors",
    "absolute": "/etc/passwd",
    "drive": "C:\\windows\\system32\\evil.dll",
    "backslashes": "..\\evil",
    "folder": "folder/",
    "upper-case": "MANIFEST.JSON",
    "trailing-space": "manifest.json ",
    "lookalike": "weights.safetensоrs",  # with a Cyrillic о
    "pickle": "weights.pth",
    "line-break": "a\nb",
    "terminal-escape": "\x1b[2Jx",
    "long": "a" * 60_000,
    "engine": "adapt.tensorrt.engine",
}
KINDS = {
    "symlink": 0o120777,
    "folder": 0o040755,
    "fifo": 0o010644,
    "device": 0o020644,
    "socket": 0o140644,
    "setuid": 0o104755,
}

ZIP_CASES: dict[str, Case] = {
    **{f"flipped-byte-{position}": flipped(position) for position in FLIPPED},
    **{
        f"truncated-to-{length}": bundle_error(VALID[:length], "damaged or altered|another kind of file or a truncated")
        for length in LENGTHS
    },
    **{
        f"truncated-to-{length}-and-signed": bundle_error(resigned(VALID[:length]), "malformed|another kind")
        for length in (0, 2, 100, len(VALID) // 2, len(VALID) - 94)
    },
    "empty": bundle_error(b"", "another kind of file"),
    "text": bundle_error(b"this is not a bundle\n" * 100, "another kind of file"),
    "zeros": bundle_error(bytes(5000), "another kind of file"),
    "zip-signature-only": bundle_error(b"PK\3\4" + bytes(500), "another kind of file"),
    "empty-zip": bundle_error(resigned(b"PK\5\6" + bytes(18)), "missing|malformed"),
    "appended-byte": bundle_error(VALID + b"\0", "another kind of file"),
    "prepended-byte": bundle_error(b"\0" + VALID, "another kind of file"),
    "doubled": bundle_error(VALID + VALID, "damaged or altered"),
    "without-its-digest": bundle_error(VALID[:-71], "another kind of file"),
    "digest-of-zeros": bundle_error(VALID[:-64] + b"0" * 64, "damaged or altered"),
    "digest-in-upper-case": bundle_error(VALID[:-64] + VALID[-64:].upper(), "damaged or altered"),
    **{f"missing-{name}": bundle_error(PARTS, f"'{name}' is missing", left_out=(name,)) for name in MEMBER_LIMITS},
    **{
        f"twice-{name}": bundle_error(PARTS, f"'{name}' appears more than once", extra=((name, PARTS.members[name]),))
        for name in (WEIGHTS, STATE, INFER)
    },
    "twice-manifest.json": bundle_error(
        PARTS, "'manifest.json' appears more than once", extra=(("manifest.json", b"{}"),)
    ),
    **{f"name-{key}": bundle_error(PARTS, "unexpected member", extra=((name, b"x"),)) for key, name in NAMES.items()},
    "renamed-member": bundle_error(PARTS, "unexpected member", renamed={WEIGHTS: "../weights.safetensors"}),
    **{
        f"kind-{key}": bundle_error(PARTS, "expected a plain file", attributes={WEIGHTS: mode << 16})
        for key, mode in KINDS.items()
    },
    "kind-none": bundle_error(PARTS, "expected a plain file", attributes={WEIGHTS: 0}),
    **{
        f"compressed-{key}": bundle_error(PARTS, "expected stored bytes", compression={WEIGHTS: method})
        for key, method in (("deflate", zipfile.ZIP_DEFLATED), ("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA))
    },
    "compressed-manifest": bundle_error(PARTS, "expected stored", compression={"manifest.json": zipfile.ZIP_DEFLATED}),
    "method-unknown": bundle_error(PARTS, "expected stored bytes", tamper=patch(WEIGHTS, 10, "<H", 99)),
    "method-differs-in-local-header": bundle_error(
        PARTS, "expected stored|malformed", tamper=patch(WEIGHTS, 10, "<H", 8)
    ),
    "encrypted": bundle_error(PARTS, "expected a plain file", tamper=patch(WEIGHTS, 8, "<H", 1)),
    "claims-4-gib": bundle_error(PARTS, "compressed|claims", tamper=patch(WEIGHTS, 24, "<I", 0xFFFFFFF0)),
    "claims-more-than-the-file": bundle_error(
        PARTS,
        "claims",
        tamper=lambda body: (patch(WEIGHTS, 20, "<I", 10**9)(body), patch(WEIGHTS, 24, "<I", 10**9)(body)),
    ),
    "claims-less-than-it-holds": bundle_error(
        PARTS,
        "malformed",
        tamper=lambda body: (patch(WEIGHTS, 20, "<I", 8)(body), patch(WEIGHTS, 24, "<I", 8)(body)),
    ),
    "wrong-checksum": bundle_error(PARTS, "malformed", tamper=patch(WEIGHTS, 16, "<I", 1)),
    "offset-beyond-the-file": bundle_error(PARTS, "malformed", tamper=patch(WEIGHTS, 42, "<I", 0x7FFFFFFF)),
    "offset-of-another-member": bundle_error(PARTS, "malformed", tamper=patch(WEIGHTS, 42, "<I", 0)),
    "local-name-differs": bundle_error(PARTS, "malformed", tamper=rename_local),
    "local-signature": bundle_error(PARTS, "malformed", tamper=patch_local(WEIGHTS, 0, "<I", 0)),
    "central-signature": bundle_error(PARTS, "malformed", tamper=patch(WEIGHTS, 0, "<I", 0)),
    "central-name-length": bundle_error(PARTS, "malformed|unexpected", tamper=patch(WEIGHTS, 28, "<H", 0xFFFF)),
    "directory-of-4-gib": bundle_error(PARTS, "malformed", tamper=patch_end(12, "<I", 0xFFFFFFF0)),
    "directory-of-100-kib": bundle_error(
        PARTS, "malformed: expected a directory", tamper=patch_end(12, "<I", 100 << 10)
    ),
    "directory-offset": bundle_error(PARTS, "malformed|missing", tamper=patch_end(16, "<I", 0x7FFFFFFF)),
    "zip64-locator": bundle_error(PARTS, "malformed: expected a directory", tamper=with_zip64_locator),
    "end-record-signature": bundle_error(PARTS, "malformed: expected a directory", tamper=patch_end(0, "<I", 0)),
    "member-altered-with-its-checksum": bundle_error(
        PARTS, f"'{WEIGHTS}' does not match the manifest", tamper=altered_member
    ),
    "members-undescribed": bundle_error(PARTS, "manifest.members: expected", describe=False),
    "manifest-above-its-ceiling": bundle_error(
        PARTS, "claims", encode=lambda value: json.dumps(value).encode() + b" " * MEMBER_LIMITS["manifest.json"]
    ),
}


# --- the manifest --------------------------------------------------------------------------------------------


def described(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The manifest of the valid bundle, with its members, changed."""
    with zipfile.ZipFile(io.BytesIO(VALID)) as archive:
        content = json.loads(archive.read("manifest.json"))
    change(content)
    return content


def manifest_case(change: Callable[[dict[str, Any]], Any], message: str) -> Case:
    data = toy.pack(Parts(described(change), PARTS.members), Packing(describe=False))
    return data, ManifestError, message


def encoded(data: bytes, message: str) -> Case:
    return case(PARTS, ManifestError, message, encode=lambda _: data)


def member_claim(**claim: Any) -> Case:
    data = toy.pack(
        Parts(described(lambda m: m["members"][WEIGHTS].update(claim)), PARTS.members), Packing(describe=False)
    )
    return data, BundleError, f"'{WEIGHTS}' does not match the manifest"


MANIFEST_CASES: dict[str, Case] = {
    **{
        f"missing-{path}": manifest_case(lambda m, path=path: remove(m, path), rf"manifest\.{path}: expected a value")
        for path in FIELDS + NESTED
    },
    **{
        f"wrong-type-{path}": manifest_case(
            lambda m, path=path: assign(m, path, [{"wrong": []}]), rf"manifest\.{path}.*expected .* found"
        )
        for path in FIELDS + NESTED
    },
    **{
        f"{path}={value}": manifest_case(
            lambda m, path=path, value=value: assign(m, path, value), rf"manifest\.{path}: expected"
        )
        for path, values in OUT_OF_RANGE.items()
        for value in values
    },
    **{f"contradiction-{name}": manifest_case(*contradiction) for name, contradiction in CONTRADICTIONS.items()},
    "unknown-field": manifest_case(lambda m: m.update(surprise=1), "unknown field"),
    "json-empty": encoded(b"", "expected JSON"),
    "json-cut": encoded(toy.manifest().to_json()[:100], "expected JSON"),
    "json-binary": encoded(bytes(range(256)), "expected JSON"),
    "json-deep": encoded(b"[" * 500_000, "expected JSON"),
    "json-huge-number": encoded(b'{"schema": ' + b"1" * 100_000 + b"}", "expected JSON"),
    "json-nan": encoded(b'{"schema": NaN}', "found NaN"),
    "json-key-twice": encoded(b'{"schema": 1, "schema": 2}', "'schema' appears more than once"),
    "json-many-keys": encoded(
        b"{" + b",".join(b'"%d":1' % n for n in range(150_000)) + b',"0":1,"0":2}', "'0' appears more than once"
    ),
    "json-long-shape": manifest_case(lambda m: m["state"][0].update(shape=[1] * 500_000), r"state\[0\]: expected"),
    "json-many-norms": manifest_case(
        lambda m: m.update(norms=[{"name": f"{n // 2}", "shape": [1]} for n in range(40_000)]),
        "'0' appears more than once",
    ),
    "member-size-differs": member_claim(size=1),
    "member-digest-differs": member_claim(sha256="0" * 64),
}


# --- tensors -------------------------------------------------------------------------------------------------


def tensors(member: str, change: Callable[[toy.Arrays], Any], kind: type[MggEdgeError], message: str) -> Case:
    return case(PARTS.with_tensors(member, change), kind, message)


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    encoded_header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded_header).to_bytes(8, "little") + encoded_header + data


def poisoned(name: str, value: float) -> Callable[[toy.Arrays], None]:
    def change(arrays: toy.Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name].reshape(-1)[-1] = value

    return change


RAW_SAFETENSORS = {
    "empty": b"",
    "seven-bytes": bytes(7),
    "header-of-exabytes": b"\xff" * 8 + b"{}",
    "header-of-100-mib": (100 << 20).to_bytes(8, "little") + b"{}",
    "header-beyond-the-file": (1000).to_bytes(8, "little") + b"{}",
    "header-not-json": safetensors_bytes(b"not json"),
    "header-not-utf8": safetensors_bytes(b"\xff\xfe\xfd"),
    "header-list": safetensors_bytes([]),
    "offsets-beyond": safetensors_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "offsets-negative": safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
    "offsets-reversed": safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
    "offsets-overlap": safetensors_bytes(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        bytes(12),
    ),
    "shape-overflow": safetensors_bytes(
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "shape-contradicts-offsets": safetensors_bytes(
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "hole": safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
    "trailing-data": safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(64)),
    "unknown-type": safetensors_bytes({"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "pickle": b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
}

TENSOR_CASES: dict[str, Case] = {
    **{
        f"{member.split('.')[0]}-{key}": bundle_error(
            PARTS.with_member(member, data), "expected safetensors|expected a safetensors header"
        )
        for member in (WEIGHTS, STATE)
        for key, data in RAW_SAFETENSORS.items()
    },
    **{
        f"weights-{name}-{value}": tensors(WEIGHTS, poisoned(name, value), WeightsError, f"'{name}' expected finite")
        for name in ("backbone.projection", "learning_rate", "statistics.std")
        for value in (np.nan, np.inf, -np.inf)
    },
    **{
        f"state-{name}-{value}": tensors(STATE, poisoned(name, value), WeightsError, f"'{name}' expected finite")
        for name in ("theta", "momentum", "step")
        for value in (np.nan, np.inf)
    },
    "selftest-nan": tensors(
        SELF_TEST, poisoned("infer.logits", np.nan), WeightsError, "'infer.logits' expected finite"
    ),
    **{
        f"weights-without-{name}": tensors(
            WEIGHTS, lambda t, name=name: t.pop(name), BundleError, f"reads '{name}', which is neither"
        )
        for name in toy.weights()
    },
    "weights-header-above-its-ceiling": bundle_error(
        PARTS.with_member(WEIGHTS, safetensors_bytes(b"{}" + b" " * (9 << 20))), "header of at most 8388608 bytes"
    ),
    "weights-none": bundle_error(
        PARTS.with_member(WEIGHTS, safetensors.numpy.save({})), "which is neither computed nor"
    ),
    "weights-float64": tensors(
        WEIGHTS,
        lambda t: t.update({"backbone.head": np.zeros((6, 4))}),
        BundleError,
        "expected one of the types .* F64",
    ),
    "learning-rate-differs": tensors(
        WEIGHTS,
        lambda t: t.update(learning_rate=np.array(0.5, np.float32)),
        WeightsError,
        "learning_rate 0.05, found 0.5",
    ),
    "learning-rate-shape": tensors(
        WEIGHTS, lambda t: t.update(learning_rate=np.full(1, 0.05, np.float32)), WeightsError, r"float32\[\], found"
    ),
    "statistics-shape": tensors(
        WEIGHTS, lambda t: t.update({"statistics.mean": np.zeros(5, np.float32)}), WeightsError, r"float32\[6\], found"
    ),
    "statistics-dtype": tensors(
        WEIGHTS,
        lambda t: t.update({"statistics.std": np.ones(6, np.int32)}),
        WeightsError,
        r"float32\[6\], found int32",
    ),
    "statistics-negative-std": tensors(
        WEIGHTS, lambda t: t.update({"statistics.std": -np.ones(6, np.float32)}), WeightsError, "at least 0"
    ),
    "weights-wrong-shape-for-the-graph": tensors(
        WEIGHTS,
        lambda t: t.update({"backbone.head": np.zeros((5, 4), np.float32)}),
        EngineError,
        "cannot load the graph",
    ),
    "weights-wrong-type-for-the-graph": tensors(
        WEIGHTS, lambda t: t.update({"backbone.head": np.zeros((6, 4), np.int64)}), EngineError, "cannot load the graph"
    ),
    "weights-named-like-an-input": tensors(
        WEIGHTS,
        lambda t: t.update(theta=np.zeros(12, np.float32)),
        BundleError,
        "defines 'theta', which is the name of a weight",
    ),
    "weights-named-like-a-node": tensors(
        WEIGHTS, lambda t: t.update(logits=np.zeros(4, np.float32)), BundleError, "defines 'logits'"
    ),
    "weights-named-like-an-initialiser": tensors(
        WEIGHTS, lambda t: t.update(constant_0=np.zeros(4, np.float32)), BundleError, "defines 'constant_0'"
    ),
    **{
        f"state-without-{name}": tensors(STATE, lambda t, name=name: t.pop(name), BundleError, "expected tensors")
        for name in ("theta", "momentum", "step")
    },
    "state-extra": tensors(STATE, lambda t: t.update(v=np.zeros(12, np.float32)), BundleError, "expected tensors"),
    "state-theta-shape": tensors(
        STATE,
        lambda t: t.update(theta=np.zeros(11, np.float32)),
        BundleError,
        r"'theta' expected float32\[12\], found float32\[11\]",
    ),
    "state-step-shape": tensors(
        STATE,
        lambda t: t.update(step=np.zeros(1, np.float32)),
        BundleError,
        r"'step' expected float32\[\], found float32\[1\]",
    ),
    "state-type": tensors(
        STATE, lambda t: t.update(momentum=np.zeros(12, np.int32)), BundleError, "'momentum' expected float32"
    ),
    "state-float64": tensors(
        STATE, lambda t: t.update(momentum=np.zeros(12)), BundleError, "expected one of the types"
    ),
    "state-is-weights": bundle_error(PARTS.with_member(STATE, PARTS.members[WEIGHTS]), "expected tensors"),
    **{
        f"selftest-without-{name}": tensors(
            SELF_TEST, lambda t, name=name: t.pop(name), BundleError, "expected tensors"
        )
        for name in toy.self_test()
    },
    "selftest-frames-type": tensors(
        SELF_TEST, lambda t: t.update(frames=np.zeros((4, 8, 8, 3), np.float32)), BundleError, "'frames' expected uint8"
    ),
    "selftest-frames-shape": tensors(
        SELF_TEST, lambda t: t.update(frames=toy.frames(3)), BundleError, r"'frames' expected uint8\[4, 8, 8, 3\]"
    ),
    "selftest-classes": tensors(
        SELF_TEST,
        lambda t: t.update({"adapt.logits": np.zeros((4, 5), np.float32)}),
        BundleError,
        "'adapt.logits' expected",
    ),
}


# --- graphs --------------------------------------------------------------------------------------------------


def graph(
    member: str, change: Callable[[onnx.ModelProto], Any], message: str, kind: type[MggEdgeError] = BundleError
) -> Case:
    return case(PARTS.with_graph(member, change), kind, message)


def set_type(value: onnx.ValueInfoProto, element_type: int, shape: tuple[int, ...]) -> None:
    value.CopyFrom(helper.make_tensor_value_info(value.name, element_type, shape))


def swap(values: Any) -> None:
    first = onnx.ValueInfoProto()
    first.CopyFrom(values[0])
    values[0].CopyFrom(values[1])
    values[1].CopyFrom(first)


def add_node(model: onnx.ModelProto, operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
    model.graph.node.append(helper.make_node(operator, inputs, outputs, **attributes))


GRAPH_CASES: dict[str, Case] = {
    **{
        f"external-data-{place}": graph(ADAPT, change, "external data|which is neither")
        for place, change in PLACES.items()
    },
    "external-data-in-the-other-lowering": graph(INFER_TENSORRT, PLACES["initialiser"], "external data"),
    **{
        f"graph-{key}": bundle_error(PARTS.with_member(INFER, data), message)
        for key, data, message in (
            ("empty", b"", "operator set"),
            ("text", b"not a graph", "damaged or not ONNX"),
            ("zeros", bytes(100), "damaged or not ONNX"),
            ("ones", b"\xff" * 100, "damaged or not ONNX"),
            ("other-graph", PARTS.members[ADAPT], "input 0 expected"),
            ("safetensors", PARTS.members[WEIGHTS], "damaged or not ONNX"),
            ("doubled", PARTS.members[INFER] * 2, "expected 2 inputs, found 4"),
            ("many-fields", b"\x08\x01" * 2_000_000, "at most 300000 protobuf fields"),
            ("many-strings", (b"\x32\x00" * 2_000_000), "at most 300000 protobuf fields"),
        )
    },
    **{
        f"graph-truncated-{length}": bundle_error(PARTS.with_member(ADAPT, PARTS.members[ADAPT][:length]), f"{ADAPT}: ")
        for length in (1, 3, 10, 100, 1000, len(PARTS.members[ADAPT]) - 1)
    },
    "input-missing": graph(INFER, lambda m: m.graph.input.pop(), "input 'theta' is missing"),
    "input-extra": graph(
        INFER,
        lambda m: m.graph.input.append(helper.make_tensor_value_info("more", 1, [1])),
        "expected 2 inputs, found 3",
    ),
    "input-order": graph(INFER, lambda m: swap(m.graph.input), "input 0 expected"),
    "input-name": graph(INFER, lambda m: setattr(m.graph.input[0], "name", "images"), "input 0 expected .*'frames'"),
    "input-type": graph(
        INFER, lambda m: set_type(m.graph.input[0], TensorProto.FLOAT, (1, 8, 8, 3)), "input 0 expected"
    ),
    "input-batch": graph(
        INFER, lambda m: set_type(m.graph.input[0], TensorProto.UINT8, (2, 8, 8, 3)), "input 0 expected"
    ),
    "input-size": graph(
        INFER, lambda m: set_type(m.graph.input[0], TensorProto.UINT8, (1, 9, 8, 3)), "input 0 expected"
    ),
    "input-layout": graph(
        INFER, lambda m: set_type(m.graph.input[0], TensorProto.UINT8, (1, 3, 8, 8)), "input 0 expected"
    ),
    "input-dynamic": graph(
        INFER, lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "n"), "fixed shape"
    ),
    "input-theta-size": graph(
        INFER, lambda m: set_type(m.graph.input[1], TensorProto.FLOAT, (11,)), "input 1 expected"
    ),
    "adapt-batch": graph(
        ADAPT, lambda m: set_type(m.graph.input[0], TensorProto.UINT8, (5, 8, 8, 3)), "input 0 expected"
    ),
    "state-input-missing": graph(ADAPT, lambda m: m.graph.input.pop(), "input 'step' is missing"),
    "output-missing": graph(INFER, lambda m: m.graph.output.pop(), "output 'features' is missing"),
    "output-extra": graph(
        INFER,
        lambda m: m.graph.output.append(helper.make_tensor_value_info("value_0", 1, [1])),
        "expected 2 outputs, found 3",
    ),
    "output-order": graph(INFER, lambda m: swap(m.graph.output), "output 0 expected"),
    "output-type": graph(INFER, lambda m: set_type(m.graph.output[0], TensorProto.DOUBLE, (1, 4)), "output 0 expected"),
    "output-classes": graph(
        INFER, lambda m: set_type(m.graph.output[0], TensorProto.FLOAT, (1, 5)), "output 0 expected"
    ),
    "output-features": graph(
        INFER, lambda m: set_type(m.graph.output[1], TensorProto.FLOAT, (1, 7)), "output 1 expected"
    ),
    "output-scalar-shape": graph(
        ADAPT, lambda m: set_type(m.graph.output[1], TensorProto.FLOAT, (1,)), "output 1 expected"
    ),
    "state-output-missing": graph(ADAPT, lambda m: m.graph.output.pop(), "output 'step_out' is missing"),
    "opset-differs": graph(INFER, lambda m: setattr(m.opset_import[0], "version", 18), "operator set 17 .*found 18"),
    "opset-missing": graph(INFER, lambda m: m.opset_import.pop(), "one version of the standard operator set"),
    "function": graph(
        INFER,
        lambda m: m.functions.append(
            helper.make_function("local", "f", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], m.opset_import)
        ),
        "found a function",
    ),
    "training-information": graph(INFER, lambda m: m.training_info.add(), "found training information"),
    "weight-unknown": graph(
        INFER, lambda m: add_node(m, "Identity", ["backbone.nothing"], ["x"]), "reads 'backbone.nothing'"
    ),
    "weight-unknown-in-a-subgraph": graph(
        INFER,
        lambda m: m.graph.node[0].attribute.append(
            onnx.AttributeProto(name="g", g=onnx.GraphProto(node=[helper.make_node("Neg", ["secret"], ["x"])]))
        ),
        "reads 'secret'",
    ),
    "weight-shadowed-by-an-initialiser": graph(
        INFER,
        lambda m: m.graph.initializer.append(numpy_helper.from_array(np.zeros((6, 4), np.float32), "backbone.head")),
        "defines 'backbone.head'",
    ),
    "weight-shadowed-by-a-node": graph(
        INFER, lambda m: add_node(m, "Neg", ["theta"], ["backbone.head"]), "defines 'backbone.head'"
    ),
    "operator-unknown": graph(
        INFER, lambda m: setattr(m.graph.node[3], "op_type", "Frobnicate"), "Frobnicate", EngineError
    ),
    "operator-domain-unknown": graph(
        INFER, lambda m: setattr(m.graph.node[3], "domain", "evil"), "cannot load", EngineError
    ),
    "operator-of-python": graph(
        INFER,
        lambda m: (setattr(m.graph.node[3], "domain", "ai.onnx.contrib"), setattr(m.graph.node[3], "op_type", "PyOp")),
        "cannot load",
        EngineError,
    ),
    "cycle": graph(ADAPT, lambda m: m.graph.node[1].input.__setitem__(1, "loss"), "cannot load the graph", EngineError),
    "value-computed-twice": graph(
        ADAPT, lambda m: add_node(m, "Neg", ["theta"], ["logits"]), "cannot load", EngineError
    ),
    "output-not-computed": graph(
        ADAPT, lambda m: m.graph.node.remove(next(node for node in m.graph.node if node.output[0] == "loss")), "'loss'"
    ),
    "attribute-type": graph(
        INFER,
        lambda m: m.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("to", "text")),
        "cannot load",
        EngineError,
    ),
    "cast-to-nowhere": graph(
        INFER,
        lambda m: m.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("to", 999)),
        "cannot load",
        EngineError,
    ),
    "initialiser-without-its-data": graph(
        INFER, lambda m: m.graph.initializer[0].ClearField("raw_data"), "cannot load", EngineError
    ),
    "ir-version": graph(INFER, lambda m: setattr(m, "ir_version", 10_000), "cannot load", EngineError),
}

LAYERS = {"zip": ZIP_CASES, "manifest": MANIFEST_CASES, "tensors": TENSOR_CASES, "graphs": GRAPH_CASES}
CASES: dict[str, Case] = {f"{layer}-{name}": value for layer, cases in LAYERS.items() for name, value in cases.items()}
