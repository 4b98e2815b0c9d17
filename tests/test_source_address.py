"""Credentials never leave the program: not in names, messages, logs or figures."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgg_edge.errors import MggEdgeError, UsageError
from mgg_edge.runtime.sources.source_address import redact, scheme_of
from mgg_edge.runtime.sources.source_live import LiveOptions
from mgg_edge.runtime.sources.source_open import open_source, suggest_name
from streams import RtspStream, free_port

SECRET = "s3cr3t"  # noqa: S105 - of nothing


@pytest.mark.parametrize(
    "text",
    [
        f"rtsp://admin:{SECRET}@10.0.0.7/stream",
        f"rtsp://{SECRET}@10.0.0.7/stream",
        f"rtsp://admin:p@ss/{SECRET}@10.0.0.7/stream",
        f"http://10.0.0.7/video.cgi?user=admin&pwd={SECRET}&size=640",
        f"http://10.0.0.7/video?loginpas={SECRET}",
        f"https://10.0.0.7/video?access_token={SECRET}",
        f"rtsp://10.0.0.7:554/user=admin_password={SECRET}_channel=1_stream=0.sdp",
        f"rtspsrc location=rtsp://10.0.0.7/x user-id={SECRET} user-pw={SECRET} ! appsink",
        f'rtspsrc location="rtsp://a:{SECRET}@10.0.0.7/x" ! appsink',
        f"[Errno 5] Input/output error: 'rtsp://admin:{SECRET}@10.0.0.7/'",
        f"two: rtsp://a:{SECRET}@h/ and http://b:{SECRET}@h/",
    ],
)
def test_credentials_are_replaced_and_the_host_stays(text: str) -> None:
    shown = redact(text)
    assert SECRET not in shown
    assert "***" in shown
    assert "10.0.0.7" in shown or "two:" in shown


@pytest.mark.parametrize(
    "text", ["bikes.mp4", "rtsp://10.0.0.7:554/stream?channel=1", "a@b", "/dev/video0", "monkey=1"]
)
def test_what_holds_no_credentials_is_left_alone(text: str) -> None:
    assert redact(text) == text


# What is not escaped in an address ends at white space and quotes.
password = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="'\""), min_size=6)


@given(password, st.sampled_from(["rtsp", "http", "https", "rtsps", "custom+1"]))
def test_no_password_survives(word: str, scheme: str) -> None:
    assert f"{word}@" not in redact(f"cannot open {scheme}://user:{word}@camera.local/x: refused")


def test_scheme() -> None:
    assert scheme_of("RTSP://x") == "rtsp"
    assert scheme_of("C:/x") is None
    assert scheme_of("x/rtsp://y") is None


def test_a_failing_camera_is_named_without_its_password(caplog: pytest.LogCaptureFixture) -> None:
    address = f"rtsp://admin:{SECRET}@127.0.0.1:{free_port()}/live?token={SECRET}"
    with pytest.raises(MggEdgeError) as caught:
        open_source(address, LiveOptions(open_timeout_s=10))
    chain: BaseException | None = caught.value
    assert "***@127.0.0.1" in str(chain)
    while chain is not None:
        assert SECRET not in str(chain)
        chain = chain.__cause__
    assert SECRET not in caplog.text


def test_a_running_camera_has_no_password_anywhere_but_in_its_request(caplog: pytest.LogCaptureFixture) -> None:
    with RtspStream(authorization="Basic YWRtaW46c2VjcmV0") as camera:  # admin:secret
        address = camera.address.replace("//", "//admin:secret@")
        with open_source(address, LiveOptions(open_timeout_s=20)) as source:
            assert "secret" not in source.name
            assert "secret" not in suggest_name(address, 0)
            command = Path(f"/proc/{source.process_id}/cmdline").read_bytes()
            environment = Path(f"/proc/{source.process_id}/environ").read_bytes()
            assert b"secret" not in command + environment
            frames = iter(source)
            next(frames)
            camera.cut()
            camera.close()
            source._options = LiveOptions(open_timeout_s=1, max_reconnects=1)
            with pytest.raises(MggEdgeError) as caught:
                deque(frames)
    assert "secret" not in str(caught.value)
    assert "connection lost" in caplog.text
    assert "secret" not in caplog.text


def test_control_the_unredacted_text_would_be_found() -> None:
    address = f"rtsp://admin:{SECRET}@127.0.0.1/live"
    assert SECRET in address
    assert SECRET not in redact(address)


@pytest.mark.parametrize(
    "text",
    [
        "rtsp://admin:hunter2/rd@127.0.0.1/cam1", "rtsp://admin:hunter2#x@127.0.0.1/cam1",
        "rtsp://admin:hunter2?x@127.0.0.1/cam1", "rtsp://admin:hunter2 x@127.0.0.1/cam1",
        "rtsp://hunter2:9/x@127.0.0.1/cam1", "rtsp://admin:p@hunter2:w/rd@127.0.0.1/cam1",
        "admin:hunter2@127.0.0.1/cam1", "rtsp://admin:hunter2", "http://admin:hunter2]@127.0.0.1/",
    ],
)  # fmt: skip
def test_nothing_of_a_malformed_password_is_ever_shown(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        open_source(text)
    assert "hunter2" not in str(refused.value)
    assert "percent-encoded" in str(refused.value) or "begins with its scheme" in str(refused.value)
