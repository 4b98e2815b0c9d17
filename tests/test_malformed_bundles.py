"""Malformed bundles: each one typed error, one line, within two seconds, and from the guard meant for it."""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

import toy
from malformed_cases import CASES, PARTS, VALID, resigned
from mgg_edge.errors import BundleError, ManifestError, MggEdgeError, UsageError
from mgg_edge.runtime import Adapter, Bundle

LIMIT_S = 2.0


@pytest.fixture(scope="module", autouse=True)
def _engine_imported(toy_bundle: Path) -> None:
    """Imports are not part of the time limit."""
    Adapter.open(toy_bundle).close()


def refuse(path: Path, kind: type[MggEdgeError], message: str) -> str:
    start_s = time.process_time()  # work, not waiting for a busy machine
    with pytest.raises(MggEdgeError) as refusal:
        Adapter.open(path).close()
    assert time.process_time() - start_s < LIMIT_S
    text = str(refusal.value)
    # Without the path, which pytest makes from the case's name.
    assert re.search(message, text.replace(str(path), "")), text
    assert type(refusal.value) is kind, text
    assert text.isprintable()
    assert len(text) <= 1000
    return text


def test_the_unchanged_bundle_opens(tmp_path: Path):
    path = tmp_path / "valid.mgg"
    path.write_bytes(VALID)
    Adapter.open(path).close()


def test_there_are_at_least_a_hundred_distinct_cases():
    assert len({hashlib.sha256(data).digest() for data, _, _ in CASES.values()}) >= 100


@pytest.mark.parametrize("name", CASES)
def test_malformed(tmp_path: Path, name: str):
    data, kind, message = CASES[name]
    path = tmp_path / "malformed.mgg"
    path.write_bytes(data)
    assert str(path) in refuse(path, kind, message) or kind is ManifestError
    assert [entry.name for entry in tmp_path.iterdir()] == ["malformed.mgg"]


class TestNotAFile:
    def test_folder(self, tmp_path: Path):
        refuse(tmp_path, BundleError, "not a regular file")

    def test_fifo_does_not_block(self, tmp_path: Path):
        os.mkfifo(tmp_path / "pipe.mgg")
        refuse(tmp_path / "pipe.mgg", BundleError, "not a regular file")

    def test_device(self):
        refuse(Path("/dev/zero"), BundleError, "not a regular file")

    def test_dangling_link(self, tmp_path: Path):
        (tmp_path / "link.mgg").symlink_to(tmp_path / "none.mgg")
        refuse(tmp_path / "link.mgg", UsageError, "no such bundle")

    def test_circular_link(self, tmp_path: Path):
        (tmp_path / "link.mgg").symlink_to(tmp_path / "link.mgg")
        refuse(tmp_path / "link.mgg", BundleError, "cannot read the bundle")

    def test_below_a_file(self, tmp_path: Path):
        (tmp_path / "file").write_bytes(b"")
        refuse(tmp_path / "file" / "x.mgg", BundleError, "cannot read the bundle: Not a directory")

    def test_name_too_long(self, tmp_path: Path):
        refuse(tmp_path / ("x" * 5000), BundleError, "cannot read the bundle: File name too long")

    def test_name_with_a_null_byte(self):
        refuse(Path("a\0b.mgg"), BundleError, "cannot read the bundle")

    def test_empty_name(self):
        refuse(Path(), BundleError, "not a regular file")

    def test_sparse_file_of_terabytes(self, tmp_path: Path):
        with (tmp_path / "huge.mgg").open("wb") as file:
            file.truncate(1 << 42)
        refuse(tmp_path / "huge.mgg", BundleError, "expected at most")


def test_any_flipped_bit_is_refused(tmp_path: Path):
    random, path = np.random.default_rng(0), tmp_path / "flipped.mgg"
    for position in random.choice(len(VALID) * 8, 400, replace=False):
        data = bytearray(VALID)
        data[position // 8] ^= 1 << (position % 8)
        path.write_bytes(data)
        with pytest.raises(BundleError, match=r"damaged or altered|another kind of file"):
            Bundle.load(path)


@pytest.mark.parametrize("member", PARTS.members)
def test_any_flipped_bit_below_the_digests_is_refused_or_harmless(tmp_path: Path, member: str):
    """An attacker recomputes digests: then a bundle may hold other numbers, but nothing else may happen."""
    random, path = np.random.default_rng(1), tmp_path / "flipped.mgg"
    original = PARTS.members[member]
    for position in random.choice(min(len(original), 3000) * 8, 150, replace=False):
        data = bytearray(original)
        data[position // 8] ^= 1 << (position % 8)
        path.write_bytes(toy.pack(PARTS.with_member(member, bytes(data))))
        try:
            Bundle.load(path)
        except MggEdgeError:
            continue


def test_any_flipped_bit_of_the_zip_structure_is_refused_or_harmless(tmp_path: Path):
    """The outer digest recomputed over altered headers: what loads is exactly what was packed."""
    random, path = np.random.default_rng(2), tmp_path / "flipped.mgg"
    body = VALID[:-71]
    graphs = {name: data for name, data in PARTS.members.items() if name.endswith(".onnx")}
    for position in random.choice(np.arange(body.index(b"PK\1\2"), len(body)), 400):
        data = bytearray(body)
        data[position] ^= 1 << int(random.integers(8))
        path.write_bytes(resigned(bytes(data)))
        try:
            assert dict(Bundle.load(path).graphs) == graphs
        except MggEdgeError:
            continue
