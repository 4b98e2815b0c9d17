"""The command line: what goes to which stream, and with which exit code it ends."""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command

import mgg_edge
from mgg_edge.cli import main as cli
from mgg_edge.cli.bundle_name import bundle_file
from mgg_edge.runtime import Adapter
from mgg_edge.runtime.outputs.sinks_lines import COLUMNS
from streams import HttpStream, free_port
from videos import pictures, read_pictures, write_video

FRAME_FIELDS = ["source", *COLUMNS, "age_ms"]
PROGRAM = "from mgg_edge.cli.main import main; main()"
WITHOUT_TORCH = "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'timm', 'onnx')));"

Call = Callable[..., SimpleNamespace]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in this process: `call("run", …)` gives `code`, `out` and `err`."""

    def run(*arguments: object) -> SimpleNamespace:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=out, err=err)

    return run


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 12 different pictures."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mov", pictures(12))


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video that takes some seconds."""
    images = pictures(20, 120, 160) * 100
    return write_video(tmp_path_factory.mktemp("clip") / "long.mp4", images, codec="mpeg4")


def start(*arguments: object, program: str = PROGRAM) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def error_line(err: str) -> str:
    """The one line of an error, after whatever was said before."""
    *before, last = err.splitlines()
    assert last.startswith("error: ")
    assert not any(line.startswith(("error: ", "Traceback")) for line in before)
    return last


# --- help


def commands(group: Any, *words: str) -> Iterator[Any]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *words, name)
        else:
            yield pytest.param((*words, name), command, id=" ".join((*words, name)))


@pytest.mark.parametrize(("words", "command"), list(commands(get_command(cli.app))))
def test_help_cuts_no_word_on_a_narrow_terminal(
    call: Call, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], command: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = call(*words, "--help").out
    said = [option.help or "" for option in command.params]
    assert shown.count("…") == sum(text.count("…") for text in (command.help or "", command.epilog or "", *said))


def test_help_and_version(call: Call) -> None:
    listing = call("--help")
    assert listing.code == 0
    for command in ("export", "run", "inspect", "doctor"):
        assert command in listing.out
        described = call(command, "--help")
        assert described.code == 0
        assert "Example" in described.out
        assert f"mgg-edge {command}" in described.out
    assert call("--version").out.strip() == f"mgg-edge {mgg_edge.__version__}"


def test_help_works_without_torch_and_export_says_what_to_install() -> None:
    for arguments in (["--help"], ["export", "--help"], ["run", "--help"]):
        process = start(*arguments, program=WITHOUT_TORCH + PROGRAM)
        assert process.wait(30) == 0, process.stderr.read()
        process.communicate()
    process = start("export", "--backbone", "x", "--out", "x.mgg", program=WITHOUT_TORCH + PROGRAM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert "pip install 'mgg-edge[export]'" in error_line(err)
    assert not out


def test_the_installed_program_is_this_one() -> None:
    program = shutil.which("mgg-edge", path=str(Path(sys.executable).parent))
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"mgg-edge {mgg_edge.__version__}"


# --- run


def test_json_lines_are_all_there_is_on_standard_output(call: Call, toy_bundle: Path, clip: Path) -> None:
    done = call("run", "--bundle", toy_bundle, "--source", clip, "--json", "--threads", 1)
    assert done.code == 0
    *frames, last = map(json.loads, done.out.splitlines())
    assert [list(frame) for frame in frames] == [FRAME_FIELDS] * 12
    assert [frame["frame"] for frame in frames] == list(range(12))
    assert [frame["step"] for frame in frames] == [0] * 4 + [1] * 4 + [2] * 4
    assert [frame["adapted"] for frame in frames] == [False] * 4 + [True] * 8
    assert list(last) == ["summary"]
    assert last["summary"]["frames_read"] == last["summary"]["frames_inferred"] == 12
    assert last["summary"]["adapt_steps"] == 3
    (note,) = done.err.splitlines()
    assert "knows no site" in note


def test_off_and_limit(call: Call, toy_bundle: Path, clip: Path) -> None:
    done = call("run", "--bundle", toy_bundle, "--source", clip, "--json", "--adapt", "off", "--limit", 7)
    *frames, last = map(json.loads, done.out.splitlines())
    assert len(frames) == 7
    assert not any(frame["adapted"] for frame in frames)
    assert last["summary"]["adapt_steps"] == 0
    assert last["summary"]["adapt_ms"] == {"p50": None, "p95": None, "p99": None}


def test_people_get_a_summary_and_the_saved_video(call: Call, toy_bundle: Path, clip: Path, tmp_path: Path) -> None:
    done = call("run", "--bundle", toy_bundle, "--source", clip, "--save", tmp_path / "out.mp4")
    assert done.code == 0
    facts = dict(line.split(maxsplit=1) for line in done.out.splitlines() if line)
    assert facts["frames"].startswith("12 in ")
    assert facts["adaptation"].startswith("3 steps; ")
    assert facts["saved"] == str(tmp_path / "out.mp4")
    assert "encoder" in done.err
    assert len(read_pictures(tmp_path / "out.mp4")) == 12


def test_without_a_bundle_the_default_one_is_used_and_named(
    call: Call, toy_bundle: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgg_edge.runtime.outputs import http_page  # noqa: F401 - reads its own file when it is first imported

    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    refused = call("run", "--source", clip)
    assert refused.code == 2
    assert "holds no 'default.mgg'; name a file" in error_line(refused.err)
    shutil.copy(toy_bundle, tmp_path / "default.mgg")
    done = call("run", "--source", clip, "--json")
    assert done.code == 0
    assert len(done.out.splitlines()) == 13
    assert "default bundle" in done.err


@pytest.mark.parametrize("words", [("inspect", "default"), ("doctor", "--bundle", "default")])
def test_the_package_s_bundle_has_a_name(call: Call, words: tuple[str, ...]) -> None:
    done = call(*words, "--json")
    assert done.code == 0
    assert json.loads(done.out)


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle_file("default").name == "default.mgg"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "default").touch()
    assert bundle_file("default") == Path("default")


def test_more_than_one_label_a_line(call: Call, toy_bundle: Path, clip: Path) -> None:
    done = call("run", "--bundle", toy_bundle, "--source", clip, "--json", "--top", 3)
    first = json.loads(done.out.splitlines()[0])
    assert [len(entry) for entry in first["top"]] == [3, 3, 3]
    assert first["top"][0][:2] == [first["label"], first["index"]]


def damaged(source: Path, target: Path) -> Path:
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--bundle {bundle} --source absent.mp4", 2, "absent.mp4: no such video"),
        ("--bundle {bundle} --source {text}", 1, "not a readable video"),
        ("--bundle absent.mgg --source {clip}", 2, "absent.mgg: no such bundle"),
        ("--bundle {damaged} --source {clip}", 1, "damaged or altered"),
        ("--bundle {text} --source {clip}", 1, "another kind of file"),
        ("--bundle {bundle} --source {clip} --save /absent/out.mp4", 1, "cannot write here"),
        ("--bundle {bundle} --source {clip} --save out.gif", 2, "expected a video file ending in"),
        ("--bundle {bundle} --source {clip} --save {clip}", 2, "would overwrite the source"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    call: Call,
    toy_bundle: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    code: int,
    said: str,
) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video\n")
    broken, before = damaged(toy_bundle, tmp_path / "damaged.mgg"), clip.read_bytes()
    monkeypatch.chdir(tmp_path)
    arguments = words.format(bundle=toy_bundle, text=text, damaged=broken, clip=clip).split()
    done = call("run", *arguments)
    assert done.code == code
    assert said in error_line(done.err)
    assert not done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.mgg", "text.mp4"]
    assert clip.read_bytes() == before


@pytest.mark.parametrize("words", [[], ["--source"], ["--source", "x", "--adapt", "maybe"], ["--threads", "0"]])
def test_wrong_options_are_usage_errors(call: Call, words: Sequence[str]) -> None:
    done = call("run", *words)
    assert done.code == 2
    assert not done.out
    assert "Traceback" not in done.err


def test_a_bad_output_is_refused_before_the_model_is_loaded(
    call: Call, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adapter, "open", lambda *_, **__: pytest.fail("loaded the model"))
    assert call("run", "--bundle", "x.mgg", "--source", clip, "--save", "/absent/out.mp4").code == 1


def test_a_broken_video_still_gives_its_frames_and_the_summary(call: Call, toy_bundle: Path, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", pictures(60), codec="mpeg4", movflags="faststart")
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    done = call(
        "run", "--bundle", toy_bundle, "--source", tmp_path / "cut.mp4", "--json", "--save", tmp_path / "out.mp4"
    )
    assert done.code == 1
    assert "damaged or cut short" in error_line(done.err)
    *frames, last = map(json.loads, done.out.splitlines())
    assert last["summary"]["frames_read"] == len(frames) == len(read_pictures(tmp_path / "out.mp4")) > 0


# --- errors nobody made a class for


def test_missing_packages_are_named_with_their_extra(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_(error: Exception) -> Callable[..., None]:
        def read_container(_: Path) -> None:
            raise error

        return read_container

    for name, extra in (("onnxruntime.capi", "cpu"), ("timm", "export")):
        monkeypatch.setattr("mgg_edge.container.read_container", raise_(ModuleNotFoundError("no", name=name)))
        done = call("inspect", "x.mgg")
        assert done.code == 3
        assert f"pip install 'mgg-edge[{extra}]'" in error_line(done.err)
    for error in (ModuleNotFoundError("no", name="something"), ZeroDivisionError()):
        monkeypatch.setattr("mgg_edge.container.read_container", raise_(error))
        with pytest.raises(type(error)):
            cli.main(["inspect", "x.mgg"])


# --- signals and pipes, in real processes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_drains(toy_bundle: Path, long_clip: Path, tmp_path: Path, number: int, code: int) -> None:
    target = tmp_path / "out.mp4"
    process = start("run", "--bundle", toy_bundle, "--source", long_clip, "--json", "--save", target, "--threads", 1)
    first = process.stdout.readline()
    process.send_signal(number)
    rest, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    *frames, last = map(json.loads, (first + rest).splitlines())
    assert 0 < last["summary"]["frames_read"] == len(frames) < 2000
    assert len(read_pictures(target)) == len(frames)
    assert "Traceback" not in err


def test_a_reader_that_leaves_ends_the_run_quietly(toy_bundle: Path, long_clip: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    process = start("run", "--bundle", toy_bundle, "--source", long_clip, "--json", "--save", target, "--threads", 1)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 0
    err = process.stderr.read()
    process.stderr.close()
    assert "Error" not in err
    assert 0 < len(read_pictures(target)) < 2000


def test_a_full_disk_under_standard_output_is_one_line(toy_bundle: Path, clip: Path) -> None:
    words = [sys.executable, "-c", PROGRAM, "run", "--bundle", str(toy_bundle), "--source", str(clip), "--json"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "No space left" in error_line(done.stderr)


# --- cameras


def test_several_sources_each_learn_for_themselves(call: Call, toy_bundle: Path, clip: Path, tmp_path: Path) -> None:
    words = [
        "--source",
        f"door={clip}",
        "--source",
        "synthetic:frames=8",
        "--source",
        clip,
        "--csv",
        tmp_path / "t.csv",
    ]
    done = call("run", "--bundle", toy_bundle, *words, "--json", "--threads", 1, "--save", tmp_path / "out.mp4")
    assert done.code == 0
    *frames, last = map(json.loads, done.out.splitlines())
    by_source = {name: [line for line in frames if line["source"] == name] for name in ("door", "synthetic", "clip")}
    assert [len(lines) for lines in by_source.values()] == [12, 8, 12]
    for lines in by_source.values():
        assert [line["frame"] for line in lines] == list(range(len(lines)))
    own = {"source": "", "time": "", "age_ms": 0}
    unnamed = [[line | own for line in by_source[name]] for name in ("door", "clip")]
    assert unnamed[0] == unnamed[1]
    assert set(last["summary"]["sources"]) == set(by_source)
    assert last["summary"]["frames_read"] == last["summary"]["frames_inferred"] == 32
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stem}-{name}.{suffix}" for stem, suffix in (("out", "mp4"), ("t", "csv")) for name in by_source
    }
    assert len(read_pictures(tmp_path / "out-synthetic.mp4")) == 8


def test_people_see_what_was_dropped_of_which_camera(call: Call, toy_bundle: Path) -> None:
    source = "synthetic:frames=40,faults=shape,every=10"
    done = call("run", "--bundle", toy_bundle, "--source", f"door={source}", "--source", f"gate={source}")
    assert done.code == 0
    assert "74, 6 dropped (6 malformed)" in done.out
    assert "camera gate" in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--source a=synthetic: --source a=synthetic:", "found 'a' twice"),
        ("--source synthetic: --serve nowhere", "expected [HOST:]PORT"),
        ("--source rtsp://u:secret@ --json", "expected an address with a host"),
        ("--source ftp://u:secret@h/x", "ftp://***@h/x"),
    ],
)
def test_mistakes_with_cameras(call: Call, toy_bundle: Path, words: str, said: str) -> None:
    done = call("run", "--bundle", toy_bundle, *words.split())
    assert done.code == 2
    assert said in error_line(done.err)
    assert "secret" not in done.err + done.out


def test_a_log_for_programs_is_json_on_standard_error(call: Call, toy_bundle: Path) -> None:
    source = "synthetic:frames=12,faults=shape,every=5"
    done = call("run", "--bundle", toy_bundle, "--source", source, "--json", "--log-format", "json")
    note, line, _ = map(json.loads, done.err.splitlines())
    assert "knows no site" in note["message"]
    assert list(line) == ["time", "level", "logger", "message"]
    assert line["level"] == "warning"
    assert "frame 5 dropped" in line["message"]


def test_under_a_log_for_programs_the_summary_and_the_last_error_are_json(call: Call, toy_bundle: Path) -> None:
    source = ("--source", "synthetic:frames=12", "--log-format", "json")
    done = call("run", "--bundle", toy_bundle, *source)
    assert json.loads(done.out)["summary"]["frames_read"] == 12
    done = call("run", "--bundle", "nowhere.mgg", *source)
    assert (done.code, done.out) == (2, "")
    (line,) = map(json.loads, done.err.splitlines())
    assert (line["level"], line["message"].partition(";")[0]) == ("error", "nowhere.mgg: no such bundle")
    for words in (("--soruce", "x"), ("--top", 0)):
        done = call("run", *words, *source)
        assert (done.code, done.out) == (2, "")
        (line,) = map(json.loads, done.err.splitlines())
        assert (line["level"], words[0] in line["message"]) == ("error", True)
    assert call("inspect", "nowhere.mgg").err.startswith("error: ")  # said to people again
    assert "Usage" in call("inspect", "--soruce").err


def test_a_camera_with_a_password_served_while_its_connection_breaks(toy_bundle: Path, tmp_path: Path) -> None:
    """The whole program: source from the environment, page, reconnection, two SIGTERMs; and nowhere the password."""
    port = free_port()
    with HttpStream("mjpeg") as stream:
        address = stream.address.replace("//", "//admin:s3cr3t@")
        words = ["run", "--bundle", str(toy_bundle), "--json", "--serve", str(port), "--log-format", "json"]
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words, "--threads", "1", "--stall-timeout", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MGG_EDGE_SOURCE": address},
        )
        lines = [process.stdout.readline() for _ in range(10)]
        stream.cut()
        stream.restore()
        lines += [process.stdout.readline() for _ in range(30)]
        answers = []
        for path in ("status", "metrics", "readyz", ""):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
                answers.append(answer.read().decode())
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # supervisors do this
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    last = json.loads(out.splitlines()[-1])["summary"]
    assert last["reconnects"] >= 1
    assert last["frames_read"] == last["frames_inferred"] + last["frames_dropped"]
    assert '"connected": true' in answers[0]
    said = [json.loads(line)["message"] for line in err.splitlines()]
    assert any("connection lost" in message for message in said)
    assert any("connected again" in message for message in said)
    assert not [text for text in (*lines, out, err, *answers) if "s3cr3t" in text]


# --- inspect


def test_inspect_says_what_the_bundle_holds(call: Call, toy_bundle: Path) -> None:
    done = call("inspect", toy_bundle, "--json")
    assert done.code == 0
    facts = json.loads(done.out)
    assert facts["backbone"]["name"] == "toy"
    assert facts["norms"] == {"parameters": 2, "scalars": 12, "names": ["norm.weight", "norm.bias"]}
    assert facts["state"]["size_bytes"] == 4 * (12 + 12 + 1)
    assert facts["labels"]["count"] == 4
    assert len(facts["members"]) == 8
    assert all(len(member["sha256"]) == 64 and member["size"] > 0 for member in facts["members"].values())
    assert facts["members"]["manifest.json"]["sha256"] == facts["id"]
    table = call("inspect", toy_bundle)
    assert table.code == 0
    for name, member in facts["members"].items():
        assert f"{name}  " in table.out
        assert member["sha256"] in table.out


def test_inspect_refuses_a_damaged_bundle(call: Call, toy_bundle: Path, tmp_path: Path) -> None:
    done = call("inspect", damaged(toy_bundle, tmp_path / "damaged.mgg"))
    assert done.code == 1
    assert "damaged or altered" in error_line(done.err)
    assert not done.out
