"""Bring scenes and cut-outs from the free pictures in Debian's packages; two minutes, 580 MB to fetch.

    scripts/build_objects --out objects

writes `scenes/`, photographs, and `stamps/`, things with an outline: photographs of them, and below `stamps/furniture`
the pictures of three-dimensional models of what stands in houses. All under the names they have in the packages,
reduced to what a model can see. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO

from build_photographs import LEAST_BYTES, LEAST_SIDE, LIST, archive_of, globs
from PIL import Image
from rich.console import Console
from rich.progress import track

from mgg_edge.errors import MggEdgeError, UsageError
from mgg_edge.learn import debian

SCENE_SIDE, STAMP_SIDE = 512, 384
QUALITY = 95
STAMPS, FURNITURE = "tuxpaint-stamps-default", "sweethome3d-furniture"
SAME_PLATES = ("rounded-", "square-")  # switches and sockets once more, in other frames


def main() -> int:
    """Build; exit status as the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--archives", type=Path, help="folder of .deb files, instead of fetching them")
    arguments = parser.parse_args()
    try:
        print(json.dumps(_build(arguments.out, arguments.archives)))
    except MggEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _build(out: Path, archives: Path | None) -> dict[str, object]:
    if out.exists():
        raise UsageError(f"{out}: expected a folder that is not there yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [line.split() for line in LIST.read_text().splitlines() if line.startswith("photograph ")]
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        scratch, made = Path(name), Path(name) / "made"
        packages = sorted({package for _, package, _ in lines} | {STAMPS, FURNITURE})
        found = sorted(archives.glob("*.deb")) if archives else debian.download_packages(packages, scratch)
        folders = {package: debian.unpack(archive_of(found, package), scratch).folder for package in packages}
        scenes = sorted(
            {
                path
                for _, package, pattern in lines
                for one in globs(pattern)
                for path in _share(folders[package]).glob(one)
            }
        )
        stamps = _share(folders[STAMPS]) / "tuxpaint" / "stamps"
        things = [path for path in sorted(stamps.rglob("*.png")) if path.is_file()]
        catalogues = sorted((_share(folders[FURNITURE]) / "sweethome3d" / "furniture").glob("*.sh3f"))
        counts = {
            "scenes": sum(_scene(path, made / "scenes") for path in _shown(scenes, "scenes")),
            "stamps": sum(_stamp(path, stamps, made / "stamps") for path in _shown(things, "stamps")),
            "furniture": sum(_furniture(path, made / "stamps" / "furniture") for path in _shown(catalogues, "models")),
        }
        made.rename(out)
    return {"out": str(out), **counts}


def _share(folder: Path) -> Path:
    return folder / "usr" / "share"


def _shown(paths: list[Path], what: str) -> list[Path]:
    return list(track(paths, what, console=Console(stderr=True)))


def _scene(path: Path, out: Path) -> bool:
    """Keep a photograph under its name, below its folder's, as several share one."""
    with Image.open(path) as opened:
        if min(opened.size) < LEAST_SIDE or path.stat().st_size < LEAST_BYTES:
            return False
        image = opened.convert("RGB")
    image.thumbnail((2 * SCENE_SIDE, 2 * SCENE_SIDE))
    target = out / "-".join(path.parent.parts[-3:]) / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target, quality=QUALITY)
    return True


def _stamp(path: Path, root: Path, out: Path) -> bool:
    """Keep a photograph with an outline; drawings (`cartoon`) and letters are none."""
    relative = path.relative_to(root)
    if "cartoon" in relative.parts or relative.parts[0] == "symbols":
        return False
    return _thing(path, out / relative)


def _furniture(catalogue: Path, out: Path) -> int:
    """Keep the pictures of a catalogue's models, below its name; how many."""
    with zipfile.ZipFile(catalogue) as archive:
        listed = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
        paths = [PurePosixPath(path) for path in sorted(re.findall(r"(?m)^icon#\d+\s*=\s*/?(\S+)", listed))]
        wanted = [path for path in paths if not path.name.startswith(SAME_PLATES)]
        pictures = ((path.name, io.BytesIO(archive.read(str(path)))) for path in wanted)
        return sum(_thing(picture, out / catalogue.stem / name) for name, picture in pictures)


def _thing(picture: Path | IO[bytes], target: Path) -> bool:
    with Image.open(picture) as opened:
        if min(opened.size) < LEAST_SIDE // 2:
            return False
        image = opened.convert("RGBA")
    image.thumbnail((STAMP_SIDE, STAMP_SIDE))
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(target)
    return True


if __name__ == "__main__":
    sys.exit(main())
