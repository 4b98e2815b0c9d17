"""Cameras that different things pass: scenes and cut-outs, episodes, `forward+` and its training."""

from __future__ import annotations

import json
import math

import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from method_models import backbone, weights  # noqa: E402
from mgg_edge.cli.main import main  # noqa: E402
from mgg_edge.errors import SourceError, UsageError, WeightsError  # noqa: E402
from mgg_edge.learn.objective import Objective  # noqa: E402
from mgg_edge.learn.rules.base import CLEAN_WINDOWS, SourceNumbers  # noqa: E402
from mgg_edge.learn.rules.files import load_rule, save_rule, untrained_rule  # noqa: E402
from mgg_edge.learn.rules.forward_plus import ForwardPlus  # noqa: E402
from mgg_edge.learn.statistics import SourceStatistics  # noqa: E402
from mgg_edge.learn.training.cameras import CameraRecipe, CameraTraining  # noqa: E402
from mgg_edge.learn.training.cameras_judge import WeatherRow, judge_rule, verdict  # noqa: E402
from mgg_edge.learn.training.learner import Learner  # noqa: E402
from mgg_edge.learn.training.scene_map import (  # noqa: E402
    RobustTrainer,
    SceneMapTrainer,
    SceneRecipe,
    descent,
    telling_directions,
)
from mgg_edge.learn.training.stages import build_stages, clear_shift, draw_episode, recognised  # noqa: E402
from mgg_edge.scenes.domains import Domain  # noqa: E402
from mgg_edge.scenes.objects import (  # noqa: E402
    TEST,
    TRAINING,
    VALIDATION,
    load_cut_outs,
    load_scenes,
    part_of,
    place,
)
from vit import NAME, OPTIONS, SIZE  # noqa: E402

pytestmark = pytest.mark.torch


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Thirty photographs of nothing in particular and a hundred coloured shapes with an outline."""
    root = tmp_path_factory.mktemp("pictures")
    for name in ("scenes", "things/deep"):
        (root / name).mkdir(parents=True)
    for number in range(30):
        noise = rng(number).integers(0, 256, (6, 9, 3), np.uint8)
        Image.fromarray(noise).resize((90, 60), Image.Resampling.BICUBIC).save(root / "scenes" / f"{number}.jpg")
    for number in range(100):
        image = Image.new("RGBA", (50, 40), (0, 0, 0, 0))
        colour = tuple(rng(number).integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).ellipse((8, 4, 41, 35), fill=(*colour, 255))
        image.save(root / "things" / "deep" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def stages(pictures):
    learner = a_learner()
    scenes, things = load_scenes(pictures / "scenes", SIZE, SIZE), load_cut_outs(pictures / "things")
    return build_stages(scenes[:4], things, learner.frozen, 96, 0)


def a_learner():
    net = backbone()
    zeros = torch.zeros(net.features, dtype=torch.float64)
    statistics = SourceStatistics(zeros, zeros + 1, 32, torch.ones(len(CLEAN_WINDOWS), dtype=torch.float64))
    return Learner(net, Objective(), statistics, torch.device("cpu"))


def fog(strength=0.7):
    return Domain("fog", (lambda x, _scale, _own: (1 - strength) * x + strength,))


class TestScenes:
    def test_an_object_stands_in_the_scene_and_nothing_else_changes(self, pictures):
        scene, thing = load_scenes(pictures / "scenes", 32, 48)[0], load_cut_outs(pictures / "things")[0]
        views = np.stack([place(scene, thing, rng(seed)) for seed in range(20)])
        assert views.shape == (20, 32, 48, 3)
        changed = (views != scene.frame).any(-1).mean((1, 2))
        assert 0.05 < changed.min() < changed.max() < 0.6
        assert len({view.tobytes() for view in views}) == 20

    def test_parts_go_by_the_name_alone(self):
        assert part_of("zebra.png") == part_of("zebra.png")
        shares = np.bincount([part_of(f"{number}.jpg") for number in range(4000)], minlength=4) / 4000
        assert np.abs(shares - 0.25).max() < 0.03
        assert not set(TEST) & set(VALIDATION) & set(TRAINING)
        # SHA-1 of the bytes modulo 4, as anybody can compute it.
        assert part_of("a") == int("86f7e437faa5a7fce15d1ddcb9eaeaea377667b8", 16) % 4

    def test_parts_are_disjoint_and_all_there(self, pictures):
        whole = {scene.name for scene in load_scenes(pictures / "scenes", 8, 8)}
        parts = [{scene.name for scene in load_scenes(pictures / "scenes", 8, 8, (part,))} for part in range(4)]
        assert set.union(*parts) == whole
        assert sum(map(len, parts)) == len(whole) == 30
        views = load_scenes(pictures / "scenes", 8, 8, TRAINING, views=3)
        assert len(views) == 3 * len(parts[2] | parts[3])
        assert len({view.frame.tobytes() for view in views}) == len(views)

    def test_an_outline_is_needed_or_the_whole_is_taken(self, tmp_path):
        Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "plain.png")
        Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(tmp_path / "nothing.png")
        with pytest.raises(UsageError, match="alpha channel that outlines an object, found none"):
            load_cut_outs(tmp_path)
        assert [thing.image.size for thing in load_cut_outs(tmp_path, whole=True)] == [(20, 20)] * 2
        with pytest.raises(UsageError, match="expected a directory of images"):
            load_scenes(tmp_path / "none", 8, 8)
        (tmp_path / "broken.png").write_bytes(b"no picture")
        with pytest.raises(SourceError, match=r"broken\.png: not a readable picture"):
            load_cut_outs(tmp_path)


class TestEpisodes:
    def test_things_known_seen_and_aimed_at_differ(self, stages):
        stage = stages[0]
        theta = torch.zeros(3)
        for seed in range(5):
            episode = draw_episode(stage, Domain("clean", ()), theta, 16, 16, rng(seed))
            of = {frame.tobytes(): thing for frame, thing in zip(stage.frames, stage.objects, strict=True)}
            seen, aimed = ({of[frame.numpy().tobytes()] for frame in part} for part in (episode.window, episode.aim))
            assert not seen & aimed
            assert episode.window_target.shape == (16, 10)
        few = draw_episode(stage, Domain("clean", ()), theta, 32, 4, rng(9), few=True)
        assert len({of[frame.numpy().tobytes()] for frame in few.window}) <= 3

    def test_what_is_known_is_what_a_calibration_measures(self, stages):
        stage = stages[0]
        views = np.arange(40)
        source = stage.source(torch.zeros(3), views, rng())
        assert torch.allclose(source.mean, stage.features[:40].mean(0), atol=1e-5)
        assert torch.allclose(source.std, stage.features[:40].std(0), atol=1e-5)
        assert bool((source.clean_discrepancy > 0).all())

    def test_things_named_after_the_scene_behind_them_are_left_out(self, pictures):
        """Dark things are named by themselves, the others by the brightness of the scene."""
        scenes, things = load_scenes(pictures / "scenes", SIZE, SIZE)[:4], load_cut_outs(pictures / "things")
        dark = {thing.name for thing in things if np.asarray(thing.image)[..., :3].max(-1).max() < 180}
        placed = []

        def frozen(frames):
            order = [things[number % len(things)] for number in range(len(frames))]
            placed.append(len(frames))
            names = [1 if thing.name in dark else 2 + len(placed) for thing in order]
            return 50 * torch.nn.functional.one_hot(torch.tensor(names), 10).float(), torch.zeros(len(frames), 4)

        found = recognised(things, scenes, frozen, 0)
        assert placed == [len(things)] * 4
        assert dark
        assert set(found) == dark
        assert set(found.values()) == {1}

    def test_views_the_model_is_not_sure_of_are_left_out(self, pictures):
        scenes, things = load_scenes(pictures / "scenes", SIZE, SIZE), load_cut_outs(pictures / "things")

        def unsure(frames):
            return torch.zeros(len(frames), 10), torch.zeros(len(frames), 4)

        with pytest.raises(
            UsageError, match="at least 8 that the model names alike before most scenes, found 0 of 100"
        ):
            build_stages(scenes[:2], things, unsure, 96, 0)


class TestRule:
    def source(self, features):
        return SourceNumbers(torch.zeros(6), torch.zeros(features), torch.ones(features), torch.ones(7))

    def test_directions_tell_weather_from_content(self):
        generator = torch.Generator().manual_seed(0)
        content = torch.randn(400, 8, generator=generator) * torch.tensor([5.0, 4, 1, 1, 1, 1, 1, 1])
        weather = content[:200] + torch.randn(200, 1, generator=generator) * torch.tensor([3.0, 0, 0, 3, 0, 0, 0, 0])
        (direction,) = telling_directions(weather, content, 1)
        assert direction[3].abs() > 5 * direction[0].abs()  # both carry weather, the first much content as well
        assert float((weather @ direction).square().mean().sqrt()) == pytest.approx(1.0, rel=1e-3)

    def test_nothing_moves_while_the_scene_is_calm_and_everything_in_weather(self):
        rule = ForwardPlus(6, 4, rank=2)
        with torch.no_grad():
            rule.robust.fill_(0.5)
            rule.write.fill_(0.1)
            rule.read.copy_(torch.eye(2, 8))
            rule.log_slope.fill_(math.log(8.0))

        def way(size):
            window = rule.statistics(torch.zeros(2, 4), torch.tensor(16.0), self.source(4))
            shift = torch.zeros(8)
            shift[0] = size
            return -rule.change(window._replace(shift=shift), self.source(4))

        assert way(0.05).abs().max() < 1e-6
        assert torch.allclose(way(20.0), torch.full((6,), 0.6), atol=1e-3)
        assert rule.reach() == pytest.approx(0.7)

    def test_the_rule_of_another_backbone_is_refused(self, tmp_path):
        save_rule(tmp_path / "x.safetensors", ForwardPlus(6, 4, rank=2), {})
        assert load_rule(tmp_path / "x.safetensors", 6, 4).name == "forward+"
        with pytest.raises(
            WeightsError, match="learned for N = 6 scalars and D = 4 features; the backbone has 6 and 5"
        ):
            load_rule(tmp_path / "x.safetensors", 6, 5)


class TestTraining:
    def rule(self, learner):
        return ForwardPlus(learner.backbone.norms.size, learner.backbone.features, rank=4)

    def test_the_robust_way_lowers_its_loss(self, pictures):
        learner = a_learner()
        rule = self.rule(learner)
        parts = load_scenes(pictures / "scenes", SIZE, SIZE, TRAINING), load_cut_outs(pictures / "things", TRAINING)
        trainer = RobustTrainer(rule, learner, *parts, SceneRecipe(clean_share=0.0))
        trainer.prepare(rng())
        before = trainer.backward(rng(3))
        with torch.no_grad():
            rule.robust.sub_(0.002 * rule.robust.grad.sign())
        assert trainer.backward(rng(3)) < before

    def test_a_round_makes_a_step_that_serves_held_out_episodes_or_none(self, stages):
        learner = a_learner()
        rule = self.rule(learner)
        trainer = SceneMapTrainer(rule, learner, stages, SceneRecipe(episodes=24))
        trainer.prepare(rng())
        theta = learner.source.theta
        held_out = [draw_episode(stages[1], fog(), theta, 16, 16, rng(seed)) for seed in range(4)]
        losses = list(trainer.round([0, 0]))
        assert len(losses) == 24
        assert np.isfinite(losses).all()
        looks = [(episode, trainer._look(episode)[0]) for episode in held_out]
        before = trainer._loss(looks, None, 0.0, 0.0)
        after = trainer.step(held_out)
        assert after <= before
        assert trainer._loss(looks, None, 0.0, 0.0) == pytest.approx(after, rel=1e-4)
        again = trainer._loss(looks, 1e3 * torch.ones(rule.size, 5), 0.01, 0.01)
        assert again > after  # a step that harms would be seen

    def test_the_descent_is_what_the_regression_foretells(self):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(400, 2, generator=generator)
        gradients = torch.stack([3 * hidden[:, 0] + 0.1, -hidden[:, 1]], 1)  # of two scalars
        gradients += 0.1 * torch.randn(400, 2, generator=generator)
        way = descent(hidden, gradients)
        assert way.shape == (2, 3)
        assert way[0, 1] == pytest.approx(-1, abs=0.1)
        assert way[1, 2] == pytest.approx(1, abs=0.15)
        assert way[0, 2].abs() < 0.05

    def test_prepared_thresholds_lie_above_what_content_does(self, stages):
        learner = a_learner()
        rule = ForwardPlus(learner.backbone.norms.size, learner.backbone.features, rank=4)
        trainer = SceneMapTrainer(rule, learner, stages, SceneRecipe())
        trainer.prepare(rng())

        def share(shift):
            hidden = (shift / rule.shift_scale) @ rule.read.T
            return float(rule.share(hidden, torch.tensor(16.0)))

        with torch.no_grad():
            calm = [share(clear_shift(stages[0], 16, rng(seed), few=bool(seed % 2))) for seed in range(20)]
            episodes = [draw_episode(stages[0], fog(), learner.source.theta, 16, 2, rng(seed)) for seed in range(6)]
            foggy = [share(trainer._shift(episode)[0]) for episode in episodes]
        assert np.median(calm) < 0.3
        assert min(foggy) > 0.5

    def test_a_training_from_end_to_end_is_resumed_and_judged(self, pictures, tmp_path, monkeypatch):
        def training(rule="forward+"):
            parts = [
                (load_scenes(pictures / "scenes", SIZE, SIZE, part)[:3], load_cut_outs(pictures / "things", part))
                for part in (TRAINING, VALIDATION)
            ]
            return CameraTraining(
                backbone(), *parts, CameraRecipe(rule, robust_updates=2, rounds=2, episodes=2, score_every=1)
            )

        first, resume = training(), tmp_path / "x.resume"
        steps = first.run(resume)
        # Two updates of the robust way, then rounds of two episodes with a score after each.
        assert [next(steps).made for _ in range(6)] == [1, 2, 3, 4, 4, 5]
        again = training()
        assert [now.made for now in again.run(resume)] == [4, 5, 6, 6]  # the second round again, all before is in it
        assert not list(tmp_path.iterdir())
        with monkeypatch.context() as patched:  # interrupted between its last update and the end, `robust` is not lost
            robust = training("robust")
            patched.setattr(robust._map, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                list(robust.run(resume))
        resumed = training("robust")
        assert [now.made for now in resumed.run(resume)] == [2]
        assert torch.equal(resumed.rule.robust, robust.rule.robust)
        scene, things = load_scenes(pictures / "scenes", SIZE, SIZE)[:6], load_cut_outs(pictures / "things")
        rows = judge_rule(again.rule, again.learner, scene, things)
        assert rows[0].weather == "clear"
        assert rows[0].frozen == 1.0
        assert len(rows) == 16

    def test_the_command_trains_exports_and_says_whether_it_pays(self, pictures, tmp_path, capsys):
        from safetensors.torch import load_file, save_file

        save_file(weights(), tmp_path / "net.safetensors")
        out = tmp_path / "rule.safetensors"
        import own_models

        own_models.small_transformer = lambda: __import__("timm").create_model(NAME, **{**OPTIONS, "depth": 4})
        model = ["--backbone", "own_models:small_transformer", "--weights", str(tmp_path / "net.safetensors")]
        model += ["--image-size", str(SIZE)]
        data = ["--data", str(pictures / "scenes"), "--objects", str(pictures / "things")]
        with pytest.raises(SystemExit) as ended:
            main(["train", *model, *data, "--rule", "forward+", "--updates", "5", "--out", str(out), "--json"])
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        facts = json.loads(captured.out.splitlines()[-1])
        assert facts["weathers"][0]["weather"] == "clear"
        assert "on scenes and things it has never seen" in facts["verdict"]
        further = [
            "--rule",
            "robust",
            "--start",
            str(out),
            "--updates",
            "1",
            "--out",
            str(tmp_path / "further.safetensors"),
        ]
        with pytest.raises(SystemExit) as ended:
            main(["train", *model, *data, *further, "--json"])
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        assert json.loads(captured.out.splitlines()[-1])["start"] == str(out)
        before, after = (load_file(tmp_path / f"{name}.safetensors")["robust"] for name in ("rule", "further"))
        assert float(before.norm()) > 0
        assert float((after - before).abs().max()) <= 1e-4  # a tenth of 1e-3: the first update of ten of warm-up
        words = ["--mgg", str(out), "--parity-steps", "5", "--batch", "4", "--out", str(tmp_path / "x.mgg")]
        with pytest.raises(SystemExit) as ended:
            main(["export", *model, *words])
        assert not ended.value.code, capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--rule", "mgg", "--objects", "x"], "objects: for rules of cameras alone"),
            (["--rule", "mgg", "--start", "x"], "start: for rules of cameras alone"),
            (["--rule", "robust", "--start", "none.safetensors"], "no such file of a learned rule"),
            (["--rule", "robust", "--start", "package"], "--mgg package has numbers for efficientnet_lite0"),
            (["--rule", "robust", "--start", "other.safetensors"], "expected the numbers of forward+ or robust"),
            (["--rule", "forward+", "--data", "nowhere"], "expected a directory of images"),
            (["--rule", "robust", "--out", "x.pth"], "ends in .safetensors"),
        ],
    )
    def test_what_cannot_be_trained_gets_one_line(self, pictures, tmp_path, capsys, monkeypatch, words, message):
        monkeypatch.chdir(tmp_path)
        save_rule(tmp_path / "other.safetensors", untrained_rule("mgg", 1, 1))
        base = ["--backbone", "mobilenetv3_small_050", "--weights", "random", "--image-size", "32"]
        with pytest.raises(SystemExit) as ended:
            main(["train", *base, "--data", str(pictures / "scenes"), "--out", "x.safetensors", *words])
        assert ended.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_the_verdict_is_about_gain_and_about_clear_pictures():
    clear, fog_row = WeatherRow("clear", 1.0, 0.9, 0.99), WeatherRow("fog@3", 0.5, 0.55, 0.6)
    assert verdict([clear, fog_row]).startswith("it pays: on scenes and things it has never seen, at severity 3")
    assert "worst is fog@3, +10.0" in verdict([clear, fog_row])
    assert verdict([WeatherRow("clear", 1.0, 0.9, 0.9), fog_row]).startswith("it does not pay")
    assert verdict([clear, WeatherRow("fog@3", 0.5, 0.5, 0.4)]).startswith("it does not pay")
