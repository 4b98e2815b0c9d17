"""`mgg-edge demo --real`: a camera that different things pass, frozen beside adapted."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from mgg_edge.errors import UsageError

__all__ = ["demo_real"]

BACKBONE, SIDE, BATCH, PARITY_STEPS = "efficientnet_lite0", 160, 8, 5


def demo_real(pictures: Path | None, save: Path | None, seed: int, *, as_json: bool) -> None:
    """Export the net with its packaged weights and rule, calibrate, read the film twice, print who was right.

    Raises:
        MissingDependencyError: the package of the weights is not installed.
        UsageError: no folder of pictures.
    """
    from mgg_edge.cli.display import Stages, log_to_terminal, print_facts, print_table
    from mgg_edge.export import ExportRequest, compose, export_bundle
    from mgg_edge.runtime.adaptation.calibration import calibrate
    from mgg_edge.runtime.demo import stretches
    from mgg_edge.runtime.demo_camera import READERS, make_film, read_film, write_film
    from mgg_edge.runtime.sources.source import IteratorSource

    if pictures is None:
        raise UsageError("demo --real: expected --pictures FOLDER, which scripts/build_objects makes")
    console = log_to_terminal()
    with Stages(console) as stages, tempfile.TemporaryDirectory() as folder:
        film = make_film(pictures, seed)
        bundle, site = Path(folder) / "camera.mgg", Path(folder) / "site.mgg"
        request = ExportRequest(BACKBONE, "package", mgg=Path("package"), image_size=SIDE, norm_statistics="source")
        step, labels, origins = compose(request, stages)
        export_bundle(
            step, bundle, adapt_batch=BATCH, labels=labels, origins=origins, parity_steps=PARITY_STEPS, progress=stages
        )
        found = calibrate(bundle, IteratorSource(film.clear), site, threads=1, progress=stages)
        reading = read_film(film, site, stages)
        if save is not None:
            write_film(save, film, reading)
    shares = [
        (film.weathers[span.start], {name: reading.share(name, span) for name in READERS})
        for span in stretches(film.weathers)
    ]
    if as_json:
        rows = [{"weather": weather, **own} for weather, own in shares]
        sys.stdout.write(json.dumps({"stretches": rows, "verdict": found.verdict, "frames": len(film.frames)}) + "\n")
        return
    print_table(
        ["weather", *READERS], [[weather, *(f"{own[name]:.1%}" for name in READERS)] for weather, own in shares]
    )
    print_facts({"calibrated": found.verdict} | ({} if save is None else {"saved": str(save)}))
