"""Glyph masters of Pillow's own font, for tests that need characters and no file."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mgg_edge.scenes.glyphs import CHARACTERS, MASTER_SIZE, SPLITS, Face, GlyphSet, split_of


def family_of(split):
    """A family name that falls into a split."""
    return next(name for name in map(str, range(1000)) if split_of(name) == split)


def drawn_glyphs():
    """One face in each split, all with the same masters."""
    masters = np.zeros((len(CHARACTERS), MASTER_SIZE, MASTER_SIZE), np.uint8)
    for master, character in zip(masters, CHARACTERS, strict=True):
        image = Image.new("L", (MASTER_SIZE, MASTER_SIZE))
        ImageDraw.Draw(image).text((10, 2), character, fill=255, font=ImageFont.load_default(38))
        master[:] = np.asarray(image)
    faces = tuple(Face(family_of(split), f"{split} Regular") for split in SPLITS)
    return GlyphSet(np.stack([masters] * len(SPLITS)), faces)
