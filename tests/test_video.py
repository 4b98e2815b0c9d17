"""Video files: what is read, and what is said of files that cannot be."""

from __future__ import annotations

import os
import socket
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.stream import Disposition

from mgg_edge.errors import MggEdgeError, SourceError, UsageError
from mgg_edge.runtime.sources import video
from mgg_edge.runtime.sources.source_picture import oriented
from mgg_edge.runtime.sources.source_track import choose_track
from mgg_edge.runtime.sources.video import DEFAULT_RATE, VideoSource
from videos import (
    pictures,
    sample_video,
    write_empty_video,
    write_jpegs,
    write_sound,
    write_video,
)


def read(path: Path) -> tuple[list[video.Frame], MggEdgeError | None]:
    """The frames until the end or the error."""
    frames = []
    failure = None
    try:
        with VideoSource(path) as source:
            for frame in source:
                frames.append(frame)  # noqa: PERF402 - what came before an error must stay
    except MggEdgeError as error:
        failure = error
    assert failure is None or (str(path) in str(failure) and "\n" not in str(failure))
    return frames, failure


def test_every_picture_comes_in_order_and_bit_exact(tmp_path: Path) -> None:
    images = pictures(7)
    frames, error = read(write_video(tmp_path / "video.mov", images))
    assert error is None
    assert [frame.index for frame in frames] == list(range(7))
    np.testing.assert_allclose([frame.time_s for frame in frames], np.arange(7) / 25, atol=1e-3)
    for frame, image in zip(frames, images, strict=True):
        np.testing.assert_array_equal(frame.image, image)


def test_the_street_video_is_read_whole() -> None:
    with VideoSource(sample_video("bikes.mp4")) as source:
        assert (source.width, source.height, source.rate, source.frames_expected) == (640, 272, 25, 250)
        frames = list(source)
    assert len(frames) == 250
    assert frames[-1].time_s == pytest.approx(9.96)
    assert all(frame.image.shape == (272, 640, 3) and frame.image.dtype == np.uint8 for frame in frames)


def test_times_start_at_zero_where_the_file_starts_later(tmp_path: Path) -> None:
    path = write_video(tmp_path / "video.mkv", pictures(5), codec="mpeg4", start=50)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).time > 1
    frames, error = read(path)
    assert error is None
    assert [frame.time_s for frame in frames] == pytest.approx([0, 0.04, 0.08, 0.12, 0.16])


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_metadata_is_applied(tmp_path: Path, degrees: int) -> None:
    images = pictures(2)
    path = write_video(tmp_path / "video.mov", images, rotation=degrees)
    with VideoSource(path) as source:
        assert (source.width, source.height) == ((48, 32) if degrees == 180 else (32, 48))
        for frame, image in zip(source, images, strict=True):
            np.testing.assert_array_equal(frame.image, np.rot90(image, degrees // 90))


@pytest.mark.parametrize(("colour_range", "white"), [(1, 235), (2, 255)])
def test_the_colour_range_of_the_stream_is_honoured(tmp_path: Path, colour_range: int, white: int) -> None:
    path = tmp_path / "video.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv444p"
        stream.codec_context.color_range = colour_range
        for luma in (16, 126, white):
            picture = av.VideoFrame(32, 16, "yuv444p")
            for plane, value in zip(picture.planes, (luma, 128, 128), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            picture.color_range = colour_range
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    levels = [int(frame.image.mean()) for frame in read(path)[0]]
    expected = [0, 128, 255] if colour_range == 1 else [16, 126, 255]
    assert np.abs(np.array(levels) - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(31, 47), (1, 1), (3, 2)])
def test_odd_sizes_are_read(tmp_path: Path, height: int, width: int) -> None:
    frames, error = read(write_video(tmp_path / "video.mov", pictures(3, height, width)))
    assert error is None
    assert [frame.image.shape for frame in frames] == [(height, width, 3)] * 3


def test_a_size_change_is_said_once_and_the_frames_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jpegs(tmp_path / "video.mjpeg", pictures(3, 32, 48) + pictures(3, 40, 24))
    frames, error = read(path)
    assert error is None
    assert [frame.image.shape for frame in frames] == [(32, 48, 3)] * 3 + [(40, 24, 3)] * 3
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{path}: the picture size changes from 48x32 to 24x40 at frame 3"]


def test_a_colon_in_the_name_is_not_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "plain.mov", pictures(2)).rename(tmp_path / "http:x%d.mov")
    monkeypatch.chdir(tmp_path)
    frames, error = read(Path("http:x%d.mov"))
    assert error is None
    assert len(frames) == 2


def test_no_file_makes_the_reader_open_a_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        address = f"http://127.0.0.1:{port}/video.ts"
        (tmp_path / "list.m3u8").write_text(PLAYLIST.replace("good.ts", address))
        (tmp_path / "list.mp4").write_text(CONCAT.replace("good.ts", address))
        for name in ("list.m3u8", "list.mp4"):
            assert isinstance(read(tmp_path / name)[1], SourceError)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_rate_falls_back_where_the_file_has_no_usable_one(tmp_path: Path) -> None:
    with VideoSource(write_video(tmp_path / "video.mov", pictures(2), rate=30)) as source:
        assert source.rate == 30
    for name, rate in (("fast.mov", Fraction(5000)), ("slow.mov", Fraction(1, 5000))):
        with VideoSource(write_video(tmp_path / name, pictures(3), rate=rate)) as source:
            assert source.rate == DEFAULT_RATE, name


def test_a_video_is_read_once(tmp_path: Path) -> None:
    with VideoSource(write_video(tmp_path / "video.mov", pictures(2))) as source:
        assert len(list(source)) == 2
        with pytest.raises(UsageError, match="read already"):
            list(source)


def test_missing_files_and_other_things_are_usage_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "absent.mp4", tmp_path, tmp_path / "pipe.mp4"):
        start_s = time.monotonic()
        assert isinstance(read(path)[1], UsageError)
        assert time.monotonic() - start_s < 10  # a pipe would be waited for for ever


TEXT = "this is not a video\n" * 200
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.ts\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile good.ts\n"
SUBTITLES = "1\n00:00:00,000 --> 00:00:01,000\nhello\n\n" * 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text.mp4", TEXT, "not a readable video"),
        ("text.txt", TEXT, "found text"),  # FFmpeg would draw it
        ("list.m3u8", PLAYLIST, "found a playlist"),  # and would open what these name
        ("list.mp4", CONCAT, "found a playlist"),
        ("words.srt", SUBTITLES, "found only subtitle"),
        ("empty.mp4", "", "not a readable video"),
        ("zeros.mp4", "\0" * 4096, "not a readable video"),
    ],
)
def test_files_that_are_no_video(tmp_path: Path, name: str, content: str, said: str) -> None:
    write_video(tmp_path / "good.ts", pictures(3), codec="mpeg4")
    (tmp_path / name).write_text(content)
    frames, error = read(tmp_path / name)
    assert isinstance(error, SourceError)
    assert said in str(error)
    assert not frames


def test_sound_alone_and_no_pictures(tmp_path: Path) -> None:
    assert "found only audio" in str(read(write_sound(tmp_path / "sound.wav"))[1])
    for suffix in ("mkv", "mp4"):
        error = read(write_empty_video(tmp_path / f"empty.{suffix}"))[1]
        assert isinstance(error, SourceError), suffix


def test_a_picture_too_large_to_hold_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    jpeg = bytearray(write_jpegs(tmp_path / "small.mjpeg", pictures(1)).read_bytes())
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = b"\xff\xdc\xff\xdc"
    (tmp_path / "large.mjpeg").write_bytes(jpeg)
    assert "expected a picture of 1 to" in str(read(tmp_path / "large.mjpeg")[1])


def test_a_size_limit_holds_for_the_whole_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jpegs(tmp_path / "video.mjpeg", pictures(2, 32, 48) + pictures(1, 256, 256))
    monkeypatch.setattr(video, "MAX_PIXELS", 10_000)
    frames, error = read(path)
    assert len(frames) == 2
    assert isinstance(error, SourceError)


@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_truncated_video_gives_its_good_frames_and_an_error(tmp_path: Path, fraction: float, suffix: str) -> None:
    options = {"movflags": "faststart"} if suffix == "mp4" else {}  # the index first
    whole = write_video(tmp_path / f"whole.{suffix}", pictures(100), codec="mpeg4", **options)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * fraction)])
    frames, error = read(cut)
    assert isinstance(error, SourceError)
    assert f"after {len(frames)} frames" in str(error)
    assert 0 < len(frames) < 100


def test_a_cut_between_two_pictures_is_found_by_the_stated_length(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", pictures(100), codec="mpeg4", movflags="faststart")
    with av.open(str(whole)) as container:
        positions = sorted(packet.pos for packet in container.demux(video=0) if packet.size)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: positions[60]])
    assert len([None for _ in av.open(str(cut)).decode(video=0)]) == 60  # FFmpeg itself says nothing
    frames, error = read(cut)
    assert len(frames) == 60
    assert "expected 4.0 s, so its end is missing" in str(error)


def test_a_video_without_its_index_is_refused(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", pictures(50), codec="mpeg4")  # the index comes last
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:-200])
    frames, error = read(tmp_path / "cut.mp4")
    assert isinstance(error, SourceError)
    assert not frames


def test_a_video_nobody_can_decode_is_refused(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mov", pictures(3)).read_bytes()
    (tmp_path / "strange.mov").write_bytes(whole.replace(b"png ", b"zzzz"))
    assert "no decoder for this video" in str(read(tmp_path / "strange.mov")[1])


def test_names_in_no_known_encoding_do_no_harm(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", pictures(3), codec="mpeg4").read_bytes()
    assert b"Lavf" in whole
    (tmp_path / "named.mp4").write_bytes(whole.replace(b"Lavf", b"\x85\xff\xfe\xfd"))
    frames, error = read(tmp_path / "named.mp4")
    assert error is None
    assert len(frames) == 3


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_damage_anywhere_is_an_error_of_ours_or_none(tmp_path: Path, suffix: str) -> None:
    whole = write_video(tmp_path / f"whole.{suffix}", pictures(20), codec="mpeg4").read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / f"damaged.{suffix}"
    for _ in range(60):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[random.integers(0, len(whole), 20)] = random.integers(0, 256, 20)
        path.write_bytes(damaged.tobytes())
        start_s = time.process_time()
        read(path)  # raises anything but an MggEdgeError
        assert time.process_time() - start_s < 2


SIGNS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


@pytest.mark.parametrize("matrix", [(a, 0, 0, d) for a, d in SIGNS] + [(0, b, c, 0) for b, c in SIGNS])
def test_the_eight_orientations_are_the_display_matrix_s(matrix: tuple[int, int, int, int]) -> None:
    a, b, c, d = matrix
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    turned = oriented(image, np.array([[a, b], [c, d]], np.int8))
    assert turned is not None
    height, width = turned.shape[:2]
    for y in range(3):
        for x in range(5):
            from_middle = (2 * x - 4, 2 * y - 2)  # in half pixels
            across = (a * from_middle[0] + c * from_middle[1] + width - 1) // 2
            down = (b * from_middle[0] + d * from_middle[1] + height - 1) // 2
            np.testing.assert_array_equal(turned[down, across], image[y, x])


def test_other_matrices_are_no_orientation() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    for matrix in ([[9, 0], [0, 1]], [[1, 1], [0, 1]], [[0, 0], [0, 0]]):
        assert oriented(image, np.array(matrix, np.int8)) is None


def write_tracks(path: Path, *tracks: tuple[int, int, Disposition]) -> Path:
    """A file of several video tracks: pictures, grey level, disposition of each."""
    with av.open(str(path), "w") as container:
        streams = []
        for _, _, disposition in tracks:
            stream = container.add_stream("mjpeg", rate=25)
            stream.width, stream.height, stream.pix_fmt = 32, 16, "yuvj420p"
            stream.disposition = disposition
            streams.append(stream)
        for stream, (count, level, _) in zip(streams, tracks, strict=True):
            for index in range(count):
                frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), level, np.uint8), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def container_of(*kinds: str) -> SimpleNamespace:
    """What a container says of its tracks; the first video is called the best. Muxers put covers last, files do not."""
    dispositions = {"cover": Disposition.attached_pic, "video": Disposition(0), "audio": Disposition(0)}
    tracks = [
        SimpleNamespace(index=index, type="audio" if kind == "audio" else "video", width=8, height=8,
                        disposition=dispositions[kind])
        for index, kind in enumerate(kinds)
    ]  # fmt: skip
    videos = [track for track in tracks if track.type == "video"]

    class Streams(list):
        video = videos

        def best(self, _kind: str) -> SimpleNamespace | None:
            return videos[0] if videos else None

    return SimpleNamespace(streams=Streams(tracks))


@pytest.mark.parametrize(
    ("kinds", "index"), [(("cover", "video"), 1), (("video", "cover"), 0), (("video", "audio"), 0)]
)
def test_a_cover_is_never_the_video(kinds: tuple[str, ...], index: int) -> None:
    assert choose_track("x", container_of(*kinds)).index == index


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("audio", "cover"), "no video, only audio with a cover"),
        (("audio",), "expected a video stream, found only audio"),
        ((), "expected a video stream, found only nothing"),
    ],
)
def test_what_is_no_video_is_named(kinds: tuple[str, ...], message: str) -> None:
    with pytest.raises(SourceError, match=f"x: {message}"):
        choose_track("x", container_of(*kinds))


def test_of_several_tracks_the_default_one_is_read_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, default = Disposition(0), Disposition.default
    with caplog.at_level("INFO", logger="mgg_edge"):
        frames, _ = read(write_tracks(tmp_path / "x.mkv", (5, 20, plain), (5, 200, default)))
    assert abs(int(frames[0].image.mean()) - 200) < 4
    assert "2 video tracks (#0 32x16, #1 32x16): reading #1" in caplog.text
