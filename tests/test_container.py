"""The bundle file: atomic writing, exact reading, and nothing left unverified. Damage: test_malformed_bundles.py."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

import toy
from mgg_edge import container
from mgg_edge.container import MEMBER_LIMITS, describe_members, graph_name, read_container, write_container
from mgg_edge.errors import BundleError, SinkError, UsageError


def described(members: dict[str, bytes]):
    return toy.manifest().replace(members=describe_members(members))


def test_round_trip(toy_bundle: Path, toy_parts: toy.Parts):
    manifest, members, identity = read_container(toy_bundle)
    assert members == toy_parts.members
    assert manifest == described(toy_parts.members)
    assert len(identity) == 64


def test_same_content_gives_the_same_bytes_and_identity(tmp_path: Path, toy_bundle: Path):
    again = toy.write_bundle(tmp_path / "again.mgg")
    assert again.read_bytes() == toy_bundle.read_bytes()
    assert read_container(again)[2] == read_container(toy_bundle)[2]


def test_another_manifest_gives_another_identity(tmp_path: Path, toy_bundle: Path, toy_parts: toy.Parts):
    other = tmp_path / "other.mgg"
    manifest = described(toy_parts.members).replace(labels=("a", "b", "c", "d"))
    write_container(other, manifest, toy_parts.members)
    assert read_container(other)[2] != read_container(toy_bundle)[2]


def test_any_unzip_tool_lists_it(toy_bundle: Path):
    with zipfile.ZipFile(toy_bundle) as archive:
        assert archive.testzip() is None
        assert set(archive.namelist()) == set(MEMBER_LIMITS)
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_packer_of_the_tests_makes_valid_bundles(tmp_path: Path, toy_parts: toy.Parts):
    path = tmp_path / "packed.mgg"
    path.write_bytes(toy.pack(toy_parts))
    assert read_container(path)[1] == toy_parts.members


def test_graph_names():
    assert graph_name("adapt", "tensorrt") == "adapt.tensorrt.onnx"


def test_missing_file_is_a_usage_error_that_names_the_way(tmp_path: Path):
    with pytest.raises(UsageError, match=r"none\.mgg: no such bundle; write one with 'mgg-edge export'"):
        read_container(tmp_path / "none.mgg")


def test_unreadable_file(tmp_path: Path, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BundleError, match="cannot read the bundle: Permission denied"):
        read_container(toy_bundle)


class TestWriting:
    """Complete at its path, or not there at all."""

    def test_unwritable_folder(self, tmp_path: Path, toy_parts: toy.Parts):
        with pytest.raises(SinkError, match="cannot write here: No such file or directory"):
            write_container(tmp_path / "absent" / "toy.mgg", described(toy_parts.members), toy_parts.members)

    @pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
    def test_failure_leaves_the_old_file_and_no_remains(
        self, tmp_path: Path, toy_parts: toy.Parts, monkeypatch: pytest.MonkeyPatch, call: str
    ):
        path = tmp_path / "toy.mgg"
        path.write_bytes(b"old")

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, call, fail)
        with pytest.raises(SinkError, match="No space left on device"):
            write_container(path, described(toy_parts.members), toy_parts.members)
        assert path.read_bytes() == b"old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["toy.mgg"]

    def test_members_must_match_the_manifest(self, tmp_path: Path, toy_parts: toy.Parts):
        altered = {**toy_parts.members, "state.safetensors": b"other"}
        with pytest.raises(BundleError, match=r"'state\.safetensors' does not match the manifest's size and SHA-256"):
            write_container(tmp_path / "toy.mgg", described(toy_parts.members), altered)
        assert not list(tmp_path.iterdir())

    def test_members_are_a_fixed_set(self, tmp_path: Path, toy_parts: toy.Parts):
        members = {**toy_parts.members, "notes.txt": b"hello"}
        with pytest.raises(BundleError, match=r"members: expected .* found .*notes\.txt"):
            write_container(tmp_path / "toy.mgg", described(members), members)

    def test_ceilings_hold_for_writing_too(self, tmp_path: Path, toy_parts: toy.Parts, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(container.MEMBER_LIMITS, "weights.safetensors", 10)
        with pytest.raises(BundleError, match=r"'weights\.safetensors' has \d+ bytes, above its ceiling 10"):
            write_container(tmp_path / "toy.mgg", described(toy_parts.members), toy_parts.members)
