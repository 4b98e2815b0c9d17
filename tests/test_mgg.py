"""The MGG against vectors of the official layer, its two memories against each other, and its files."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

from safetensors.numpy import load_file  # noqa: E402

from mgg_edge.errors import SinkError, UsageError, WeightsError  # noqa: E402
from mgg_edge.learn import MGG  # noqa: E402

pytestmark = pytest.mark.torch

VECTORS = Path(__file__).parent / "data" / "mgg_reference.safetensors"
STATE_TOLERANCE = 1e-12  # float64, 50 steps; the two forms differ only in rounding


def run(mgg, gradients):
    state = mgg.init(gradients.shape[1], dtype=gradients.dtype)
    updates = []
    with torch.no_grad():
        for gradient in gradients:
            update, state = mgg.update(gradient, state)
            updates.append(update)
    return torch.stack(updates), state


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(value) for name, value in load_file(VECTORS).items()}


@pytest.fixture(scope="module")
def released(golden):
    return {name.removeprefix("param."): value for name, value in golden.items() if name.startswith("param.")}


@pytest.mark.parametrize("memory", ["factored", "plain"])
def test_updates_match_the_official_layer(golden, released, memory):
    updates, state = run(MGG.from_released(released, memory=memory), golden["gradients"])
    assert (updates - golden["updates"]).abs().max() < STATE_TOLERANCE
    assert (state.m - golden["m_last"]).abs().max() < STATE_TOLERANCE
    assert (state.v - golden["v_last"]).abs().max() < STATE_TOLERANCE
    assert state.step == len(golden["gradients"])


def test_plain_memory_matches_the_official_weights(golden, released):
    mgg = MGG.from_released(released, memory="plain")
    for count, name in ((1, "first"), (len(golden["gradients"]), "last")):
        _, state = run(mgg, golden["gradients"][:count])
        assert (state.memory.permute(2, 0, 1) - golden[f"W_{name}"]).abs().max() < STATE_TOLERANCE
        assert (state.memory_bias.T - golden[f"b_{name}"]).abs().max() < STATE_TOLERANCE


def test_textbook_bias_correction_is_another_exponent(golden, released):
    mgg = MGG.from_released(released)
    mgg.bias_correction = "textbook"
    updates, _ = run(mgg, golden["gradients"])
    assert (updates - golden["updates"]).abs().max() > 1e-3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_memories_agree_for_any_numbers(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    factored = MGG(seed).double()
    with torch.no_grad():
        for value in factored.parameters():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
    plain = copy.deepcopy(factored)
    plain.memory = "plain"
    gradients = scale * torch.randn(50, 40, generator=generator, dtype=torch.float64)
    assert (run(factored, gradients)[0] - run(plain, gradients)[0]).abs().max() < STATE_TOLERANCE


def test_both_memories_have_the_same_meta_gradient():
    gradients = torch.randn(6, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = {}
    for memory in ("factored", "plain"):
        mgg = MGG(3, memory=memory).double()
        state, total = mgg.init(30, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for gradient in gradients:
            update, state = mgg.update(gradient, state)
            total = total + (update * gradients.sum(0)).sum()
        total.backward()
        found[memory] = {name: value.grad for name, value in mgg.named_parameters()}
    for name, gradient in found["plain"].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found["factored"][name], gradient, rtol=1e-9, atol=1e-12)


def test_update_is_pure_and_bounded():
    mgg = MGG(0)
    state = mgg.init(100)
    before = [value.clone() for value in state]
    gradient = torch.randn(100, generator=torch.Generator().manual_seed(1)) * 1e3
    first, _ = mgg.update(gradient, state)
    second, _ = mgg.update(gradient, state)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    assert first.abs().max() <= 1


def test_zero_gradients_stay_finite_and_untrained_numbers_do_not_move():
    updates, state = run(MGG(0), torch.zeros(5, 3))
    assert torch.equal(updates, torch.zeros(5, 3))
    assert all(bool(value.isfinite().all()) for value in state)


def test_untrained_numbers_descend():
    updates, _ = run(MGG(7), torch.tensor([[1e-3, -1e-3, 5.0, -5.0]]).repeat(3, 1))
    assert torch.equal(updates.sign(), torch.tensor([[1.0, -1.0, 1.0, -1.0]]).repeat(3, 1))


def test_counts_of_numbers_and_state():
    mgg = MGG()
    assert sum(value.numel() for value in mgg.parameters()) == 164
    assert sum(value.numel() for name, value in mgg.init(10)._asdict().items() if name != "step") == 26 * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_gradient(dtype):
    update, state = MGG().update(torch.ones(4, dtype=dtype), MGG().init(4, dtype=dtype))
    assert {update.dtype, *(value.dtype for value in state)} == {dtype}


def test_released_names_with_and_without_prefix_are_the_same(released):
    gradient = torch.linspace(-1, 1, 9, dtype=torch.float64)[None]
    prefixed = {f"seq_modeling_block.{name}": value for name, value in released.items()}
    assert torch.equal(run(MGG.from_released(released), gradient)[0], run(MGG.from_released(prefixed), gradient)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda numbers: numbers.pop("W1"), "'W1' is missing"),
        (lambda numbers: numbers.update(extra=torch.zeros(1)), "unexpected tensor 'extra'"),
        (lambda numbers: numbers.update(W1=torch.zeros(8, 7)), "'W1' expected"),
        (lambda numbers: numbers.update(b1=torch.full((1, 1, 8), float("nan"))), "NaN"),
    ],
    ids=["missing", "unexpected", "mis-shaped", "nan"],
)
def test_released_checkpoints_that_do_not_fit_are_refused(released, change, message):
    numbers = dict(released)
    change(numbers)
    with pytest.raises(WeightsError, match=message):
        MGG.from_released(numbers)


@pytest.mark.parametrize("bias_correction", ["textbook", "released"])
def test_save_and_load_give_the_same_updates(tmp_path, bias_correction):
    mgg = MGG(5, bias_correction=bias_correction)
    mgg.save(tmp_path / "mgg.safetensors", {"recipe": "none"})
    loaded = MGG.load(tmp_path / "mgg.safetensors")
    gradients = torch.randn(4, 20, generator=torch.Generator().manual_seed(2))
    assert torch.equal(run(mgg, gradients)[0], run(loaded, gradients)[0])
    assert loaded.bias_correction == bias_correction
    assert [path.name for path in tmp_path.iterdir()] == ["mgg.safetensors"]


def test_load_refuses_other_files(tmp_path):
    with pytest.raises(UsageError, match="no such MGG"):
        MGG.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(WeightsError, match="safetensors format"):
        MGG.load(tmp_path / "text.safetensors")
    from safetensors.torch import save_file

    save_file({"query": torch.zeros(8, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="expected metadata"):
        MGG.load(tmp_path / "other.safetensors")
    save_file(
        {"query": torch.zeros(8, 2)},
        tmp_path / "part.safetensors",
        {"format": "mgg-edge.mgg", "bias_correction": "textbook"},
    )
    with pytest.raises(WeightsError, match="expected tensors"):
        MGG.load(tmp_path / "part.safetensors")


def test_save_to_an_unwritable_place_is_refused(tmp_path):
    with pytest.raises(SinkError, match="cannot write"):
        MGG().save(tmp_path / "missing" / "mgg.safetensors")


@pytest.mark.parametrize("setting", [{"memory": "lost"}, {"bias_correction": "none"}])
def test_unknown_settings_are_refused(setting):
    with pytest.raises(ValueError, match="expected one of"):
        MGG(**setting)


def test_float32_stays_close_to_float64():
    gradients = torch.randn(20, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact, _ = run(MGG(1).double(), gradients)
    single, _ = run(MGG(1), gradients.float())
    relative = (single.double() - exact).norm() / exact.norm()
    assert relative < 1e-5, "float32 rounding, a few hundred operations deep"
    assert np.isfinite(float(relative))
