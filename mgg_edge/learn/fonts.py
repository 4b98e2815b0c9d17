"""From unpacked packages of fonts (`debian`) to glyph masters: rasterise, drop what is unfit, name families.

A face is kept if its package is in Debian's main archive (so its licence is free), FreeType opens it, its name does not
call it symbols, Fraktur, outlines or the like, and it has all 36 characters, each with ink and no two alike.

Families are those the fonts name, without words for weight, width and slant. Packages copy Latin letters from each
other (Arundina's are DejaVu's), which would put one drawing on both sides of the split by family: families that have
two faces of nearly equal rasters are joined under the name that sorts first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from mgg_edge.errors import UsageError
from mgg_edge.scenes.glyphs import CHARACTERS, MASTER_SIZE, Face

__all__ = [
    "Rejected",
    "distinct_faces",
    "find_fonts",
    "join_families",
    "rasterise",
    "read_packages",
]

FONT_SUFFIXES = (".ttf", ".otf", ".ttc", ".pfb")
DRAWING_SIZE = 96  # pixels of an em, twice the master: scaled down with an area filter
MARGIN = 3
ABSENT = "\uffff"  # a noncharacter: every font draws its placeholder for it
MIN_INK = 12 * 255  # coverage of the smallest full stop one would still call a letter
# Pictures in place of letters, runes, broken scripts and copybook hands: not what plates and serial numbers are set in.
UNFIT_NAME = re.compile(
    r"symbol|dingbat|d050000l|ornament|emoji|keyboard|futhark|fraktur|blackletter|gotisch|schwabacher|zainer|isabella|"
    r"joscelyn|ecolier|math|music|initial|outline|shadow|swash|relief|sketch|barcode|euterpe|border|staypuft|"
    r"smallcaps|small caps|\bsc\b|titling|phonetic|alias",
    re.IGNORECASE,
)
MAX_FACES_IN_FILE = 16
SAME_DRAWING = 3.0  # mean absolute difference of coverage, of 255
STYLE_WORDS = re.compile(
    r"\b(thin|hairline|extra ?light|ultra ?light|semi ?light|light|book|regular|roman|normal|medium|demi|"
    r"demi ?bold|semi ?bold|bold|extra ?bold|ultra ?bold|heavy|black|ultra|fat|italic|oblique|slanted|condensed|"
    r"semi ?condensed|"
    r"extra ?condensed|narrow|wide|expanded|compressed|outline|otf|ttf|std|lgc|pro)\b",
    re.IGNORECASE,
)


class Rejected(Exception):
    """Why a face is left out, in few words that can be counted."""


def read_packages(path: Path) -> list[str]:
    """The names of a text file: `fonts-NAME` on each line, `#` begins a comment.

    Raises:
        UsageError: no such file, or a line of another form.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such list of packages")
    names = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name = line.partition("#")[0].strip()
        if name and not re.fullmatch(r"fonts-[a-z0-9.+-]+", name):
            raise UsageError(f"{path}, line {number}: expected 'fonts-NAME', found '{line}'")
        names += [name] if name else []
    return names


def find_fonts(folder: Path) -> list[Path]:
    """Font files below a folder, sorted; links are left out, they lead to another copy."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in FONT_SUFFIXES)
    return sorted(path for path in files if path.is_file() and not path.is_symlink())


def rasterise(path: Path) -> Iterator[tuple[str, str, NDArray[np.uint8] | Rejected]]:
    """Masters of every face in a font file.

    Yields:
        Family without style words, full name, and u8[36, 48, 48] or the reason to leave the face out.
    """
    for index in range(MAX_FACES_IN_FILE):
        try:
            font = ImageFont.truetype(path, DRAWING_SIZE, index, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            if index == 0:
                yield path.stem, path.stem, Rejected(f"FreeType cannot open it: {error}")
            return
        family, style = (part or "" for part in font.getname())
        family = family or path.stem
        short = " ".join(STYLE_WORDS.sub(" ", family.replace("-", " ")).split()) or family
        name = f"{family} {style}".strip()
        try:
            yield short, name, _masters(font) if not UNFIT_NAME.search(name) else Rejected("unfit by its name")
        except Rejected as reason:
            yield short, name, reason
        if path.suffix.lower() != ".ttc":
            return


def distinct_faces(found: Iterable[tuple[Face, NDArray[np.uint8]]]) -> list[tuple[Face, NDArray[np.uint8]]]:
    """The faces in order of their names, without those whose rasters repeat an earlier one's exactly."""
    kept: dict[bytes, tuple[Face, NDArray[np.uint8]]] = {}
    for face, masters in sorted(found, key=lambda item: (item[0].family, item[0].name, item[0].package)):
        kept.setdefault(masters.tobytes(), (face, masters))
    return list(kept.values())


def join_families(faces: Sequence[Face], masters: NDArray[np.uint8]) -> list[str]:
    """The family of each face, families with nearly equal drawings joined under the first of their names.

    Args:
        faces: n faces with families as named.
        masters: u8[n, 36, 48, 48].
    """
    small = masters.reshape(len(faces), len(CHARACTERS), 12, 4, 12, 4).mean((3, 5)).reshape(len(faces), -1)
    parent = {face.family: face.family for face in faces}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for index, face in enumerate(faces):
        distances = np.abs(small[index + 1 :] - small[index]).mean(1)
        for other in (np.flatnonzero(distances < SAME_DRAWING) + index + 1).tolist():
            first, second = sorted((root(face.family), root(faces[other].family)))
            parent[second] = first
    return [root(face.family) for face in faces]


def _masters(font: ImageFont.FreeTypeFont) -> NDArray[np.uint8]:
    try:
        absent = bytes(font.getmask(ABSENT, "L"))
        drawings = [_draw(font, character) for character in CHARACTERS]
        missing = [c for c in CHARACTERS if absent and bytes(font.getmask(c, "L")) == absent]
    except (OSError, ValueError) as error:
        raise Rejected(f"FreeType cannot draw it: {error}") from error
    if missing:
        raise Rejected("lacks some of the 36 characters")
    if any(int(drawing.sum(dtype=np.int64)) < MIN_INK for drawing, _ in drawings):
        raise Rejected("some character has next to no ink")
    if len({(drawing.shape, drawing.tobytes()) for drawing, _ in drawings}) < len(CHARACTERS):
        raise Rejected("two characters look the same")
    return _fit(drawings)


def _draw(font: ImageFont.FreeTypeFont, character: str) -> tuple[NDArray[np.uint8], int]:
    """Coverage cut to the ink, u8[h, w], and the row of its top relative to the baseline (negative: above)."""
    mask, (_, top) = font.getmask2(character, "L", anchor="ls")
    width, height = mask.size
    if not width or not height:
        raise Rejected("some character has no ink")
    drawing = np.frombuffer(bytes(mask), np.uint8).reshape(height, width)
    rows, columns = np.flatnonzero(drawing.any(1)), np.flatnonzero(drawing.any(0))
    if not rows.size:
        raise Rejected("some character has no ink")
    return drawing[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], int(top + rows[0])


def _fit(drawings: Sequence[tuple[NDArray[np.uint8], int]]) -> NDArray[np.uint8]:
    """All characters at one scale on one baseline, each centred across; only the widest are drawn smaller."""
    top = min(row for _, row in drawings)
    bottom = max(row + drawing.shape[0] for drawing, row in drawings)
    room = MASTER_SIZE - 2 * MARGIN
    scale = min(room / (bottom - top), room / float(np.percentile([drawing.shape[1] for drawing, _ in drawings], 90)))
    baseline = MASTER_SIZE / 2 - scale * (top + bottom) / 2
    masters = np.zeros((len(drawings), MASTER_SIZE, MASTER_SIZE), np.uint8)
    for index, (drawing, row) in enumerate(drawings):
        height, width = drawing.shape
        own = min(scale, room / width)
        size = max(1, round(width * own)), max(1, round(height * own))
        resized = np.asarray(Image.fromarray(drawing).resize(size, Image.Resampling.BOX))
        middle = baseline + scale * (row + height / 2)
        y = min(max(round(middle - size[1] / 2), 0), MASTER_SIZE - size[1])
        x = (MASTER_SIZE - size[0]) // 2
        masters[index, y : y + size[1], x : x + size[0]] = resized
    return masters
