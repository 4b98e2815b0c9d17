"""What docs and deploy/ say is so: options exist, examples run, the health check tells."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from mgg_edge.runtime import Adapter
from mgg_edge.runtime.outputs import http_check
from mgg_edge.runtime.outputs.http_server import LiveServer
from mgg_edge.runtime.outputs.http_view import CameraView
from mgg_edge.runtime.pipeline import Reader
from mgg_edge.runtime.sources.source_synthetic import SyntheticSource

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
OTHERS_OPTIONS = {"--now", "--restart", "--env-file", "--install-completion", "--format", "--health-on-failure"}
INFO = {"version": "1", "engine": "", "bundle": "", "bundle_id": ""}


def known_options(*names: str) -> set[str]:
    import typer

    from mgg_edge.cli.main import app

    command = typer.main.get_command(app)
    for name in names or ("run",):
        command = command.commands[name]
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


def test_every_option_of_the_unit_and_the_container_exists() -> None:
    (start,) = re.findall(r"^ExecStart=(.*)$", (DEPLOY / "mgg-edge.service").read_text(), re.MULTILINE)
    container = (DEPLOY / "Containerfile").read_text()
    (defaults,) = re.findall(r"^CMD (\[.*\])$", container, re.MULTILINE)
    for words in (shlex.split(start), json.loads(defaults)):
        options = {word for word in words if word.startswith("--")}
        assert len(options) >= 4
        assert options <= known_options()
    commands = ((), ("calibrate",), ("replay",), ("state", "restore"))
    known = OTHERS_OPTIONS.union(*(known_options(*names) for names in commands))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / "docs" / "DEPLOY.md").read_text())) <= known


def test_no_credentials_in_arguments() -> None:
    text = (DEPLOY / "mgg-edge.service").read_text()
    assert "EnvironmentFile=" in text
    assert "rtsp://" not in re.findall(r"^ExecStart=.*$", text, re.MULTILINE)[0]


def test_the_folders_the_container_copies_are_those_of_the_package() -> None:
    copied = re.findall(r"^COPY (\w+) \1$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    assert set(copied) == {"mgg_edge", "export", "runtime", "cli"}
    assert all((ROOT / folder).is_dir() for folder in copied)


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    for path in DEPLOY.glob("mgg-edge*"):
        text = path.read_text().replace("/opt/mgg-edge/bin/mgg-edge", "/bin/true")
        (tmp_path / path.name).write_text(text)
    done = subprocess.run([program, "verify", *map(str, tmp_path.iterdir())], capture_output=True, text=True)
    assert not [line for line in done.stderr.splitlines() if "mgg-edge" in line and "Unknown" in line], done.stderr


def test_the_unit_may_do_little(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "mgg-edge.service"
    text = (DEPLOY / "mgg-edge.service").read_text().replace("/opt/mgg-edge/bin/mgg-edge", "/bin/true")
    for content, good in (
        (text, True),
        (re.sub("^(System|Capab|Restrict|Protect).*", "", text, flags=re.MULTILINE), False),
    ):
        unit.write_text(content)
        words = [program, "security", "--offline=true", "--threshold=40", str(unit)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == good, done.stdout[-500:] + done.stderr


def test_the_health_check_tells(
    toy_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LiveServer(("127.0.0.1", 0), INFO) as server:
        port = str(server.port)
        assert http_check.main([port]) == 0
        assert http_check.main([port, "/readyz"]) == 1
        assert "unhealthy: starting" in capsys.readouterr().err
        with (
            Adapter.open(toy_bundle, threads=1) as adapter,
            Reader(SyntheticSource.parse("synthetic:frames=1")) as reader,
        ):
            server.cameras = (CameraView("door", adapter, reader),)
            monkeypatch.setattr("mgg_edge.runtime.outputs.http_server.HUNG_S", -1.0)
            assert http_check.main([port]) == 1
        assert "camera door: the run has not moved" in capsys.readouterr().err
    assert http_check.main([port]) == 1
    assert "no answer" in capsys.readouterr().err
    for wrong in ([], ["x"], [port, "/status"], [port, "/healthz", "more"]):
        assert http_check.main(wrong) == 2


def test_the_examples_of_the_embedding_page_run(toy_bundle: Path) -> None:
    text = (ROOT / "docs" / "EMBEDDING.md").read_text()
    first, *examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(first, "first", "exec")
    names: dict[str, object] = {"BUNDLE": toy_bundle, "SOURCE": "synthetic:frames=100,width=16,height=16"}
    for example in examples:
        exec(compile(example, "docs/EMBEDDING.md", "exec"), names)  # noqa: S102 - our own page
    assert len(names["labels"]) == 20
    assert names["summary"].frames_read == 30
