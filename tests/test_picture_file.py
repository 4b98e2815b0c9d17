"""Picture files: all orientations, bit depths and animations; pixels of videos that are not square."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from mgg_edge.errors import SourceError
from mgg_edge.runtime.sources.source_open import open_source
from mgg_edge.runtime.sources.source_picture import square_size
from mgg_edge.scenes.picture_file import read_animation, read_picture
from videos import pictures

RAMP = np.linspace(0, 65535, 24 * 16).reshape(16, 24)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_shown_as_pillow_shows_it(tmp_path, orientation):
    image = Image.fromarray(pictures(1)[0])
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(read_picture(tmp_path / "x.png"), expected)
    assert (expected.shape[0] > expected.shape[1]) == (orientation >= 5)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / f"x.{suffix}")
    found = read_picture(tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(found[..., 0], RAMP.astype(np.uint16) >> 8)
    assert (found.shape, found.dtype) == ((16, 24, 3), np.uint8)


def test_kinds_without_a_known_range_are_refused_by_name(tmp_path):
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(SourceError, match=r"x\.tif: expected 8 or 16 bits a pixel, found floating point"):
        read_picture(tmp_path / "x.tif")
    Image.fromarray((RAMP * 1000).astype(np.int32)).save(tmp_path / "y.tif")
    with pytest.raises(SourceError, match=r"y\.tif: expected at most 16 bits a pixel"):
        read_picture(tmp_path / "y.tif")


@pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
def test_an_animation_is_read_whole(tmp_path, suffix):
    first, *others = (Image.fromarray(image) for image in pictures(5))
    path = tmp_path / f"x.{suffix}"
    first.save(path, save_all=True, append_images=others, duration=[100, 100, 300, 100, 100])
    found = list(read_animation(path))
    assert [round(time_s, 3) for time_s, _ in found] == [0.0, 0.1, 0.2, 0.5, 0.6]
    assert all(image.shape == (32, 48, 3) for _, image in found)
    with open_source(str(path)) as source:
        assert [round(frame.time_s, 3) for frame in source] == [0.0, 0.1, 0.2, 0.5, 0.6]
    assert read_picture(path).shape == (32, 48, 3)


def test_a_still_is_one_picture_at_zero(tmp_path):
    Image.fromarray(pictures(1)[0]).save(tmp_path / "x.webp", lossless=True)
    ((time_s, image),) = read_animation(tmp_path / "x.webp")
    assert time_s == 0.0
    np.testing.assert_array_equal(image, pictures(1)[0])


def write_anamorphic(path: Path, pixel_aspect: Fraction) -> Path:
    """A circle as wide as the picture is high, seen with pixels of this shape."""
    rows, columns = np.mgrid[0:64, 0:64]
    inside = (rows - 31.5) ** 2 + (columns - 31.5) ** 2 < 24**2
    image = np.repeat((inside * 255).astype(np.uint8)[:, :, None], 3, axis=2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv444p"
        stream.codec_context.sample_aspect_ratio = pixel_aspect
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("pixel_aspect", "size"),
    [(Fraction(1), (64, 64)), (Fraction(2), (64, 128)), (Fraction(16, 11), (64, 93)), (Fraction(1, 2), (128, 64)),
     (Fraction(1000), (64, 64))],
)  # fmt: skip
def test_pixels_that_are_not_square_are_made_so(tmp_path, pixel_aspect, size):
    with open_source(str(write_anamorphic(tmp_path / "x.mp4", pixel_aspect))) as source:
        assert (source.height, source.width) == size
        image = next(iter(source)).image
    assert image.shape == (*size, 3)
    bright = image[..., 0] > 128
    height, width = (int(bright.any(axis=axis).sum()) for axis in (1, 0))
    stretched = pixel_aspect if pixel_aspect < 100 else 1
    assert width / height == pytest.approx(float(stretched), rel=0.05)


def test_the_longer_side_of_a_pixel_decides():
    assert square_size(720, 576, Fraction(16, 15)) == (768, 576)
    assert square_size(720, 480, Fraction(8, 9)) == (720, 540)


def test_the_second_picture_of_a_photograph_or_a_page_is_no_frame(tmp_path):
    first, second = (Image.new("RGB", (32, 24), colour) for colour in ((200, 0, 0), (0, 0, 200)))
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    first.save(tmp_path / "moves.gif", save_all=True, append_images=[second], duration=100)
    counts = {path.name: len(list(read_animation(path))) for path in sorted(tmp_path.iterdir())}
    assert counts == {"moves.gif": 2, "phone.jpg": 1}
    assert read_picture(tmp_path / "phone.jpg")[0, 0, 0] > 150
