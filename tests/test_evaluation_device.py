"""What `eval` answers is what the device answers: every rule, PyTorch and the exported graphs against the run time."""

from __future__ import annotations

import contextlib

import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

import numpy as np  # noqa: E402

from method_models import backbone as transformer  # noqa: E402
from method_models import convolutional  # noqa: E402
from mgg_edge.export import Origins, export_bundle  # noqa: E402
from mgg_edge.export.engine_method import EngineMethod  # noqa: E402
from mgg_edge.learn import AdaptStep, Objective, measure_statistics  # noqa: E402
from mgg_edge.learn.images import synthetic_frames  # noqa: E402
from mgg_edge.learn.methods.discrepancy import RuleMethod  # noqa: E402
from mgg_edge.learn.rules.files import RULES, untrained_rule  # noqa: E402
from mgg_edge.learn.rules.forward import Forward  # noqa: E402
from mgg_edge.learn.rules.forward_plus import ForwardPlus  # noqa: E402
from mgg_edge.runtime import Adapter, AdapterSettings, Bundle, open_engine  # noqa: E402
from mgg_edge.runtime.adaptation.gate import GateSettings  # noqa: E402
from mgg_edge.runtime.adaptation.guard import StepLimits  # noqa: E402

pytestmark = pytest.mark.torch

BATCH, FRAMES = 4, 20
# Of the largest logit, in float32 after four steps; the least that a rule does here is 1e-3.
TOLERANCE = 5e-5
# Every frame is admitted: those of the test have nothing to do with each other.
OPEN = AdapterSettings(gate=GateSettings(min_contrast=0, min_difference=0, cut_levels=255), limits=StepLimits(1e9, 1e9))


def rule_of(name, net):
    rule = untrained_rule(name, net.norms.size, net.features, 0)
    if isinstance(rule, Forward | ForwardPlus):
        with torch.no_grad():  # untrained, it moves nothing
            rule.write.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
            if isinstance(rule, ForwardPlus):
                rule.log_threshold.fill_(-20.0)
    return rule


@pytest.mark.parametrize("name", RULES)
def test_the_same_answers_frame_by_frame(name, tmp_path):
    net = convolutional("mix:0.3") if name == "statistics" else transformer()
    statistics = measure_statistics(net, synthetic_frames(32, 32, 32, 0).split(8))
    rule = rule_of(name, net)
    step = AdaptStep(net, Objective(), rule, statistics, min(0.01, rule.max_learning_rate))
    path, labels = tmp_path / "x.mgg", [str(index) for index in range(10)]
    export_bundle(step, path, adapt_batch=BATCH, labels=labels, origins=Origins("", "", ""), parity_steps=5)
    frames = synthetic_frames(FRAMES, 32, 32, 7)
    with Adapter.open(path, adapt="always", settings=OPEN, threads=1) as adapter:
        device = np.stack([adapter(frame.numpy()).logits for frame in frames])
        assert adapter.counters.adapt_steps >= FRAMES // BATCH - 1, adapter.counters
    bundle = Bundle.load(path)
    with contextlib.closing(open_engine(bundle, threads=1)) as engine:
        for method in (EngineMethod(bundle, engine), RuleMethod(step, BATCH)):
            state, answers = method.init(), []
            for part in frames.split(BATCH):
                logits, state = method.step(part, state)
                answers.append(logits.detach().numpy())
            found = np.concatenate(answers)
            assert np.abs(found - device).max() < TOLERANCE * np.abs(device).max(), type(method).__name__
            assert (found.argmax(1) == device.argmax(1)).all()
            frozen = method.predict(frames, method.init()).detach().numpy()
            assert np.abs(frozen - device).max() > 10 * TOLERANCE * np.abs(device).max()  # the rule did something
