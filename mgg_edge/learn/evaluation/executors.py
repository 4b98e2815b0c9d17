"""Where jobs run: processes of this machine, or a Ray cluster.

Each yields results as they come, in any order, with the job they belong to. A job that fails with an error of this
package yields the error, and the others go on; any other exception ends the sweep. When told to stop, an executor
starts no further job and finishes those that run.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Protocol

from mgg_edge.errors import MggEdgeError, MissingDependencyError, UsageError
from mgg_edge.learn.evaluation.jobs import Job, Row

__all__ = ["EXECUTORS", "Executor", "Outcome", "Run", "executor"]

Run = Callable[[Job], Row]
Outcome = tuple[Job, Row | MggEdgeError]
Stop = Callable[[], bool]
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Executor(Protocol):
    """Runs jobs, `workers` at a time; `run` is a function of a module, so that other processes find it."""

    def __call__(self, run: Run, jobs: Sequence[Job], workers: int, stop: Stop) -> Iterator[Outcome]:
        """Results as they come."""


def run_in_processes(run: Run, jobs: Sequence[Job], workers: int, stop: Stop) -> Iterator[Outcome]:
    """Run jobs in fresh processes of this machine, one thread each.

    Raises:
        MggEdgeError: a process died.
    """
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(
        max(1, min(workers, len(jobs))), multiprocessing.get_context("spawn"), initializer=_prepare_worker
    )

    def finished(running: Iterable[Any]) -> Iterable[Any]:
        return concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done

    try:
        for job, future in _drain(jobs, workers, stop, lambda job: pool.submit(_attempt, run, job), finished):
            yield job, future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise MggEdgeError(
            "evaluation: a worker process died, perhaps for lack of memory; finished jobs are kept: run the same "
            "command again, with fewer --jobs"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()


def run_on_ray(run: Run, jobs: Sequence[Job], workers: int, stop: Stop) -> Iterator[Outcome]:
    """Run jobs on the Ray cluster that RAY_ADDRESS names, or on one started here; Ray gives each job one processor.

    Files named by the jobs must lie under the same paths on every node.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "the package 'ray' is not installed; install it with: pip install 'mgg-edge[cluster]'"
        ) from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)  # reads RAY_ADDRESS itself
    try:
        remote = ray.remote(num_cpus=1, max_retries=1)(_attempt_single_threaded)
        submit = lambda job: remote.remote(run, job)  # noqa: E731
        for job, handle in _drain(jobs, workers, stop, submit, lambda running: ray.wait(list(running))[0]):
            yield job, ray.get(handle)
    finally:
        if started:
            ray.shutdown()


EXECUTORS: dict[str, Executor] = {"processes": run_in_processes, "ray": run_on_ray}


def executor(name: str) -> Executor:
    """The executor of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in EXECUTORS:
        raise UsageError(f"executor: expected one of {', '.join(EXECUTORS)}, found '{name}'")
    return EXECUTORS[name]


def _drain(
    jobs: Sequence[Job],
    workers: int,
    stop: Stop,
    submit: Callable[[Job], Any],
    finished: Callable[[Iterable[Any]], Iterable[Any]],
) -> Iterator[tuple[Job, Any]]:
    """Keep `workers` jobs going; yields the handles of those that are done."""
    waiting, running = list(reversed(jobs)), dict[Any, Job]()
    while running or (waiting and not stop()):
        while waiting and len(running) < workers and not stop():
            job = waiting.pop()
            running[submit(job)] = job
        for handle in list(finished(running)) if running else []:
            yield running.pop(handle), handle


def _attempt(run: Run, job: Job) -> Row | MggEdgeError:
    try:
        return run(job)
    except MggEdgeError as error:
        return error


def _attempt_single_threaded(run: Run, job: Job) -> Row | MggEdgeError:
    import torch

    torch.set_num_threads(1)
    return _attempt(run, job)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    for name in THREAD_SETTINGS:
        os.environ[name] = "1"
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed can stop nobody: its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
