"""The GPU engines on a GPU: what tests/test_tensorrt_engine.py and test_open_engine.py show on stand-ins."""

from __future__ import annotations

import numpy as np
import pytest

import toy
from mgg_edge.errors import MissingDependencyError
from mgg_edge.runtime import Adapter, open_engine
from mgg_edge.runtime.engines.cuda import open_cuda
from mgg_edge.runtime.engines.engine_cache import CACHE_VARIABLE

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["tensorrt", "cuda"])
def engine_name(request, tmp_path, monkeypatch, loaded_toy):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "engines"))
    try:
        open_cuda()
        open_engine(loaded_toy, request.param).close()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return request.param


def relative(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_fifty_steps_match_numpy_in_float64(engine_name, loaded_toy):
    """First calls run, second ones record, later ones replay; refused steps leave their set to be written again."""
    constants = {name: value.astype(np.float64) for name, value in toy.weights().items()}
    state = {name: value.astype(np.float64) for name, value in toy.initial_state().items()}
    start, engine = state["theta"], open_engine(loaded_toy, engine_name)
    for step in range(50):
        pictures = toy.frames(toy.BATCH, seed=step)
        engine.adapt(toy.frames(toy.BATCH, seed=500 + step))  # a candidate that is not committed
        logits, _ = engine.adapt(pictures)
        expected, _, state = toy.reference_adapt(pictures, state, constants)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        engine.commit()
        assert relative(engine.state()["theta"] - start, state["theta"] - start) < 1e-5
        picture = toy.frames(1, seed=1000 + step)
        np.testing.assert_allclose(
            engine.infer(picture)[0], toy.reference_infer(picture, state["theta"], constants)[0], atol=1e-5
        )
    engine.close()


def test_an_adapter_runs_on_it(engine_name, toy_bundle):
    with Adapter.open(toy_bundle, engine=engine_name, adapt="always") as adapter:
        for frame in toy.frames(40, seed=3):
            adapter(frame)
        assert adapter.counters.adapt_steps > 0
        assert all(np.isfinite(array).all() for array in adapter.state().values())
