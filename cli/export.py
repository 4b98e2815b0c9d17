"""`mgg-edge export`: write a bundle from a classifier."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from mgg_edge.cli.display import Stages, log_to_terminal, print_parity
from mgg_edge.cli.model_words import BackboneName, Crop, Interpolation, Labels, Mean, OutputsName, Std, preparation
from mgg_edge.manifest import Precision

__all__ = ["export"]


def export(
    backbone: BackboneName,
    out: Annotated[Path, typer.Option(help="Bundle to write.")],
    weights: Annotated[
        str, typer.Option(help="FILE (.safetensors, .pth) or its folder, 'pretrained', 'package' or 'random'.")
    ] = "pretrained",
    source_data: Annotated[
        Path | None, typer.Option(help="Directory of at least 32 clean images, or a glyph file.")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="mgg, mgg+, adam+, forward, statistics, adam, sgd; the file's, or mgg.")
    ] = None,
    mgg: Annotated[
        Path | None,
        typer.Option(help="Learned rule: what `mgg-edge train` wrote, a released MGG (.pth), or 'package'."),
    ] = None,
    batch: Annotated[int, typer.Option(min=2, help="Frames per adaptation step.")] = 8,
    labels: Labels = None,
    learning_rate: Annotated[float | None, typer.Option(help="α; the rule's own by default.")] = None,
    entropy_weight: Annotated[float, typer.Option(min=0, help="Weight of the entropy.")] = 1.0,
    discrepancy_weight: Annotated[float, typer.Option(min=0, help="λ on the mean squared discrepancy.")] = 57.6,
    image_size: Annotated[int | None, typer.Option(min=8, help="Square input, pixels; the model's by default.")] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="Number of classes; the weights' by default.")] = None,
    adapt: Annotated[str, typer.Option(help="Norms that adapt: all, last:K or a regular expression.")] = "all",
    taps: Annotated[str | None, typer.Option(help="Modules the features come from, a regular expression.")] = None,
    norm_statistics: Annotated[
        str | None,
        typer.Option(help="Of batch normalisation: source, batch or mix:ALPHA; mix:0.1, or source for a learned rule."),
    ] = None,
    mean: Mean = None,
    std: Std = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    outputs: Annotated[
        OutputsName | None, typer.Option(help="What the model returns; logits by default, and checked.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights and of an untrained rule.")] = 0,
    precision: Annotated[
        Precision, typer.Option(help="Of the large products on GPUs; norms, loss and rule stay in float32.")
    ] = Precision.FLOAT32,
    engine: Annotated[
        str | None, typer.Option(help="Build engines as well: tensorrt, or for other devices tensorrt:sm86,sm89.")
    ] = None,
    workspace: Annotated[int | None, typer.Option(min=1, help="Scratch memory of an engine, MiB.")] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="How long TensorRT searches for faster kernels.")
    ] = None,
    parity_steps: Annotated[int, typer.Option(min=5, help="Adaptation steps of the numeric check.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Trace a classifier with its adaptation step, check it against float64, and write one bundle file."""
    from mgg_edge.export import ExportRequest, compose, export_bundle
    from mgg_edge.learn import Objective
    from mgg_edge.runtime.engines.tensorrt_build import BuildOptions
    from mgg_edge.runtime.engines.tensorrt_plans import build_engines, parse_engine

    aim = None if engine is None else parse_engine(engine)
    options = BuildOptions(workspace, optimization_level)
    start = time.perf_counter()
    console = log_to_terminal()
    objective = Objective(entropy_weight, discrepancy_weight)
    request = ExportRequest(
        backbone, weights, seed, source_data, rule, mgg, labels, learning_rate, objective, image_size, classes,
        adapt, taps, norm_statistics, outputs and outputs.value, preparation(mean, std, crop, interpolation),
    )  # fmt: skip
    with Stages(console) as stages:
        step, names, origins = compose(request, stages)
        console.print(f"pictures: {step.backbone.preprocess.text}", highlight=False, soft_wrap=True)
        manifest = export_bundle(
            step, out, adapt_batch=batch, labels=names, origins=origins, parity_steps=parity_steps,
            precision=precision.value, progress=stages,
        )  # fmt: skip
        built = () if aim is None else build_engines(out, aim, options, progress=stages)
    size_bytes, export_s = out.stat().st_size, time.perf_counter() - start
    if as_json:
        report = {"bundle": str(out), "size_bytes": size_bytes, "export_s": round(export_s, 2)}
        parity = None if manifest.parity is None else dataclasses.asdict(manifest.parity)
        half = None if manifest.half_parity is None else dataclasses.asdict(manifest.half_parity)
        engines = [{"engine": str(plan.path), "size_bytes": plan.path.stat().st_size} for plan in built]
        sys.stdout.write(json.dumps({**report, "parity": parity, "half_parity": half, "engines": engines}) + "\n")
        return
    print_parity(manifest.parity)
    if manifest.half_parity is not None:
        print_parity(manifest.half_parity)
    sys.stdout.write(f"{out}: {size_bytes / 1e6:.1f} MB in {export_s:.1f} s\n")
    for plan in built:
        sys.stdout.write(f"{plan.path}: {plan.what}, {plan.path.stat().st_size / 1e6:.1f} MB\n")
