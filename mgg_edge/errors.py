"""Every error a user can meet, as one tree.

    MggEdgeError                 exit code 1
    ├── UsageError               2   an argument or option cannot be used as given
    ├── MissingDependencyError   3   a package or device is absent; the message has the install line
    ├── ParityError              4   the exported step does not match the reference
    ├── ManifestError            1   the manifest breaks its schema
    ├── BundleError              1   the bundle file is damaged, altered or not a bundle
    ├── WeightsError             1   a checkpoint does not fit the model or is not finite
    ├── UnsupportedError         1   a module or operator that cannot be exported
    ├── EngineError              1   the inference engine failed
    ├── SourceError              1   a video or image cannot be read
    ├── SinkError                1   an output cannot be written
    └── StateError               1   an adaptation state is malformed or belongs to another bundle

A message says what failed and where, what was expected, what was found and what to do, in one line.
`code` is stable across releases; `exit_code` is what the command line returns.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BundleError",
    "EngineError",
    "ManifestError",
    "MggEdgeError",
    "MissingDependencyError",
    "ParityError",
    "SinkError",
    "SourceError",
    "StateError",
    "UnsupportedError",
    "UsageError",
    "WeightsError",
]

MAX_MESSAGE_LENGTH = 1000


class MggEdgeError(Exception):
    """Base of every error raised on purpose; `str(error)` is one line fit for a terminal."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def _one_line(message: str) -> str:
    # Messages quote names and values from files: those may hold line breaks, terminal escapes or megabytes.
    text = " ".join(message.split())
    if len(text) > MAX_MESSAGE_LENGTH:
        text = f"{text[: MAX_MESSAGE_LENGTH - 200]} … {text[-190:]}"
    return printable(text)


def printable(text: str) -> str:
    """The text with every character replaced that a terminal would obey rather than show."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


class UsageError(MggEdgeError):
    """An argument or option cannot be used as given."""

    code = "usage"
    exit_code = 2


class MissingDependencyError(MggEdgeError):
    """A package or device is absent; the message names the line that installs it."""

    code = "missing-dependency"
    exit_code = 3


class ParityError(MggEdgeError):
    """The exported step is further from the float64 reference than allowed."""

    code = "parity"
    exit_code = 4


class ManifestError(MggEdgeError):
    """A manifest field is absent, unknown or of the wrong type or value."""

    code = "manifest"


class BundleError(MggEdgeError):
    """A bundle file is damaged, altered or not a bundle."""

    code = "bundle"


class WeightsError(MggEdgeError):
    """A checkpoint does not fit the model or holds non-finite numbers."""

    code = "weights"


class UnsupportedError(MggEdgeError):
    """A module or operator has no exported form; the message names it."""

    code = "unsupported"


class EngineError(MggEdgeError):
    """The inference engine refused a graph or failed while running it."""

    code = "engine"


class SourceError(MggEdgeError):
    """A video or image cannot be opened or decoded."""

    code = "source"


class SinkError(MggEdgeError):
    """An output cannot be created or written."""

    code = "sink"


class StateError(MggEdgeError):
    """An adaptation state is malformed or belongs to another bundle."""

    code = "state"
