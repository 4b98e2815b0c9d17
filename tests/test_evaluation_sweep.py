"""Sweeps: jobs and their keys, results on disk, processes, kills, and a Ray cluster of two nodes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

from mgg_edge.errors import MggEdgeError, MissingDependencyError, SinkError, UnsupportedError, UsageError  # noqa: E402
from mgg_edge.learn.evaluation import Job, PartStore, make_jobs, run_sweep  # noqa: E402
from mgg_edge.learn.evaluation import executors as executors_module  # noqa: E402
from sweep_jobs import die, fail_on_fog, note, row, where_on_ray  # noqa: E402

pytestmark = pytest.mark.torch

JOB = Job("tent", "iid:fog", 0, {"batch": 16, "weights": "sha256:12"})


def in_this_process(run, jobs, workers, stop):
    for job in jobs:
        if stop():
            return
        yield job, executors_module._attempt(run, job)


@pytest.fixture
def here(monkeypatch):
    """Jobs run in the test's own process."""
    monkeypatch.setitem(executors_module.EXECUTORS, "here", in_this_process)


def ran(folder):
    path = folder / "ran.txt"
    return [tuple(line.split()[:3]) for line in path.read_text().splitlines()] if path.exists() else []


def test_jobs_are_the_product_without_repetition():
    jobs = make_jobs(["none", "tent"], ["fog", "snow"], [0, 1], {})
    assert len(jobs) == len({job.key for job in jobs}) == 8
    for arguments in (
        ([], ["fog"], [0]),
        (["none"], [], [0]),
        (["none"], ["fog"], []),
        (["none", "none"], ["fog"], [0]),
    ):
        with pytest.raises(UsageError, match="at least one and each once"):
            make_jobs(*arguments, {})


@pytest.mark.parametrize(
    "change",
    [{"method": "sar"}, {"stream": "iid:snow"}, {"seed": 1}, {"setting": {"batch": 16, "weights": "sha256:13"}}],
)
def test_every_setting_changes_the_key(change):
    assert dataclasses.replace(JOB, **change).key != JOB.key
    assert dataclasses.replace(JOB, setting=dict(reversed(JOB.setting.items()))).key == JOB.key


def test_results_come_back_only_for_their_own_settings(tmp_path, caplog):
    store = PartStore(tmp_path / "new" / "folder")
    assert store.read(JOB) is None
    store.write(JOB, row(0.25))
    assert store.read(JOB) == row(0.25)
    assert [path.name for path in store.folder.iterdir()] == [f"{JOB.key}.jsonl"]
    other = dataclasses.replace(JOB, seed=1)
    store.path(other).write_bytes(store.path(JOB).read_bytes())
    for content in (None, b"", b"{", b"[]", b'{"job": 1}', b"\xff\xfe"):
        if content is not None:
            store.path(other).write_bytes(content)
        caplog.clear()
        assert store.read(other) is None
        assert "not a result of this sweep" in caplog.text
    with pytest.raises(ValueError, match="JSON"):
        store.write(JOB, row(float("nan")))
    assert store.read(JOB) == row(0.25)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match="cannot make the folder"):
        PartStore(tmp_path / "file")


def test_a_finished_sweep_is_not_run_again(tmp_path, here):
    jobs = make_jobs(["none", "tent"], ["snow"], [0, 1], {"folder": str(tmp_path)})
    seen = []
    rows = run_sweep(jobs, note, tmp_path, executor_name="here", progress=lambda *state: seen.append(state))
    assert [(entry["method"], entry["stream"], entry["seed"]) for entry in rows] == [
        (job.method, job.stream, job.seed) for job in jobs
    ]
    assert seen == [("evaluate", count, 4) for count in range(5)]
    assert len(ran(tmp_path)) == 4
    again = run_sweep(jobs, note, tmp_path, executor_name="here")
    assert again == rows
    assert len(ran(tmp_path)) == 4
    PartStore(tmp_path).path(jobs[2]).unlink()
    run_sweep(jobs, note, tmp_path, executor_name="here")
    assert ran(tmp_path)[4:] == [("none", "snow", "1")]


def test_a_failing_job_stops_no_other_and_is_reported(tmp_path, here, caplog):
    jobs = make_jobs(["tent"], ["fog", "snow"], [0, 1], {"folder": str(tmp_path)})
    with pytest.raises(UnsupportedError, match=r"tent on fog, seed 0: no fog today \(2 jobs failed\)"):
        run_sweep(jobs, fail_on_fog, tmp_path, executor_name="here")
    assert ran(tmp_path) == [("tent", "snow", "0"), ("tent", "snow", "1")]
    assert caplog.text.count("no fog today") == 2


def test_a_wish_to_stop_keeps_what_is_done(tmp_path, here):
    jobs = make_jobs(["tent"], ["snow"], range(4), {"folder": str(tmp_path)})
    rows = run_sweep(jobs, note, tmp_path, executor_name="here", stop=lambda: len(ran(tmp_path)) >= 2)
    assert [entry["seed"] for entry in rows] == [0, 1]
    assert len(run_sweep(jobs, note, tmp_path, executor_name="here")) == 4


def test_an_unknown_executor_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected one of processes, ray, found 'slurm'"):
        run_sweep([JOB], note, tmp_path, executor_name="slurm")


def test_never_more_jobs_at_a_time_than_workers():
    jobs, running, most = make_jobs(["a"], ["b"], range(7), {}), set(), []

    def submit(job):
        running.add(job.seed)
        most.append(len(running))
        return job.seed

    def finished(handles):
        first = min(handles)
        running.discard(first)
        return [first]

    done = [job.seed for job, _ in executors_module._drain(jobs, 3, lambda: False, submit, finished)]
    assert done == list(range(7))
    assert max(most) == 3
    stopped = executors_module._drain(jobs, 3, lambda: len(most) >= 9, submit, finished)
    assert [job.seed for job, _ in stopped] == [0, 1]


def test_processes_run_jobs_with_one_thread_each(tmp_path):
    jobs = make_jobs(["tent"], ["fog", "snow"], [1, 2], {"folder": str(tmp_path), "processes": 2})
    rows = run_sweep(jobs, note, tmp_path, workers=2)
    assert [entry["accuracy"] for entry in rows] == [0.1, 0.2, 0.1, 0.2]
    assert {entry["threads"] for entry in rows} == {1}
    processes = {entry["process"] for entry in rows}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert not any(is_alive(process) for process in processes)


def test_a_worker_that_dies_is_reported(tmp_path):
    with pytest.raises(MggEdgeError, match="a worker process died"):
        run_sweep([JOB], die, tmp_path, workers=1)


def test_a_killed_sweep_loses_at_most_the_running_jobs_and_leaves_no_worker(tmp_path):
    code = Path(__file__).with_name("run_sweep_to_be_killed.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}
    sweep = subprocess.Popen([sys.executable, str(code), str(tmp_path), "1"], env=environment)
    parts = tmp_path / "parts"
    try:
        wait_for(lambda: parts.is_dir() and len(list(parts.glob("*.jsonl"))) >= 2)
    finally:
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
    kept, begun = len(list(parts.glob("*.jsonl"))), len(ran(tmp_path))
    assert 2 <= kept < 6
    assert begun - kept <= 2
    workers = {int(line.split()[3]) for line in (tmp_path / "ran.txt").read_text().splitlines()}
    wait_for(lambda: not any(is_alive(process) for process in workers))
    subprocess.run([sys.executable, str(code), str(tmp_path), "1"], env=environment, check=True)
    assert len(list(parts.glob("*.jsonl"))) == 6
    assert len(ran(tmp_path)) == begun + (6 - kept)


def test_without_ray_the_message_has_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mgg-edge\[cluster\]'"):
        run_sweep([JOB], note, tmp_path, executor_name="ray")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_spreads_jobs_over_two_nodes(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs the cluster extra")
    from ray.cluster_utils import Cluster

    tests = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tests), str(tests.parent), *filter(None, sys.path)]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        jobs = make_jobs(["tent"], ["fog"], range(6), {})
        rows = run_sweep(jobs, where_on_ray, tmp_path, executor_name="ray", workers=2)
        assert [entry["seed"] for entry in rows] == list(range(6))
        assert len({entry["node"] for entry in rows}) == 2
        assert {entry["threads"] for entry in rows} == {1}
        assert not ray.is_initialized()
    finally:
        cluster.shutdown()


def is_alive(process):
    """Whether a process runs; one that has ended and waits to be asked for its code does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, limit_s=60.0):
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)
