"""Meta-training: what the surrogate's gradient is, what is refused, what a resumed training gives, what is learned."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the learn half needs the export extra")

from PIL import Image  # noqa: E402

from characters import drawn_glyphs  # noqa: E402
from mgg_edge.cli.main import main  # noqa: E402
from mgg_edge.errors import UsageError, WeightsError  # noqa: E402
from mgg_edge.learn import Objective, measure_statistics  # noqa: E402
from mgg_edge.learn.class_folders import Naming  # noqa: E402
from mgg_edge.learn.pictures import LoadedSource, open_training_data  # noqa: E402
from mgg_edge.learn.reader import READER_NAME  # noqa: E402
from mgg_edge.learn.rules.files import load_rule, untrained_rule  # noqa: E402
from mgg_edge.learn.training.gradient import GradientRecipe, GradientTrainer, principal_directions, rule_update  # noqa: E402
from mgg_edge.learn.training.learner import FROZEN_BATCH, Learner  # noqa: E402
from mgg_edge.learn.training.loop import LoopRecipe, meta_train  # noqa: E402
from mgg_edge.learn.training.optimiser import MetaOptimiser  # noqa: E402
from mgg_edge.learn.training.rules import RuleRecipe, RuleTraining  # noqa: E402
from mgg_edge.learn.training.statistics_map import StatisticsMapTrainer, StatisticsRecipe  # noqa: E402
from mgg_edge.learn.training.worlds import World  # noqa: E402
from mgg_edge.manifest import PreprocessInfo  # noqa: E402
from mgg_edge.scenes.glyphs import save_glyphs  # noqa: E402
from mgg_edge.scenes.sources import GlyphSource  # noqa: E402
from vit import small_backbone  # noqa: E402

pytestmark = pytest.mark.torch

NAMING = Naming(tuple(f"class {label}" for label in range(10)))


@pytest.fixture(autouse=True)
def _few_weathers(monkeypatch):
    """What is measured over many weathers, over a few: their number is accuracy, not behaviour."""
    monkeypatch.setattr("mgg_edge.learn.training.rules.HELD_OUT_WEATHERS", 4)
    for trainer in ("gradient", "statistics_map"):
        monkeypatch.setattr(f"mgg_edge.learn.training.{trainer}.SCALE_DOMAINS", 64)  # as many as directions are wanted


SMALL = GradientRecipe(horizon=2, max_windows=2, episodes=2, batches=(4,), aim_batch=6)


def pictures(classes=10, each=6):
    """A source of as many classes as the small transformer has."""
    glyphs = GlyphSource(drawn_glyphs())
    labels = np.repeat(np.arange(classes), each)
    return LoadedSource(glyphs.draw(labels, np.random.default_rng(0)), labels, [str(index) for index in range(classes)])


def learner():
    backbone, source = small_backbone(), pictures()
    rng = np.random.default_rng(0)
    draws = [torch.from_numpy(source.draw(rng.integers(0, 10, 16), rng)) for _ in range(4)]
    return Learner(backbone, Objective(), measure_statistics(backbone, draws), torch.device("cpu"))


def trainer_of(name, seed=0, **options):
    model = learner()
    rule = untrained_rule(name, model.backbone.norms.size, model.backbone.features, seed)
    world = World(pictures(), model.predictions, **options)
    if name == "forward":
        return StatisticsMapTrainer(rule, model, world, StatisticsRecipe(episodes=2, windows=(4, 8), aim_batch=4))
    return GradientTrainer(rule, model, world, 1e-2, SMALL)


def rng(seed=0):
    return np.random.default_rng(seed)


class TestLearner:
    def test_episodes_side_by_side_are_the_model_under_each_theta(self):
        model = learner()
        noise = torch.randn(3, len(model.source.theta), generator=torch.Generator().manual_seed(0))
        theta = model.source.theta + 0.05 * noise
        frames = torch.from_numpy(pictures().draw(rng().integers(0, 10, 15), rng())).reshape(3, 5, 32, 32, 3)
        logits, features = model.forward(theta, frames)
        for index in range(3):
            own = model.backbone.forward(frames[index], model.backbone.split(theta[index]), model.constants)
            torch.testing.assert_close(logits[index], own[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(features[index], own[1], rtol=1e-4, atol=1e-5)

    def test_parts_give_what_all_frames_at_once_give(self):
        model = learner()
        frames = torch.from_numpy(pictures().draw(rng().integers(0, 10, 40), rng()))
        logits, features = model.backbone.forward(frames, model.backbone.split(model.source.theta), model.constants)
        assert len(frames) > 2 * FROZEN_BATCH
        torch.testing.assert_close(model.features(frames.reshape(2, 20, 32, 32, 3)).flatten(0, 1), features)
        assert torch.equal(model.predictions(frames), logits.argmax(1))

    def test_frames_of_a_weather_are_those_it_draws_with_nothing_asked_of_the_model(self):
        asked = []
        world = World(pictures(), lambda frames: asked.append(len(frames)) or torch.zeros(len(frames)), "predictions")
        weather = world.weather(rng(3), clean_share=0.0)
        assert torch.equal(weather.frames(7, rng(4)), weather.draw(7, rng(4)).frames)
        assert asked == [7]

    def test_the_loss_is_the_objective_of_the_step(self):
        model = learner()
        frames = torch.from_numpy(pictures().draw(rng().integers(0, 10, 10), rng())).reshape(2, 5, 32, 32, 3)
        gradient, discrepancy = model.loss_gradient(model.start(2), frames)
        for index in range(2):
            theta = model.source.theta.clone().requires_grad_()
            output = model.backbone.forward(frames[index], model.backbone.split(theta), model.constants)
            terms = model.objective(*output, model.source.mean, model.source.std)
            (expected,) = torch.autograd.grad(terms.loss, theta)
            assert (gradient[index] - expected).norm() <= 1e-4 * expected.norm()
            torch.testing.assert_close(discrepancy[index], terms.discrepancy.detach())


class TestGradientTraining:
    def test_the_surrogate_s_gradient_is_that_of_the_unrolled_meta_losses(self):
        """With the gradients that enter the rule held fixed, against automatic differentiation through θ_k."""
        trainer = trainer_of("mgg", target="labels", sorted_share=0.0)
        rule, model = trainer.rule, trainer.learner
        trainer.backward(rng(3))
        found = {name: value.grad.clone() for name, value in rule.named_parameters()}
        rule.zero_grad()

        chance = rng(3)
        weathers = [trainer.world.weather(chance) for _ in range(2)]
        batch = int(chance.choice((4,)))
        chance.integers(2)

        def draw():
            parts = [weather.draw(6, chance) for weather in weathers]
            return torch.stack([part.frames for part in parts]), torch.stack([part.targets for part in parts])

        theta, state, total = model.start(2), rule.init(2 * len(model.source.theta)), torch.zeros(())
        frames, targets = draw()
        for _ in range(2):
            gradient = model.signal(theta, frames, targets, batch).gradient
            update, state = rule_update(rule, gradient, torch.ones(2), state, 1e-2)
            theta = theta - update
            frames, targets = draw()
            logits, _ = model.forward(theta, frames)
            total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        (total / 2).backward()  # mean over the two steps; the cross-entropy is already the mean over the episodes
        for name, value in rule.named_parameters():
            assert (found[name] - value.grad).norm() <= 1e-3 * value.grad.norm() + 1e-9, name

    def test_preparing_gives_directions_of_unit_output(self):
        rows = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 20)
        directions = principal_directions(rows, 5)
        torch.testing.assert_close((rows @ directions.T).square().mean(0).sqrt(), torch.ones(5))
        with pytest.raises(UsageError, match="at least 60"):
            principal_directions(rows, 60)


class TestOptimiser:
    def rule(self):
        return untrained_rule("forward", 6, 4)

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_a_gradient_that_is_not_finite_changes_nothing(self, poison):
        rule = self.rule()
        optimiser, before = MetaOptimiser(rule, 10), {k: v.clone() for k, v in rule.state_dict().items()}
        for value in rule.parameters():
            value.grad = torch.ones_like(value)
        rule.write.grad[2, 1] = poison
        with pytest.raises(WeightsError, match="'write' is not finite at update 0"):
            optimiser.step()
        assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())

    def test_a_group_with_no_gradient_at_first_still_learns_later(self):
        rule = self.rule()
        optimiser, before = MetaOptimiser(rule, 10), rule.read.detach().clone()
        for size in (0.0, 1.0):
            for value in rule.parameters():
                value.grad = torch.full_like(value, size)
            optimiser.step()
        assert (rule.read - before).abs().max() > 1e-5

    def test_one_huge_gradient_is_clipped_at_twice_the_running_norm(self):
        rule = self.rule()
        optimiser = MetaOptimiser(rule, 1000)
        for size in (1.0, 1e6):
            rule.write.grad = torch.full_like(rule.write, size)
            optimiser.step()
        exponential = optimiser.state_dict()["exp_avg.write"]
        assert float(exponential.max()) == pytest.approx(0.9 * 0.1 + 0.1 * 2.0, rel=1e-3)

    def test_rho_is_measured_not_learned(self):
        assert "shift_scale" not in MetaOptimiser(self.rule(), 1).parameters


class TestLoop:
    scores = itertools.count()  # always better than before

    def train(self, path, stop=None, seed=0):
        trainer = trainer_of("forward")
        steps = meta_train(trainer, lambda: float(next(self.scores)), LoopRecipe(6, seed, score_every=2), path)
        made = [now.made for now in itertools.islice(steps, stop)]
        assert made[-1] == (stop or 6)
        return trainer.rule

    def test_an_interrupted_training_goes_on_as_it_would_have(self, tmp_path):
        whole = self.train(tmp_path / "a.resume")
        self.train(tmp_path / "b.resume", stop=4)
        assert (tmp_path / "b.resume").exists()
        resumed = self.train(tmp_path / "b.resume")
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name
        assert not (tmp_path / "b.resume").exists()

    def test_the_state_of_another_training_is_refused(self, tmp_path):
        self.train(tmp_path / "a.resume", stop=4)
        with pytest.raises(WeightsError, match="another training"):
            self.train(tmp_path / "a.resume", seed=1)
        (tmp_path / "a.resume").write_bytes(b"junk")
        with pytest.raises(WeightsError, match="expected a state of meta-training"):
            self.train(tmp_path / "a.resume")

    def test_the_best_score_decides(self):
        trainer, kept = trainer_of("forward"), []
        scores = iter([0.1, 0.9, 0.2])

        def score():
            kept.append({name: value.clone() for name, value in trainer.rule.state_dict().items()})
            return next(scores)

        list(meta_train(trainer, score, LoopRecipe(4, score_every=2)))
        assert torch.equal(trainer.rule.write, kept[1]["write"])
        assert not torch.equal(kept[1]["write"], kept[2]["write"])

    def test_a_loss_that_is_not_finite_stops_it(self):
        trainer = trainer_of("forward")
        trainer.backward = lambda _rng: math.nan
        with pytest.raises(WeightsError, match="the loss is nan at update 0"):
            list(meta_train(trainer, lambda: 0.0, LoopRecipe(4)))


@pytest.mark.parametrize("name", ["mgg", "mgg+", "adam+", "forward"])
def test_every_rule_trains_and_is_what_it_started_from_without_labels_too(name):
    recipe = RuleRecipe(name, "predictions", updates=2, score_every=2)
    training = RuleTraining(small_backbone(), pictures(), pictures(each=2), recipe)
    before = {key: value.clone() for key, value in training.rule.state_dict().items()}
    steps = list(training.run())
    assert [step.made for step in steps] == [1, 2]
    assert all(math.isfinite(step.loss) for step in steps)
    assert set(training.rule.state_dict()) == set(before)


class TestRequests:
    def test_targets_and_rules_are_checked(self):
        with pytest.raises(UsageError, match="expected one that learns"):
            RuleRecipe("adam")
        with pytest.raises(UsageError, match="target of labels, predictions"):
            World(pictures(), lambda frames: frames, "guesses")
        with pytest.raises(UsageError, match="pictures of 2 to 10 classes"):
            RuleTraining(small_backbone(), pictures(classes=1), pictures(), RuleRecipe())

    def test_a_directory_without_enough_images_or_classes(self, tmp_path):
        info = PreprocessInfo(32, 32, "squash", 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
        for number in range(8):
            folder = tmp_path / f"class {number % 4}"
            folder.mkdir(exist_ok=True)
            Image.new("RGB", (40, 40), (30 * number, 0, 0)).save(folder / f"{number}.png")
        with pytest.raises(UsageError, match="expected at least 32 images to train on, found 8"):
            open_training_data(tmp_path, info, NAMING, labelled=True)
        with pytest.raises(UsageError, match="no class of the model: 'class 3'"):
            open_training_data(tmp_path, info, Naming(NAMING.labels[:3]), labelled=True)

    def test_unlabelled_images_need_no_folders(self, tmp_path):
        info = PreprocessInfo(32, 32, "squash", 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
        for number in range(40):
            Image.new("RGB", (40, 40), (6 * number, 0, 0)).save(tmp_path / f"{number:02}.png")
        train, held_out = open_training_data(tmp_path, info, NAMING, labelled=False)
        assert (len(train), len(held_out)) == (32, 8)
        assert train.draw(np.zeros(3, int), rng()).shape == (3, 32, 32, 3)

    def test_the_command_writes_a_rule_that_exports(self, tmp_path, capsys):
        glyphs, out = tmp_path / "glyphs.safetensors", tmp_path / "rule.safetensors"
        save_glyphs(glyphs, drawn_glyphs())
        words = ["--backbone", READER_NAME, "--weights", "random", "--data", str(glyphs), "--out", str(out)]
        with pytest.raises(SystemExit) as ended:
            main(["train", *words, "--updates", "1", "--rule", "mgg", "--learning-rate", "0.004", "--json"])
        assert ended.value.code in (0, None), capsys.readouterr().err
        rule = load_rule(out, 1, 1)
        assert (rule.name, rule.max_learning_rate) == ("mgg", 0.004)
        bundle = ["--out", str(tmp_path / "x.mgg"), "--parity-steps", "5", "--batch", "8"]
        model = ["--backbone", READER_NAME, "--weights", "random", "--mgg", str(out)]
        with pytest.raises(SystemExit) as ended:
            main(["export", *model, *bundle, "--learning-rate", "0.01"])
        assert ended.value.code == 2
        assert "(0, 0.004], the rate it was learned for, found 0.01" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "x.mgg").exists()
        with pytest.raises(SystemExit) as ended:
            main(["export", *model, *bundle])
        assert ended.value.code in (0, None), capsys.readouterr().err

    def test_the_output_is_checked_before_the_work(self, tmp_path, capsys):
        words = ["--backbone", READER_NAME, "--weights", "random", "--data", str(tmp_path)]
        cases = (("none/x.safetensors", 1, "cannot write here"), ("x.pth", 2, "ends in .safetensors"))
        for out, code, message in cases:
            with pytest.raises(SystemExit) as ended:
                main(["train", *words, "--out", str(tmp_path / out)])
            assert ended.value.code == code
            assert message in " ".join(capsys.readouterr().err.split())

    def test_rules_of_batch_normalised_nets_keep_the_statistics_they_were_learned_with(self, tmp_path, capsys):
        for number in range(40):
            (tmp_path / "data" / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
            picture = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(picture).save(tmp_path / "data" / f"class {number % 2}" / f"{number}.png")
        model = ["--backbone", "mobilenetv3_small_050", "--weights", "random", "--classes", "2", "--image-size", "32"]
        rule, out = tmp_path / "rule.safetensors", tmp_path / "x.mgg"
        with pytest.raises(SystemExit) as ended:
            main(["train", *model, "--data", str(tmp_path / "data"), "--updates", "1", "--out", str(rule), "--json"])
        assert ended.value.code in (0, None), capsys.readouterr().err
        export = ["export", *model, "--mgg", str(rule), "--parity-steps", "5", "--batch", "4", "--out", str(out)]
        with pytest.raises(SystemExit) as ended:
            main([*export, "--norm-statistics", "mix:0.1"])
        assert ended.value.code == 2
        assert "use --norm-statistics source" in " ".join(capsys.readouterr().err.split())
        with pytest.raises(SystemExit) as ended:
            main(export)
        assert ended.value.code in (0, None), capsys.readouterr().err
