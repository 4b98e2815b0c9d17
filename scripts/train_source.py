"""Train the default backbone on the glyphs of the source families; ten minutes on two cores.

    scripts/train_source --glyphs glyphs.safetensors --out reader.safetensors

Interrupted, the same command goes on from the last whole epoch. The model is written only at the end; beside it stands
reader.json: recipe, hash of the glyphs, accuracy after each epoch on the validation families and at the end on the
test families.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save

import mgg_edge.learn.reader
from mgg_edge.errors import MggEdgeError
from mgg_edge.learn.checkpoint import write_file
from mgg_edge.learn.training.source import SourceRecipe, accuracy, train_source
from mgg_edge.scenes.glyphs import GlyphSet, load_glyphs
from mgg_edge.scenes.sources import GlyphSource, LabelledFrames

READER = mgg_edge.learn.reader.READER_NAME
VALIDATION_PICTURES, TEST_PICTURES = 4_000, 8_000
VALIDATION_SEED, TEST_SEED = 1, 2


def main() -> int:
    """Train; exit status as the command line's."""
    arguments = _parser().parse_args()
    recipe = SourceRecipe(epochs=arguments.epochs, images_per_epoch=arguments.images, seed=arguments.seed)
    try:
        report = _train(arguments, recipe)
    except MggEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last whole epoch", file=sys.stderr)
        return 130
    print(json.dumps(report))
    return 0


def _train(arguments: argparse.Namespace, recipe: SourceRecipe) -> dict[str, object]:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    glyphs = load_glyphs(arguments.glyphs)
    source = GlyphSource(glyphs.select("source-train"))
    validation = _pictures(glyphs.select("source-validation"), VALIDATION_PICTURES, VALIDATION_SEED)
    torch.manual_seed(recipe.seed)
    model = timm.create_model(READER).to(arguments.device)
    started, curve = time.monotonic(), []
    resume = arguments.out.with_suffix(".resume")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=recipe.epochs * recipe.steps_per_epoch)
        for progress in train_source(model, source, validation, recipe, resume):
            if progress.accuracy is not None:
                curve.append({"step": progress.step, "loss": progress.loss, "validation": progress.accuracy})
                bar.console.print(f"step {progress.step}  loss {progress.loss:.3f}  validation {progress.accuracy:.3f}")
            bar.update(task, completed=progress.step, description=f"loss {progress.loss:.3f}")
    report: dict[str, object] = {
        "model": READER,
        "recipe": dataclasses.asdict(recipe),
        "glyphs_sha256": hashlib.sha256(arguments.glyphs.read_bytes()).hexdigest(),
        "faces": len(glyphs),
        "families": len(glyphs.families),
        "validation_accuracy": accuracy(model, validation),
        "test_accuracy": accuracy(model, _pictures(glyphs.select("test"), TEST_PICTURES, TEST_SEED)),
        "epochs": curve,
        "seconds": round(time.monotonic() - started, 1),
    }
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    write_file(arguments.out, save(weights, {"model": READER, "report": json.dumps(report)}))
    write_file(arguments.out.with_suffix(".json"), json.dumps(report, indent=1).encode())
    resume.unlink(missing_ok=True)
    return report


def _pictures(glyphs: GlyphSet, count: int, seed: int) -> LabelledFrames:
    rng = np.random.default_rng(seed)
    source = GlyphSource(glyphs)
    labels = rng.choice(source.available, count)
    return LabelledFrames(source.draw(labels, rng), labels)


def _parser() -> argparse.ArgumentParser:
    recipe = SourceRecipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glyphs", type=Path, required=True, help="what scripts/build_data wrote")
    parser.add_argument("--out", type=Path, required=True, help="model file to write, .safetensors")
    parser.add_argument("--epochs", type=int, default=recipe.epochs)
    parser.add_argument("--images", type=int, default=recipe.images_per_epoch, help="pictures of an epoch")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; by default as many as it takes")
    parser.add_argument("--device", default="cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
