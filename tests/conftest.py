"""Shared fixtures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import toy
from mgg_edge.runtime import Bundle, Engine, open_engine


def pytest_configure() -> None:
    """Give PyTorch one thread: of two processes with two each on two cores, both take several times as long."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch is not imported yet


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of the valid toy bundle; not to be written to."""
    return toy.write_bundle(tmp_path_factory.mktemp("toy") / "toy.mgg")


@pytest.fixture(scope="session")
def toy_parts() -> toy.Parts:
    """What the toy bundle is made of, to mutate copies of."""
    return toy.parts()


@pytest.fixture(scope="session")
def loaded_toy(toy_bundle: Path) -> Bundle:
    """The toy bundle in memory."""
    return Bundle.load(toy_bundle)


@pytest.fixture
def toy_engine(loaded_toy: Bundle) -> Iterator[Engine]:
    """A fresh engine of the toy bundle, on one thread."""
    engine = open_engine(loaded_toy, threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def videos() -> Path:
    """Folder with bikes.mp4 and its companions, which scripts/test fetches."""
    folder = os.environ.get("MGG_EDGE_VIDEOS")
    if not folder or not (Path(folder) / "bikes.mp4").is_file():
        pytest.skip("set MGG_EDGE_VIDEOS to a folder that holds bikes.mp4 (scripts/test does)")
    return Path(folder)
