"""What the published protocol needs: optimisers as the authors', α-BN, MEMO, top norms of every family, a preset."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

import timm  # noqa: E402

from method_models import Reference, backbone, convolutional, source, stream  # noqa: E402
from mgg_edge.errors import UnsupportedError  # noqa: E402
from mgg_edge.learn import Backbone, measure_statistics  # noqa: E402
from mgg_edge.learn.methods import Classifier, Source, build_method, method_options, parse_method  # noqa: E402
from mgg_edge.learn.methods.memo import marginal_entropy, random_views  # noqa: E402
from mgg_edge.learn.methods.published import published_options  # noqa: E402
from mgg_edge.learn.methods.sar import lower_norms  # noqa: E402
from vit import frames  # noqa: E402

pytestmark = pytest.mark.torch
RATE = 0.01


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize(
    ("words", "optimiser"),
    [
        ("nesterov=true", lambda parameters: torch.optim.SGD(parameters, RATE, momentum=0.9, nesterov=True)),
        ("optimiser=adam", lambda parameters: torch.optim.Adam(parameters, RATE)),
        ("optimiser=adam:momentum=0.5", lambda parameters: torch.optim.Adam(parameters, RATE, betas=(0.5, 0.999))),
    ],
    ids=["nesterov", "adam", "adam-beta"],
)
def test_optimisers_are_pytorchs(words, optimiser):
    reference = Reference()
    chosen, theirs = build_method(f"tent:learning_rate={RATE}:{words}", backbone(), source()), None
    theirs, state = optimiser(reference.parameters), chosen.init()
    for batch in stream(6):
        theirs.zero_grad()
        entropy(reference(batch)).mean().backward()
        theirs.step()
        _, state = chosen.step(batch, state)
    # A scalar whose gradient is nearly 0 goes either way under Adam.
    difference = (state.theta - reference.theta()).abs()
    assert difference.quantile(0.999) < 2e-6
    assert difference.max() < 0.1 * RATE
    assert (state.theta - backbone().theta()).abs().max() > RATE / 2


def knowledge(model):
    return Source(measure_statistics(model, frames(32).split(32)), frames(32))


def test_alpha_bn_mixes_the_batch_with_the_source_and_remembers_nothing():
    model, alpha, batch = convolutional(), 0.3, stream(1, 6)[0]
    chosen = build_method(f"alpha-bn:alpha={alpha}", model, knowledge(model))
    first, state = chosen.step(batch, chosen.init())
    chosen.step(stream(2, 6)[1], state)
    assert torch.equal(chosen.step(batch, state)[0], first)
    assert torch.equal(chosen.predict(batch, state), first)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        reference = timm.create_model("mobilenetv3_small_050", num_classes=10).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(mixing(alpha))
    info = model.preprocess
    inputs = ((batch / 255 - torch.tensor(info.mean)) / torch.tensor(info.std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert (first - reference(inputs)).abs().max() < 1e-4 * max(1.0, float(first.abs().max()))


def mixing(alpha):
    """Before a layer normalises: its running statistics become the mixture, biased variance as α-BN has it."""

    def hook(module, inputs):
        (x,) = inputs
        module.running_mean.lerp_(x.mean((0, 2, 3)), alpha)
        module.running_var.lerp_(x.var((0, 2, 3), unbiased=False), alpha)

    return hook


def test_alpha_bn_needs_statistics_that_move():
    with pytest.raises(UnsupportedError, match="alpha-bn: 'vit_tiny"):
        build_method("alpha-bn", backbone(), source())


def test_memos_update_is_one_step_on_the_marginal_entropy_of_each_image():
    views, batch = 4, stream(1, 2)[0]
    chosen = build_method(f"memo:views={views}:learning_rate={RATE}", backbone(), source())
    answers, state = chosen.step(batch, chosen.init())
    assert state.step == 2
    for place, frame in enumerate(batch):
        reference = Reference()
        shown = random_views(frame, views, place, 0)
        mean = reference(shown).softmax(1).mean(0)
        torch.optim.SGD(reference.parameters, RATE).zero_grad()
        (-(mean * mean.log()).sum()).backward()
        torch.optim.SGD(reference.parameters, RATE).step()
        assert (answers[place] - reference(frame[None])[0]).abs().max() < 1e-4
    source_answers = build_method("none", backbone(), source()).predict(batch, None)
    assert (answers - source_answers).abs().max() > 1e-3


def test_the_marginal_entropy():
    certain, uniform = torch.tensor([[50.0, 0.0]]), torch.zeros(1, 2)
    assert marginal_entropy(certain) == pytest.approx(0.0, abs=1e-6)
    assert marginal_entropy(uniform) == pytest.approx(0.6931, abs=1e-4)
    # Two views that are sure of different classes agree on nothing.
    assert marginal_entropy(torch.tensor([[50.0, 0.0], [0.0, 50.0]])) == pytest.approx(0.6931, abs=1e-4)


def test_views_are_random_and_the_same_again():
    frame, before = frames(1)[0], torch.random.get_rng_state()
    one, other = random_views(frame, 3, 5, 0), random_views(frame, 3, 6, 0)
    assert torch.equal(one, random_views(frame, 3, 5, 0))
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    assert one.shape == (3, *frame.shape)
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's numbers are touched


def test_momentum_survives_a_reset_where_the_authors_does():
    text = f"sar:learning_rate={RATE}:margin=1:recovery=99"  # every batch resets
    kept, dropped = (build_method(f"{text}{words}", backbone(), source()) for words in (":keep_momentum=true", ""))
    batch = stream(1)[0]
    for chosen, survives in ((kept, True), (dropped, False)):
        _, state = chosen.step(batch, chosen.init())
        assert torch.equal(state.weights.theta, backbone().theta())
        assert bool(state.weights.momentum.any()) == survives


FROZEN = {
    "resnet18": ("layer4.",),
    "swin_tiny_patch4_window7_224": ("layers.3.", "norm."),
    "convnext_atto": ("stages.3.", "head.norm."),
    "vit_tiny_patch16_224": ("blocks.9.", "blocks.10.", "blocks.11.", "norm."),
    "efficientnet_lite0": ("blocks.6.", "bn2."),
    "torchvision/vit_b_16": (*(f"encoder.layers.encoder_layer_{number}." for number in (9, 10, 11)), "encoder.ln."),
    "torchvision/swin_t": ("features.6.", "features.7.", "norm."),
    "torchvision/convnext_tiny": ("features.6.", "features.7.", "classifier.0."),
    "densenet121": ("features.denseblock4.", "features.norm5."),
}


@pytest.mark.parametrize("name", FROZEN)
def test_top_norms_are_found_by_depth_in_every_family(name):
    model = Backbone.create(name, norm_statistics="source")
    mask = model.split(lower_norms(Classifier(model)))
    frozen = {name for name, part in mask.items() if not part.any()}
    expected = {parameter for parameter in mask if parameter.startswith(FROZEN[name])}
    assert frozen == expected != set()
    assert all(part.unique().numel() == 1 for part in mask.values())


def test_the_preset_names_options_that_there_are_and_that_differ():
    defaults = dict(method_options())
    for name, known in defaults.items():
        for layer_norm in (True, False):
            for option, value in published_options(name, layer_norm=layer_norm).items():
                assert option in known, (name, option)
                assert value != known[option] or name == "memo", (name, option)
            parse_method(name, **published_options(name, layer_norm=layer_norm))
    assert published_options("deyo", layer_norm=False) == {"difference": 0.3}
    assert published_options("deyo", layer_norm=True) == {}
    assert parse_method("tent:nesterov=false", **published_options("tent", layer_norm=False)).options.nesterov is False
