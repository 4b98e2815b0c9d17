"""The defining equations of DeYO, CoTTA, ROID, LAME, T3A and FOA's shift, worked out by hand or in plain loops."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from method_models import DEPTH, Reference, backbone, source, stream  # noqa: E402
from mgg_edge.errors import UnsupportedError  # noqa: E402
from mgg_edge.learn import Backbone  # noqa: E402
from mgg_edge.learn.methods import Classifier, build_method  # noqa: E402
from mgg_edge.learn.methods.augmentation import Augmentation  # noqa: E402
from mgg_edge.learn.methods.deyo import shuffle_patches  # noqa: E402
from mgg_edge.learn.methods.eata import default_redundancy  # noqa: E402
from mgg_edge.learn.methods.head import Head  # noqa: E402
from mgg_edge.learn.methods.outputs import assign  # noqa: E402
from mgg_edge.learn.methods.randomness import generator_of  # noqa: E402
from mgg_edge.learn.methods.roid import correct_prior, roid_weights, soft_likelihood_ratio  # noqa: E402
from mgg_edge.learn.methods.sar import lower_norms  # noqa: E402
from vit import OPTIONS  # noqa: E402

pytestmark = pytest.mark.torch

RATE = 0.01
# Updates of θ in float32 against a plain loop, relative to the largest of them.
UPDATE_TOLERANCE = 2e-4


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def same_update(found, expected):
    found, expected = found - backbone().theta(), expected - backbone().theta()
    assert expected.abs().max() > 1e-4
    assert (found - expected).abs().max() < UPDATE_TOLERANCE * expected.abs().max()


def gradient_of(loss, reference):
    gradients = torch.autograd.grad(loss, reference.parameters)
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_eatas_redundancy_goes_through_both_of_the_papers_settings():
    assert default_redundancy(10) == pytest.approx(0.4)
    assert default_redundancy(1000) == pytest.approx(0.05)


def test_top_norms_are_the_last_quarter_of_the_blocks_and_the_final_norm():
    mask = backbone().split(lower_norms(Classifier(backbone())))
    for name, part in mask.items():
        assert part.unique().tolist() == [float(not name.startswith((f"blocks.{DEPTH - 1}.", "norm.")))]


def test_patches_are_permuted_within_each_image_and_nothing_is_lost():
    pictures = torch.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3).float()
    shuffled = shuffle_patches(pictures, 4, generator_of(0, 0))

    def patches(image):
        return {tuple(image[r : r + 2, c : c + 2].flatten().tolist()) for r in range(0, 8, 2) for c in range(0, 8, 2)}

    for before, after in zip(pictures, shuffled, strict=True):
        assert patches(before) == patches(after)
        assert not torch.equal(before, after)
    orders = [
        [after[r, c, 0] - 192 * k for r in range(0, 8, 2) for c in range(0, 8, 2)] for k, after in enumerate(shuffled)
    ]
    assert orders[0] != orders[1]
    assert shuffle_patches(torch.zeros(1, 30, 31, 3, dtype=torch.uint8), 4, generator_of(0, 0)).shape == (1, 30, 31, 3)


def test_deyos_update():
    batch = stream(1, 16)[0]
    method = build_method(f"deyo:learning_rate={RATE}:freeze_top=false:difference=0.05", backbone(), source())
    _, state = method.step(batch, method.init())
    reference = Reference()
    logits = reference(batch)
    entropies = entropy(logits)
    confident = torch.nonzero(entropies < 0.5 * math.log(10)).flatten()
    shuffled = shuffle_patches(batch[confident], 4, generator_of(0, 0))
    destroyed = reference(shuffled).softmax(1)
    loss, kept = 0.0, 0
    for row, index in enumerate(confident.tolist()):
        answer = logits[index].argmax()
        difference = (logits[index].softmax(0)[answer] - destroyed[row, answer]).item()
        if difference > 0.05:
            kept += 1
            value = entropies[index]
            loss = loss + value * (math.exp(0.4 * math.log(10) - value.item()) + math.exp(difference))
    assert 0 < kept < len(confident) < 16
    same_update(state.weights.theta, backbone().theta() - RATE * gradient_of(loss / kept, reference))


def test_cottas_update_teacher_and_restoration():
    batch = stream(1)[0]
    text = f"cotta:learning_rate={RATE}:momentum=0:confidence=0:restore=0.25:decay=0.5"
    method = build_method(text, backbone(), source())
    _, state = method.step(batch, method.init())
    _, after = method.step(batch, state)
    start = backbone().theta()
    reference = Reference()
    student, teacher = reference(batch), reference(batch).detach()
    loss = (
        -0.5 * (teacher.softmax(1) * student.log_softmax(1) + student.softmax(1) * teacher.log_softmax(1)).sum(1).mean()
    )
    moved = start - RATE * gradient_of(loss, reference)
    same_update(state.teacher, 0.5 * start + 0.5 * moved)
    restored = state.weights.theta == start
    assert 0.15 < restored.float().mean() < 0.35
    assert (state.weights.theta - moved)[~restored].abs().max() < 1e-6
    # The answers of the second step are the teacher's of the first.
    answers, _ = method.step(batch, state)
    assert torch.allclose(answers, method.predict(batch, state), atol=1e-5)
    assert not torch.equal(after.teacher, state.teacher)


def test_cotta_averages_views_only_where_the_source_is_unsure():
    batch = stream(1)[0]
    middle = float(build_method("none", backbone(), source()).predict(batch, None).softmax(1).amax(1).mean())
    sure, unsure = (
        build_method(f"cotta:views=3:confidence={middle + change}", backbone(), source()) for change in (-1e-3, 1e-3)
    )
    plain = sure.predict(batch, sure.init())
    assert torch.allclose(sure.step(batch, sure.init())[0], plain, atol=1e-5)
    averaged, _ = unsure.step(batch, unsure.init())
    generator = generator_of(0, 0)
    views = [unsure.predict(Augmentation()(batch, generator), unsure.init()) for _ in range(3)]
    assert torch.allclose(averaged, torch.stack(views).mean(0), atol=1e-4)
    confidences = build_method("none", backbone(), source()).predict(source().frames, None).softmax(1).amax(1)
    found = build_method("cotta", backbone(), source()).confidence
    assert found == pytest.approx(float(confidences.quantile(0.05)), abs=1e-5)


def test_views_stay_pictures_and_follow_the_generator():
    batch = stream(1)[0]
    one, same, other = (Augmentation()(batch, generator_of(0, step)) for step in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == batch.shape
    assert float(one.min()) >= 0
    assert float(one.max()) <= 255
    lit = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    lit[:, :, :8] = 255

    def mirrored(augmentation):
        views = [augmentation(lit, generator_of(0, step)) for step in range(12)]
        return {bool(view[..., :16, :].sum() < view[..., 16:, :].sum()) for view in views}

    assert mirrored(Augmentation()) == {True, False}
    assert mirrored(Augmentation(flip=False)) == {False}


def test_roids_weights():
    # Three images, two classes; m = (½, ½).
    probability = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.99, 0.01]])
    mean = torch.tensor([0.5, 0.5])
    cosines = [(0.5 * a + 0.5 * b) / (math.sqrt(0.5) * math.hypot(a, b)) for a, b in probability.tolist()]
    diverse = [(max(cosines) - value) / (max(cosines) - min(cosines)) for value in cosines]
    surprises = [-sum(p * math.log(p) for p in row) for row in probability.tolist()]
    certain = [(max(surprises) - value) / (max(surprises) - min(surprises)) for value in surprises]
    limit = sum(diverse) / 3
    expected = [0.0 if d < limit else math.exp(d * c / (1 / 3)) for d, c in zip(diverse, certain, strict=True)]
    assert expected[0] == 0.0
    assert expected[2] == pytest.approx(math.exp(3.0))
    found = roid_weights(probability.log(), mean, 1 / 3)
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert roid_weights(probability[:1].log(), mean, 1 / 3).tolist() == [1.0]


def test_the_soft_likelihood_ratio():
    assert float(soft_likelihood_ratio(torch.tensor([[0.75, 0.25]]).log())) == pytest.approx(
        -(0.75 * math.log(3 + 1e-5) + 0.25 * math.log(1 / 3 + 1e-5)), rel=1e-5
    )
    sure = soft_likelihood_ratio(torch.tensor([[40.0, 0.0]]))  # clipped at 0.99, and 0 · log 0 is 0
    assert float(sure) == pytest.approx(-0.99 * math.log(99 + 1e-5), rel=1e-3)


def test_the_corrected_prior():
    probability = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
    prior = (0.75, 0.25)
    smoothing = 0.5 / 0.75
    weights = [(value + smoothing) / (1 + 2 * smoothing) for value in prior]
    for row, found in zip(probability.tolist(), correct_prior(probability.log()).exp().tolist(), strict=True):
        product = [p * w for p, w in zip(row, weights, strict=True)]
        assert found == pytest.approx([value / sum(product) for value in product], rel=1e-5)


def test_roids_update_is_averaged_with_the_source():
    batch = stream(1, 12)[0]
    text = f"roid:learning_rate={RATE}:consistency=false:prior=false"
    method = build_method(text, backbone(), source())
    answers, state = method.step(batch, method.init())
    reference = Reference()
    logits = reference(batch)
    uniform = torch.full((10,), 0.1)
    weight = roid_weights(logits.detach(), uniform, 1 / 3)
    gradient = gradient_of((soft_likelihood_ratio(logits) * weight).sum() / 12, reference)
    start = backbone().theta()
    same_update(state.weights.theta, start - 0.99 * RATE * 1.9 * gradient)  # Nesterov's first step is (1 + μ)g
    expected = 0.9 * uniform + 0.1 * logits.detach().softmax(1).mean(0)
    assert torch.allclose(state.mean, expected, atol=1e-6)
    corrected = build_method(text.replace(":prior=false", ""), backbone(), source())
    assert torch.allclose(corrected.step(batch, corrected.init())[0], correct_prior(answers), atol=1e-5)


def test_roids_consistency_compares_with_a_view():
    batch = stream(1, 12)[0]
    method = build_method(f"roid:learning_rate={RATE}:keep=1:momentum=0", backbone(), source())
    _, state = method.step(batch, method.init())
    reference = Reference()
    logits = reference(batch)
    weight = roid_weights(logits.detach(), torch.full((10,), 0.1), 1 / 3)
    kept = weight > 0
    view = Augmentation(optics=False, padding="reflect")(batch[kept], generator_of(0, 0))
    a, b = reference(view).log_softmax(1), logits[kept].log_softmax(1)
    consistency = -0.5 * (b.exp() * a + a.exp() * b).sum(1)
    loss = ((soft_likelihood_ratio(logits) * weight).sum() + (consistency * weight[kept]).sum()) / 12
    same_update(state.weights.theta, backbone().theta() - RATE * gradient_of(loss, reference))


def test_lames_assignments_solve_their_fixed_point():
    probability = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7]])
    graph = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assignment = assign(probability, graph)
    for i in range(3):
        weight = [float(probability[i, c] * math.exp(float(graph[i] @ assignment[:, c]))) for c in range(2)]
        assert assignment[i].tolist() == pytest.approx([value / sum(weight) for value in weight], rel=1e-3)
    assert assignment[2].argmax() == 0  # the neighbour outweighs the image's own 0.7
    assert torch.allclose(assign(probability, torch.zeros(3, 3)), probability, atol=1e-5)


@pytest.mark.parametrize("affinity", ["knn", "rbf", "linear"])
def test_lames_graph(affinity):
    batch = stream(1, 12)[0]
    method = build_method(f"lame:affinity={affinity}", backbone(), source())
    head = Head(Classifier(backbone()), "lame")
    logits, embedding = head(batch)
    embedding = embedding / embedding.norm(dim=1, keepdim=True)
    distance = torch.tensor([[float((a - b).norm()) for b in embedding] for a in embedding])
    if affinity == "knn":
        graph = torch.zeros(12, 12)
        for i in range(12):
            for j in sorted(range(12), key=lambda other, row=i: float(distance[row, other]))[1:6]:
                graph[i, j] = 1
    elif affinity == "rbf":
        scale = distance.sort(1).values[:, 4].mean()
        graph = torch.exp(-(distance**2) / (2 * scale**2))
    else:
        graph = embedding @ embedding.T
    expected = assign(logits.softmax(1), graph)
    found, _ = method.step(batch, method.init())
    assert torch.allclose(found.exp(), expected, atol=1e-4)


def test_t3as_supports_and_templates():
    batches = stream(2, 12)
    method = build_method("t3a:supports=2", backbone(), source())
    state = method.init()
    head = Head(Classifier(backbone()), "t3a")
    weight, bias = head.weight, head.bias
    members = [(row, int((row @ weight.T + bias).argmax()), float(entropy(row @ weight.T + bias))) for row in weight]
    for batch in batches:
        found, state = method.step(batch, state)
        logits, embedding = head(batch)
        members += [(e, int(z.argmax()), float(entropy(z))) for e, z in zip(embedding, logits, strict=True)]
        members = [
            member
            for label in range(10)
            for member in sorted((entry for entry in members if entry[1] == label), key=lambda entry: entry[2])[:2]
        ]
        templates = torch.zeros(10, embedding.shape[1])
        for support, label, _ in members:
            templates[label] += support / support.norm()
        norms = templates.norm(dim=1, keepdim=True)
        expected = embedding @ (templates / norms.clamp(min=1e-12)).T
        assert torch.allclose(found, expected, atol=1e-4)
    assert len(state.labels) == len(members)
    assert state.labels.bincount(minlength=10).max() <= 2


def test_foas_shift():
    first, second, third = stream(3)
    method = build_method("foa", backbone(), source())
    head = Head(Classifier(backbone()), "foa")
    state, found = method.init(), []
    for batch in (first, second, third):
        logits, state = method.step(batch, state)
        found.append(logits)
    mean = head(source().frames)[1].mean(0)
    (_, one), (_, two), (_, three) = head(first), head(second), head(third)
    running = [one.mean(0), 0.9 * one.mean(0) + 0.1 * two.mean(0)]
    assert torch.allclose(found[0], head.logits(one), atol=1e-4)
    assert torch.allclose(found[1], head.logits(two + mean - running[0]), atol=1e-3)
    assert torch.allclose(found[2], head.logits(three + mean - running[1]), atol=1e-3)


def test_a_model_without_a_linear_last_layer_is_refused():
    class Scaled(VisionTransformer):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Backbone(Scaled(**OPTIONS), "scaled", backbone().preprocess)
    with pytest.raises(UnsupportedError, match="t3a: expected the logits of 'scaled' to come from its linear layer"):
        build_method("t3a", model, source())
