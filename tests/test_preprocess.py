"""Resize and crop: sizes as torchvision's, pixels close to PIL's, bounded memory, clear refusals."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mgg_edge.errors import SourceError, UsageError
from mgg_edge.manifest import PreprocessInfo
from mgg_edge.runtime import preprocess
from mgg_edge.runtime.preprocess import fit

INFO = PreprocessInfo(224, 224, "shortest-side", 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def smooth(height: int, width: int) -> np.ndarray:
    """A photo-like picture: soft shading with a few edges."""
    y, x = np.mgrid[0:height, 0:width] / 100.0
    waves = [127 + 60 * np.sin(x * (1 + k) + 2 * y) + 40 * np.cos(3 * y - x * k) for k in range(3)]
    picture = np.stack(waves, -1)
    picture[height // 4 : height // 2, width // 3 : width // 2] = (200, 40, 90)
    return np.clip(picture, 0, 255).astype(np.uint8)


def with_pil(picture: np.ndarray, info: PreprocessInfo) -> np.ndarray:
    """What torchvision's Resize and CenterCrop do to a PIL picture, for square inputs."""
    image = Image.fromarray(picture)
    size, short = int(info.height / info.crop_fraction), min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    if info.resize == "squash":
        width = height = size
    left, top = round((width - info.width) / 2.0), round((height - info.height) / 2.0)
    resized = image.resize((width, height), FILTERS[info.interpolation])
    return np.asarray(resized.crop((left, top, left + info.width, top + info.height)))


def mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


class TestCloseness:
    """Measured: 0.10 to 0.15 grey levels on pictures, which is rounding; 0.9 on white noise, where swscale's
    sharper cubic (C = 0.6 against PIL's 0.5) shows. Half a grey level is a third of the step of 8 bits after the
    normalisation of a ViT (1/127)."""

    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    @pytest.mark.parametrize("resize", ["shortest-side", "squash"])
    @pytest.mark.parametrize(
        "size", [(480, 640), (640, 480), (272, 640), (1080, 1920), (300, 300), (225, 397), (100, 80)]
    )
    def test_smooth_picture(self, size: tuple[int, int], resize: str, interpolation: str):
        info = dataclasses.replace(INFO, resize=resize, interpolation=interpolation)
        assert mean_difference(fit(smooth(*size), info), with_pil(smooth(*size), info)) < 0.25

    @pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
    def test_frame_of_a_video(self, videos: Path, interpolation: str):
        info = dataclasses.replace(INFO, interpolation=interpolation)
        with av.open(str(videos / "bikes.mp4")) as container:
            frames = [frame for frame, _ in zip(container.decode(video=0), range(121), strict=False)]
        for frame in frames[::40]:
            picture = frame.to_ndarray(format="rgb24")
            assert mean_difference(fit(picture, info), with_pil(picture, info)) < 0.25

    def test_decoded_frames_skip_the_detour_over_rgb(self, videos: Path):
        """One pass from YUV against two over RGB: chroma is interpolated once instead of twice."""
        with av.open(str(videos / "bikes.mp4")) as container:
            frame = next(iter(container.decode(video=0)))
        assert mean_difference(fit(frame, INFO), fit(frame.to_ndarray(format="rgb24"), INFO)) < 3

    def test_white_noise(self):
        picture = np.random.default_rng(0).integers(0, 256, (480, 700, 3), np.uint8)
        assert mean_difference(fit(picture, INFO), with_pil(picture, INFO)) < 1.5


class TestGeometry:
    @pytest.mark.parametrize("fraction", [0.875, 0.9, 0.95, 1.0])
    @pytest.mark.parametrize("size", [(480, 640), (641, 479), (272, 640), (1, 1), (7, 3), (500, 500)])
    def test_size_as_torchvision(self, size: tuple[int, int], fraction: float):
        info = dataclasses.replace(INFO, crop_fraction=fraction)
        target, short = int(224 / fraction), min(size)
        expected = tuple(target if side == short else int(target * side / short) for side in size)
        assert info.resized_size(*size) == expected

    def test_oblong_inputs_are_covered(self):
        info = dataclasses.replace(INFO, height=128, width=256, crop_fraction=1.0)
        assert info.resized_size(300, 300) == (256, 256)
        assert info.resized_size(100, 400) == (128, 512)
        assert fit(smooth(300, 300), info).shape == (128, 256, 3)

    @pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 999), (999, 3), (223, 225), (255, 257)])
    @pytest.mark.parametrize("resize", ["shortest-side", "squash"])
    def test_odd_sizes(self, size: tuple[int, int], resize: str):
        picture = np.full((*size, 3), (10, 100, 200), np.uint8)
        fitted = fit(picture, dataclasses.replace(INFO, resize=resize))
        assert fitted.shape == (224, 224, 3)
        assert fitted.flags.c_contiguous
        assert mean_difference(fitted, np.broadcast_to(np.uint8([10, 100, 200]), fitted.shape)) <= 1

    def test_channels_stay_in_order(self):
        picture = np.zeros((300, 400, 3), np.uint8)
        picture[..., 0] = 255
        assert fit(picture, INFO)[100, 100].tolist() == [255, 0, 0]

    def test_the_crop_is_the_centre(self):
        picture = np.zeros((224, 448, 3), np.uint8)
        picture[:, 112:336] = 255
        assert fit(picture, dataclasses.replace(INFO, crop_fraction=1.0))[:, 2:-2].min() == 255

    def test_model_size_passes_untouched(self):
        picture = smooth(224, 224)
        assert fit(picture, INFO) is picture

    def test_views_are_taken(self):
        picture = smooth(224, 224)[:, ::-1]
        np.testing.assert_array_equal(fit(picture, INFO), picture)
        wide = smooth(300, 400)[:, ::-1]
        np.testing.assert_array_equal(fit(wide, INFO), fit(wide.copy(), INFO))

    def test_the_input_is_left_alone(self):
        picture = smooth(300, 400)
        fit(picture, INFO)
        np.testing.assert_array_equal(picture, smooth(300, 400))

    def test_same_result_every_time_and_between_other_sizes(self):
        first = fit(smooth(300, 400), INFO)
        fit(smooth(640, 480), INFO)
        assert fit(smooth(300, 400), INFO).tobytes() == first.tobytes()

    @pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
    def test_a_strip_does_not_become_gigabytes(self, size: tuple[int, int]):
        """Resized whole, it would have 248 × 24,800,000 pixels."""
        tracemalloc.start()
        fitted = fit(np.full((*size, 3), 50, np.uint8), INFO)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert fitted.shape == (224, 224, 3)
        assert peak_bytes < 10 << 20

    def test_trimming_a_strip_changes_little(self):
        picture = smooth(100, 1000)
        whole = preprocess._scale(picture, INFO.resized_size(100, 1000), "bicubic")
        assert mean_difference(fit(picture, INFO), preprocess._centre(whole, (224, 224))) < 1.5


class TestRefusals:
    @pytest.mark.parametrize(
        ("picture", "found"),
        [
            (None, "NoneType"),
            ([[1]], "list"),
            (np.zeros((4, 4, 3), np.float32), r"float32\[4, 4, 3\]"),
            (np.zeros((4, 4, 3), np.int8), r"int8\[4, 4, 3\]"),
            (np.zeros((4, 4), np.uint8), r"uint8\[4, 4\]"),
            (np.zeros((4, 4, 4), np.uint8), r"uint8\[4, 4, 4\]"),
            (np.zeros((1, 4, 4, 3), np.uint8), r"uint8\[1, 4, 4, 3\]"),
            (np.zeros((0, 4, 3), np.uint8), r"uint8\[0, 4, 3\]"),
            (np.zeros((4, 0, 3), np.uint8), r"uint8\[4, 0, 3\]"),
        ],
    )
    def test_pictures(self, picture, found: str):
        with pytest.raises(UsageError, match=rf"frame: expected .*uint8\[height, width, 3\].*, found {found}$"):
            preprocess.check_picture(picture)

    def test_what_the_scaler_raises_is_mapped(self, monkeypatch: pytest.MonkeyPatch):
        class Failing:
            def reformat(self, *_, **__):
                raise av.FFmpegError(22, "Invalid argument")

        monkeypatch.setattr(preprocess._local, "reformatter", Failing(), raising=False)
        with pytest.raises(SourceError, match=r"cannot be resized to 330 x 248 pixels: .*Invalid argument"):
            fit(smooth(300, 400), INFO)
