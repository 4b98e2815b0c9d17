"""A sweep in a process of its own; see test_evaluation_sweep.py."""

from __future__ import annotations

import sys
from pathlib import Path

from mgg_edge.learn.evaluation import make_jobs, run_sweep
from sweep_jobs import note

if __name__ == "__main__":
    folder, pause_s = Path(sys.argv[1]), float(sys.argv[2])
    jobs = make_jobs(["tent"], ["fog"], range(6), {"folder": str(folder), "pause_s": pause_s})
    run_sweep(jobs, note, folder, workers=2)
