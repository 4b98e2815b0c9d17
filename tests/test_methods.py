"""Every method: pure, finite on any batch, batch 1 included; its name, options and what it refuses."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

import timm  # noqa: E402

from method_models import backbone, convolutional, source, stream  # noqa: E402
from mgg_edge.errors import UnsupportedError, UsageError, WeightsError  # noqa: E402
from mgg_edge.learn import MGG, Adam, AdaptStep, Objective, Sgd, measure_statistics  # noqa: E402
from mgg_edge.learn.methods import METHODS, Source, build_method, parse_method  # noqa: E402
from vit import frames  # noqa: E402

pytestmark = pytest.mark.torch

WITH_BATCH_NORM = ("bn", "alpha-bn")
ON_TRANSFORMERS = tuple(name for name in METHODS if name not in WITH_BATCH_NORM)
# Few views, so that the test is quick; on always, so that they are tested.
TEXT = {
    "cotta": "cotta:views=2:confidence=1.0",
    "memo": "memo:views=3:learning_rate=0.01",
    "eata": "eata:redundancy=0.9",
    "rdumb": "rdumb:redundancy=0.9",
}
LEARNS = ("tent", "eata", "rdumb", "sar", "deyo", "cotta", "roid", "sgd", "adam", "mgg", "t3a", "foa")


def tensors_of(state):
    """All tensors in a state, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = state.values()
    return (
        [tensor for part in state for tensor in tensors_of(part)] if not isinstance(state, int | float | None) else []
    )


def method(name, **extra):
    text = ":".join([TEXT.get(name, name), *(f"{key}={value}" for key, value in extra.items())])
    return build_method(text, backbone(), source())


def walk(chosen, batches):
    state, answers = chosen.init(), []
    for batch in batches:
        logits, state = chosen.step(batch, state)
        answers.append(logits)
    return answers, state


@pytest.mark.parametrize("name", ON_TRANSFORMERS)
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_every_batch_size_gives_finite_answers_and_states(name, batch):
    chosen = method(name)
    answers, state = walk(chosen, stream(18 // batch, batch))
    for logits in answers:
        assert logits.shape == (batch, 10)
        assert logits.isfinite().all()
        assert not logits.requires_grad
    for tensor in tensors_of(state):
        assert tensor.isfinite().all()
        assert not tensor.requires_grad
    assert chosen.predict(frames(3), state).isfinite().all()


@pytest.mark.parametrize("name", ON_TRANSFORMERS)
def test_extreme_batches_give_finite_answers(name):
    black = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)  # four equal frames: no spread in anything
    answers, state = walk(method(name), [black, black + 255, stream(1, 4)[0]])
    assert all(logits.isfinite().all() for logits in answers)
    assert all(tensor.isfinite().all() for tensor in tensors_of(state))


@pytest.mark.parametrize("name", ON_TRANSFORMERS)
def test_steps_are_pure_and_repeatable(name):
    chosen, batches = method(name), stream(3)
    _, state = walk(chosen, batches[:2])
    before = [tensor.clone() for tensor in tensors_of(state)]
    pictures = batches[2].clone()
    logits, after = chosen.step(batches[2], state)
    chosen.predict(batches[0], after)
    again, after_again = chosen.step(batches[2], state)
    assert torch.equal(logits, again)
    assert all(map(torch.equal, tensors_of(after), tensors_of(after_again)))
    assert all(map(torch.equal, before, tensors_of(state)))
    assert torch.equal(pictures, batches[2])
    fresh, _ = walk(method(name), batches)  # nothing is hidden in the object
    assert torch.equal(fresh[2], logits)


@pytest.mark.parametrize("name", LEARNS)
def test_learning_changes_later_answers(name):
    chosen, batches = method(name), stream(4, 12)
    _, state = walk(chosen, batches)
    held_out = frames(6, seed=5)
    assert not torch.equal(chosen.predict(held_out, chosen.init()), chosen.predict(held_out, state))


@pytest.mark.parametrize("name", [name for name in ON_TRANSFORMERS if name not in ("lame", "t3a", "roid", "memo")])
def test_the_first_answers_and_those_before_any_step_are_the_source_models(name):
    chosen, batch = (
        method(name) if name != "cotta" else build_method("cotta:confidence=0", backbone(), source()),
        stream(1)[0],
    )
    expected = build_method("none", backbone(), source()).predict(batch, None)
    assert torch.equal(chosen.predict(batch, chosen.init()), expected)
    assert (chosen.step(batch, chosen.init())[0] - expected).abs().max() < 1e-4


def test_bn_needs_batch_normalisation_and_says_so():
    with pytest.raises(UnsupportedError, match=r"bn: 'vit_tiny.*' has no batch normalisation whose statistics move"):
        build_method("bn", backbone(), source())
    still = convolutional("source")
    statistics = measure_statistics(still, frames(32).split(32))
    with pytest.raises(UnsupportedError, match="norm statistics: source"):
        build_method("bn", still, Source(statistics, frames(32)))


@pytest.mark.parametrize(
    "name", [*WITH_BATCH_NORM, *(name for name in ON_TRANSFORMERS if name not in ("foa", "t3a", "lame"))]
)
def test_networks_with_batch_normalisation(name):
    model = convolutional()
    knowledge = Source(measure_statistics(model, frames(32).split(32)), frames(32))
    chosen = build_method(TEXT.get(name, name), model, knowledge)
    for batch in (1, 6):
        answers, state = walk(chosen, stream(9 // batch, batch))
        assert all(logits.isfinite().all() for logits in answers)
        assert all(tensor.isfinite().all() for tensor in tensors_of(state))


def test_bn_answers_under_the_batchs_own_statistics():
    model = convolutional()
    knowledge = Source(measure_statistics(model, frames(32).split(32)), frames(32))
    chosen, batch = build_method("bn", model, knowledge), stream(1, 6)[0]
    logits, state = chosen.step(batch, chosen.init())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        reference = timm.create_model("mobilenetv3_small_050", num_classes=10).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    info = model.preprocess
    inputs = ((batch / 255 - torch.tensor(info.mean)) / torch.tensor(info.std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert (logits - reference(inputs)).abs().max() < 1e-4 * max(1.0, float(logits.abs().max()))
    assert torch.allclose(chosen.predict(batch, state), logits, atol=1e-4)
    assert not torch.allclose(chosen.predict(batch, chosen.init()), logits, atol=1e-2)


@pytest.mark.parametrize(("name", "rule"), [("sgd", Sgd), ("adam", Adam), ("mgg", MGG)])
def test_rules_are_the_exported_step(name, rule):
    step = AdaptStep(backbone(), Objective(), rule(), source().statistics, 2e-3)
    tensors, constants = step.initial_state(), step.constants()
    answers, state = walk(method(name, learning_rate=2e-3), stream(3))
    for batch, logits in zip(stream(3), answers, strict=True):
        output = step.adapt(batch, tensors, constants)
        tensors = output.state
        assert torch.equal(logits, output.logits)
    assert torch.equal(state.tensors["theta"], tensors["theta"])


def test_rules_collect_small_batches_and_then_step_on_all_of_them():
    chosen = method("mgg", least_batch=6)
    singles = stream(7, 1)
    _, five = walk(chosen, singles[:5])
    assert len(five.waiting) == 5
    assert torch.equal(five.tensors["theta"], backbone().theta())
    _, six = walk(chosen, singles[:6])
    assert len(six.waiting) == 0
    _, whole = walk(chosen, [torch.cat(singles[:6])])
    assert torch.equal(six.tensors["theta"], whole.tensors["theta"])


def test_the_mgg_takes_learned_numbers_from_a_file(tmp_path):
    MGG(7).save(tmp_path / "mgg.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    _, learned = walk(method("mgg", weights=tmp_path / "mgg.safetensors"), stream(2))
    _, seeded = walk(method("mgg", seed=7), stream(2))
    _, other = walk(method("mgg"), stream(2))
    assert torch.equal(learned.tensors["theta"], seeded.tensors["theta"])
    assert not torch.equal(learned.tensors["theta"], other.tensors["theta"])
    with pytest.raises(WeightsError):
        method("mgg", weights=tmp_path / "bad.safetensors")
    with pytest.raises(UsageError, match="sgd: takes no weights file"):
        method("sgd", weights="x.safetensors")


def test_options_are_read_by_their_types():
    spec = parse_method("roid:keep=0.9:flip=false:learning_rate=0.1:seed=3")
    assert (spec.name, spec.options.keep, spec.options.flip, spec.options.seed) == ("roid", 0.9, False, 3)
    assert spec.options.learning_rate == 0.1
    assert parse_method("deyo", seed=5, weights="x").options.seed == 5
    assert parse_method("deyo:seed=6", seed=5).options.seed == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tnet", "expected one of none, bn, alpha-bn, tent"),
        ("tent:rate=1", "found 'rate=1'"),
        ("tent:momentum", "found 'momentum'"),
        ("none:seed=1", "has no options"),
        ("tent:momentum=x", "momentum: expected float, found 'x'"),
        ("roid:flip=1", "flip: expected bool, found '1'"),
        ("tent:momentum=1", r"expected a number in \[0, 1\)"),
        ("tent:momentum=nan", r"expected a number in \[0, 1\)"),
        ("tent:learning_rate=0", "expected positive numbers"),
        ("sar:rate_factor=nan", "expected positive numbers"),
        ("eata:margin=0", "positive margin"),
        ("eata:fisher_weight=nan", "positive margin"),
        ("sar:radius=-1", "positive margin"),
        ("deyo:patches=1", "at least 2 patches"),
        ("cotta:restore=2", r"shares in \[0, 1\]"),
        ("roid:temperature=0", "positive temperature"),
        ("lame:affinity=cosine", "expected an affinity of knn, rbf, linear"),
        ("t3a:supports=0", "at least 1 support"),
        ("tent:optimiser=lion", "expected one of sgd, adam, found 'lion'"),
        ("tent:optimiser=adam:nesterov=true", "expected the optimiser sgd, found adam"),
        ("alpha-bn:alpha=0", r"share in \(0, 1\]"),
        ("memo:views=0", "at least one view"),
        ("foa:decay=1.5", r"decay in \[0, 1\]"),
        ("mgg:least_batch=1", "least batch of 2"),
        ("adam:discrepancy_weight=nan", "weights of at least 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_method(text)


def test_learning_rates_follow_the_papers_rule():
    from mgg_edge.learn.methods.base import Classifier, RateOptions, paper_rate

    transformer, convolutions = Classifier(backbone()), Classifier(convolutional())
    plain = RateOptions()
    assert paper_rate(transformer, plain, 64) == pytest.approx(1e-3)
    assert paper_rate(transformer, plain, 16) == pytest.approx(2.5e-4)
    assert paper_rate(transformer, plain, 1, alone=2.0) == pytest.approx(1e-3 / 32)
    assert paper_rate(convolutions, plain, 64) == paper_rate(convolutions, plain, 32) == pytest.approx(2.5e-4)
    assert paper_rate(convolutions, plain, 16) == pytest.approx(1.25e-4)
    assert paper_rate(transformer, RateOptions(rate_factor=3.0), 64) == pytest.approx(3e-3)
    assert paper_rate(transformer, RateOptions(learning_rate=0.5, rate_factor=2.0), 1, alone=2.0) == 1.0
