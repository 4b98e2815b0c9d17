"""Evaluation: methods on streams, in parallel and resumable, and what comes out as tables, plots and one HTML file."""

from mgg_edge.learn.evaluation.executors import EXECUTORS
from mgg_edge.learn.evaluation.jobs import Job, PartStore, Row
from mgg_edge.learn.evaluation.sweep import make_jobs, run_sweep
from mgg_edge.learn.evaluation.tables import Summary, means, rows_as_csv, summarise, summary_table, verdicts
from mgg_edge.learn.evaluation.trial import CHECKPOINTS, Checks, LabelledBatch, LabelledSet, Result, evaluate

__all__ = [
    "CHECKPOINTS",
    "EXECUTORS",
    "Checks",
    "Job",
    "LabelledBatch",
    "LabelledSet",
    "PartStore",
    "Result",
    "Row",
    "Summary",
    "evaluate",
    "make_jobs",
    "means",
    "rows_as_csv",
    "run_sweep",
    "summarise",
    "summary_table",
    "verdicts",
]
