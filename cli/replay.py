"""`mgg-edge replay`: does a recorded run come out the same, bit for bit, and if not, where does it part?"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from mgg_edge.cli.bundle_name import bundle_option, default_bundle
from mgg_edge.cli.engine_name import ENGINE_HELP, EngineName
from mgg_edge.errors import ParityError, UsageError

__all__ = ["replay"]


def replay(
    record: Annotated[Path, typer.Argument(help="Record (.mggrun) of 'run --record'.", show_default=False)],
    source: Annotated[str | None, typer.Option(help="The video or pictures of that run.", show_default=False)] = None,
    frames: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What 'run --record-frames' kept of it instead.", show_default=False),
    ] = None,
    bundle: Annotated[
        Path | None,
        bundle_option("Bundle (.mgg) of that run; the package's, 'default', when not given."),
    ] = None,
    engine: Annotated[EngineName, typer.Option(help=ENGINE_HELP)] = EngineName.AUTO,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the engine; as recorded by default.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Compute a recorded run anew and compare every hash; ends with exit code 4 at the first difference."""
    from mgg_edge.cli.display import Stages, log_to_terminal, print_facts
    from mgg_edge.runtime.bundle.bundle import Bundle
    from mgg_edge.runtime.engines.engine import open_engine
    from mgg_edge.runtime.sources.source_open import open_source
    from mgg_edge.runtime.store.record_file import Record
    from mgg_edge.runtime.store.record_pictures import KeptPictures
    from mgg_edge.runtime.store.record_replay import Replay

    if (source is None) == (frames is None):
        raise UsageError(f"replay: expected either --source or --frames, found {'both' if source else 'neither'}")
    console = log_to_terminal()
    recorded = Record.read(record)
    with contextlib.ExitStack() as stack:
        path = bundle or default_bundle()
        loaded = Bundle.load(path)
        kept = None if frames is None else KeptPictures.read(frames)
        pictures = () if source is None else stack.enter_context(open_source(source))
        counted = threads or recorded.header.get("facts", {}).get("threads")
        opened = open_engine(loaded, engine.value, threads=counted)
        stack.callback(opened.close)
        with Stages(console) as stages:
            report = Replay(recorded, loaded, opened, kept).run(
                (frame.image for frame in pictures), lambda done, total: stages("replay", done, total)
            )
    if json:
        import json as json_codec

        result = dataclasses.asdict(report) | {"complete": recorded.complete}
        sys.stdout.write(json_codec.dumps(result) + "\n")
    else:
        others = f"{report.skipped} others in the source" if kept is None else f"{report.not_kept} not kept"
        print_facts(
            {
                "frames": f"{report.frames} of {len(recorded.frames)} equal, {others}",
                "steps": f"{report.steps} computed anew, all equal" if report.steps else "none",
                "states": f"{report.states} of {len(recorded.events)} equal",
                "record": "complete" if recorded.complete else "cut short: the run was killed",
            }
        )
    if report.difference is not None:
        raise ParityError(f"{record}: first difference: {report.difference}")
