"""Folders, patterns, lists and single pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mgg_edge.errors import SourceError, UsageError
from mgg_edge.runtime.sources.source_files import FileSequence
from mgg_edge.runtime.sources.source_open import open_source
from mgg_edge.scenes.picture_file import read_picture
from videos import pictures, write_video


def save(path: Path, image: np.ndarray, **options: object) -> Path:
    Image.fromarray(image).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = pictures(12)
    for index, image in enumerate(images):
        save(tmp_path / f"frame{index}.png", image)
    (tmp_path / "notes.md").write_text("not a picture")
    (tmp_path / "inner").mkdir()
    save(tmp_path / "inner" / "frame0.png", images[0])
    return tmp_path


def test_a_folder_is_read_in_the_order_of_people(folder: Path) -> None:
    with open_source(str(folder)) as source:
        assert (source.width, source.height, source.frames_expected, source.live) == (48, 32, 12, False)
        frames = list(source)
        assert list(source) == []
    assert [frame.index for frame in frames] == list(range(12))
    assert [frame.time_s for frame in frames] == pytest.approx(np.arange(12) / 25)
    for frame, image in zip(frames, pictures(12), strict=True):
        np.testing.assert_array_equal(frame.image, image)


def test_a_pattern_may_reach_into_folders(folder: Path) -> None:
    with open_source(f"{folder}/frame1*.png") as source:
        assert source.frames_expected == 3  # 1, 10, 11
    with open_source(f"{folder}/**/*.png") as source:
        assert source.frames_expected == 13


def test_a_list_keeps_its_order_and_may_mix_pictures_and_videos(folder: Path) -> None:
    write_video(folder / "clip.mov", pictures(5))
    (folder / "list.txt").write_text("# a comment\nframe3.png\n\nclip.mov\nframe1.png\n")
    with open_source(str(folder / "list.txt")) as source:
        assert source.frames_expected is None
        frames = list(source)
    assert [frame.index for frame in frames] == list(range(7))
    assert (np.diff([frame.time_s for frame in frames]) > 0.03).all()
    np.testing.assert_array_equal(frames[0].image, pictures(12)[3])
    np.testing.assert_array_equal(frames[-1].image, pictures(12)[1])


def test_a_file_with_the_characters_of_a_pattern_is_that_file(tmp_path: Path) -> None:
    save(tmp_path / "a[1].png", pictures(1)[0])
    with open_source(str(tmp_path / "a[1].png")) as source:
        assert len(list(source)) == 1


def test_what_cannot_be_read_is_left_out_said_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "frame2.png").write_bytes(b"not a picture")
    (folder / "frame5.png").write_bytes((folder / "frame4.png").read_bytes()[:100])
    with open_source(str(folder)) as source:
        frames = list(source)
        assert source.losses() == {"unreadable": 2}
    assert len(frames) == 10
    assert [frame.index for frame in frames] == list(range(10))
    assert "frame2.png: not a readable picture" in caplog.text
    assert "frame5.png: not a readable picture" in caplog.text


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(SourceError, match="none of 1 files can be read"):
        open_source(str(tmp_path))
    with pytest.raises(SourceError, match="none of 0 files"):
        FileSequence("empty", [])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", "\n# nothing\n", "expected one path a line, found none"),
        ("odd.txt", "frame1.png\nrm -rf /\n", "line 2: expected the path of a picture or video, found 'rm -rf /'"),
        ("addresses.txt", "rtsp://camera/\n", "line 1: expected the path"),
        ("binary.txt", "\udcff\udcfe", "expected a text file"),
    ],
)
def test_a_list_that_is_none(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=said):
        open_source(str(tmp_path / name))


def test_a_folder_or_pattern_without_pictures(tmp_path: Path) -> None:
    for text in (str(tmp_path), f"{tmp_path}/*.png"):
        with pytest.raises(UsageError, match="expected pictures or videos, found none"):
            open_source(text)


def test_pictures_of_every_kind_become_rgb(tmp_path: Path) -> None:
    colour = pictures(1)[0]
    save(tmp_path / "grey.png", colour[:, :, 0])
    rgba = np.dstack([colour, np.full(colour.shape[:2], 7, np.uint8)])
    save(tmp_path / "alpha.png", rgba)
    deep = (colour[:, :, 0].astype(np.uint16) << 8) | 0x0F
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(colour).quantize(256).save(tmp_path / "palette.gif")
    np.testing.assert_array_equal(read_picture(tmp_path / "grey.png"), np.repeat(colour[:, :, :1], 3, 2))
    np.testing.assert_array_equal(read_picture(tmp_path / "alpha.png"), colour)
    np.testing.assert_array_equal(read_picture(tmp_path / "deep.png"), np.repeat(colour[:, :, :1], 3, 2))
    assert read_picture(tmp_path / "palette.gif").shape == colour.shape


def test_the_camera_s_orientation_is_applied(tmp_path: Path) -> None:
    image = pictures(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    save(tmp_path / "turned.png", image, exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "turned.png"), np.rot90(image, -1))


def test_a_picture_too_large_to_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "large.png", pictures(1)[0])
    monkeypatch.setattr("mgg_edge.scenes.picture_file.MAX_PIXELS", 100)
    with pytest.raises(SourceError, match="expected at most 100 pixels, found 48x32"):
        read_picture(path)


def test_every_frame_names_its_file_and_files_left_out_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jfif", "b.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name, format="JPEG" if name.endswith("jfif") else "PNG")
    for name in ("notes.txt", "c.heic", ".hidden.png", "._b.png", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    with caplog.at_level("WARNING"), open_source(tmp_path) as source:
        assert [Path(frame.file).name for frame in source] == ["a.jfif", "b.png"]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "2 other files left out, no pictures or videos by their names: c.heic, notes.txt"
    ]


def test_a_byte_order_mark_is_no_part_of_a_list(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n", encoding="utf-8-sig")
    with open_source(tmp_path / "list.txt") as source:
        assert len(list(source)) == 1


def test_a_file_whose_name_looks_like_a_pipeline_is_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "A ! B.png")
    with open_source(str(tmp_path / "A ! B.png")) as source:
        assert len(list(source)) == 1
