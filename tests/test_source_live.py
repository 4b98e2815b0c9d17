"""Cameras and streams that hang, break, die and come back. Every decoder here is a real process."""

from __future__ import annotations

import contextlib
import functools
import http.server
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mgg_edge.errors import SourceError, UsageError
from mgg_edge.runtime.sources import decoder, source_live
from mgg_edge.runtime.sources.decoder import Decoder, EndedError
from mgg_edge.runtime.sources.decoder_link import MAX_MESSAGE_BYTES, PixelMemory, pack_message, take_message
from mgg_edge.runtime.sources.source import Frame
from mgg_edge.runtime.sources.source_backoff import Backoff
from mgg_edge.runtime.sources.source_live import LiveOptions, LiveSource
from mgg_edge.runtime.sources.source_open import open_source
from mgg_edge.runtime.sources.source_synthetic import synthetic_picture
from streams import HttpStream, RtspStream, UdpStream, free_port, mean_difference
from videos import pictures, write_video

QUICK = LiveOptions(open_timeout_s=20, stall_timeout_s=1.0, backoff=Backoff(first_s=0.1, limit_s=0.5))


def synthetic(text: str, options: LiveOptions = QUICK) -> LiveSource:
    return LiveSource({"reader": "synthetic", "address": f"synthetic:{text}"}, "camera", options)


def children() -> list[int]:
    """Process ids of this process's children, zombies included."""
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(number) for path in found for number in path.read_text().split()]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = set(children())
    yield
    assert set(children()) <= before, "a decoding process was left behind"


@contextlib.contextmanager
def served_files(folder: Path) -> Iterator[str]:
    """A web server of the files in a folder; its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


# --- pictures


def test_pictures_arrive_bit_exact_with_the_time_they_were_made() -> None:
    with synthetic("frames=0,seed=4") as source:
        assert (source.width, source.height, source.live, source.rate) == (64, 48, True, 30)
        frames: list[Frame] = []
        for frame in source:
            frames.append(frame)
            if len(frames) == 20:
                break
    for index, frame in enumerate(frames):
        assert frame.index == index
        np.testing.assert_array_equal(frame.image, synthetic_picture(index, 48, 64, 4))
        assert 0 <= time.monotonic() - frame.captured_s < 30
    assert (np.diff([frame.time_s for frame in frames]) >= 0).all()


def test_a_picture_kept_is_never_written_to_by_the_next() -> None:
    with synthetic("frames=0") as source:
        frames = iter(source)
        kept = next(frames)
        before = kept.image.copy()
        for _ in range(10):
            next(frames)
        np.testing.assert_array_equal(kept.image, before)


# --- a decoder that hangs


def gap_of_a_hang(options: LiveOptions) -> float:
    """Seconds from the last picture before a hang to the decoding process that replaces it."""
    with synthetic("frames=0,faults=hang,every=5", options) as source:
        started: list[float] = []
        connect = source._connect

        def timed() -> object:
            started.append(time.monotonic())
            return connect()

        source._connect = timed
        last_s = 0.0
        for frame in source:
            if frame.index == 5:  # the first picture of the next process
                break
            last_s = time.monotonic()
        assert source.stats.kills == 1
        return started[0] - last_s


def test_a_hung_decoder_is_killed_and_replaced_within_the_timeout_and_a_second() -> None:
    for timeout_s in (0.5, 1.5):
        gap_s = gap_of_a_hang(LiveOptions(open_timeout_s=20, stall_timeout_s=timeout_s))
        assert timeout_s <= gap_s <= timeout_s + 1


def test_control_without_the_watchdog_nothing_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    poll = decoder.select.poll

    class Patient:
        """As `select.poll`, and deaf to timeouts of a picture."""

        def __init__(self) -> None:
            self._poll = poll()

        def register(self, *words: object) -> None:
            self._poll.register(*words)

        def poll(self, _: float) -> list[object]:
            return self._poll.poll()

    monkeypatch.setattr(decoder.select, "poll", Patient)
    with synthetic("frames=0,faults=hang,every=5", LiveOptions(open_timeout_s=20, stall_timeout_s=0.3)) as source:
        seen: list[Frame] = []
        thread = threading.Thread(target=lambda: seen.extend(source))
        thread.start()
        thread.join(2.5)
        assert thread.is_alive()
        assert source.stats.kills == 0
        source.interrupt()
        thread.join(10)
        assert not thread.is_alive()
    assert len(seen) == 5


def test_a_slow_reader_is_no_hung_decoder() -> None:
    with synthetic("frames=0", LiveOptions(open_timeout_s=20, stall_timeout_s=0.3)) as source:
        frames = iter(source)
        for _ in range(3):
            next(frames)
            time.sleep(0.6)
        next(frames)
        assert source.stats.kills == 0


# --- a decoder that breaks or dies


def test_fifty_disconnects_leave_no_zombie_and_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_live, "MIN_LIFETIME_S", 0.0)
    with synthetic("frames=0,faults=disconnect,every=2") as source:
        counts = []
        for _ in source:
            if source.stats.disconnects in (10, 50):
                counts.append((source.stats.disconnects, descriptors(), len(children()), threading.active_count()))
            if source.stats.disconnects >= 50:
                break
        assert source.stats.reconnects == source.stats.disconnects
        assert source.stats.connected
    assert len({row[1:] for row in counts}) == 1, counts


def test_a_crash_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    with synthetic("frames=0,faults=crash,every=5") as source:
        for _ in source:
            if source.stats.reconnects == 2:
                break
    assert f"ended by signal {signal.SIGSEGV}" in caplog.text


def test_a_source_lost_for_good_ends_with_an_error() -> None:
    options = LiveOptions(open_timeout_s=0.5, max_reconnects=2, backoff=Backoff(first_s=0.05))
    with HttpStream() as stream, open_source(stream.address, LiveOptions(open_timeout_s=20)) as source:
        source._options = options
        frames = iter(source)
        next(frames)
        stream.cut()
        with pytest.raises(SourceError, match="lost after 2 attempts to reconnect"):
            list(frames)


def test_no_reconnection_at_all_may_be_asked_for() -> None:
    options = LiveOptions(open_timeout_s=20, max_reconnects=0)
    with synthetic("frames=0,faults=disconnect,every=3", options) as source:
        with pytest.raises(SourceError, match="connection lost: synthetic: disconnected"):
            list(source)
        assert source.stats.reconnects == 0


def test_the_decoding_process_dies_with_its_parent() -> None:
    code = (
        "import sys, time\n"
        "from mgg_edge.runtime.sources.source_live import LiveSource\n"
        "source = LiveSource({'reader': 'synthetic', 'address': 'synthetic:faults=hang,every=2'}, 'x')\n"
        "print(source.process_id, flush=True)\n"
        "list(source)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    parent.kill()
    parent.communicate(timeout=10)
    end_s = time.monotonic() + 5
    while Path(f"/proc/{child}/statm").exists() and Path(f"/proc/{child}/statm").read_text().split()[0] != "0":
        assert time.monotonic() < end_s, "the decoding process outlived its parent"
        time.sleep(0.05)


def test_the_end_of_a_group_is_the_parent_s_to_decide() -> None:
    with synthetic("frames=0,paced=1") as source:
        frames = iter(source)
        next(frames)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(source.process_id, number)
        for _ in range(20):
            next(frames)
        assert source.stats.disconnects == 0


def test_a_source_outlives_the_thread_that_opened_it() -> None:
    opened: list[LiveSource] = []
    thread = threading.Thread(target=lambda: opened.append(synthetic("frames=0,paced=1,rate=50")))
    thread.start()
    thread.join()
    with opened[0] as source:
        time.sleep(0.5)  # for a signal to come
        for frame in source:
            if frame.index == 30:
                break
        assert (source.stats.disconnects, source.stats.reconnects) == (0, 0)


def test_a_forked_child_starts_decoding_processes_of_its_own() -> None:
    with synthetic("frames=0") as source:
        next(iter(source))
    child = os.fork()
    if child == 0:
        seen = 0
        try:
            with synthetic("frames=0") as source:
                seen = len(list(itertools.islice(source, 3)))
        finally:
            os._exit(seen)
    deadline_s = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline_s:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    assert os.waitstatus_to_exitcode(ended[1]) == 3


def test_an_interruption_ends_the_iteration_at_once_from_another_thread() -> None:
    with synthetic("frames=0,faults=hang,every=3", LiveOptions(open_timeout_s=20, stall_timeout_s=60)) as source:
        threading.Timer(0.5, source.interrupt).start()
        start_s = time.monotonic()
        assert len(list(source)) == 3
        assert time.monotonic() - start_s < 3


# --- real streams


@pytest.mark.parametrize("kind", ["mpegts", "mjpeg"])
@pytest.mark.parametrize("mood", ["refuse", "hang"])
def test_an_http_stream_cut_and_restored(kind: str, mood: str) -> None:
    with HttpStream(kind) as stream, open_source(stream.address, QUICK) as source:
        threading.Timer(0.5, stream.cut, (mood,)).start()
        threading.Timer(2.0, stream.restore).start()
        frame, after = next(frames := iter(source)), 0
        while after < 5:
            frame = next(frames)
            after += source.stats.reconnects > 0
    assert source.stats.disconnects == source.stats.reconnects == 1
    assert source.stats.kills == (mood == "hang")
    assert frame.time_s > 2
    assert (
        min(mean_difference(frame.image, image) for image in pictures(20, 48, 64)) < 25
    )  # of about 60 between two of them


def test_an_rtsp_stream_cut_and_restored() -> None:
    with RtspStream() as stream, open_source(stream.address, QUICK) as source:
        assert (source.width, source.height) == (64, 48)
        threading.Timer(0.5, stream.cut).start()
        after = 0
        for _ in source:
            after += source.stats.reconnects > 0
            if after == 5:
                break
    assert source.stats.reconnects == 1
    assert stream.asked.count("PLAY") == 2


def test_an_rtsp_camera_that_can_only_do_datagrams() -> None:
    with RtspStream(datagrams=True) as stream, open_source(stream.address, QUICK) as source:
        assert (source.width, source.height) == (64, 48)
        assert len(list(itertools.islice(source, 10))) == 10
    assert stream.asked.count("SETUP") == 2


def test_a_picture_at_an_address_is_asked_for_again_and_again(tmp_path: Path) -> None:
    address, (first, second) = tmp_path / "snapshot.jpg", pictures(2, 48, 64)
    Image.fromarray(first).save(address)
    with served_files(tmp_path) as base, open_source(f"{base}/snapshot.jpg#every=0.2", QUICK) as source:
        assert source.live
        assert source.rate == 5
        frames = iter(source)
        shown = [next(frames) for _ in range(4)]
        assert shown[3].time_s - shown[0].time_s >= 0.5
        assert all(mean_difference(frame.image, first) < 25 for frame in shown)
        replacement = tmp_path / "new.jpg"
        Image.fromarray(second).save(replacement)
        replacement.replace(address)
        assert any(mean_difference(frame.image, second) < 25 for frame in itertools.islice(frames, 10))
        address.unlink()
        threading.Timer(1.5, Image.fromarray(first).save, (address,)).start()
        assert next(frame for frame in frames if source.stats.reconnects)
    with pytest.raises(UsageError, match=r"every: expected at least 0\.05 seconds, found 0"):
        open_source("http://127.0.0.1/snapshot.jpg#every=0")


def test_a_named_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    pipe, data = tmp_path / "pipe", write_video(tmp_path / "x.ts", pictures(40), codec="mpeg4").read_bytes()
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    with open_source(str(pipe), QUICK) as source:
        assert not source.live
        assert len(list(source)) == 40
    writer.join()


def test_standard_input_is_read_to_its_end(tmp_path: Path) -> None:
    code = "from mgg_edge.runtime.sources.source_open import open_source\n"
    code += "with open_source('-') as source: print(source.name, len(list(source)))"
    path = write_video(tmp_path / "x.ts", pictures(40), codec="mpeg4")
    words = [sys.executable, "-c", code]
    piped = subprocess.run(words, input=path.read_bytes(), capture_output=True, check=True, timeout=60)
    with path.open("rb") as file:
        redirected = subprocess.run(words, stdin=file, capture_output=True, check=True, timeout=60)
    assert piped.stdout == redirected.stdout == b"standard input 40\n"


def test_a_terminal_is_no_video(monkeypatch: pytest.MonkeyPatch) -> None:
    main_end, terminal = os.openpty()
    with os.fdopen(terminal) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(UsageError, match="expected a video on standard input, found a terminal"):
            open_source("-")
    os.close(main_end)


def test_a_silent_udp_sender_is_waited_for_again_and_again() -> None:
    port = free_port()
    sender = UdpStream(port)
    with open_source(f"udp://127.0.0.1:{port}", QUICK) as source:
        frames = iter(source)
        next(frames)
        sender.paused = True
        threading.Timer(2.5, setattr, (sender, "paused", False)).start()
        for _ in frames:
            if source.stats.reconnects:
                break
        assert source.stats.kills >= 1
    sender.close()


def test_the_picture_size_may_change_with_a_reconnection() -> None:
    with HttpStream("mjpeg") as stream, open_source(stream.address, QUICK) as source:
        sizes = set()
        for frame in source:
            sizes.add(frame.image.shape)
            if frame.index == 3:
                stream.size = (240, 320)
                stream.cut("refuse")
                stream.restore()
            if len(sizes) == 2 and frame.index > 8:
                break
    assert sizes == {(48, 64, 3), (240, 320, 3)}


def test_a_recording_at_an_address_ends_and_is_not_played_again(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", pictures(40), codec="mpeg4", movflags="faststart")
    with served_files(tmp_path) as base, open_source(f"{base}/clip.mp4", QUICK) as source:
        assert len(list(source)) == 40
        assert source.stats.disconnects == 0


@pytest.mark.parametrize("cut", [False, True])
def test_an_answer_without_a_length_ends_where_the_file_does(tmp_path: Path, cut: bool) -> None:
    """FFmpeg takes that end for an error, with two pictures still in its decoder."""
    whole = write_video(tmp_path / "clip.mp4", pictures(40), codec="libx264", movflags="faststart").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "video/mp4")
            self.end_headers()
            self.wfile.write(whole[: len(whole) * 2 // 3] if cut else whole)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with open_source(f"http://127.0.0.1:{server.server_address[1]}/clip.mp4", QUICK) as source:
            if cut:
                with pytest.raises(SourceError, match="reading failed"):
                    list(source)
            else:
                assert len(list(source)) == 40
        server.shutdown()


def test_a_playlist_from_the_network_reads_no_file_of_this_machine(tmp_path: Path) -> None:
    import http.server

    local = write_video(tmp_path / "local.ts", pictures(10), codec="mpeg4")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{local}\n#EXT-X-ENDLIST\n".encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.apple.mpegurl")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(SourceError):
            open_source(f"http://127.0.0.1:{server.server_address[1]}/live.m3u8", LiveOptions(open_timeout_s=5))
        server.shutdown()


@pytest.mark.parametrize("mood", ["refuse", "hang"])
def test_a_first_connection_that_fails_is_told_at_once(mood: str) -> None:
    with HttpStream() as stream:
        stream.cut(mood)
        start_s = time.monotonic()
        with pytest.raises(SourceError, match=r"127.0.0.1.*(cannot open|no picture within 2 s)"):
            open_source(stream.address, LiveOptions(open_timeout_s=2))
        assert time.monotonic() - start_s < 4


# --- a decoding process that lies


def test_messages_come_whole_or_not_at_all() -> None:
    data = pack_message({"kind": "end"}) + pack_message({"kind": "frame"})
    received, found = bytearray(), []
    for byte in data:
        received.append(byte)
        if message := take_message(received):
            found.append(message["kind"])
    assert found == ["end", "frame"]
    assert not received


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", b"\x02\0\0\0{]", b"\x02\0\0\0[]", (MAX_MESSAGE_BYTES + 1).to_bytes(4, "little")]
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(SourceError, match="decoder: expected"):
        take_message(bytearray(data))


@pytest.mark.parametrize(
    ("offset", "height", "width"),
    [(0, 48, 65), (-1, 48, 64), (1, 48, 64), (0, 0, 64), (0, -48, -64), (1 << 62, 1, 1), (0, 1 << 40, 1)],
)
def test_a_place_outside_the_memory_is_refused(offset: int, height: int, width: int) -> None:
    memory = PixelMemory()
    memory.reserve(48 * 64 * 3)
    with pytest.raises(SourceError, match="not within the shared memory"):
        memory.read(offset, height, width)
    assert memory.read(0, 48, 64).shape == (48, 64, 3)
    memory.close()
    memory.close()


def test_the_memory_cannot_be_cut_off_under_its_reader() -> None:
    memory = PixelMemory()
    memory.reserve(4096)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(memory.handle, 0)
    memory.close()


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "frame"},
        {"kind": "frame", "offset": 0, "height": 1, "width": 1, "time_s": None, "captured_s": float("nan")},
        {"kind": "frame", "offset": "x", "height": 1, "width": 1, "time_s": None, "captured_s": 1.0},
        {"kind": "frame", "offset": 1e400, "height": 1, "width": 1, "time_s": 0, "captured_s": 1.0},
        {"no kind": 1},
    ],
)
def test_a_picture_that_is_none_is_refused(message: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Decoder({"reader": "synthetic", "address": "synthetic:faults=hang,every=1"})
    try:
        opened._received[:] = pack_message(message)
        with pytest.raises(SourceError, match="decoder"):
            opened.picture(1)
    finally:
        opened.close()
        opened.close()


def test_the_patience_with_a_source_begins_when_its_process_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    start = decoder._start

    def slow(memory: int) -> subprocess.Popen[bytes]:
        process = start(memory)
        process.send_signal(signal.SIGSTOP)  # as on a machine where twenty start at once
        threading.Timer(2.0, process.send_signal, (signal.SIGCONT,)).start()
        return process

    monkeypatch.setattr(decoder, "_start", slow)
    with synthetic("frames=0", LiveOptions(open_timeout_s=1.5, stall_timeout_s=5)) as source:
        assert next(iter(source)).index == 0


def test_a_process_that_never_starts_is_given_up() -> None:
    opened = Decoder({"reader": "synthetic", "address": "synthetic:frames=1"})
    os.kill(opened.process_id, signal.SIGSTOP)
    with pytest.raises(SourceError, match=r"no process within 0\.2 s"):
        opened.started(0.2)
    opened.close()


def test_a_decoder_says_when_there_is_no_more_and_when_it_is_closed() -> None:
    opened = Decoder({"reader": "synthetic", "address": "synthetic:frames=1"})
    opened.started()
    assert opened.opened(20).rate == 30
    opened.picture(5)
    with pytest.raises(EndedError):
        opened.picture(5)
    opened.close()
    with pytest.raises(SourceError, match="closed"):
        opened.picture(0.2)


def served(folder: Path) -> Iterator[str]:
    """The address of a web server that has a folder's files."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["film.mp4", "stream.mkv"])
def test_a_recording_at_a_web_address_is_read_as_the_file_is(tmp_path: Path, name: str) -> None:
    """An MKV that was streamed states no duration; the answer that holds it states its length."""
    options = {"live": "1"} if name.endswith("mkv") else {"movflags": "+faststart"}
    with av.open(str(tmp_path / name), "w", options=options) as film:
        stream = film.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in pictures(40, 48, 64):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        film.mux(stream.encode())
    with open_source(tmp_path / name) as source:
        expected = [frame.time_s for frame in source]
    for address in served(tmp_path):
        with open_source(f"{address}/{name}") as source:
            assert not source.live
            found = []
            for frame in source:
                found.append(frame.time_s)
                time.sleep(0.002)  # a reader that is slower than the network loses nothing
    assert found == pytest.approx(expected, abs=2e-3)
    assert len(found) == 40
