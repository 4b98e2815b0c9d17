"""`mgg-edge inspect`: what a bundle says about itself."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgg_edge.cli.bundle_name import bundle_file

if TYPE_CHECKING:
    from mgg_edge.manifest import Manifest

__all__ = ["describe", "inspect"]

MIB = 1 << 20


def inspect(
    bundle: Annotated[
        Path,
        typer.Argument(
            parser=bundle_file,
            metavar="BUNDLE",
            help="Bundle (.mgg) to look into; 'default' is the package's.",
            show_default=False,
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Verify a bundle and show what it holds.

    Every byte is checked against the hashes in the bundle; nothing is run.
    """
    from mgg_edge.container import read_container

    manifest, members, identity = read_container(bundle)
    sizes = {"manifest.json": len(manifest.to_json()), **{name: len(data) for name, data in members.items()}}
    facts = describe(manifest, identity, sizes)
    if json:
        import json as json_codec

        sys.stdout.write(json_codec.dumps(facts, indent=2, allow_nan=False) + "\n")
    else:
        _print(manifest, facts)


def describe(manifest: Manifest, identity: str, sizes: dict[str, int]) -> dict[str, Any]:
    """The facts about a bundle as plain JSON values.

    Args:
        manifest: the bundle's manifest.
        identity: bundle id, 64 hex digits.
        sizes: bytes of every member by name, the manifest included.
    """
    import json as json_codec

    facts: dict[str, Any] = json_codec.loads(manifest.to_json())
    norms = facts.pop("norms")
    labels = facts.pop("labels")
    state = facts.pop("state")
    members = facts.pop("members")
    return {
        "id": identity,
        **facts,
        "precision": manifest.precision,
        "labels": {"count": len(labels), "first": labels[:5]},
        "norms": {"parameters": len(norms), "scalars": manifest.layout.size, "names": [norm["name"] for norm in norms]},
        "state": {
            "tensors": state,
            "size_bytes": sum(math.prod(spec.shape) * 4 for spec in manifest.state),  # all float32, by the schema
        },
        "members": {name: {"size": size, **members.get(name, {"sha256": identity})} for name, size in sizes.items()},
        "size_bytes": sum(sizes.values()),
    }


def _print(manifest: Manifest, facts: dict[str, Any]) -> None:
    from mgg_edge.cli.display import print_facts, print_parity, print_table

    backbone, rule, objective = facts["backbone"], facts["rule"], facts["objective"]
    statistics, norms, state, labels = facts["statistics"], facts["norms"], facts["state"], facts["labels"]
    options = "".join(f", {name} {value}" for name, value in rule["options"].items())
    print_facts(
        {
            "bundle": f"{facts['id'][:16]} (schema {facts['schema']}, {facts['size_bytes'] / MIB:.1f} MiB)",
            "backbone": f"{backbone['name']}, weights {backbone['weights']}",
            "classes": f"{labels['count']}: {', '.join(labels['first'])}{', …' if labels['count'] > 5 else ''}",
            "pictures": manifest.preprocess.text,
            **(
                {"returns": f"{backbone['outputs']}, taken as logits"}
                if backbone.get("outputs", "logits") != "logits"
                else {}
            ),
            "batch": f"{facts['infer_batch']} to infer, {facts['adapt_batch']} to adapt",
            "rule": f"{rule['name']}, learning rate {rule['learning_rate']}{options}"
            + (f", from {rule['origin']}" if rule["origin"] else ""),
            "objective": f"{objective['entropy_weight']} entropy + {objective['discrepancy_weight']} discrepancy",
            "statistics": f"{statistics['images']} images of {statistics['source']}",
            "site": _site(manifest),
            "features": f"{backbone['features']} from {', '.join(tap['name'] for tap in facts['taps'])}",
            "adaptable": f"{norms['scalars']} scalars in {norms['parameters']} parameters",
            "state": f"{', '.join(spec['name'] for spec in state['tensors'])} ({state['size_bytes'] / MIB:.2f} MiB)",
            "inference reads": ", ".join(facts["infer_state"]),
            "graphs": f"opset {facts['opset']}, products on GPUs in {facts['precision']}",
            "made by": ", ".join(f"{name} {version}" for name, version in facts["producer"].items()) or "unknown",
        }
    )
    print_table(
        ("member", "bytes", "sha256"),
        [(name, str(member["size"]), member["sha256"]) for name, member in facts["members"].items()],
    )
    print_parity(manifest.parity)
    if manifest.half_parity is not None:
        print_parity(manifest.half_parity)


def _site(manifest: Manifest) -> str:
    site = manifest.site
    if site is None:
        return "none: not calibrated"
    return (
        f"{site.source}, {site.frames} pictures, verdict '{site.verdict}', {site.clean_changed:.1%} changed on clean, "
        f"made from {site.parent[:16]}"
    )
