"""`mgg-edge bench`: what a bundle costs on this machine, beside the same model in plain ONNX Runtime."""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgg_edge.cli.bundle_name import bundle_option, default_bundle
from mgg_edge.cli.engine_name import ENGINE_HELP, EngineName
from mgg_edge.errors import MggEdgeError

if TYPE_CHECKING:
    from mgg_edge.cli.display import Stages
    from mgg_edge.runtime.bundle.bundle import Bundle

__all__ = ["bench"]

_logger = logging.getLogger(__name__)
FILM = "synthetic:frames=300,width=640,height=480"


def bench(
    bundle: Annotated[
        Path | None,
        bundle_option("Bundle (.mgg); the package's, 'default', when not given."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="ONNX file of the same model without mgg-edge: one input of scaled pixels, NCHW in float32. Where "
            "PyTorch is installed, it is made of the bundle when not given.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str,
        typer.Option(help="Film whose frames per second are measured, as run takes it.", show_default="300 made up"),
    ] = FILM,
    limit: Annotated[int | None, typer.Option(min=1, help="Frames of the film.", show_default=False)] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Calls of each kind, in turns.")] = 30,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a graph; all cores by default.", show_default=False)
    ] = None,
    engine: Annotated[EngineName, typer.Option(help=ENGINE_HELP)] = EngineName.CPU,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Measure inference, the step and its verification, a film, start and memory.

    What is compared runs in turns, medians are shown with minima beside them. Other work on the machine slows all of
    it, but not evenly: measure on a quiet one.
    """
    from mgg_edge.cli.display import Stages, log_to_terminal
    from mgg_edge.runtime.bundle.bundle import Bundle
    from mgg_edge.runtime.engines.threads import usable_cores

    console = log_to_terminal()
    count = min(threads or usable_cores(), usable_cores())
    with contextlib.ExitStack() as stack:
        loaded = Bundle.load(bundle or default_bundle())
        with Stages(console) as stages:
            plain, floor = stack.enter_context(_reference(loaded, against))
            found = _measure(loaded, plain, engine.value, count, rounds, (source, limit), stages)
    found["floor"] = floor
    if json:
        import json as json_codec

        sys.stdout.write(json_codec.dumps(found) + "\n")
    else:
        _print(found)


@contextlib.contextmanager
def _reference(bundle: Bundle, against: Path | None) -> Iterator[tuple[Path | None, float | None]]:
    """The plain file and the floor of the step, as far as they can be had here."""
    try:
        from mgg_edge.export.plain import step_floor, write_plain
    except ModuleNotFoundError:
        yield against, None
        return
    with tempfile.TemporaryDirectory() as folder:
        floor, own = None, Path(folder) / "plain.onnx"
        try:
            floor = round(step_floor(bundle), 4)
            if against is None:
                write_plain(bundle, own)
        except MggEdgeError as error:
            _logger.warning("the model cannot be built here, so that nothing is made to compare with: %s", error)
        yield own if own.exists() else against, floor


def _measure(
    bundle: Bundle,
    plain: Path | None,
    name: str,
    threads: int,
    rounds: int,
    film: tuple[str, int | None],
    stages: Stages,
) -> dict[str, Any]:
    from mgg_edge.runtime.bench import film_cost, inference_costs, measure_start, step_costs, swap_cost
    from mgg_edge.runtime.engines.engine import open_engine

    parts = 5
    stages("start", 0, parts)
    start = measure_start(bundle, name, threads)
    engine = open_engine(bundle, name, threads=threads)
    with contextlib.closing(engine):
        stages("inference", 1, parts)
        inference = inference_costs(bundle, engine, threads, rounds, plain)
        stages("step", 2, parts)
        steps, canaries = step_costs(bundle, engine, rounds)
        stages("swap", 3, parts)
        swap = swap_cost(bundle, engine, 10 * rounds)
        stages("film", 4, parts)
        rate, percentiles, made = film_cost(bundle, engine, *film)
        stages("film", parts, parts)
    manifest, forward = bundle.manifest, inference["forward"]
    calls = manifest.adapt_batch / manifest.infer_batch
    found: dict[str, Any] = {
        "bundle": bundle.id,
        "backbone": manifest.backbone.name,
        "rule": manifest.rule.name,
        "engine": engine.name,
        "threads": threads,
        "batch": manifest.infer_batch,
        "adapt_batch": manifest.adapt_batch,
    }
    for key, cost in (
        ("forward", forward),
        ("settled_forward", inference["settled"]),
        ("settled_features", inference["settled_features"]),
        ("plain_forward", inference.get("plain")),
        ("step", steps["step"]),
    ):
        found[f"{key}_ms"] = None if cost is None else round(cost.median, 4)
        found[f"{key}_ms_min"] = None if cost is None else round(cost.minimum, 4)
    verification = steps["verified"].median - steps["attempt"].median
    return found | {
        "step_over_forward": round(steps["step"].median / (forward.median * calls), 4),
        "verification_ms": round(max(verification, 0.0), 4),
        "canaries": canaries,
        "frames_per_s": round(rate, 2),
        "film_steps": made,
        "p50_ms": percentiles.p50,
        "p95_ms": percentiles.p95,
        "p99_ms": percentiles.p99,
        "swap_p99_ratio": None if swap is None else round(swap[1] / swap[0], 4),
        "cold_start_ms": round(start.cold_start_ms, 1),
        "open_ms": round(start.open_ms, 1),
        "peak_rss_mb": round(start.peak_rss_mb, 1),
    }


def _print(found: dict[str, Any]) -> None:
    from mgg_edge.cli.display import print_facts, print_table

    plain = found["plain_forward_ms"], found["plain_forward_ms_min"]
    names = {
        "plain_forward": "model in plain ONNX Runtime",
        "settled_forward": "inference, θ at rest",
        "settled_features": "the same, with features",
        "forward": "inference, θ moving",
        "step": f"step on {found['adapt_batch']} frames",
    }
    rows = []
    for key, name in names.items():
        if (median := found[f"{key}_ms"]) is not None:
            least = found[f"{key}_ms_min"]
            ratios = [] if None in plain else [f"{median / plain[0]:.2f}", f"{least / plain[1]:.2f}"]
            rows.append((name, f"{median:.2f}", f"{least:.2f}", *ratios))
    print_table(("ms", "median", "min", *([] if None in plain else ["× plain", "× plain, min"])), rows)
    floor = "" if found["floor"] is None else f", no less than {found['floor']:.2f} by its arithmetic"
    facts = {
        "step over forward": f"{found['step_over_forward']:.2f} × the forward of its frames{floor}",
        "verification": f"{found['verification_ms']:.2f} ms on {found['canaries']} canaries",
        "film": f"{found['frames_per_s']:.1f} frames/s, {found['film_steps']} steps; inference "
        f"{found['p50_ms']:.2f} ms median, {found['p95_ms']:.2f} p95, {found['p99_ms']:.2f} p99",
        "start": f"first prediction after {found['cold_start_ms']:.0f} ms, {found['open_ms']:.0f} of them opening",
        "memory": f"{found['peak_rss_mb']:.0f} MB at most, two steps made",
        "engine": f"{found['engine']}, {found['threads']} threads, {found['batch']} frames a call",
    }
    if found["swap_p99_ratio"] is not None:
        facts["folding beside"] = f"p99 of inference {found['swap_p99_ratio']:.2f} × what it is alone"
    print_facts(facts)
