"""Training of the source model: it learns, it resumes exactly, it refuses what is not finite."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

import timm  # noqa: E402

from characters import drawn_glyphs  # noqa: E402
from mgg_edge.errors import UsageError, WeightsError  # noqa: E402
from mgg_edge.learn.reader import READER_NAME, mgg_reader_32  # noqa: E402
from mgg_edge.learn.training.source import SourceRecipe, accuracy, normalise, train_source  # noqa: E402
from mgg_edge.scenes.sources import GlyphSource, LabelledFrames  # noqa: E402

pytestmark = pytest.mark.torch

RECIPE = SourceRecipe(epochs=2, images_per_epoch=48, batch=16, warmup_steps=2, average_decay=0.5)
SOURCE = GlyphSource(drawn_glyphs())


def pictures(count=32):
    rng = np.random.default_rng(5)
    labels = rng.choice(SOURCE.available, count)
    return LabelledFrames(SOURCE.draw(labels, rng), labels)


def model(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(READER_NAME)


def test_the_reader_is_what_its_card_says():
    reader = model()
    assert sum(value.numel() for value in reader.parameters()) == pytest.approx(729_000, rel=0.01)
    assert reader(torch.zeros(2, 3, 32, 32)).shape == (2, 36)
    assert not any("BatchNorm" in type(module).__name__ for module in reader.modules())
    with pytest.raises(ValueError, match="images of a multiple of it"):
        mgg_reader_32(img_size=30)


def test_inputs_are_scaled_as_the_model_s_configuration_says():
    frames = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 1, 1, 3)
    assert normalise(frames)[:, 0, 0, 0].tolist() == [-1, 1]
    assert model().default_cfg["mean"] == model().default_cfg["std"] == (0.5, 0.5, 0.5)


def test_a_few_steps_lower_the_loss():
    recipe = dataclasses.replace(RECIPE, epochs=1, images_per_epoch=16 * 40, learning_rate=2e-3)
    losses = [step.loss for step in train_source(model(), SOURCE, pictures(), recipe)]
    assert losses[-1] < losses[0]


def test_an_interrupted_training_goes_on_as_it_would_have(tmp_path):
    whole, halved = model(), model()
    list(train_source(whole, SOURCE, pictures(), RECIPE))
    for step in train_source(halved, SOURCE, pictures(), RECIPE, tmp_path / "x.resume"):
        if step.step == 3:  # the end of the first epoch
            break
    resumed = model(seed=9)
    list(train_source(resumed, SOURCE, pictures(), RECIPE, tmp_path / "x.resume"))
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with pytest.raises(WeightsError, match="written with another recipe"):
        list(train_source(model(), SOURCE, pictures(), dataclasses.replace(RECIPE, seed=1), tmp_path / "x.resume"))


def test_numbers_that_are_not_finite_stop_it_before_anything_changes():
    poisoned = model()
    with torch.no_grad():
        poisoned.head.bias[0] = torch.nan
    before = {name: value.clone() for name, value in poisoned.state_dict().items()}
    with pytest.raises(WeightsError, match="loss nan"):
        list(train_source(poisoned, SOURCE, pictures(), RECIPE))
    after = poisoned.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "head.bias")


def test_accuracy_counts_right_answers():
    class Fixed(torch.nn.Linear):
        def forward(self, inputs):
            return torch.nn.functional.one_hot(torch.full((len(inputs),), 4), 36).float()

    found = pictures()
    assert accuracy(Fixed(1, 1), found) == np.mean(found.labels == 4)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch": 0}, {"label_smoothing": 1.0}, {"weight_decay": -1.0}])
def test_recipes_are_checked(change):
    with pytest.raises(UsageError, match="source training: expected"):
        dataclasses.replace(RECIPE, **change)
