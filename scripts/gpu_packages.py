"""Packages that scripts/gpu_check needs, one requirement a line, as pyproject.toml has them.

python scripts/gpu_packages.py [--with-torch] [--cpu]     all, or without those that come with PyTorch
python scripts/gpu_packages.py --torch                    exit code 0 if this Python has PyTorch 2.9 with CUDA
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import tomllib

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
WITH_TORCH = ("torch", "torchvision", "timm", "matplotlib")
LEAST_TORCH = (2, 9)


def main() -> int:
    """Print them; exit status 1 where PyTorch is asked for and absent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--with-torch", action="store_true")
    parser.add_argument("--torch", action="store_true")
    arguments = parser.parse_args()
    if arguments.torch:
        return 0 if has_torch() else 1
    project = tomllib.loads(PROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    here = [line for line in (*project["dependencies"], *extras["gpu"], *extras["device-test"]) if ";" not in line]
    here += [line for line in extras["tensorrt"] if line.startswith("cuda-python")]
    here += [line for line in extras["export"] if arguments.with_torch or not line.startswith(WITH_TORCH)]
    print("\n".join(dict.fromkeys(here)))
    return 0


def has_torch() -> bool:
    """Whether this Python has a PyTorch that is new enough and was built for CUDA."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch  # noqa: PLC0415 - only where it is asked for

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return version >= LEAST_TORCH and torch.version.cuda is not None


if __name__ == "__main__":
    sys.exit(main())
