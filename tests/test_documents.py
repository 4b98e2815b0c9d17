"""What README and docs tell people to type: every command is understood, and those that can run here run."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

import videos
from mgg_edge.cli.main import app, main

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
ENDS = {"|", "&&", ";", ">", "2>", "<<<"}
# What no test has: cameras, addresses, boards, nets and pictures to train with.
ABSENT = re.compile(r"rtsp:|https?:|/dev/|v4l2:|nvargus|--backbone|--serve|--pictures|test_images|engines|kept/|state/")


class Documented(NamedTuple):
    """A command line, and where it stands."""

    document: str
    words: tuple[str, ...]


def documented() -> Iterator[Documented]:
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in BLOCK.findall(path.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True) if "mgg-edge" in line else []
                if words[:1] == ["mgg-edge"]:
                    end = next((place for place, word in enumerate(words) if word in ENDS), len(words))
                    yield Documented(path.name, tuple(words[1:end]))


COMMANDS = list(dict.fromkeys(documented()))


def test_commands_are_found():
    assert len(COMMANDS) >= 30
    assert {"README.md", "DEPLOY.md", "GPU.md", "JETSON.md", "METHODS.md"} <= {command.document for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.document}: {' '.join(command.words)[:60]}")
def test_every_command_is_understood(command: Documented):
    found, words = typer.main.get_command(app), list(command.words)
    while isinstance(found, typer.core.TyperGroup):
        found = found.commands[words.pop(0)]
    found.make_context(found.name, words)


def test_what_is_misspelt_is_not_understood():
    with pytest.raises(Exception, match="No such option"):
        test_every_command_is_understood(Documented("here", ("run", "--bundel", "x.mgg")))


def test_commands_run(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the order of the documents, each going on with the files of those before; in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(toy_bundle, "model.mgg")
    for name in ("video.mp4", "clean.mp4"):
        videos.write_video(tmp_path / name, videos.pictures(80))
    ran = [command.words for command in COMMANDS if not ABSENT.search(" ".join(command.words))]
    for words in ran:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        assert not ended.value.code, words
    assert {words[0] for words in ran} == {"run", "inspect", "doctor", "bench", "calibrate"}
    assert Path("annotated.mp4").is_file()
