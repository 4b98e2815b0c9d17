"""Names that users give: written whole or not at all, through links; what the system refuses is one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mgg_edge.cli.main import main
from mgg_edge.errors import SinkError, UsageError
from mgg_edge.files import output_target, write_whole
from videos import pictures, write_video


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x"
    for data in (b"one", b"another"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/real")
    write_whole(tmp_path / "link", b"one")
    write_whole(tmp_path / "link", b"two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "real").read_bytes() == b"two"


@pytest.mark.parametrize("name", ["x" * 255, "%d", "x%03d.mgg", "-x", "x y\n"])
def test_any_name_the_system_takes(tmp_path, name):
    write_whole(tmp_path / name, b"data")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_what_is_no_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to-null").symlink_to("/dev/null")
    for name, found in (("pipe", "a device or pipe"), ("to-null", "a device or pipe"), ("folder", "a directory")):
        with pytest.raises(UsageError, match=f"expected a file to write, found {found}"):
            write_whole(tmp_path / name, b"data")
    assert Path("/dev/null").is_char_device()
    assert (tmp_path / "pipe").is_fifo()


def test_names_that_cannot_be_used(tmp_path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "file").write_text("")
    for name in ("x" * 256, "one", "one/x", "absent/x", "file/x"):
        with pytest.raises(SinkError, match="cannot write here"):
            output_target(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_whole(tmp_path / "x", b"old")

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SinkError, match=r"cannot write the bundle: No space left"):
        write_whole(tmp_path / "x", b"new", "the bundle")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("x", b"old")]


LONG = "n" * 300


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--source", LONG],
        ["run", "--source", f"{LONG}.mp4"],
        ["run", "--source", "{clip}", "--save", f"{LONG}.mp4"],
        ["run", "--source", "{clip}", "--save", "one/x.mp4"],
        ["run", "--source", "{clip}", "--csv", LONG],
        ["run", "--source", "{clip}", "--csv", "pipe"],
        ["run", "--source", "{clip}", "--record", LONG],
        ["run", "--source", "{clip}", "--record", "pipe"],
        ["run", "--source", "{clip}", "--state", LONG],
        ["run", "--source", "one"],
        ["run", "--bundle", LONG, "--source", "{clip}"],
        ["run", "--bundle", "one", "--source", "{clip}"],
        ["calibrate", "--bundle", "{bundle}", "--source", "{clip}", "--out", "pipe"],
        ["calibrate", "--bundle", "{bundle}", "--source", "{clip}", "--out", "/dev/null"],
        ["inspect", LONG],
        ["state", "show", LONG],
        ["replay", LONG, "--source", "{clip}"],
    ],
    ids=lambda words: " ".join(words).replace(LONG, "LONG"),
)
def test_a_name_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys, toy_bundle, words):
    clip = write_video(tmp_path / "clip.mov", pictures(3))
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    before = sorted(entry.name for entry in tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        main([word.format(clip=clip, bundle=toy_bundle) for word in words])
    assert ended.value.code in (1, 2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before
    assert Path("/dev/null").is_char_device()


def test_a_folder_one_may_not_enter_is_one_line(monkeypatch, capsys):
    def refused(path, *_arguments, **_options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refused)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--source", "closed/x.mp4"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: closed/x.mp4: cannot be used: Permission denied"
