"""`mgg-edge eval` on a small reader: files, resuming, refusals, and the exported step against PyTorch."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch", reason="the export half needs the export extra")

import numpy as np  # noqa: E402
import timm  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from characters import drawn_glyphs  # noqa: E402
from mgg_edge.cli.main import main  # noqa: E402
from mgg_edge.errors import UnsupportedError, UsageError  # noqa: E402
from mgg_edge.export.engine_method import EngineMethod  # noqa: E402
from mgg_edge.export.evaluation import EvaluationRequest, plan_jobs, run_job  # noqa: E402
from mgg_edge.export.restore import restore_step  # noqa: E402
from mgg_edge.learn.class_folders import Naming, open_class_folders  # noqa: E402
from mgg_edge.learn.evaluation.scenery import Scenery, open_scenery  # noqa: E402
from mgg_edge.learn.methods.discrepancy import RuleMethod  # noqa: E402
from mgg_edge.learn.pictures import FolderSource  # noqa: E402
from mgg_edge.learn.reader import READER_NAME  # noqa: E402
from mgg_edge.manifest import PreprocessInfo  # noqa: E402
from mgg_edge.runtime import Bundle, open_engine  # noqa: E402
from mgg_edge.scenes.glyphs import CHARACTERS, save_glyphs  # noqa: E402

pytestmark = pytest.mark.torch

BATCH, FRAMES = 8, 96
NAMING = Naming(tuple(f"class {label}" for label in range(6)))
# Largest difference of logits of about 5 between two float32 engines after 12 steps of at most 1e-3 a scalar.
LOGITS_TOLERANCE = 1e-3
INFO = PreprocessInfo(16, 24, "shortest-side", 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory):
    """A file with one face in each split."""
    path = tmp_path_factory.mktemp("glyphs") / "glyphs.safetensors"
    save_glyphs(path, drawn_glyphs())
    return path


def paint(folder, seed, count):
    """An ImageFolder of six colours under uneven light, close enough to be taken for each other."""
    rng = np.random.default_rng(seed)
    colours = 128 + 60 * np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, 0, -1]])
    for label, colour in enumerate(colours):
        (folder / f"class {label}").mkdir(parents=True)
        for number in range(count):
            light = rng.normal(0, 35, (1, 1, 3)) + rng.normal(0, 30, (32, 32, 3))
            frame = np.clip(colour + light, 0, 255).astype(np.uint8)
            Image.fromarray(frame).save(folder / f"class {label}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Directories of the source domain and of the test."""
    root = tmp_path_factory.mktemp("folders")
    return paint(root / "source", 0, 60), paint(root / "test", 1, 30)


@pytest.fixture(scope="module")
def weights(folders, tmp_path_factory):
    """A reader of six classes with random blocks and a last layer fitted by least squares."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(READER_NAME, num_classes=6).eval()
    info = PreprocessInfo(32, 32, "squash", 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    labels = np.repeat(np.arange(6), 60)
    found = open_class_folders(folders[0], NAMING)
    frames = torch.from_numpy(FolderSource(found.paths, found.labels, info).draw(labels, np.random.default_rng(0)))
    with torch.no_grad():
        tokens = model.forward_features((frames.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
        embedding = model.forward_head(tokens, pre_logits=True)
        design = torch.cat([embedding, torch.ones(len(labels), 1)], 1).double()
        target = torch.nn.functional.one_hot(torch.from_numpy(labels), 6).double()
        penalty = 0.1 * torch.eye(design.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(design.T @ design + penalty, design.T @ target) * 5
        model.head.weight.copy_(solution[:-1].T.float())
        model.head.bias.copy_(solution[-1].float())
    path = tmp_path_factory.mktemp("weights") / "reader.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path


def mgg_edge(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.fixture(scope="module")
def bundle(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "reader.mgg"
    words = ["export", "--backbone", READER_NAME, "--weights", weights, "--rule", "mgg", "--batch", BATCH]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*words, "--parity-steps", 5, "--out", out]])
    assert not ended.value.code
    return out


def request(folders, **changes):
    settings = {"batch": BATCH, "frames": FRAMES, "held_out": 40, "source_images": 64, **changes}
    return EvaluationRequest(str(folders[1]), source_data=str(folders[0]), **settings)


def test_a_sweep_from_end_to_end_and_again(folders, weights, tmp_path, capsys):
    words = [
        "eval", "--backbone", READER_NAME, "--weights", weights, "--data", folders[1], "--streams", "clean",
        "--seeds", 2, "--methods", "none,tent:rate_factor=3", "--frames", FRAMES, "--batch", BATCH, "--held-out", 40,
        "--jobs", 2, "--source-data", folders[0], "--source-images", 64, "--out", tmp_path / "out",
    ]  # fmt: skip
    code, stdout, stderr = mgg_edge(capsys, *words, "--json")
    assert code == 0, stderr
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["jobs"] == 4
    assert [(entry["method"], entry["seeds"]) for entry in summary["summary"]] == [
        ("none", 2),
        ("tent:rate_factor=3", 2),
    ]
    frozen = summary["summary"][0]["mean"]
    assert 0.3 < frozen["accuracy"] < 0.98
    assert frozen["accuracy_after_0"] == frozen["accuracy_after_all"]
    assert frozen["worst_window"] is None
    assert frozen["peak_memory_mb"] > 100
    with (tmp_path / "out" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert sorted((line["method"], line["seed"]) for line in lines) == [
        (method, seed) for method in ("none", "tent:rate_factor=3") for seed in "01"
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "parts", "results.csv", "predictions.npz", "summary.json", "report.html", "accuracy_over_time.png",
        "accuracy_against_updates.png", "accuracy_by_domain.png", "samples.png",
    }  # fmt: skip
    code, again, stderr = mgg_edge(capsys, *words)
    assert code == 0
    assert "4 of 4 jobs are done already" in stderr
    assert "tent:rate_factor=3" in again
    assert f"{100 * frozen['accuracy']:.1f}" in again


@pytest.mark.slow
def test_an_interrupt_finishes_what_runs_and_the_same_command_goes_on(folders, weights, tmp_path):
    out = tmp_path / "out"
    words = ["eval", "--backbone", READER_NAME, "--weights", weights, "--data", folders[1], "--source-data", folders[0]]
    words += ["--methods", "none,tent,sar,deyo", "--seeds", 2, "--frames", 400, "--jobs", 1, "--out", out]
    code = "import sys; from mgg_edge.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    sweep = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    end_s = time.monotonic() + 60
    while not list(out.glob("parts/*.jsonl")):
        assert time.monotonic() < end_s
        time.sleep(0.02)
    sweep.send_signal(signal.SIGINT)
    _, stderr = sweep.communicate(timeout=60)
    kept = len(list(out.glob("parts/*.jsonl")))
    assert sweep.returncode == 130, stderr
    assert f"interrupted: {kept} of 8 jobs are kept" in stderr
    assert 1 <= kept < 8
    assert not (out / "report.html").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"{kept} of 8 jobs are done already" in again.stderr
    assert len(list(out.glob("parts/*.jsonl"))) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "none,tnet"], "found 'tnet'"),
        (["--methods", "none,none"], "each once"),
        (["--methods", "bn"], "no batch normalisation"),
        (["--streams", "rain"], "stream: expected"),
        (["--data", "absent"], "absent"),
        (["--engine", "onnxruntime"], "name one with --bundle"),
        (["--bundle", "x.mgg"], "either --backbone or --bundle"),
        (["--frames", "8", "--batch", "9"], "at least one batch"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(folders, weights, tmp_path, capsys, words, message):
    first = ["eval", "--backbone", READER_NAME, "--weights", weights, "--data", folders[1], "--out", tmp_path / "out"]
    first += ["--source-data", folders[0]]
    code, _, stderr = mgg_edge(capsys, *first, *words)
    assert code in (1, 2)
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_exported_step_is_as_accurate_as_pytorchs(folders, bundle):
    rows = {}
    for engine in ("torch", "onnxruntime"):
        settings = request(folders, bundle=str(bundle), engine=engine)
        for job in plan_jobs(settings, ["none", "mgg"], ["clean"], [0]):
            rows[engine, job.method] = run_job(job)
    for method in ("none", "mgg"):
        one, other = rows["torch", method], rows["onnxruntime", method]
        assert 0.3 < one["accuracy"] < 0.98
        for name in ("accuracy", "calibration_error", "clean_accuracy_after"):
            assert abs(one[name] - other[name]) < 0.001, name
        for count, value in one["accuracy_after"].items():
            assert abs(value - other["accuracy_after"][count]) < 0.001
    moved = [rows["torch", method]["calibration_error"] for method in ("none", "mgg")]
    assert abs(moved[0] - moved[1]) > 0.005  # the step does something


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_logits_and_theta_of_both_engines_step_by_step(folders, bundle, batch):
    loaded = Bundle.load(bundle)
    engine = open_engine(loaded, threads=1)
    exported, plain = EngineMethod(loaded, engine), RuleMethod(restore_step(loaded), BATCH)
    stream = open_scenery(folders[1], folders[0], loaded.manifest.preprocess, NAMING).stream(
        "clean", batch=batch, frames=48, seed=1
    )
    first, second = exported.init(), plain.init()
    for part in stream:
        frames = torch.from_numpy(part.frames)
        found, first = exported.step(frames, first)
        expected, second = plain.step(frames, second)
        assert found.shape == (batch, 6)
        assert (found - expected).abs().max() < LOGITS_TOLERANCE
    assert len(first.waiting) == len(second.waiting) == 0
    assert (torch.from_numpy(first.arrays["theta"].copy()) - second.tensors["theta"]).abs().max() < 1e-4
    assert (second.tensors["theta"] - torch.from_numpy(loaded.initial_state["theta"].copy())).abs().max() > 1e-3
    engine.close()


def test_a_refused_step_of_the_engine_is_not_committed(folders, bundle, monkeypatch):
    loaded = Bundle.load(bundle)
    engine = open_engine(loaded, threads=1)
    method = EngineMethod(loaded, engine)
    frames = torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8)
    _, moved = method.step(frames, method.init())
    assert moved.arrays.digest() != loaded.initial_state.digest()
    monkeypatch.setattr("mgg_edge.export.engine_method.check_step", lambda *_: "too far")
    _, kept = method.step(frames, method.init())
    assert kept.arrays.digest() == loaded.initial_state.digest()
    with pytest.raises(UsageError, match="expected 8 frames, as the step was exported for"):
        method.step(frames[:3], method.init())
    engine.close()


def test_what_the_engine_cannot_run_is_refused(folders, bundle):
    settings = request(folders, bundle=str(bundle), engine="onnxruntime")
    with pytest.raises(UsageError, match="runs none and the bundle's own rule, mgg; found 'tent'"):
        plan_jobs(settings, ["tent"], ["clean"], [0])
    with pytest.raises(UsageError, match="batch: expected 8 frames"):
        plan_jobs(request(folders, bundle=str(bundle), engine="onnxruntime", batch=3), ["mgg"], ["clean"], [0])


def test_a_bundle_whose_statistics_move_is_not_restored(bundle):
    from types import SimpleNamespace

    loaded = Bundle.load(bundle)
    moving = SimpleNamespace(path="x.mgg", manifest=SimpleNamespace(infer_state=("theta", "norm_statistics")))
    with pytest.raises(UnsupportedError, match=r"x\.mgg: its batch normalisation moves"):
        restore_step(moving)
    assert restore_step(loaded).rule.name == "mgg"


def test_jobs_know_the_contents_of_their_files(folders, weights, tmp_path):
    copied = tmp_path / "weights.safetensors"
    copied.write_bytes(weights.read_bytes())
    settings = request(folders, backbone=READER_NAME, weights=str(copied))
    (before,) = plan_jobs(settings, ["none"], ["clean"], [0])
    tensors = timm.create_model(READER_NAME, num_classes=6).state_dict()
    save_file({name: value.contiguous() for name, value in tensors.items()}, copied)
    (after,) = plan_jobs(settings, ["none"], ["clean"], [0])
    assert before.key != after.key


def test_glyphs_as_data(glyphs):
    settings = EvaluationRequest(str(glyphs), READER_NAME, batch=8, frames=24, held_out=0, source_images=32)
    (job,) = plan_jobs(settings, ["foa"], ["clean"], [0])
    result = run_job(job)
    assert (result["frames"], result["accuracy_after"], result["clean_accuracy_after"]) == (24, {}, None)


def test_streams_repeat_by_seed_and_differ_from_what_is_kept_apart(glyphs):
    info = PreprocessInfo(32, 32, "squash", 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    scenery = open_scenery(glyphs, None, info, Naming(tuple(CHARACTERS)))
    stream = scenery.stream("clean", batch=8, frames=20, seed=3)
    first, again = list(stream), list(stream)
    assert [len(part.labels) for part in first] == [8, 8]
    assert all(np.array_equal(one.frames, other.frames) for one, other in zip(first, again, strict=True))
    other = next(iter(scenery.stream("clean", batch=8, frames=20, seed=4)))
    assert not np.array_equal(first[0].frames, other.frames)
    kept, clean = scenery.held_out("clean", 8), scenery.clean(8)
    assert not np.array_equal(kept.frames, clean.frames)
    assert scenery.source_frames(5).shape == (5, 32, 32, 3)
    for words in ({"batch": 9, "frames": 8}, {"batch": 0, "frames": 8}):
        with pytest.raises(UsageError, match="at least one batch"):
            scenery.stream("clean", seed=0, **words)
    with pytest.raises(UsageError, match="weather: expected clean or KIND"):
        scenery.held_out("rain", 5)
    with pytest.raises(UsageError, match="36 classes"):
        open_scenery(glyphs, None, info, Naming(tuple("0123456789")))


def test_folders_of_images(tmp_path):
    for name, level in (("b", 200), ("a", 50)):
        (tmp_path / name / "deep").mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 30), (level + number,) * 3).save(tmp_path / name / "deep" / f"{number}.png")
    naming = Naming(("b", "c", "a"))
    found = open_class_folders(tmp_path, naming)
    source = FolderSource(found.paths, found.labels, INFO)
    assert (source.classes, source.available.tolist(), len(source)) == (("b", "c", "a"), [0, 2], 4)
    frames = source.draw(np.array([2, 0, 2]), np.random.default_rng(0))
    assert frames.shape == (3, 16, 24, 3)
    assert [bool(frame.mean() > 150) for frame in frames] == [False, True, False]
    assert source.clip(0, 3, np.random.default_rng(0)).shape == (3, 16, 24, 3)
    with pytest.raises(UsageError, match="a class of at least 3 pictures"):
        open_scenery(tmp_path, None, INFO, naming)
    scenery = open_scenery(tmp_path, tmp_path, INFO, naming)
    assert isinstance(scenery, Scenery)
    assert scenery.classes.tolist() == [0, 2]
    assert open_scenery(tmp_path, tmp_path, INFO, naming, mask=False).classes is None


def pixels(frames):
    return {frame.tobytes() for frame in frames}


def test_pictures_of_the_stream_kept_apart_and_of_the_source_are_all_different(folders):
    info = PreprocessInfo(32, 32, "squash", 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    scenery = open_scenery(folders[1], None, info, NAMING)
    once = list(scenery.stream("one-pass", batch=16, frames=16, seed=0))
    shown = pixels(np.concatenate([part.frames for part in once]))
    assert sorted(np.bincount(np.concatenate([part.labels for part in once]))) == [18] * 6
    assert len(shown) == 108  # every picture of the stream's part, none twice
    apart, source = scenery.held_out("clean", 1000).frames, scenery.source_frames(1000).numpy()
    assert (len(apart), len(source)) == (36, 36)
    assert not shown & pixels(apart)
    assert not (shown | pixels(apart)) & pixels(source)
    assert pixels(scenery.clean(1000).frames) == pixels(apart)
    drawn = np.concatenate([part.frames for part in scenery.stream("clean", batch=16, frames=320, seed=0)])
    assert pixels(drawn) <= shown
    whole = open_scenery(folders[1], folders[0], info, NAMING, keep_apart=False)
    assert sum(len(part.labels) for part in whole.stream("one-pass", batch=16, frames=16, seed=0)) == 180
