"""A sweep: methods × streams × seeds as independent jobs, kept as they finish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from mgg_edge.errors import MggEdgeError, UsageError
from mgg_edge.learn.evaluation.executors import Run, executor
from mgg_edge.learn.evaluation.jobs import Job, PartStore, Row

__all__ = ["make_jobs", "run_sweep"]

_logger = logging.getLogger(__name__)


def make_jobs(
    methods: Sequence[str], streams: Sequence[str], seeds: Sequence[int], setting: Mapping[str, Any]
) -> tuple[Job, ...]:
    """Every method on every stream with every seed, streams outermost.

    Raises:
        UsageError: nothing to do, or something twice.
    """
    for what, values in (("methods", methods), ("streams", streams), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise UsageError(f"{what}: expected at least one and each once, found {list(values) or 'none'}")
    return tuple(Job(method, stream, seed, setting) for stream, seed, method in product(streams, seeds, methods))


def run_sweep(
    jobs: Sequence[Job],
    run: Run,
    folder: Path,
    *,
    executor_name: str = "processes",
    workers: int = 1,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> list[Row]:
    """Run the jobs whose results are not in the folder yet.

    Args:
        jobs: what to run.
        run: what runs one, a function of a module.
        folder: where results are kept.
        executor_name: `processes` or `ray`.
        workers: jobs at a time.
        stop: asked before a job is started; when true, those that run are finished and kept.
        progress: called with a stage's name, and how much of how much of it is done.

    Returns:
        One row a job that is done, in the order of the jobs: its method, stream and seed, and its result.

    Raises:
        UsageError: an unknown executor.
        SinkError: a result cannot be written.
        MggEdgeError: the first failure of a job, after all others are done and kept.
    """
    launch, store = executor(executor_name), PartStore(folder)
    found = {job.key: result for job in jobs if (result := store.read(job)) is not None}
    missing = [job for job in jobs if job.key not in found]
    if found:
        _logger.info("%d of %d jobs are done already: %s", len(found), len(jobs), store.folder)
    progress("evaluate", len(found), len(jobs))
    failures: list[tuple[Job, MggEdgeError]] = []
    for job, outcome in launch(run, missing, workers, stop) if missing else ():
        if isinstance(outcome, MggEdgeError):
            failures.append((job, outcome))
            _logger.warning("%s on %s, seed %d: %s", job.method, job.stream, job.seed, outcome)
        else:
            store.write(job, outcome)
            found[job.key] = outcome
        progress("evaluate", len(found) + len(failures), len(jobs))
    if failures:
        job, error = failures[0]
        rest = f" ({len(failures)} jobs failed)" if len(failures) > 1 else ""
        raise type(error)(f"{job.method} on {job.stream}, seed {job.seed}: {error}{rest}") from error
    done = [job for job in jobs if job.key in found]
    return [{"method": job.method, "stream": job.stream, "seed": job.seed, **found[job.key]} for job in done]
