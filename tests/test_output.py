"""Standard output that is closed, full, read by nobody, or cannot show a letter; labels that a terminal would obey."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

import toy
from mgg_edge.cli.main import main
from mgg_edge.cli.output import stoppable
from mgg_edge.cli.stop_request import asked_to_end
from mgg_edge.errors import printable
from mgg_edge.runtime.store.state_file import cameras_in
from videos import pictures, write_video

MAIN = [sys.executable, "-c", "import sys; from mgg_edge.cli.main import main; main(sys.argv[1:])"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mov", pictures(6))


def commands(bundle, clip):
    run = ["run", "--bundle", bundle, "--source", clip]
    return [["inspect", bundle], ["doctor"], run, [*run, "--json"], ["--help"], ["--version"], ["engines", "list"]]


def call(words, redirect, **environment):
    """Exit code and standard error of a command whose output a shell redirects."""
    script = f'"$@" {redirect}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *MAIN, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize(("redirect", "reason"), [(">&-", "it is closed"), (">/dev/full", "No space left on device")])
def test_an_output_that_cannot_be_written_is_one_line_and_code_1(toy_bundle, clip, number, redirect, reason):
    done = call(commands(toy_bundle, clip)[number], redirect)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: standard output: cannot write: {reason}"


def test_a_run_that_nobody_reads_ends_when_it_is_asked_to(toy_bundle, tmp_path):
    words = ["run", "--bundle", toy_bundle, "--source", "demo", "--json", "--state", tmp_path]
    with subprocess.Popen([*MAIN, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        held, before = 0, -1
        while held == 0 or held != before:  # until the pipe is full
            before, held = held, int.from_bytes(fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4)), sys.byteorder)
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1
        last = process.stderr.read().decode().splitlines()[-1]
    assert last == "error: standard output: nobody reads it, and the run was asked to end; lines are missing"
    assert cameras_in(tmp_path) == ["demo"]  # what was learned is kept


def test_long_lines_reach_a_slow_reader_whole():
    read, write = os.pipe()
    text = "".join(f"{number} é\n" for number in range(40_000))
    with os.fdopen(write, "w", encoding="utf-8") as stream:
        writer = threading.Thread(target=stoppable(stream, lambda: False).write, args=(text,))
        writer.start()
        got = b""
        while len(got) < len(text.encode()):
            got += os.read(read, 5000)
        writer.join()
    os.close(read)
    assert got.decode() == text


@pytest.mark.parametrize("number", range(7))
def test_a_reader_that_has_gone_is_no_error(toy_bundle, clip, number):
    done = call(commands(toy_bundle, clip)[number], "| true; exit ${PIPESTATUS[0]}")
    assert done.returncode == 0


def test_nothing_is_lost_after_a_whole_run(toy_bundle, clip, tmp_path):
    done = call(["run", "--bundle", toy_bundle, "--source", clip, "--save", tmp_path / "out.mp4"], ">/dev/full")
    assert done.returncode == 1
    assert (tmp_path / "out.mp4").stat().st_size > 0


def test_both_outputs_closed(toy_bundle):
    assert call(["inspect", toy_bundle], ">&- 2>&-").returncode == 1
    assert call(["inspect", "absent.mgg"], ">&- 2>&-").returncode == 2


def test_a_locale_that_cannot_show_a_letter(tmp_path, clip):
    bundle = tmp_path / "x.mgg"
    parts = toy.parts()
    parts.manifest["labels"] = ["Größe", "日本", "a", "b"]
    bundle.write_bytes(toy.pack(parts))
    eight_bits = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in (["run", "--bundle", bundle, "--source", clip], ["inspect", bundle]):
        done = call(words, "", **eight_bits)
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()


def test_a_name_that_is_not_utf_8(toy_bundle, clip, tmp_path):
    odd = os.fsencode(tmp_path) + b"/clip\xff.mov"
    os.link(clip, odd)
    words = [os.fsencode(str(word)) for word in (*MAIN, "run", "--bundle", toy_bundle, "--source")]
    done = subprocess.run([*words, odd], capture_output=True, timeout=120)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def test_labels_do_not_command_a_terminal(tmp_path, clip):
    parts = toy.parts()
    parts.manifest["labels"] = [f"\x1b[31m{name}\x07" for name in "abcd"]
    (tmp_path / "x.mgg").write_bytes(toy.pack(parts))
    done = call(["run", "--bundle", tmp_path / "x.mgg", "--source", clip], "")
    assert done.returncode == 0
    assert not any(letter in done.stdout + done.stderr for letter in "\x1b\x07")
    assert printable("a\x1b[0mb\n") == "a\N{REPLACEMENT CHARACTER}[0mb\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_hang_up_ends_a_run_as_a_termination_does(toy_bundle, tmp_path, number):
    words = ["run", "--bundle", toy_bundle, "--source", "synthetic:frames=1000000", "--json"]
    process = subprocess.Popen(
        [*MAIN, *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        # These tests may run under nohup, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert rest.splitlines()[-1].startswith('{"summary"')


def test_under_nohup_a_hang_up_is_ignored(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda _number: signal.SIG_IGN)
    assert signal.SIGHUP not in asked_to_end(reloads=False)
    monkeypatch.setattr(signal, "getsignal", lambda _number: signal.SIG_DFL)
    assert set(asked_to_end(reloads=True)) == {signal.SIGINT, signal.SIGTERM}
    assert set(asked_to_end(reloads=False)) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def test_names_that_occur_twice_stay_apart(tmp_path, clip):
    parts = toy.parts()
    parts.manifest["labels"] = ["crane"] * 4
    (tmp_path / "x.mgg").write_bytes(toy.pack(parts))
    images = list(toy.frames(40, seed=3))
    long = write_video(tmp_path / "long.mov", images)
    done = call(["run", "--bundle", tmp_path / "x.mgg", "--source", long, "--adapt", "off"], "")
    assert "crane #" in done.stdout


def test_an_empty_state_directory_is_said(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        main(["state", "show", str(tmp_path)])
    assert ended.value.code == 0
    assert "no camera has learned anything yet" in capfd.readouterr().err
