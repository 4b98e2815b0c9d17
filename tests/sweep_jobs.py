"""What sweeps of the tests run: quick functions that worker processes can find, and a toy stream."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgg_edge.errors import UnsupportedError


@dataclass(frozen=True)
class Batch:
    frames: np.ndarray
    labels: np.ndarray
    domain: str


class ToyStream:
    """Frames of which one pixel is the label; seeded, to be gone through again."""

    def __init__(self, batches=6, batch=4, seed=0, classes=10, domains=("dark",)):
        self.shape, self.seed, self.classes, self.domains = (batches, batch), seed, classes, domains

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        batches, batch = self.shape
        for number in range(batches):
            labels = rng.integers(0, self.classes, batch)
            frames = rng.integers(0, 256, (batch, 32, 32, 3), np.uint8)
            frames[:, 0, 0, 0] = labels
            yield Batch(frames, labels, self.domains[number * len(self.domains) // batches])


def row(accuracy=0.5, after=None, **changes):
    """A result as jobs give it."""
    return {
        "frames": 24,
        "batches": 6,
        "accuracy": accuracy,
        "calibration_error": 0.1,
        "accuracy_after": {"0": 0.4, "1": 0.45, "5": 0.5, "all": 0.55} if after is None else after,
        "worst_window": None,
        "clean_accuracy_after": 0.9,
        "domains": {"fog": accuracy, "<snow>": 0.25},
        "timeline": [0.4, 0.5, 0.6],
        "frame_ms": 1.5,
        "peak_memory_mb": 300.0,
        "non_finite": 0,
        **changes,
    }


def wait_for_company(path, processes, patience_s=120.0):
    """Until so many processes have left a trace: on a busy machine the first may do all before another is up."""
    limit_s = time.monotonic() + patience_s
    while len({line.split()[-1] for line in path.read_text().splitlines()}) < processes:
        assert time.monotonic() < limit_s, f"{processes} processes did not come together"
        time.sleep(0.02)


def note(job):
    """Leave a trace of having run, and say where."""
    folder = Path(job.setting["folder"])
    with (folder / "ran.txt").open("a") as file:
        file.write(f"{job.method} {job.stream} {job.seed} {os.getpid()}\n")
    wait_for_company(folder / "ran.txt", job.setting.get("processes", 1))
    time.sleep(job.setting.get("pause_s", 0.0))
    import torch

    return row(accuracy=job.seed / 10, threads=torch.get_num_threads(), process=os.getpid())


def fail_on_fog(job):
    if job.stream == "fog":
        raise UnsupportedError("no fog today")
    return note(job)


def die(job):
    os._exit(9)


def where_on_ray(job):
    """The Ray node a job runs on."""
    import ray
    import torch

    time.sleep(0.5)
    node = ray.get_runtime_context().get_node_id()
    return {"accuracy": 0.5, "node": node, "threads": torch.get_num_threads()}
