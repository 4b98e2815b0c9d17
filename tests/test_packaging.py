"""What is built: the wheel holds the package whole and nothing else, and it works on its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import mgg_edge

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as built from the source archive."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("the package 'build' is not installed in this environment")
    folder = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def sources() -> set[str]:
    """Paths the wheel must hold, by the names they are imported under."""
    modules = {f"mgg_edge/{path.relative_to(ROOT / 'mgg_edge')}" for path in (ROOT / "mgg_edge").glob("*.py")}
    inner = ("scenes", "learn", "learn/evaluation", "learn/methods", "learn/rules", "learn/training", "data")
    rooms = ("adaptation", "bundle", "engines", "outputs", "sources", "store")
    outer = ("export", "runtime", "cli", *(f"runtime/{room}" for room in rooms))
    for folder, parent in (*((name, "mgg_edge") for name in inner), *((name, "") for name in outer)):
        modules |= {f"mgg_edge/{folder}/{path.name}" for path in (ROOT / parent / folder).glob("*.py")}
    data = [path for path in (ROOT / "mgg_edge" / "data").iterdir() if path.suffix in (".mgg", ".safetensors", ".md")]
    assert {
        "default.mgg",
        "reader-mgg.mgg",
        "efficientnet_lite0.safetensors",
        "characters.safetensors",
        "MODEL_CARD.md",
    } == {path.name for path in data}
    assert sum(path.stat().st_size for path in data) <= 10_000_000
    return modules | {f"mgg_edge/data/{path.name}" for path in data}


def test_the_wheel_holds_every_module_once_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert set(names) == sources() | {"mgg_edge/py.typed", "mgg_edge/runtime/outputs/http_page.html"}
    for name in names:
        source = ROOT / name
        assert wheel.read(name) == source.read_bytes(), name


def test_the_metadata_is_complete(wheel: zipfile.ZipFile) -> None:
    folder = f"mgg_edge-{mgg_edge.__version__}.dist-info"
    metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Version"] == mgg_edge.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache License" in wheel.read(f"{folder}/licenses/LICENSE").decode()
    assert {"cpu", "gpu", "tensorrt", "export", "dev"} <= set(metadata.get_all("Provides-Extra"))
    base = {line.split(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert base == {"numpy", "safetensors", "av", "pillow", "typer", "rich", "typing-extensions", "tomli"}
    assert "mgg-edge = mgg_edge.cli.main:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_the_wheel_works_from_nowhere_near_the_sources(
    wheel: zipfile.ZipFile, toy_bundle: Path, tmp_path: Path
) -> None:
    wheel.extractall(tmp_path / "site")
    code = (
        "import mgg_edge; from mgg_edge.cli.main import main;"
        f"assert mgg_edge.__file__.startswith({str(tmp_path)!r}), mgg_edge.__file__; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--bundle", str(toy_bundle)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "the run time works here" in done.stdout


def test_the_suite_runs_on_the_installed_package() -> None:
    if os.environ.get("MGG_EDGE_INSTALLED") != "1":
        pytest.skip("only scripts/test promises an installed wheel")
    assert Path(mgg_edge.__file__).parent != ROOT / "mgg_edge"
    assert "site-packages" in mgg_edge.__file__
    assert importlib.metadata.version("mgg-edge") == mgg_edge.__version__
