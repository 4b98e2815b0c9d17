"""What the user says of each camera: in words of `mgg-edge run`, or in a file of cameras.

    adapt = "burst"                      # of every camera that does not say otherwise
    stall-timeout = 10

    [camera.door]
    source = "$DOOR_CAMERA"              # of the environment: passwords do not belong into files
    bundle = "/etc/mgg-edge/door.mgg"    # such as `mgg-edge calibrate` made for this site

    [camera.gate]
    source = "rtsp://10.0.0.7/stream"
    max-reconnects = 100

The words are those of the command line; paths count from the working directory, as there.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mgg_edge.compat import tomllib
from mgg_edge.errors import UsageError
from mgg_edge.runtime.pipeline import Policy
from mgg_edge.runtime.sources.source_live import LiveOptions
from mgg_edge.runtime.sources.source_open import split_name, suggest_name

__all__ = ["CameraWords", "named", "read_cameras"]

MAX_BYTES = 1 << 20
MODES = ("auto", "window", "burst", "always", "off")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")
_ENVIRONMENT = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")
_POLICY: Mapping[bool | None, Policy | None] = {True: "latest", False: "every-frame", None: None}


@dataclass(frozen=True)
class CameraWords:
    """What was said of one camera.

    Attributes:
        name: different from the others'.
        source: as `open_source` takes it.
        bundle: the one shipped with the package if None.
        adapt: one of `MODES`.
        adapt_budget_ms: steps that would take longer are left out.
        latest: skip frames that a newer one has overtaken; None for live sources only.
        strict: end at the first lost picture of a video file.
        stall_timeout: seconds without a picture before the decoder is replaced.
        max_reconnects: attempts in a row before the camera is given up; None never does.
    """

    name: str
    source: str = field(repr=False)  # it may hold a password
    bundle: Path | None = None
    adapt: str = "auto"
    adapt_budget_ms: float | None = None
    latest: bool | None = None
    strict: bool = False
    stall_timeout: float = 5.0
    max_reconnects: int | None = None

    @property
    def policy(self) -> Policy | None:
        """What becomes of frames that come too fast."""
        return _POLICY[self.latest]

    @property
    def live_options(self) -> LiveOptions:
        """Patience with a camera or stream."""
        return LiveOptions(stall_timeout_s=self.stall_timeout, max_reconnects=self.max_reconnects)


def named(sources: Sequence[str], common: CameraWords) -> list[CameraWords]:
    """Cameras of a command line, under different names: `NAME=SOURCE`, or one that the source suggests.

    Raises:
        UsageError: two of one given name.
    """
    found: dict[str, CameraWords] = {}
    for index, spec in enumerate(sources):
        given, text = split_name(spec)
        name = given or _free(suggest_name(text, index), found)
        if name in found:
            raise UsageError(f"source: expected different names, found '{name}' twice")
        found[name] = replace(common, name=name, source=text)
    return list(found.values())


def read_cameras(path: Path, common: CameraWords) -> list[CameraWords]:
    """Cameras of a file, in its order.

    Args:
        path: TOML, of at most 1 MiB.
        common: words of the command line, which hold where the file says nothing.

    Raises:
        UsageError: no such file, not TOML, a word there is not, a value that is none, or no camera.
    """
    try:
        data = path.read_bytes()
        if not len(data) <= MAX_BYTES:
            raise UsageError(f"{path}: expected at most {MAX_BYTES} bytes, found {len(data)}")
        values = tomllib.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the cameras: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOML's and the text's errors are among them
        raise UsageError(f"{path}: not TOML: {_one_line(error)}") from error
    cameras = values.pop("camera", None)
    if not (isinstance(cameras, dict) and cameras):
        raise UsageError(f"{path}: expected at least one table [camera.NAME], found none")
    everywhere = _with(common, values, str(path), {"source"})
    return [_camera(name, words, everywhere, f"{path}: camera.{name}") for name, words in cameras.items()]


def _camera(name: str, words: object, everywhere: CameraWords, where: str) -> CameraWords:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{where}: expected a name of a letter and up to 31 letters, digits, '-' or '_'")
    if not isinstance(words, dict):
        raise UsageError(f"{where}: expected a table, found {_kind(words)}")
    camera = _with(everywhere, words, where, set())
    if not camera.source:
        raise UsageError(f"{where}: expected a source, found none")
    return replace(camera, name=name)


def _with(common: CameraWords, words: Mapping[str, Any], where: str, excluded: set[str]) -> CameraWords:
    known = {word: check for word, check in _CHECKS.items() if word not in excluded}
    found: dict[str, Any] = {}
    for word, value in words.items():
        if word not in known:
            raise UsageError(f"{where}: expected {_near(word, known)}, found '{word}'")
        expected, check = known[word]
        try:
            found[word.replace("-", "_")] = check(value)
        except UsageError as error:
            raise UsageError(f"{where}.{word}: {error}") from error
        except (TypeError, ValueError) as error:
            shown = "" if word == "source" else f" {value!r}"
            raise UsageError(f"{where}.{word}: expected {expected}, found {_kind(value)}{shown}") from error
    return replace(common, **found)


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, 2)
    return " or ".join(f"'{name}'" for name in near) or f"one of {', '.join(known)}"


def _text(value: object) -> str:
    if not (isinstance(value, str) and value.strip()):
        raise TypeError
    return value


def _source(value: object) -> str:
    text = _text(value)
    if (name := _ENVIRONMENT.fullmatch(text)) is None:
        return text
    if not os.environ.get(name.group(1)):
        raise UsageError(f"the environment has no {name.group(1)}")
    return os.environ[name.group(1)]


def _mode(value: object) -> str:
    if value not in MODES:
        raise ValueError
    return str(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _number(least: float, most: float = math.inf) -> Any:
    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise TypeError
        return value

    return check


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError
    return value


def _kind(value: object) -> str:
    kinds = {str: "text", bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "a table"}
    return kinds.get(type(value), "a date or time")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _free(name: str, taken: Mapping[str, object]) -> str:
    if name not in taken:
        return name
    return next(f"{name}-{number}" for number in range(2, len(taken) + 3) if f"{name}-{number}" not in taken)


_CHECKS: Mapping[str, tuple[str, Any]] = {
    "source": ("text: a file, camera, address, or $NAME of the environment", _source),
    "bundle": ("the path of a bundle", lambda value: Path(_text(value))),
    "adapt": (f"one of {', '.join(MODES)}", _mode),
    "adapt-budget-ms": ("a number of at least 1", _number(1)),
    "latest": ("true or false", _flag),
    "strict": ("true or false", _flag),
    "stall-timeout": ("seconds from 0.1 to 3600", _number(0.1, 3600)),
    "max-reconnects": ("a whole number of at least 0", _count),
}
