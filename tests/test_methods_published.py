"""Tent, EATA, RDumb and SAR against plain versions with modules and optimisers, written from the papers' rules."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

from method_models import DEPTH, Reference, backbone, source, stream  # noqa: E402
from mgg_edge.learn.methods import build_method  # noqa: E402

pytestmark = pytest.mark.torch

STEPS = 6
# Both compute in float32 with the same operators in another order; logits are about 10.
LOGITS_TOLERANCE = 1e-5
# Differences of θ between the two, against moves of more than 1e-3.
THETA_TOLERANCE = 1e-6
CLASSES = 10
MARGIN = 0.4 * math.log(CLASSES)
RECOVERY = 0.86
LIMIT = 0.9  # few images of a random net are alike and yet sure: 0.4 leaves none after the first batch
RATE = 0.01  # far above the defaults, so that several steps tell one rule from another


def entropy(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


def run(text, batches):
    method = build_method(text, backbone(), source())
    state, answers = method.init(), []
    for batch in batches:
        logits, state = method.step(batch, state)
        answers.append(logits)
    return answers, state


def check(text, reference_step, reference, batches, least_move=1e-3):
    start = reference.theta()
    expected = [reference_step(batch).detach().clone() for batch in batches]
    found, state = run(text, batches)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one - other).abs().max() < LOGITS_TOLERANCE * max(1.0, float(other.abs().max())), f"step {step}"
    theta = getattr(state, "weights", state).theta
    assert (theta - reference.theta()).abs().max() < THETA_TOLERANCE
    moved = (reference.theta() - start).abs().max()
    assert moved >= least_move
    return expected, state


def test_tent():
    reference = Reference()
    optimiser = torch.optim.SGD(reference.parameters, RATE, momentum=0.9)

    def step(batch):
        optimiser.zero_grad()
        logits = reference(batch)
        entropy(logits).mean().backward()
        optimiser.step()
        return logits

    check(f"tent:learning_rate={RATE}", step, reference, stream(STEPS))


def plain_eata(reference, optimiser, fisher, weight, counts):
    anchor = {name: value.detach().clone() for name, value in reference.named.items()}
    margin, limit, memory = MARGIN, LIMIT, {"mean": None}

    def step(batch):
        optimiser.zero_grad()
        logits = reference(batch)
        mean, loss, used = memory["mean"], 0.0, []
        for row in logits:
            value = entropy(row)
            probability = row.softmax(0)
            if not value < margin:
                continue
            if mean is not None and not abs(torch.cosine_similarity(mean, probability, dim=0)) < limit:
                continue
            used.append(probability.detach())
            loss = loss + value * math.exp(margin - value.item())
        counts.append(len(used))
        if used:
            loss = loss / len(used)
            for name, value in reference.named.items():
                if fisher:
                    loss = loss + weight * (fisher[name] * (value - anchor[name]) ** 2).sum()
            loss.backward()
            optimiser.step()
            new = torch.stack(used).mean(0)
            memory["mean"] = new if mean is None else 0.9 * mean + 0.1 * new
        return logits

    return step


def plain_fisher(reference):
    pictures, totals = source().frames, dict.fromkeys(reference.named, 0.0)
    batches = pictures.split(64)
    for batch in batches:
        logits = reference(batch)
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
        for name, gradient in zip(reference.named, torch.autograd.grad(loss, reference.parameters), strict=True):
            totals[name] = totals[name] + gradient**2 / len(batches)
    return totals


def test_eata_with_its_fisher_term():
    reference, counts = Reference(), []
    step = plain_eata(
        reference, torch.optim.SGD(reference.parameters, RATE, momentum=0.9), plain_fisher(reference), 2000.0, counts
    )
    check(f"eata:redundancy={LIMIT}:learning_rate={RATE}:fisher_weight=2000", step, reference, stream(STEPS))
    assert sum(count > 0 for count in counts) >= 3
    assert sum(counts) < STEPS * 8  # some images pass, some do not
    free = run(f"eata:redundancy={LIMIT}:learning_rate={RATE}:fisher_weight=0", stream(STEPS))[1]
    anchored = run(f"eata:redundancy={LIMIT}:learning_rate={RATE}:fisher_weight=2000", stream(STEPS))[1]
    start = backbone().theta()
    assert (anchored.weights.theta - start).norm() < 0.99 * (free.weights.theta - start).norm()


def test_a_batch_without_reliable_images_changes_nothing_in_eata():
    states = [run("eata:margin=1e-6", stream(2))[1], run("deyo:margin=1e-6", stream(2))[1]]
    for state in states:
        assert torch.equal(state.weights.theta, backbone().theta())
        assert not state.weights.momentum.any()


def test_rdumb_is_eata_without_fisher_that_forgets_everything_after_its_period():
    batches = stream(7)
    reference, counts = Reference(), []
    step = plain_eata(reference, torch.optim.SGD(reference.parameters, RATE, momentum=0.9), {}, 0.0, counts)
    check(f"rdumb:redundancy={LIMIT}:learning_rate={RATE}", step, reference, batches)
    answers, state = run(f"rdumb:redundancy={LIMIT}:learning_rate={RATE}:reset_steps=5", batches)
    again, fresh = run(f"rdumb:redundancy={LIMIT}:learning_rate={RATE}:reset_steps=5", batches[5:])
    for one, other in zip(answers[5:], again, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(state.weights.theta, fresh.weights.theta)
    assert torch.equal(state.mean, fresh.mean)


def plain_sar(reference, margin, recovery):
    optimiser = torch.optim.SGD(reference.parameters, RATE, momentum=0.9)
    source_values = [value.detach().clone() for value in reference.parameters]
    memory = {"mean": None, "resets": 0}

    def gradient_of(values):
        return (
            torch.autograd.grad(values.mean(), reference.parameters)
            if len(values)
            else ([torch.zeros_like(value) for value in reference.parameters])
        )

    def step(batch):
        logits = reference(batch)
        values = entropy(logits)
        reliable = torch.nonzero(values < margin).flatten()
        first = gradient_of(values[reliable])
        norm = math.sqrt(sum((gradient**2).sum().item() for gradient in first))
        before = [value.detach().clone() for value in reference.parameters]
        with torch.no_grad():
            for value, gradient in zip(reference.parameters, first, strict=True):
                value.add_(gradient, alpha=0.05 / (norm + 1e-12))
        values = entropy(reference(batch))[reliable]
        values = values[values < margin]
        second = gradient_of(values)
        with torch.no_grad():
            for value, old, gradient in zip(reference.parameters, before, second, strict=True):
                value.copy_(old)
                value.grad = gradient
        optimiser.step()
        if len(values):
            last = float(values.mean().detach())
            memory["mean"] = last if memory["mean"] is None else 0.9 * memory["mean"] + 0.1 * last
        if memory["mean"] is not None and memory["mean"] < recovery:
            memory["resets"] += 1
            optimiser.state.clear()
            with torch.no_grad():
                for value, old in zip(reference.parameters, source_values, strict=True):
                    value.copy_(old)
        return logits

    return step, memory


def lower_names():
    frozen = (f"blocks.{DEPTH - 1}.", "norm.")
    return tuple(name for name in backbone().norms.names if not name.startswith(frozen))


def test_sar_without_recovery():
    reference = Reference(lower_names())
    step, _ = plain_sar(reference, MARGIN, recovery=0.0)
    _, state = check(f"sar:learning_rate={RATE}:recovery=0", step, reference, stream(STEPS))
    assert len(reference.parameters) == 2 * 2 * (DEPTH - 1)  # γ and β of two norms in each block but the last
    start = backbone().split(backbone().theta())
    for name, value in backbone().split(state.weights.theta).items():
        assert torch.equal(value, start[name]) == (name not in lower_names()), name


def test_sar_recovers():
    reference = Reference(lower_names())
    step, memory = plain_sar(reference, MARGIN, recovery=RECOVERY)
    check(f"sar:learning_rate={RATE}:recovery={RECOVERY}", step, reference, stream(STEPS), least_move=0.0)
    assert 1 <= memory["resets"] < STEPS, memory


def test_sar_carries_momentum_through_a_batch_without_reliable_images():
    loud = torch.zeros(8, 32, 32, 3, dtype=torch.uint8)  # eight equal frames: one entropy
    reference = Reference(lower_names())
    with torch.no_grad():
        margin_share = float(entropy(reference(loud))[0]) / math.log(CLASSES) * 0.99
    step, _ = plain_sar(reference, margin_share * math.log(CLASSES), recovery=0.0)
    batches = [stream(1)[0], loud, stream(1)[0]]
    check(f"sar:learning_rate={RATE}:recovery=0:margin={margin_share}", step, reference, batches, least_move=1e-4)
