"""What a bundle says about the place it runs at: which schedule is the default there, and what a user should know."""

from __future__ import annotations

from mgg_edge.manifest import Manifest
from mgg_edge.runtime.adaptation.schedule import AUTO

__all__ = ["default_schedule", "site_note"]


def default_schedule(manifest: Manifest) -> str:
    """The schedule of `auto`: the verdict of a calibration, or else what the rule is made for."""
    if manifest.site is not None and manifest.site.verdict != "adapt":
        return {"burst only": "burst", "do not adapt": "off"}[manifest.site.verdict]
    return manifest.rule.schedule


def site_note(manifest: Manifest, adapt: str) -> str | None:
    """A line for the user of a run with `adapt`, or None where there is nothing to say."""
    site = manifest.site
    if adapt == "off":
        return None
    if site is None:
        return (
            "the bundle knows no site: its source statistics are of other pictures than this camera's; calibrate with "
            "`mgg-edge calibrate --bundle … --source clean.mp4 --out site.mgg`"
        )
    if adapt == AUTO and site.verdict != "adapt":
        return f"calibration on {site.source} said '{site.verdict}': --adapt {default_schedule(manifest)}"
    return None
