"""`mgg-edge demo`: a reader that heals itself, beside one that does not."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["demo"]


def demo(
    save: Annotated[Path | None, typer.Option(help="Write a video to watch here (.mp4, .mov, .mkv or .avi).")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of each of the six stretches of weather.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of characters, fonts and weather.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a frame, and a summary.")] = False,
    real: Annotated[
        bool,
        typer.Option("--real", help="Photographs, ImageNet's classes and a camera's rule; needs the export extra."),
    ] = False,
    pictures: Annotated[
        Path | None, typer.Option(help="For --real: the folder scripts/build_objects makes.", show_default=False)
    ] = None,
) -> None:
    """Read characters of unseen fonts through fog, noise, blur and night: frozen, with the MGG, and by default.

    The stream is labelled, so that you see who reads right; the readers see no label. With --real it is a camera that
    different things pass: half of them calibrate it in clear weather, the others come by in fog, noise, blur and frost.
    """
    if real:
        from mgg_edge.cli.demo_real import demo_real

        demo_real(pictures, save, seed, as_json=as_json)
        return
    from mgg_edge.cli.display import DemoDisplay, log_to_terminal, print_facts, print_table
    from mgg_edge.runtime.demo import ADAPTED, READERS, Scores, open_readers
    from mgg_edge.runtime.sources.source_demo import COURSE, demo_frames
    from mgg_edge.scenes.glyphs import CHARACTERS

    console = log_to_terminal()
    scores = Scores()
    with contextlib.ExitStack() as stack:
        total = frames * len(COURSE)
        video = _video(save, total, stack)
        readers, glyphs = stack.enter_context(open_readers())
        with DemoDisplay(console, scores, total) as display:
            for frame in demo_frames(glyphs, frames, seed):
                predictions = {name: readers[name](frame.image) for name in READERS}
                scores.add(frame, predictions)
                display(frame)
                if video is not None:
                    video.add(frame, predictions, scores)
                if as_json:
                    labels = {name: prediction.label for name, prediction in predictions.items()}
                    line = {"frame": frame.index, "weather": frame.weather, "label": CHARACTERS[frame.label], **labels}
                    sys.stdout.write(json.dumps(line) + "\n")
        if video is not None:
            video.close()
        steps = {name: readers[name].counters.adapt_steps for name in READERS}
    summary = {**scores.summary(), "adapt_steps": steps, "seed": seed}
    if as_json:
        sys.stdout.write(json.dumps({"summary": summary}) + "\n")
        return
    rows = [[entry["weather"], *(f"{entry[name]:.1%}" for name in READERS)] for entry in summary["stretches"]]
    rows.append(["in all", *(f"{summary[f'accuracy_{name}']:.1%}" for name in READERS)])
    print_table(["weather", *READERS], rows)
    if save is not None:
        print_facts({"saved": str(save)})
    if summary[f"accuracy_{ADAPTED}"] <= summary["accuracy_frozen"]:
        console.print("the adapted reader is not ahead on this stream", style="yellow")


def _video(path: Path | None, frames: int, stack: contextlib.ExitStack) -> Any:
    if path is None:
        return None
    from mgg_edge.runtime.demo_picture import DemoVideo

    video = DemoVideo(path, frames)
    stack.callback(video.abort)
    return video
