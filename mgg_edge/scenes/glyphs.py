"""Glyph masters: the characters of many typefaces as coverage rasters, split by type family.

A file of masters is a safetensors file with two tensors and string metadata:

    compressed  u8[bytes]       the masters of each face, deflated one after the other (all of them raw: 80 MB)
    offsets     i64[faces + 1]  where each face begins in `compressed`
    metadata    "format", "size" and "faces": a JSON list of {family, name, package, version, licence} in face order
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from os import PathLike
from typing import Literal, get_args

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save

from mgg_edge.errors import SourceError, UsageError
from mgg_edge.files import write_whole

__all__ = ["CHARACTERS", "MASTER_SIZE", "SPLITS", "Face", "GlyphSet", "Split", "load_glyphs", "save_glyphs", "split_of"]

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MASTER_SIZE = 48
FORMAT = "mgg-edge glyphs 1"
MAX_FACES = 10_000

Split = Literal["source-train", "source-validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
TRAIN_SHARE, VALIDATION_SHARE = 0.7, 0.1


@dataclass(frozen=True)
class Face:
    """Where a typeface comes from.

    Attributes:
        family: what the split goes by; families that share drawings share this name.
        name: family and style as the font names itself.
        package: Debian package, and its version.
        version: of the package.
        licence: short names of the licences in the package's copyright file.
    """

    family: str
    name: str
    package: str = ""
    version: str = ""
    licence: str = ""


@dataclass(frozen=True)
class GlyphSet:
    """Masters of some faces.

    Attributes:
        masters: u8[faces, 36, 48, 48], coverage from 0 (paper) to 255 (ink), in the order of `CHARACTERS`.
        faces: one entry for each face.

    Raises:
        UsageError: an array of another shape or dtype, or as many faces as it has not.
    """

    masters: NDArray[np.uint8]
    faces: tuple[Face, ...]

    def __post_init__(self) -> None:
        expected = (len(self.faces), len(CHARACTERS), MASTER_SIZE, MASTER_SIZE)
        if self.masters.shape != expected or self.masters.dtype != np.uint8:
            raise UsageError(
                f"glyph masters: expected u8{list(expected)}, found {self.masters.dtype}{list(self.masters.shape)}"
            )

    def __len__(self) -> int:
        return len(self.faces)

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families, sorted, each once."""
        return tuple(sorted({face.family for face in self.faces}))

    def select(self, split: Split) -> GlyphSet:
        """The faces whose family falls into a split.

        Raises:
            UsageError: no such split, or none of the faces belongs to it.
        """
        if split not in SPLITS:
            raise UsageError(f"glyphs: expected a split of {', '.join(SPLITS)}, found '{split}'")
        kept = [index for index, face in enumerate(self.faces) if split_of(face.family) == split]
        if not kept:
            raise UsageError(f"glyphs: none of {len(self)} faces belongs to the split '{split}'")
        return GlyphSet(self.masters[kept], tuple(self.faces[index] for index in kept))


def split_of(family: str) -> Split:
    """The split a family belongs to, by the hash of its name alone: the same in every set of faces."""
    digest = hashlib.sha256(family.casefold().encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < TRAIN_SHARE:
        return "source-train"
    return "source-validation" if share < TRAIN_SHARE + VALIDATION_SHARE else "test"


def save_glyphs(path: str | PathLike[str], glyphs: GlyphSet) -> None:
    """Write a glyph set.

    Raises:
        SinkError: the file cannot be written.
    """
    parts = [zlib.compress(master.tobytes(), 9) for master in glyphs.masters]
    content = save(
        {
            "compressed": np.frombuffer(b"".join(parts), np.uint8),
            "offsets": np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64),
        },
        {"format": FORMAT, "size": str(MASTER_SIZE), "faces": json.dumps([vars(face) for face in glyphs.faces])},
    )
    write_whole(path, content, "the glyphs")


def load_glyphs(path: str | PathLike[str]) -> GlyphSet:
    """Read a glyph set.

    Raises:
        SourceError: the file is absent, damaged or not a glyph file.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            if metadata.get("format") != FORMAT or names != {"compressed", "offsets"}:
                raise SourceError(f"{path}: expected a file of format '{FORMAT}', found {metadata.get('format')!r}")
            compressed, offsets = file.get_tensor("compressed"), file.get_tensor("offsets")
        faces = tuple(Face(**entry) for entry in json.loads(metadata["faces"]))
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path}: cannot read the glyphs: {error}") from error
    return GlyphSet(_inflate(path, compressed, offsets, len(faces)), faces)


def _inflate(
    path: str | PathLike[str], compressed: NDArray[np.uint8], offsets: NDArray[np.int64], faces: int
) -> NDArray[np.uint8]:
    if not (1 <= faces <= MAX_FACES and offsets.shape == (faces + 1,) and offsets.dtype == np.int64):
        raise SourceError(f"{path}: expected offsets of {faces} faces, 1 to {MAX_FACES}, found {list(offsets.shape)}")
    if (
        compressed.dtype != np.uint8
        or offsets[0] != 0
        or offsets[-1] != compressed.size
        or (np.diff(offsets) < 0).any()
    ):
        raise SourceError(f"{path}: the offsets of the faces do not cover their {compressed.size} bytes")
    shape = (len(CHARACTERS), MASTER_SIZE, MASTER_SIZE)
    size_bytes = int(np.prod(shape))
    masters = np.empty((faces, *shape), np.uint8)
    for index in range(faces):
        inflater = zlib.decompressobj()
        try:
            # Bounded: a few damaged or hostile bytes may stand for gigabytes.
            raw = inflater.decompress(compressed[offsets[index] : offsets[index + 1]].tobytes(), size_bytes + 1)
        except zlib.error as error:
            raise SourceError(f"{path}: face {index} is damaged: {error}") from error
        if len(raw) != size_bytes or not inflater.eof:
            raise SourceError(f"{path}: face {index}: expected {size_bytes} bytes of masters, found {len(raw)} or more")
        masters[index] = np.frombuffer(raw, np.uint8).reshape(shape)
    return masters
