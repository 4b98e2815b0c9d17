"""Build a folder of source pictures from the free photographs in Debian's packages; two minutes, 460 MB to fetch.

    scripts/build_photographs --out photographs

Some two hundred photographs are few: a rule that learns from them learns their content. So each picture is a random
part of one, and every other one has an object of another pasted in. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from mgg_edge.errors import MggEdgeError, SourceError, UsageError
from mgg_edge.learn import debian

LIST = Path(__file__).with_name("photographs.txt")
SIDE = 256
LEAST_SIDE, LEAST_BYTES = 160, 15_000  # smaller ones are icons
QUALITY = 92


def main() -> int:
    """Build; exit status as the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--archives", type=Path, help="folder of .deb files, instead of fetching them")
    parser.add_argument("--count", type=int, default=2400, help="pictures")
    arguments = parser.parse_args()
    try:
        print(json.dumps(_build(arguments.out, arguments.archives, arguments.count)))
    except MggEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _build(out: Path, archives: Path | None, count: int) -> dict[str, object]:
    if out.exists():
        raise UsageError(f"{out}: expected a folder that is not there yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        photographs, cut_outs = _gather(archives, Path(scratch))
        made = Path(scratch) / "pictures"  # nothing half-made appears at `out`
        made.mkdir()
        hasher = hashlib.sha256()
        for number in track(range(count), "pictures", console=Console(stderr=True)):
            rng = np.random.default_rng(number)
            picture = _part(photographs[number % len(photographs)], rng)
            if number % 2:
                _paste(picture, cut_outs[rng.integers(len(cut_outs))], rng)
            picture.save(made / f"{number:05}.jpg", quality=QUALITY)
            hasher.update(np.asarray(picture).tobytes())
        made.rename(out)
    used = {"photographs": len(photographs), "cut_outs": len(cut_outs)}
    return {"out": str(out), "pictures": count, **used, "sha256": hasher.hexdigest()}


def _gather(archives: Path | None, scratch: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """Photographs (RGB) and cut-outs (RGBA) in the order of the list."""
    lines = [line.split() for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    names = sorted({package for _, package, _ in lines})
    found = sorted(archives.glob("*.deb")) if archives else debian.download_packages(names, scratch)
    folders = {name: debian.unpack(archive_of(found, name), scratch).folder for name in names}
    pictures: dict[str, list[Image.Image]] = {"photograph": [], "cut-out": []}
    for kind, package, pattern in lines:
        paths = sorted({path for glob in globs(pattern) for path in (folders[package] / "usr/share").glob(glob)})
        if not paths:
            raise SourceError(f"{package}: expected pictures at {pattern}, found none; the package has changed")
        for path in paths:
            with Image.open(path) as opened:
                if min(opened.size) >= LEAST_SIDE and path.stat().st_size >= LEAST_BYTES:
                    pictures[kind].append(_reduced(opened.convert("RGB" if kind == "photograph" else "RGBA")))
    return pictures["photograph"], pictures["cut-out"]


def archive_of(found: list[Path], package: str) -> Path:
    """The archive of a package among those there are."""
    matching = [path for path in found if path.name.startswith(f"{package}_")]
    if not matching:
        raise SourceError(f"{package}: expected its archive, found {len(found)} others")
    return matching[0]


def globs(pattern: str) -> list[str]:
    """The patterns that one with {a,b} stands for."""
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        return [pattern]
    return [pattern[: match.start()] + choice + pattern[match.end() :] for choice in match[1].split(",")]


def _reduced(picture: Image.Image) -> Image.Image:
    picture.thumbnail((8 * SIDE, 8 * SIDE))
    return picture


def _part(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random square of a photograph, stretched by up to a fifth, mirrored or not."""
    shortest = min(photograph.size)
    height = int(rng.uniform(max(0.25, min(1.0, LEAST_SIDE / shortest)), 1.0) * shortest)
    width = min(photograph.width, int(height * rng.uniform(0.85, 1.2)))
    left = int(rng.integers(photograph.width - width + 1))
    top = int(rng.integers(photograph.height - height + 1))
    box = (left, top, left + width, top + height)
    part = photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def _paste(picture: Image.Image, cut_out: Image.Image, rng: np.random.Generator) -> None:
    """Put an object into a picture, 45 to 95 per cent of its side, turned a little, mirrored or not."""
    scale = rng.uniform(0.45, 0.95) * SIDE / max(cut_out.size)
    size = (max(1, round(cut_out.width * scale)), max(1, round(cut_out.height * scale)))
    thing = cut_out.resize(size, Image.Resampling.BICUBIC)
    thing = thing.rotate(float(rng.normal(0, 6)), Image.Resampling.BICUBIC, expand=True)
    if rng.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = (int(rng.integers(min(0, SIDE - side), max(0, SIDE - side) + 1)) for side in thing.size)
    picture.paste(thing, (left, top), thing)


if __name__ == "__main__":
    sys.exit(main())
