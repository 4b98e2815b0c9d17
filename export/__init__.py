"""Export: trace the step, lower it for each engine, check it, write the bundle."""

from mgg_edge.export.bundle import Origins, export_bundle
from mgg_edge.export.compose import ExportRequest, compose

__all__ = ["ExportRequest", "Origins", "compose", "export_bundle"]
