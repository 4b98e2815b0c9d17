"""Write what goes beside the default bundles: faces for the demonstration, and the model card.

    scripts/build_default          calls this last

Only rasters of freely licensed faces go into the package: all come from Debian's main archive, and the card lists each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import safetensors

from mgg_edge.errors import MggEdgeError
from mgg_edge.runtime import Bundle
from mgg_edge.scenes.glyphs import GlyphSet, load_glyphs, save_glyphs

MAX_FACES = 24
SEED = 7
BUNDLES = ("default.mgg", "reader-mgg.mgg")


def main() -> int:
    """Pack; exit status as the command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, required=True, help="folder of glyphs, reader and rules")
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundles")
    arguments = parser.parse_args()
    try:
        faces = _one_face_a_family(load_glyphs(arguments.parts / "glyphs.safetensors").select("test"))
        save_glyphs(arguments.out / "characters.safetensors", faces)
        (arguments.out / "MODEL_CARD.md").write_text(_card(arguments.parts, arguments.out, faces), encoding="utf-8")
    except (MggEdgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _one_face_a_family(glyphs: GlyphSet) -> GlyphSet:
    rng = np.random.default_rng(SEED)
    by_family: dict[str, list[int]] = {}
    for index, face in enumerate(glyphs.faces):
        by_family.setdefault(face.family, []).append(index)
    families = rng.permutation(sorted(by_family))[:MAX_FACES]
    chosen = sorted(int(rng.choice(by_family[family])) for family in families)
    return GlyphSet(glyphs.masters[chosen], tuple(glyphs.faces[index] for index in chosen))


def _card(parts: Path, out: Path, faces: GlyphSet) -> str:
    report = json.loads((parts / "reader.json").read_text())
    rules = {name: _report(parts / f"{name}.safetensors") for name in ("forward", "mgg")}
    table = "\n".join(f"| {path.name} | `{_sha256(path)}` |" for path in _files(parts, out))
    learned = "; ".join(
        f"`{name}`: {facts['updates']} updates, seed {facts['seed']}, held-out agreement {facts['held_out_score']:.3f}"
        for name, facts in rules.items()
    )
    listed = "\n".join(f"| {face.name} | {face.package} {face.version} | {face.licence} |" for face in faces.faces)
    recipe = report["recipe"]
    return f"""# The reader

Reads one character, A–Z or 0–9, in a picture of 32 × 32 pixels, and adapts to weather without labels.

- *Model*: timm `{report["model"]}`, a vision transformer of width 96 and depth 6 with a convolutional stem, 729 k
  parameters; 2,496 of them, the normalisation's, adapt.
- *Data*: {report["faces"]} faces of {report["families"]} type families from Debian's main archive, split by family,
  rendered on the fly. No photographs, no people.
- *Source training*: {recipe["epochs"]} epochs of {recipe["images_per_epoch"]:,} pictures, seed {recipe["seed"]},
  {report["seconds"] / 60:.0f} minutes on two cores. Accuracy {report["validation_accuracy"]:.1%} on validation
  families, {report["test_accuracy"]:.1%} on test families.
- *Rules*: {learned}. Learned on random generic
  weathers over the training families; none of them is a corruption of the tests.
- *Limits*: single upright characters (±10°) of ordinary typefaces, centred. Not for text lines, handwriting, Fraktur or
  symbols. Under weather that hides the strokes no rule can help.
- *Rebuild*: `scripts/build_default`. Figures: docs/RESULTS.md.

## Files

| file | SHA-256 |
|---|---|
{table}

The two bundles by id: {", ".join(f"`{name}` {Bundle.load(out / name).id[:16]}" for name in BUNDLES)}.

## Faces in characters.safetensors

| face | package | licence |
|---|---|---|
{listed}
"""


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(parts: Path, out: Path) -> list[Path]:
    inputs = [parts / f"{name}.safetensors" for name in ("glyphs", "reader", "forward", "mgg")]
    return [*inputs, *(out / name for name in (*BUNDLES, "characters.safetensors"))]


def _report(path: Path) -> dict[str, object]:
    with safetensors.safe_open(path, "numpy") as file:
        found: dict[str, object] = json.loads((file.metadata() or {})["report"])
    return found


if __name__ == "__main__":
    sys.exit(main())
