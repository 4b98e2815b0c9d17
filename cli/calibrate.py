"""`mgg-edge calibrate`: a bundle for the place a camera looks at."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mgg_edge.cli.bundle_name import bundle_option
from mgg_edge.cli.stop_request import StopRequest

__all__ = ["calibrate"]


def calibrate(
    bundle: Annotated[
        Path,
        bundle_option("Bundle (.mgg) to start from; 'default' is the package's."),
    ],
    source: Annotated[str, typer.Option(help="Clean pictures of the site: anything `run --source` takes.")],
    out: Annotated[Path, typer.Option(help="Bundle for the site to write.")],
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.05, max=1440, help="Minutes of footage; 3 of a camera, all of a file by default.", show_default=False
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine; all cores by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what a site looks like when all is well, and what adapting is worth there.

    A few minutes of clean footage in which something moves, no labels; Ctrl-C makes do with what there is. Weights and
    graphs stay as they are; the new bundle has its own id, the site's statistics, canary frames and a verdict, which
    `run` obeys unless --adapt says otherwise.
    """
    from mgg_edge.cli.display import Stages, log_to_terminal, print_facts, print_table
    from mgg_edge.runtime.adaptation.calibration import calibrate as calibrate_bundle
    from mgg_edge.runtime.sources.source_open import open_source

    console = log_to_terminal()
    with StopRequest() as stopper, open_source(source) as opened, Stages(console) as stages:
        seconds = None if minutes is None else 60 * minutes
        stop = lambda: stopper.signal is not None  # noqa: E731
        site = calibrate_bundle(bundle, opened, out, threads=threads, seconds=seconds, stop=stop, progress=stages)
    if as_json:
        sys.stdout.write(json.dumps({"out": str(out), **dataclasses.asdict(site)}) + "\n")
        return
    rows = [(row.kind, f"{row.frozen:.1%}", f"{row.adapted:.1%}") for row in site.rows]
    count = len(site.rows)
    means = [sum(getattr(row, name) for row in site.rows) / count for name in ("frozen", "adapted")]
    print_table(("agreement with clean", "frozen", "adapted"), [*rows, ("mean", *(f"{mean:.1%}" for mean in means))])
    print_facts(
        {
            "clean pictures": f"{site.frames} of {site.source}",
            "changed on clean": f"{site.clean_changed:.1%}",
            "verdict": site.verdict,
            "written": str(out),
        }
    )
