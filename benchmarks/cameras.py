"""Many cameras in one process: frames a second, their age, and the memory of one camera more.

    scripts/bench cameras                                   two minutes: 1, 4 and 20 cameras on the default reader
    PYTHONPATH=. python benchmarks/cameras.py --bundle model.mgg --counts 1,8 --width 1280 --height 720

Each camera is a synthetic one with a decoding process of its own, as a real one has, at its own rate; all run on the
same weights with a page beside them (`mgg-edge run --config`). Memory is what the kernel counts as proportional (PSS):
pages that processes share are divided among them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=None, help="the package's reader by default")
    parser.add_argument("--counts", default="1,4,20", help="numbers of cameras")
    parser.add_argument("--rate", type=float, default=5.0, help="frames a second of each camera")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--seconds", type=float, default=20.0, help="measured, after ten to warm up")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    arguments = parser.parse_args()
    rows = [measure(arguments, int(count)) for count in arguments.counts.split(",")]
    print("| cameras | frames/s wanted | frames/s | dropped | age p99, worst, ms | run, MB | decoders, MB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        wanted = row["cameras"] * arguments.rate
        cells = [row["cameras"], f"{wanted:.0f}", f"{row['rate']:.1f}", row["dropped"], f"{row['age_ms']:.0f}"]
        print(f"| {' | '.join(map(str, [*cells, round(row['run_mb']), round(row['decoders_mb'])]))} |")
    first, last = rows[0], rows[-1]
    more = max(1, last["cameras"] - first["cameras"])
    each = {name: (last[f"{name}_mb"] - first[f"{name}_mb"]) / more for name in ("run", "decoders")}
    print(f"\none camera more: {each['run']:.1f} MB in the run, {each['decoders']:.1f} MB in its decoding process")
    print(json.dumps({"rows": rows, "one_more_mb": each}))


def measure(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    """A run of so many cameras, looked at twice."""
    source = f"synthetic:live=1,paced=1,frames=0,width={arguments.width},height={arguments.height}"
    with tempfile.TemporaryDirectory() as folder:
        cameras = Path(folder) / "cameras.toml"
        bundle = "" if arguments.bundle is None else f'bundle = "{arguments.bundle.resolve()}"\n'
        tables = (
            f'[camera.c{number}]\nsource = "{source},rate={arguments.rate},seed={number}"\n' for number in range(count)
        )
        cameras.write_text(bundle + "".join(tables))
        words = ["mgg-edge", "run", "--config", str(cameras), "--serve", "0", "--threads", str(arguments.threads)]
        run = subprocess.Popen([*words, "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            address = page(run)
            while any(camera["inferred"] == 0 for camera in status(address)) or len(status(address)) < count:
                time.sleep(0.5)
            time.sleep(10)
            before, start_s = status(address), time.monotonic()
            time.sleep(arguments.seconds)
            after, elapsed_s = status(address), time.monotonic() - start_s
            inferred = total(after, "inferred") - total(before, "inferred")
            dropped = sum(sum(one["dropped"].values()) for one in after)
            return {
                "cameras": count,
                "rate": inferred / elapsed_s,
                "dropped": dropped - sum(sum(one["dropped"].values()) for one in before),
                "age_ms": max(one["frame_age_ms"]["p99"] for one in after),
                "run_mb": memory_mb(run.pid),
                "decoders_mb": sum(map(memory_mb, children(run.pid))),
            }
        finally:
            run.send_signal(signal.SIGTERM)
            run.communicate(timeout=60)


def page(run: subprocess.Popen[str]) -> str:
    """Address of the live page, which the run says first."""
    for line in run.stderr or ():
        if found := re.search(r"http://\S+", line):
            return found[0]
    raise SystemExit("the run ended before its page was there")


def status(address: str) -> list[dict[str, Any]]:
    """What the page shows of each camera."""
    with urllib.request.urlopen(f"{address}status", timeout=30) as answer:  # noqa: S310 - our own page
        return json.load(answer)["cameras"]


def total(cameras: list[dict[str, Any]], name: str) -> int:
    return sum(camera[name] for camera in cameras)


def memory_mb(process: int) -> float:
    """Proportional set size of a process."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[1]) / 1e3


def children(process: int) -> list[int]:
    return [
        int(number)
        for task in Path(f"/proc/{process}/task").iterdir()
        for number in (task / "children").read_text().split()
    ]


if __name__ == "__main__":
    main()
