"""What the device half weighs: a fresh environment with `mgg-edge[cpu]`, its size, and its import time.

    python benchmarks/device_half.py [--repeats R]

Prints a table and, last, one JSON line. Import times are medians over fresh processes, with the interpreter's own start
subtracted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = Path(folder) / "bin" / "python"
        site = Path(
            subprocess.check_output(
                [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
            ).strip()
        )
        subprocess.run(
            [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", f"{ROOT}[cpu]"],
            check=True,
        )
        sizes_mb = {entry.name: folder_size_mb(entry) for entry in site.iterdir() if entry.is_dir()}
        imports_ms = {
            name: process_ms(python, f"import {name}", options.repeats) - process_ms(python, "pass", options.repeats)
            for name in ("mgg_edge", "mgg_edge.runtime", "mgg_edge.cli.main")
        }
    total_mb = sum(sizes_mb.values())
    for name, size_mb in sorted(sizes_mb.items(), key=lambda item: -item[1])[:8]:
        print(f"{name:24} {size_mb:8.1f} MB")
    print(f"{'total':24} {total_mb:8.1f} MB")
    for name, value in imports_ms.items():
        print(f"import {name:17} {value:8.0f} ms")
    print(
        json.dumps(
            {"install_mb": round(total_mb, 1), "import_ms": {name: round(value) for name, value in imports_ms.items()}}
        )
    )


def folder_size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def process_ms(python: Path, code: str, repeats: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([python, "-c", code], check=True)
        return (time.perf_counter() - start) * 1e3

    once()
    return statistics.median(once() for _ in range(repeats))


if __name__ == "__main__":
    main()
