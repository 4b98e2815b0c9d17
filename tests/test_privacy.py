"""No usage data: nothing is written below the home directory, whichever way the run time is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgg_edge.runtime.engines.onnxruntime_import import TELEMETRY_SWITCH

COMMAND = "from mgg_edge.cli.main import main; main({words!r})"
EMBEDDED = """
import numpy as np
from mgg_edge.runtime import Adapter
with Adapter.open({bundle!r}) as adapter:
    for seed in range(8):
        adapter(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))
"""


def run(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != TELEMETRY_SWITCH and "XDG" not in name}
    variables = {**kept, "HOME": str(home), **environment}
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)


def written(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file() and "fontconfig" not in str(path)]


@pytest.mark.parametrize("use", ["run", "doctor", "embedded"])
def test_a_run_in_an_empty_home_writes_nothing_there(use: str, toy_bundle: Path, tmp_path: Path) -> None:
    words = {
        "run": ["run", "--bundle", str(toy_bundle), "--source", "synthetic:frames=12", "--json"],
        "doctor": ["doctor", "--bundle", str(toy_bundle)],
    }
    code = EMBEDDED.format(bundle=str(toy_bundle)) if use == "embedded" else COMMAND.format(words=words[use])
    done = run(code, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert written(tmp_path / "home") == []


def test_an_application_that_has_chosen_keeps_its_choice(tmp_path: Path) -> None:
    code = (
        "import os; from mgg_edge.runtime.engines.onnxruntime_import import import_onnxruntime as load; load(); "
        f"print(os.environ['{TELEMETRY_SWITCH}'])"
    )
    assert run(code, tmp_path / "a").stdout.strip() == "1"
    assert run(code, tmp_path / "b", **{TELEMETRY_SWITCH: "0"}).stdout.strip() == "0"


def test_nothing_else_imports_the_library() -> None:
    root = Path(__file__).parent.parent
    importing = [
        path.name
        for folder in ("runtime", "cli", "export", "mgg_edge/learn", "mgg_edge/scenes")
        for path in (root / folder).rglob("*.py")
        if "import onnxruntime" in path.read_text().replace("import import_onnxruntime", "")
    ]
    assert importing == ["onnxruntime_import.py"]
