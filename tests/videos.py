"""Videos for the tests: made here with known pictures, or the real ones that `scripts/test` fetches."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

VIDEOS = Path(os.environ.get("MGG_EDGE_VIDEOS", Path(__file__).parent.parent / ".cache" / "videos"))


def sample_video(name: str) -> Path:
    """A real video; without it the test is skipped, or fails where everything must run."""
    path = VIDEOS / name
    if not path.is_file():
        reason = f"{path} is missing: scripts/test fetches it (or set MGG_EDGE_VIDEOS)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def pictures(count: int, height: int = 32, width: int = 48, seed: int = 0) -> list[np.ndarray]:
    """Pictures u8[height,width,3], all different and without any symmetry."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    ramp = np.stack([rows * 255 // height, columns * 255 // width, (rows * 3 + columns) % 256], axis=-1)
    return [((ramp // 2) + random.integers(0, 128, (height, width, 1))).astype(np.uint8) for _ in range(count)]


def write_video(
    path: Path,
    images: Sequence[np.ndarray],
    codec: str = "png",
    rate: int | Fraction = 25,
    rotation: int = 0,
    start: int = 0,
    **options: str,
) -> Path:
    """Encode pictures; `png` keeps every bit."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        stream.height, stream.width = images[0].shape[:2]
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = start + index, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """A file with an audio stream only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_empty_video(path: Path) -> Path:
    """A well-formed video file without a single picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    return path


def write_jpegs(path: Path, images: Sequence[np.ndarray]) -> Path:
    """JPEG pictures one after another, the only format here whose size may change on the way."""
    buffer = io.BytesIO()
    for image in images:
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
    path.write_bytes(buffer.getvalue())
    return path


def read_pictures(path: Path) -> list[np.ndarray]:
    """All pictures of a video, by PyAV alone."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
