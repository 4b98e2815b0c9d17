"""Build the glyph masters from Debian's font packages; under a minute, needs `apt-get` but not root.

    scripts/build_data --out glyphs.safetensors

Prints one JSON line: faces, families, splits, the hash of the file and why faces were left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from mgg_edge.errors import MggEdgeError
from mgg_edge.learn import debian, fonts
from mgg_edge.scenes.glyphs import Face, GlyphSet, save_glyphs, split_of

PACKAGES = Path(__file__).with_name("fonts-packages.txt")


def main() -> int:
    """Build; exit status as the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of glyph masters to write, .safetensors")
    parser.add_argument("--packages", type=Path, default=PACKAGES, help="list of packages")
    parser.add_argument("--archives", type=Path, help="folder of .deb files, instead of fetching them")
    arguments = parser.parse_args()
    try:
        print(json.dumps(_build(arguments)))
    except MggEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _build(arguments: argparse.Namespace) -> dict[str, object]:
    reasons: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        found = fonts.distinct_faces(_faces(arguments, Path(scratch), reasons))
    masters = np.stack([array for _, array in found])
    families = fonts.join_families([face for face, _ in found], masters)
    faces = tuple(replace(face, family=family) for (face, _), family in zip(found, families, strict=True))
    save_glyphs(arguments.out, GlyphSet(masters, faces))
    return {
        "out": str(arguments.out),
        "faces": len(faces),
        "families": len(set(families)),
        "families_by_split": dict(Counter(split_of(family) for family in set(families))),
        "left_out": dict(reasons.most_common()),
        "sha256": hashlib.sha256(arguments.out.read_bytes()).hexdigest(),
    }


def _faces(
    arguments: argparse.Namespace, scratch: Path, reasons: Counter[str]
) -> Iterator[tuple[Face, NDArray[np.uint8]]]:
    archives = sorted(arguments.archives.glob("*.deb")) if arguments.archives else None
    if archives is None:
        archives = debian.download_packages(fonts.read_packages(arguments.packages), scratch)
    for archive in track(archives, "packages", console=Console(stderr=True)):
        package = debian.unpack(archive, scratch)
        for path in fonts.find_fonts(package.folder):
            for family, name, masters in fonts.rasterise(path):
                if isinstance(masters, fonts.Rejected):
                    reasons[str(masters).partition(":")[0]] += 1
                else:
                    yield Face(family, name, package.name, package.version, package.licence), masters


if __name__ == "__main__":
    sys.exit(main())
