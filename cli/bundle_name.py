"""A bundle as every command takes it: a path, or `default` for the one that the package brings."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import typer

from mgg_edge.files import packaged_file

__all__ = ["bundle_file", "bundle_option", "default_bundle"]

DEFAULT = "default"
_logger = logging.getLogger(__name__)


def bundle_file(text: str) -> Path:
    """The file that a word of the command line names; a file called `default` comes before the package's.

    Raises:
        UsageError: this build of the package brings none.
    """
    return packaged_file("default.mgg") if text == DEFAULT and not Path(text).exists() else Path(text)


def bundle_option(about: str) -> Any:
    """The option `--bundle` of a command, with what it says of it."""
    return typer.Option(parser=bundle_file, metavar="PATH", help=about)


def default_bundle() -> Path:
    """The bundle of those who name none, which is said.

    Raises:
        UsageError: this build of the package brings none.
    """
    path = packaged_file("default.mgg")
    _logger.info(
        "no --bundle given: using the default bundle of the package, which reads single characters A–Z and 0–9 and "
        "says nothing sensible of anything else"
    )
    return path
