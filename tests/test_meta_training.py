"""Meta-training: its gradient, its recipes, resuming, and what it refuses."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

from mgg_edge.errors import MggEdgeError, UsageError, WeightsError  # noqa: E402
from mgg_edge.learn import MGG  # noqa: E402
from mgg_edge.learn.meta_training import (  # noqa: E402
    RELEASED,
    Domain,
    Learner,
    MetaRecipe,
    MetaTrainer,
    Signal,
)
from vit import frames, small_step  # noqa: E402

pytestmark = pytest.mark.torch

SIZE = 12
RECIPE = MetaRecipe(iterations=6, horizon=3, windows=2, episodes=2, batch_sizes=(2, 4), signal_batch=0)


class Scripted:
    """Gradients and meta-gradients from a fixed list, whatever θ is; each meta-gradient has mean size one."""

    def __init__(self, seed=0):
        self.backbone = SimpleNamespace(norms=SimpleNamespace(size=SIZE), theta=lambda: torch.zeros(SIZE))
        self._generator = torch.Generator().manual_seed(seed)
        self.given = []

    def signal(self, theta, frames, labels, adapt_count):
        gradient = torch.randn(SIZE, generator=self._generator)
        meta = torch.randn(SIZE, generator=self._generator)
        self.given.append(Signal(gradient, meta / meta.abs().mean(), 0.0))
        return self.given[-1]


def domain(name="shifted", labels=True, count=8):
    return Domain(name, frames(count), torch.arange(count) % 10 if labels else None)


def learner():
    step = small_step()
    return Learner(step.backbone, step.objective, step.statistics)


def test_meta_gradient_is_that_of_the_unrolled_window():
    recipe = dataclasses.replace(RECIPE, iterations=1, horizon=5, episodes=1)
    scripted, mgg = Scripted(), MGG(0)
    trainer = MetaTrainer(mgg, scripted, [domain()], recipe)
    trainer._update = lambda surrogate: setattr(trainer, "surrogate", surrogate) or setattr(trainer, "iteration", 1)
    list(trainer.train())
    found = torch.autograd.grad(trainer.surrogate, list(mgg.parameters()), allow_unused=True)

    # Σ_k h_k·θ_k over the same window, by automatic differentiation.
    state, theta, loss = mgg.init(SIZE), torch.zeros(SIZE), 0.0
    for now, then in zip(scripted.given[:-1], scripted.given[1:], strict=True):
        update, state = mgg.update(now.gradient, state)
        theta = theta - recipe.learning_rate * update
        loss = loss + then.meta_gradient @ theta
    expected = torch.autograd.grad(loss, list(mgg.parameters()), allow_unused=True)
    scale = recipe.learning_rate * recipe.horizon * SIZE
    assert len(scripted.given) == recipe.horizon + 1  # one differentiation a step
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one * scale, other, rtol=1e-4, atol=1e-7)


def test_training_learns_to_follow_the_meta_gradient():
    class Opposed(Scripted):
        """The meta-loss wants the opposite of what the loss wants."""

        def signal(self, theta, frames, labels, adapt_count):
            return Signal(torch.ones(SIZE), -torch.ones(SIZE), -float(theta.sum()))

    mgg = MGG(0)
    assert mgg.update(torch.ones(SIZE), mgg.init(SIZE))[0].min() > 0.5
    recipe = dataclasses.replace(RECIPE, iterations=150, horizon=2, windows=1, meta_learning_rate=0.05)
    losses = [progress.loss for progress in MetaTrainer(mgg, Opposed(), [domain()], recipe).train()]
    assert mgg.update(torch.ones(SIZE), mgg.init(SIZE))[0].max() < -0.5
    assert losses[-1] < 0 < losses[0]


@pytest.mark.parametrize("supervised", [False, True])
def test_a_real_model_is_trained_and_nothing_but_the_rule_changes(supervised):
    mgg, real = MGG(0), learner()
    before, theta = {name: value.clone() for name, value in mgg.named_parameters()}, real.backbone.theta()
    recipe = dataclasses.replace(RECIPE, supervised=supervised, iterations=3, signal_batch=4)
    steps = list(MetaTrainer(mgg, real, [domain(), domain("other")], recipe).train())
    assert [step.iteration for step in steps] == [1, 2, 3]
    assert all(not torch.equal(value, before[name]) for name, value in mgg.named_parameters())
    assert torch.equal(real.backbone.theta(), theta)


def test_same_seed_same_numbers_another_seed_others():
    def numbers(seed):
        mgg = MGG(0)
        list(MetaTrainer(mgg, Scripted(seed), [domain()], dataclasses.replace(RECIPE, seed=seed)).train())
        return torch.cat([value.detach().flatten() for value in mgg.parameters()])

    assert torch.equal(numbers(0), numbers(0))
    assert not torch.equal(numbers(0), numbers(1))


def test_resuming_between_episodes_is_exact():
    def trainer():
        return MetaTrainer(MGG(0), learner(), [domain(), domain("other")], RECIPE)

    whole = trainer()
    list(whole.train())
    first = trainer()
    for progress in first.train():
        if progress.iteration == RECIPE.windows:
            break
    second = trainer()
    second.load_state_dict(first.state_dict())
    assert [progress.iteration for progress in second.train()] == [3, 4, 5, 6]
    for one, other in zip(whole.rule.parameters(), second.rule.parameters(), strict=True):
        assert torch.equal(one, other)


def test_resuming_names_what_is_missing():
    trainer = MetaTrainer(MGG(0), learner(), [domain()], RECIPE)
    state = trainer.state_dict()
    with pytest.raises(WeightsError, match=r"expected 'query' \[8, 2\], found nothing"):
        trainer.load_state_dict({name: value for name, value in state.items() if name != "rule.query"})
    with pytest.raises(WeightsError, match=r"expected 'query' \[8, 2\], found \[8, 3\]"):
        trainer.load_state_dict({**state, "rule.query": torch.zeros(8, 3)})


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_meta_gradient_that_is_not_finite_changes_nothing(poison):
    class Poisoned(Scripted):
        def signal(self, theta, frames, labels, adapt_count):
            given = super().signal(theta, frames, labels, adapt_count)
            return given._replace(meta_gradient=torch.full((SIZE,), poison))

    mgg = MGG(0)
    before = [value.clone() for value in mgg.parameters()]
    with pytest.raises(MggEdgeError, match="iteration 0 is not finite"):
        list(MetaTrainer(mgg, Poisoned(), [domain()], RECIPE).train())
    assert all(torch.equal(one, other) for one, other in zip(before, mgg.parameters(), strict=True))


def test_released_recipe_judges_each_update_by_the_next_batch_and_never_resets():
    thetas = []

    class Watched(Scripted):
        def signal(self, theta, frames, labels, adapt_count):
            thetas.append(theta.clone())
            assert len(frames) == adapt_count == 2
            return super().signal(theta, frames, labels, adapt_count)

    recipe = dataclasses.replace(RELEASED, iterations=5)
    list(MetaTrainer(MGG(0), Watched(), [domain()], recipe).train())
    assert len(thetas) == 6
    moved = [float((theta - thetas[0]).abs().max()) for theta in thetas]
    assert moved == sorted(moved)
    assert 0 < moved[1] <= recipe.learning_rate


def test_bad_requests():
    with pytest.raises(UsageError, match="at least one domain"):
        MetaTrainer(MGG(0), learner(), [], RECIPE)
    with pytest.raises(UsageError, match="'bare' has none"):
        MetaTrainer(
            MGG(0), learner(), [domain(), domain("bare", labels=False)], dataclasses.replace(RECIPE, supervised=True)
        )
    for changes, message in (
        ({"horizon": 0}, "horizon of at least 1, found 0"),
        ({"batch_sizes": (4, 1)}, "batches of at least 2"),
        ({"batch_sizes": ()}, "batches of at least 2"),
        ({"learning_rate": float("nan")}, r"learning_rate in \(0, 1\], found nan"),
        ({"meta_learning_rate": 2.0}, r"meta_learning_rate in \(0, 1\]"),
    ):
        with pytest.raises(UsageError, match=message):
            dataclasses.replace(RECIPE, **changes)
