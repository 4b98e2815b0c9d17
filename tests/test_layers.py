"""What may import what, checked on the code and on what really gets loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml, which Python 3.10 cannot")

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "torchvision", "timm", "onnx", "onnxscript")


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh process after running some code."""
    words = [sys.executable, "-c", f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"]
    return set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_core_loads_nothing_heavy() -> None:
    assert not loaded_after("import mgg_edge, mgg_edge.container") & {*HEAVY, "onnxruntime", "av", "typer", "rich"}


def test_importing_the_run_time_loads_no_engine_and_no_training_package() -> None:
    assert not loaded_after("import mgg_edge.runtime") & {*HEAVY, "onnxruntime", "typer", "rich"}


def test_importing_the_command_line_loads_no_training_package() -> None:
    assert not loaded_after("import mgg_edge.cli.main") & {*HEAVY, "onnxruntime", "av"}


def test_a_bundle_runs_where_importing_torch_fails(toy_bundle: Path) -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY!r}))
try:
    import torch
except ImportError:
    pass
else:
    sys.exit("torch is still there")
import numpy as np
from mgg_edge.runtime import Adapter
with Adapter.open({str(toy_bundle)!r}, threads=1) as adapter:
    random = np.random.default_rng(0)
    for _ in range(8):
        prediction = adapter(random.integers(0, 256, (30, 40, 3), np.uint8))
    assert adapter.counters.adapt_steps == 2, adapter.counters
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_three_folders_are_reached_by_relative_links() -> None:
    for name in ("export", "runtime", "cli"):
        assert (ROOT / "mgg_edge" / name).readlink() == Path("..", name)


def test_every_room_is_a_package_that_the_wheel_is_told_of() -> None:
    """setuptools takes what is listed and no more."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for name in ("export", "runtime", "cli"):
        rooms = [path for path in (ROOT / name).iterdir() if path.is_dir() and path.name != "__pycache__"]
        assert all((room / "__init__.py").is_file() for room in rooms)
        assert {f"mgg_edge.{name}.{room.name}" for room in rooms} == {
            package for package in listed if package.startswith(f"mgg_edge.{name}.")
        }


def test_every_core_module_has_its_place_in_the_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    by_type = {contract["name"].partition(":")[0].partition(" ")[0]: contract for contract in contracts}
    layered = {name.strip() for layer in by_type["Layers"]["layers"] for name in layer.replace("|", ":").split(":")}
    core = {f"mgg_edge.{path.stem}" for path in (ROOT / "mgg_edge").glob("*.py") if path.stem != "__init__"}
    missing = core - layered
    assert not missing, f"add {sorted(missing)} to the layers in pyproject.toml"
    forbidden = next(contract for contract in contracts if contract["name"].startswith("The core"))
    assert core == set(forbidden["source_modules"])


def test_the_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed in this environment")
    done = subprocess.run([linter, "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_forbidden_import_breaks_a_contract(tmp_path: Path) -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed in this environment")
    for folder in ("mgg_edge", "export", "runtime", "cli"):
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT)
            package = relative if folder == "mgg_edge" else Path("mgg_edge") / relative
            (tmp_path / package).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / package).write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for module, line in (
        ("runtime/sources/video.py", "def sneak():\n    import torch\n"),
        ("state.py", "import pickle\n"),
        ("learn/__init__.py", "import mgg_edge.runtime\n"),
    ):
        path = tmp_path / "mgg_edge" / module
        before = path.read_text()
        path.write_text(f"{before}\n{line}")
        done = subprocess.run([linter, "--no-logo", "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 0, f"{module} with {line!r} broke no contract"
        assert "BROKEN" in done.stdout
        path.write_text(before)
