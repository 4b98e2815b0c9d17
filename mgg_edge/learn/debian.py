"""Debian packages as a source of free data: fetch and unpack them, without root."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgg_edge.errors import MissingDependencyError, SourceError

__all__ = ["Package", "download_packages", "unpack"]

RETRY = "fetch the package again"


@dataclass(frozen=True)
class Package:
    """A package as unpacked. Attributes: name; version; licence: short names of its licences; folder: its files."""

    name: str
    version: str
    licence: str
    folder: Path


def download_packages(names: Sequence[str], folder: Path) -> list[Path]:
    """Fetch packages with `apt-get download`, which needs neither root nor the package's installation.

    Args:
        names: what to fetch.
        folder: an existing folder to fetch them into.

    Raises:
        MissingDependencyError: no `apt-get` here.
        SourceError: a package is not to be had.
    """
    _call(["apt-get", "download", "--quiet", "--quiet", *names], folder, "run `apt-get update` and try again")
    return sorted(folder.glob("*.deb"))


def unpack(archive: Path, folder: Path) -> Package:
    """Unpack a .deb file into a folder of its own below `folder`.

    Raises:
        MissingDependencyError: no `dpkg` here.
        SourceError: the archive is damaged, or not from Debian's main archive.
    """
    archive, folder = archive.resolve(), folder.resolve()
    fields = _call(
        ["dpkg-deb", "--show", "--showformat", "${Package} ${Version} ${Section}", str(archive)], folder, RETRY
    ).split()
    name, version, section = fields if len(fields) == 3 else (archive.stem, "", "")
    if "/" in section or not section:
        raise SourceError(f"{archive.name}: expected a package of the main archive, found section '{section}'")
    target = folder / name
    _call(["dpkg-deb", "--extract", str(archive), str(target)], folder, RETRY)
    texts = [path.read_text(errors="replace") for path in sorted(target.glob("usr/share/doc/*/copyright"))]
    licences = [match.strip() for text in texts for match in re.findall(r"(?m)^License:[ \t]*(\S.*)$", text)]
    return Package(name, version, ", ".join(dict.fromkeys(licences)) or "see copyright file", target)


def _call(words: list[str], folder: Path, advice: str) -> str:
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError as error:
        raise MissingDependencyError(
            f"packages: '{words[0]}' is not here; run this on Debian or Ubuntu, or in a container of them"
        ) from error
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise SourceError(f"packages: {words[0]} failed: {last[0]}; {advice}")
    return done.stdout
