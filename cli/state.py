"""`mgg-edge state`: what cameras have learned: show it, compare it, forget it, take it elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgg_edge.errors import SinkError, UsageError

if TYPE_CHECKING:
    from mgg_edge.runtime.store.state_file_format import SavedState
    from mgg_edge.state import AdaptState

__all__ = ["state_app"]

state_app = typer.Typer(
    help="State files of 'mgg-edge run --state DIR': what each camera has learned.", no_args_is_help=True
)
Directory = Annotated[Path, typer.Argument(help="Directory given to 'run --state'.", show_default=False)]
Camera = Annotated[str | None, typer.Option(help="This camera only.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


@state_app.command(epilog="Example: mgg-edge state show states/")
def show(directory: Directory, camera: Camera = None, json: AsJson = False) -> None:
    """Show the newest whole state of each camera."""
    facts = {name: _facts(_newest(directory, name)) for name in _cameras(directory, camera)}
    if json:
        import json as json_codec

        sys.stdout.write(json_codec.dumps(facts, indent=2, allow_nan=False) + "\n")
        return
    from mgg_edge.cli.display import print_facts

    if not facts:
        sys.stderr.write(f"{directory}: no states: no camera has learned anything yet\n")
    for name, one in facts.items():
        counters = ", ".join(f"{key} {value}" for key, value in one["counters"].items() if value)
        print_facts(
            {
                "camera": name,
                "bundle": one["bundle"],
                "updates": f"{one['step']}, saved {one['generation'] + 1} times",
                "schedule": f"{one['schedule']} {one['schedule_numbers'] or ''}".rstrip(),
                "guard": f"rung {one['guard']['rung']}, frozen for {one['guard']['frozen_frames']} frames",
                "snapshots": str(one["snapshots"]),
                "hash": one["state"],
                "last run": counters or "nothing done",
            }
        )


@state_app.command(epilog="Example: mgg-edge state diff states/gate.0.mggstate model.mgg")
def diff(
    first: Annotated[Path, typer.Argument(help="State file, or bundle for the source model.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    json: AsJson = False,
) -> None:
    """Compare two states, array by array."""
    import numpy as np

    (first_bundle, before), (second_bundle, after) = _read(first), _read(second)
    if first_bundle != second_bundle:
        raise UsageError(f"expected two states of one bundle, found bundle {first_bundle} and bundle {second_bundle}")
    after.check(before.specs)
    rows = {}
    for name, array in before.items():
        change = np.subtract(after[name], array, dtype=np.float64)
        norm = float(np.linalg.norm(array.astype(np.float64)))
        rows[name] = {
            "equal": array.tobytes() == after[name].tobytes(),
            "largest_change": float(np.abs(change).max()),
            "relative_change": float(np.linalg.norm(change)) / norm if norm > 0 else None,
        }
    if json:
        import json as json_codec

        sys.stdout.write(json_codec.dumps({"bundle": first_bundle, "arrays": rows}, indent=2, allow_nan=False) + "\n")
        return
    from mgg_edge.cli.display import print_table

    print_table(
        ("array", "equal", "largest change", "relative L2 change"),
        [(name, "yes" if row["equal"] else "no", *map(_number, list(row.values())[1:])) for name, row in rows.items()],
    )


@state_app.command(epilog="Example: mgg-edge state reset states/ --camera gate")
def reset(directory: Directory, camera: Camera = None) -> None:
    """Delete the states of one camera, or of all: they begin anew with the source model."""
    from mgg_edge.runtime.store.state_file import StateStore

    for name in _cameras(directory, camera):
        store = StateStore(directory, name, "")
        with store.locked():
            for path in store.paths():
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise SinkError(f"{path}: cannot be deleted: {error.strerror or error}") from error
        sys.stdout.write(f"{name}: begins anew\n")


@state_app.command(epilog="Example: mgg-edge state restore states/ --camera gate states/gate.20261128T101500Z.mggstate")
def restore(
    directory: Directory,
    kept: Annotated[Path, typer.Argument(help="State file to go back to, such as a snapshot.", show_default=False)],
    camera: Annotated[str, typer.Option(help="Whose state.", show_default=False)],
) -> None:
    """Let a camera go on from a state that was kept."""
    from mgg_edge.runtime.store.state_file import StateStore

    _cameras(directory, None)
    saved = _saved(kept)
    store = StateStore(directory, camera, saved.checkpoint.bundle_id)
    with store.locked():
        store.save(saved.checkpoint)
    sys.stdout.write(f"{camera}: goes on from {kept}, after {saved.checkpoint.step} updates\n")


@state_app.command(epilog="Example: mgg-edge state export states/ --camera gate --out gate.safetensors")
def export(
    directory: Directory,
    camera: Annotated[str, typer.Option(help="Whose state.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.", show_default=False)],
) -> None:
    """Write θ and what the update rule remembers as a safetensors file, names as in the graphs."""
    import safetensors.numpy

    from mgg_edge.runtime.store.state_file_system import RealFiles, write_durably

    saved = _newest(directory, camera)
    metadata = {"bundle": saved.checkpoint.bundle_id, "camera": camera, "step": str(saved.checkpoint.step)}
    data = safetensors.numpy.save(dict(saved.checkpoint.state), metadata)
    try:
        write_durably(RealFiles(), out, data)
    except OSError as error:
        raise SinkError(f"{out}: cannot be written: {error.strerror or error}") from error


def _cameras(directory: Path, camera: str | None) -> list[str]:
    from mgg_edge.runtime.store.state_file import cameras_in

    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory; it is made by 'mgg-edge run --state'")
    names = cameras_in(directory)
    if camera is None:
        return names
    if camera not in names:
        raise UsageError(f"{directory}: expected a camera of {', '.join(names) or 'none'}, found '{camera}'")
    return [camera]


def _newest(directory: Path, camera: str) -> SavedState:
    from mgg_edge.runtime.store.state_file import newest_state

    saved = newest_state(directory, _cameras(directory, camera)[0])
    if saved is None:
        raise UsageError(f"{directory}: camera '{camera}' has no state")
    return saved


def _facts(saved: SavedState) -> dict[str, Any]:
    checkpoint = saved.checkpoint
    return {
        "bundle": checkpoint.bundle_id,
        "generation": saved.generation,
        "step": checkpoint.step,
        "state": checkpoint.state.digest(),
        "arrays": {spec.name: list(spec.shape) for spec in checkpoint.state.specs},
        "schedule": checkpoint.schedule,
        "schedule_numbers": dict(checkpoint.schedule_numbers),
        "guard": dict(checkpoint.ladder_numbers),
        "snapshots": len(checkpoint.snapshots),
        "counters": dict(checkpoint.counters),
    }


def _read(path: Path) -> tuple[str, AdaptState]:
    """Bundle id and state of a state file or of a bundle's source model."""
    from mgg_edge.runtime.bundle.bundle import Bundle
    from mgg_edge.runtime.store.state_file import SUFFIX

    if path.suffix != SUFFIX:
        bundle = Bundle.load(path)
        return bundle.id, bundle.initial_state
    checkpoint = _saved(path).checkpoint
    return checkpoint.bundle_id, checkpoint.state


def _saved(path: Path) -> SavedState:
    """What a state file holds."""
    from mgg_edge.runtime.store.state_file_format import decode_state

    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    return decode_state(data, str(path))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
