"""What a source's text means, and what is said of texts that mean nothing."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from mgg_edge.errors import MggEdgeError, MissingDependencyError, SourceError, UsageError
from mgg_edge.runtime.sources import source_open
from mgg_edge.runtime.sources.source import ClosingSource, Frame, FrameSource, IteratorSource
from mgg_edge.runtime.sources.source_backoff import Backoff
from mgg_edge.runtime.sources.source_live import LiveOptions, LiveSource
from mgg_edge.runtime.sources.source_open import open_source, split_name, suggest_name
from mgg_edge.runtime.sources.source_synthetic import (
    FAULTS,
    SyntheticOptions,
    SyntheticSource,
    fault_at,
    synthetic_picture,
)
from mgg_edge.runtime.sources.video import VideoSource
from videos import pictures, write_video


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What decoding processes would be asked for; none is started."""
    asked: list[dict] = []

    class Recorded(ClosingSource):
        def __init__(self, request: dict, name: str, options: LiveOptions | None) -> None:
            asked.append({**request, "name": name})

    monkeypatch.setattr(source_open, "LiveSource", Recorded)
    return asked


@pytest.mark.parametrize(
    ("text", "reader", "address", "setting"),
    [
        ("rtsp://10.0.0.7/live", "ffmpeg", "rtsp://10.0.0.7/live", ("rtsp_flags", "prefer_tcp")),
        ("RTSPS://camera/live", "ffmpeg", "RTSPS://camera/live", ("rtsp_flags", "prefer_tcp")),
        (
            "http://10.0.0.7:81/video",
            "ffmpeg",
            "http://10.0.0.7:81/video",
            ("protocol_whitelist", "http,https,httpproxy,tcp,tls,crypto"),
        ),
        ("https://[::1]/video", "ffmpeg", "https://[::1]/video", None),
        ("udp://239.0.0.1:1234", "ffmpeg", "udp://239.0.0.1:1234", ("flags", "low_delay")),
        ("udp://:1234", "ffmpeg", "udp://:1234", ("protocol_whitelist", "udp")),
        ("synthetic:live=1", "synthetic", "synthetic:live=1", None),
    ],
)
def test_streams(requests: list[dict], text: str, reader: str, address: str, setting: tuple[str, str] | None) -> None:
    open_source(text)
    (request,) = requests
    assert (request["reader"], request["address"]) == (reader, address)
    if setting:
        assert request["options"][setting[0]] == setting[1]


def test_a_playlist_from_the_network_can_never_name_a_file(requests: list[dict]) -> None:
    for scheme in ("rtsp", "rtsps", "http", "https", "udp"):
        open_source(f"{scheme}://camera:99/x")
    for request in requests:
        assert not {"file", "concat", "pipe", "data"} & set(request["options"]["protocol_whitelist"].split(","))


def test_cameras_by_number_path_and_settings(requests: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_char_device", lambda _: True)
    for text in ("0", "/dev/video2", "v4l2:///dev/video1?width=1280&height=720&fps=30&format=mjpeg"):
        open_source(text)
    assert [request["address"] for request in requests] == ["/dev/video0", "/dev/video2", "/dev/video1"]
    assert all(request["format"] == "v4l2" for request in requests)
    assert requests[2]["options"] == {"video_size": "1280x720", "framerate": "30", "input_format": "mjpeg"}


def test_a_pipeline_needs_opencv(requests: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = "nvarguscamerasrc ! video/x-raw(memory:NVMM) ! nvvidconv ! videoconvert ! appsink drop=1"
    monkeypatch.setattr(source_open.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="apt install python3-opencv"):
        open_source(pipeline)
    monkeypatch.setattr(source_open.importlib.util, "find_spec", lambda _: object())
    open_source(pipeline)
    assert requests[-1]["reader"] == "gstreamer"
    with pytest.raises(UsageError, match="ends in appsink"):
        open_source("videotestsrc ! autovideosink")


def test_files_objects_and_iterables(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mov", pictures(2))
    for text in (str(path), path, f"file://{path}"):
        with open_source(text) as source:
            assert isinstance(source, VideoSource)
    assert isinstance(open_source("synthetic:frames=3"), SyntheticSource)
    own = SyntheticSource()
    assert open_source(own) is own
    with open_source(pictures(3)) as source:
        assert isinstance(source, IteratorSource)
        assert (source.width, source.height, source.frames_expected) == (48, 32, 3)
        assert [frame.index for frame in source] == [0, 1, 2]
    assert isinstance(open_source("synthetic:"), FrameSource)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("", UsageError, "found an empty text"),
        ("a\0b", UsageError, "null byte"),
        ("absent.mp4", UsageError, "absent.mp4: no such video"),
        ("rtmp://camera/x", UsageError, "expected one of rtsp://.* found rtmp://"),
        ("gopher://u:secret@h/", UsageError, r"gopher://\*\*\*@h/"),
        ("rtsp://", UsageError, "expected an address with a host"),
        ("http:///x", UsageError, "expected an address with a host"),
        ("http://h:99999/", UsageError, "not an address"),
        ("http://[::1/", UsageError, "not an address"),
        ("udp://", UsageError, "expected an address with a host"),
        ("99", UsageError, "/dev/video99: no such camera; cameras here: "),
        ("/dev/video99", UsageError, "no such camera"),
        ("v4l2:///dev/video99", UsageError, "no such camera"),
        ("v4l2:///etc/passwd", UsageError, r"expected v4l2:///dev/videoN"),
        ("v4l2:///dev/../etc/x", UsageError, "expected v4l2:///dev/videoN"),
        ("v4l2:///dev/video0?zoom=2", UsageError, "expected the settings width, height, fps, format, found 'zoom'"),
        ("v4l2:///dev/video0?fps=many", UsageError, "fps: cannot be 'many'"),
        ("v4l2:///dev/video0?width=640", UsageError, "width and height come together"),
        ("synthetic:faults=fire", UsageError, "expected faults among .* found 'fire'"),
        ("synthetic:colour=red", UsageError, "expected one of frames.* found 'colour'"),
        ("synthetic:frames=many", UsageError, "frames: expected a number, found 'many'"),
        ("synthetic:width=0", UsageError, "expected width and height from 1"),
        ("synthetic:frames=-1", UsageError, "at least 0"),
    ],
)
def test_a_text_that_means_nothing_is_one_clear_line(text: str, kind: type[MggEdgeError], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        open_source(text)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_things_that_are_no_source() -> None:
    with pytest.raises(UsageError, match="found int"):
        open_source(3)
    with pytest.raises(SourceError, match="expected pictures, found none"):
        open_source([])
    with pytest.raises(UsageError, match="expected uint8"):
        open_source([np.zeros((4, 4), np.uint8)])


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        ("door=rtsp://camera/x", "door", "rtsp://camera/x"),
        ("rtsp://camera/x?a=b", None, "rtsp://camera/x?a=b"),
        ("v4l2src device=/dev/video0 ! appsink", None, "v4l2src device=/dev/video0 ! appsink"),
        ("gate=v4l2src device=/dev/video0 ! appsink", "gate", "v4l2src device=/dev/video0 ! appsink"),
        ("bikes.mp4", None, "bikes.mp4"),
        ("1=x", None, "1=x"),
    ],
)
def test_names(text: str, name: str | None, source: str) -> None:
    assert split_name(text) == (name, source)


@pytest.mark.parametrize("name", ["my cam", "1st", "a" * 33, ""])
@pytest.mark.parametrize("source", ["rtsp://host/1", "there.mp4"])
def test_what_is_no_name_is_said(name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.mp4").touch()
    with pytest.raises(UsageError, match=f"at most 32 letters, digits, .* found '{name}'"):
        split_name(f"{name}={source}")
    assert split_name("videotestsrc pattern=ball ! autovideosink")[0] is None


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a=b.mp4").touch()
    monkeypatch.chdir(tmp_path)
    assert split_name("a=b.mp4") == (None, "a=b.mp4")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtsp://u:secret@cam-7.local:554/x", "cam-7.local"),
        ("2", "camera2"),
        ("/dev/video3", "camera3"),
        ("v4l2:///dev/video1?fps=5", "camera1"),
        ("videos/my street.mp4", "my-street"),
        ("a ! appsink", "pipeline"),
        ("synthetic:frames=2", "synthetic"),
        ("http://[::1", "source5"),
        ("...", "source5"),
    ],
)
def test_suggested_names_are_short_and_hold_no_credentials(text: str, name: str) -> None:
    assert suggest_name(text, 5) == name


# --- the synthetic source


def test_synthetic_pictures_depend_on_seed_and_index_alone() -> None:
    first, again = (list(SyntheticSource.parse("synthetic:frames=30,faults=torn+noise,share=0.3")) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    others = list(SyntheticSource.parse("synthetic:frames=30,seed=1"))
    assert not any(np.array_equal(one.image, other.image) for one, other in zip(first, others, strict=True))
    assert len({frame.image.tobytes() for frame in others}) == 30


def test_each_fault_is_what_it_is_called() -> None:
    def fifth(fault: str) -> Frame:
        return list(SyntheticSource.parse(f"synthetic:frames=8,faults={fault},every=5"))[5]

    good = synthetic_picture(5, 48, 64)
    assert fifth("black").image.max() == 0
    assert fifth("white").image.min() == 255
    np.testing.assert_array_equal(fifth("frozen").image, synthetic_picture(4, 48, 64))
    torn = fifth("torn").image
    np.testing.assert_array_equal(torn[:28], good[:28])
    np.testing.assert_array_equal(torn[28:], synthetic_picture(0, 48, 64)[28:])
    assert fifth("noise").image.std() > 60
    assert fifth("shape").image.shape != (48, 64, 3)
    assert fifth("backwards").time_s < 0
    with pytest.raises(SourceError, match="disconnected"):
        fifth("disconnect")
    with pytest.raises(UsageError, match="needs live=1"):
        fifth("crash")


def test_faults_come_as_often_as_asked() -> None:
    options = SyntheticOptions(faults="+".join(FAULTS), share=0.2)
    faults = [fault_at(options, index) for index in range(5000)]
    assert 0.18 < sum(fault is not None for fault in faults) / 5000 < 0.22
    assert set(filter(None, faults)) == set(FAULTS)
    assert faults[0] is None
    every = SyntheticOptions(faults="black+white", every=3)
    assert [fault_at(every, index) for index in range(8)] == [None, None, None, "black", None, None, "white", None]


# --- waiting between attempts


def test_waits_double_up_to_the_limit_within_the_jitter() -> None:
    backoff = Backoff(first_s=0.5, limit_s=8, jitter=0.5, seed=0)
    waits = [backoff.next_s() for _ in range(3000)]
    for index, wait_s in enumerate(waits):
        top = min(8.0, 0.5 * 2 ** min(index, 60))
        assert top / 2 <= wait_s <= top
    assert len({round(wait_s, 6) for wait_s in waits[10:]}) > 100
    backoff.reset()
    assert backoff.next_s() <= 0.5


@pytest.mark.parametrize(
    "values", [{"first_s": 0}, {"first_s": 9, "limit_s": 1}, {"jitter": 1.5}, {"first_s": float("nan")}]
)
def test_impossible_waits_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="backoff"):
        Backoff(**values)


@pytest.mark.parametrize("values", [{"stall_timeout_s": 0}, {"open_timeout_s": float("nan")}, {"max_reconnects": -1}])
def test_impossible_patience_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        LiveOptions(**values)


def test_a_live_source_fits_the_protocol() -> None:
    assert {"name", "live", "__iter__", "losses", "interrupt", "close"} <= set(dir(LiveSource)) | {"name", "live"}
    assert isinstance(IteratorSource(pictures(1), rate=Fraction(5)), FrameSource)
