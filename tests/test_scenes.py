"""Characters, rendering, corruptions, domains and streams: shapes, seeds, sizes, and what each kind does."""

import numpy as np
import pytest
from PIL import Image

from characters import drawn_glyphs, family_of
from mgg_edge.errors import SourceError, UsageError
from mgg_edge.scenes import filters
from mgg_edge.scenes.corruptions import BENCHMARK_KINDS, EXTRA_KINDS, KINDS, SEVERITIES, corrupt
from mgg_edge.scenes.courses import parse_course, parse_weather
from mgg_edge.scenes.domains import OPERATIONS, Domain, draw_domain
from mgg_edge.scenes.filters import convolve, disk, displace, gaussian, line, plasma, rank_filter, smooth_noise
from mgg_edge.scenes.glyphs import CHARACTERS, SPLITS, GlyphSet, load_glyphs, save_glyphs
from mgg_edge.scenes.render import draw_scene, render
from mgg_edge.scenes.sources import GlyphSource, require_labels
from mgg_edge.scenes.streams import Stream

SOURCE = GlyphSource(drawn_glyphs())
LABELS = np.arange(24)
FRAMES = SOURCE.draw(LABELS, np.random.default_rng(0))
CLEAN_LEVELS = FRAMES.astype(int)


def seeded(seed=1):
    return np.random.default_rng(seed)


def photograph(side):
    """A smooth picture with detail, f(x, y) the same at every size."""
    across = np.linspace(0, 1, side)
    waves = [0.5 + 0.4 * np.sin(2 * np.pi * (k * across[:, None] + (3 - k) * across)) for k in range(3)]
    return (255 * np.stack(waves, -1)).astype(np.uint8)[None]


class TestGlyphs:
    def test_characters_are_the_36_of_plates_and_serial_numbers(self):
        assert len(CHARACTERS) == len(set(CHARACTERS)) == 36
        assert CHARACTERS.isupper()

    def test_a_file_gives_back_what_was_saved(self, tmp_path):
        save_glyphs(tmp_path / "g.safetensors", SOURCE.glyphs)
        found = load_glyphs(tmp_path / "g.safetensors")
        assert np.array_equal(found.masters, SOURCE.glyphs.masters)
        assert found.faces == SOURCE.glyphs.faces

    def test_no_family_is_in_two_splits(self):
        assert [SOURCE.glyphs.select(split).families for split in SPLITS] == [(family_of(split),) for split in SPLITS]

    @pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
    def test_a_damaged_file_is_refused(self, tmp_path, place):
        path = tmp_path / "g.safetensors"
        save_glyphs(path, SOURCE.glyphs)
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 0x40
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"damaged|expected|cannot read"):
            load_glyphs(path)

    def test_masters_of_another_shape_are_refused(self):
        with pytest.raises(UsageError, match="glyph masters: expected"):
            GlyphSet(SOURCE.glyphs.masters[:, :10], SOURCE.glyphs.faces)

    def test_a_large_family_does_not_drown_small_ones(self):
        faces = SOURCE.glyphs.faces[:1] * 16 + SOURCE.glyphs.faces[2:]
        masters = np.concatenate([SOURCE.glyphs.masters[:1]] * 16 + [SOURCE.glyphs.masters[2:]])
        source = GlyphSource(GlyphSet(masters, faces))
        drawn = source._draw_faces(20_000, seeded())
        assert np.mean(drawn == 16) == pytest.approx(1 / (1 + 16 * 16**-0.5), abs=0.01)  # four times, not sixteen


class TestRender:
    def test_pictures_follow_the_seed(self):
        assert np.array_equal(FRAMES, SOURCE.draw(LABELS, np.random.default_rng(0)))
        assert not np.array_equal(FRAMES, SOURCE.draw(LABELS, np.random.default_rng(1)))

    @pytest.mark.parametrize("size", [16, 32, 96])
    def test_the_same_scene_at_every_size(self, size):
        masters, scene = SOURCE.glyphs.masters[0, LABELS], draw_scene(len(LABELS), seeded())
        small = render(masters, scene, 32, seeded()).mean((1, 2))
        assert np.abs(render(masters, scene, size, seeded()).mean((1, 2)) - small).max() < 6  # grey levels

    def test_a_glyph_stands_out_of_its_paper(self):
        grey = FRAMES.mean(3).reshape(len(FRAMES), -1)
        assert (np.percentile(grey, 97, axis=1) - np.percentile(grey, 3, axis=1)).min() > 60

    def test_labels_out_of_range_are_refused(self):
        with pytest.raises(UsageError, match="expected 0 to 35, found 0 to 36"):
            require_labels([0, 36], 36)


class TestFilters:
    @pytest.mark.parametrize("kernel", [disk(2.4), line(6, 0.5), gaussian(1.5)[None]], ids=["disk", "line", "gaussian"])
    def test_kernels_keep_the_mean_of_a_flat_picture(self, kernel):
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        flat = np.full((1, 12, 12, 3), 0.3, np.float32)
        assert np.abs(convolve(flat, kernel) - flat).max() < 1e-5

    @pytest.mark.parametrize("kernel", [gaussian(9.0)[:, None], disk(8.0), line(9.0, 0.7)], ids=len)
    def test_large_kernels_give_what_summing_gives(self, kernel, monkeypatch):
        pictures = seeded().random((2, 40, 33, 3), np.float32)
        assert np.count_nonzero(kernel) > filters.MOST_SUMMED
        found = convolve(pictures, kernel)
        monkeypatch.setattr(filters, "MOST_SUMMED", kernel.size)
        assert found.dtype == np.float32
        assert np.allclose(found, convolve(pictures, kernel), atol=2e-6)

    @pytest.mark.parametrize("reach", [1, 3])
    @pytest.mark.parametrize(("rank", "choose"), [("least", np.min), ("median", np.median), ("greatest", np.max)])
    def test_rank_filters_look_at_the_whole_window(self, reach, rank, choose):
        pictures = seeded().random((2, 12, 9, 3), np.float32)
        padded = np.pad(pictures, ((0, 0), (reach, reach), (reach, reach), (0, 0)), "symmetric")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1), (1, 2))
        found = rank_filter(pictures, reach, rank)
        assert np.allclose(found, choose(windows, (-2, -1)), atol=0.5 / 255 + 1e-6 if rank == "median" else 0)

    def test_displacing_by_whole_pixels_shifts(self):
        pictures = seeded().random((2, 8, 8, 3), np.float32)
        ones = np.ones((2, 8, 8), np.float32)
        assert np.allclose(displace(pictures, ones, -ones)[:, :-1, 1:], pictures[:, 1:, :-1])

    def test_smooth_noise_is_standard_and_smooth(self):
        field = smooth_noise((4, 32, 32), 2.0, seeded())[..., 0]
        assert (field.mean(), field.std()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))
        assert np.abs(np.diff(field, axis=2)).mean() < 0.4  # of independent numbers: 1.1

    def test_plasma_fills_zero_to_one(self):
        clouds = plasma(3, 33, 1.8, seeded())
        assert clouds.shape == (3, 33, 33, 1)
        assert np.array_equal(clouds.min((1, 2, 3)), np.zeros(3))
        assert np.allclose(clouds.max((1, 2, 3)), 1)


class TestCorruptions:
    def test_there_are_fifteen_kinds_four_extra_ones_and_night(self):
        assert (len(BENCHMARK_KINDS), len(EXTRA_KINDS), len(KINDS)) == (15, 4, 20)

    @pytest.mark.parametrize("kind", KINDS)
    def test_deterministic_by_seed_and_worse_with_severity(self, kind):
        damage = []
        for severity in SEVERITIES:
            out = corrupt(FRAMES, kind, severity, seeded())
            assert (out.shape, out.dtype) == (FRAMES.shape, np.uint8)
            assert np.array_equal(out, corrupt(FRAMES, kind, severity, seeded()))
            damage.append(np.abs(out.astype(int) - CLEAN_LEVELS).mean())
        assert min(damage) > 0.8
        if kind not in ("saturate", "spatter"):  # as in ImageNet-C, these change in kind, not only in strength
            assert damage == sorted(damage)

    @pytest.mark.parametrize("kind", ["defocus_blur", "gaussian_blur", "motion_blur", "zoom_blur", "elastic_transform"])
    def test_lengths_follow_the_size_of_small_pictures(self, kind):
        small, large = photograph(32), photograph(96)
        change = [np.abs(corrupt(np.repeat(p, 8, 0), kind, 3, seeded()).astype(int) - p).mean() for p in (small, large)]
        assert change[0] == pytest.approx(change[1], rel=0.35)

    @pytest.mark.parametrize(
        ("kind", "numbers"),
        [("gaussian_noise", (0.08, 0.12, 0.18, 0.26, 0.38)), ("speckle_noise", (0.15, 0.2, 0.35, 0.45, 0.6))],
    )
    def test_noise_of_large_pictures_is_that_of_imagenet_c(self, kind, numbers):
        grey = np.full((1, 224, 224, 3), 128, np.uint8)
        for severity, sigma in zip(SEVERITIES, numbers, strict=True):
            level = sigma * (128 / 255 if kind == "speckle_noise" else 1)
            middle = corrupt(grey, kind, severity, seeded()).astype(float) / 255
            quarter = np.percentile(middle, 75) - np.percentile(middle, 25)  # clipping leaves the middle alone
            assert min(quarter, 0.99) == pytest.approx(min(1.349 * level, 0.99), rel=0.05)

    def test_contrast_and_brightness_of_large_pictures_are_those_of_imagenet_c(self):
        picture = photograph(224)
        unit = picture.astype(float) / 255
        for severity, factor in zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), strict=True):
            mean = unit.mean((1, 2), keepdims=True)
            expected = np.clip((unit - mean) * factor + mean, 0, 1) * 255
            assert np.abs(corrupt(picture, "contrast", severity, seeded()) - expected).max() <= 0.51
        brighter = corrupt(picture, "brightness", 2, seeded()).max(3) / 255
        assert np.abs(brighter - np.clip(unit.max(3) + 0.2, 0, 1)).max() < 0.004

    def test_jpeg_is_pillows(self):
        import io

        file = io.BytesIO()
        picture = photograph(224)
        Image.fromarray(picture[0]).save(file, "JPEG", quality=25)
        assert np.array_equal(corrupt(picture, "jpeg_compression", 1, seeded())[0], np.asarray(Image.open(file)))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ((FRAMES, "rain", 1), "expected one of gaussian_noise"),
            ((FRAMES, "fog", 6), "severity of 1 to 5, found 6"),
            ((FRAMES[0], "fog", 1), "u8\\[n, H, W, 3\\]"),
            ((FRAMES.astype(float), "fog", 1), "found float64"),
        ],
    )
    def test_what_is_no_corruption_is_refused(self, words, message):
        with pytest.raises(UsageError, match=message):
            corrupt(*words, seeded())


class TestDomains:
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_each_operation_keeps_shape_and_changes_pictures(self, name):
        domain = Domain(name, (OPERATIONS[name](seeded(3)),))
        out = domain(FRAMES, seeded())
        assert (out.shape, out.dtype) == (FRAMES.shape, np.uint8)
        assert np.array_equal(out, domain(FRAMES, seeded()))
        assert np.abs(out.astype(int) - CLEAN_LEVELS).mean() > 0.8

    def test_operations_are_none_of_the_benchmark(self):
        assert not {name.replace("-", "_") for name in OPERATIONS} & set(KINDS)
        assert len(OPERATIONS) == 18

    def test_domains_follow_the_seed_and_some_are_clean(self):
        names = [draw_domain(seeded(seed)).name for seed in range(400)]
        assert names == [draw_domain(seeded(seed)).name for seed in range(400)]
        assert 0.07 < names.count("clean") / 400 < 0.18
        assert {name.count("+") for name in names} == {0, 1, 2}


class TestStreams:
    def test_a_stream_repeats_itself_and_differs_by_seed(self):
        stream = Stream(SOURCE, parse_course("iid:fog"), 8, 40, seed=3)
        first, again = list(stream), list(stream)
        assert [batch.domain for batch in first] == ["fog@5"] * 5
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(first, again, strict=True))
        other = Stream(SOURCE, parse_course("iid:fog"), 8, 40, seed=4)
        assert not np.array_equal(first[0].frames, next(iter(other)).frames)

    def test_sorted_streams_show_one_class_at_a_time_and_all_before_any_again(self):
        labels = np.concatenate([b.labels for b in Stream(SOURCE, parse_course("sorted"), 64, 128 * 40, seed=0)])
        runs = labels.reshape(-1, 128)
        assert (runs == runs[:, :1]).all()
        assert len(set(runs[:36, 0])) == 36

    def test_drift_comes_and_goes(self):
        names = [weather.name for weather in parse_course("drift:fog+night").weathers]
        assert names[:5] == names[15:20] == names[-5:] == ["clean"] * 5
        assert names[5:15] == [f"fog@{level}" for level in (1, 2, 3, 4, 5, 5, 4, 3, 2, 1)]

    def test_recurring_returns(self):
        names = [weather.name for weather in parse_course("recurring:fog+contrast@2").weathers]
        assert names == ["fog@5", "contrast@2"] * 3

    def test_continual_is_every_kind_of_the_benchmark_once(self):
        names = [weather.name for weather in parse_course("continual").weathers]
        assert names == [f"{kind}@5" for kind in BENCHMARK_KINDS]
        assert [weather.name for weather in parse_course("continual:fog+snow@2").weathers] == ["fog@5", "snow@2"]

    def test_in_a_mixed_stream_every_frame_has_its_own_weather(self):
        course = parse_course("mixed:contrast@5+brightness@5")
        (batch,) = Stream(SOURCE, course, 64, 64, seed=0)
        assert batch.domain == "mixed:contrast@5+brightness@5"
        spread = batch.frames.reshape(64, -1).std(1)
        assert 10 < (spread < np.median(spread) / 1.3).sum() < 54
        again = parse_weather(batch.domain)
        assert again == course.weathers[0]

    def test_labels_of_a_correlated_stream_cluster_and_all_are_there(self):
        def changes(text):
            labels = np.concatenate([b.labels for b in Stream(SOURCE, parse_course(text), 36, 3600, seed=0)])
            assert sorted(np.bincount(labels, minlength=36)) == [100] * 36
            windows = labels.reshape(-1, 36)
            return np.mean([len(set(window)) for window in windows])

        assert changes("correlated:0.01") < changes("correlated:1") < changes("correlated:1000") < 36

    def test_labels_shift_from_one_class_to_the_next(self):
        course = parse_course("label-shift:100:fog@3")
        labels = np.concatenate([b.labels for b in Stream(SOURCE, course, 36, 3600, seed=0)]).reshape(36, 100)
        commonest = [np.bincount(part).argmax() for part in labels]
        assert len(set(commonest)) == 36
        shares = [np.bincount(part).max() / 100 for part in labels]
        assert 0.6 < np.mean(shares) < 0.9  # (100 − 1) / (100 − 1 + 36), and chance
        assert parse_course("label-shift").order.ratio == 100

    def test_one_frame_at_a_time(self):
        batches = list(Stream(SOURCE, parse_course("batch1:fog"), 8, 16, seed=0))
        assert [len(batch.labels) for batch in batches] == [1] * 16

    def test_drawn_characters_have_no_end(self):
        with pytest.raises(UsageError, match="one-pass expected a folder of pictures"):
            list(Stream(SOURCE, parse_course("one-pass"), 8, 16, seed=0))

    @pytest.mark.parametrize(
        "text",
        [
            "", "iid", "iid:rain", "iid:fog@6", "iid:fog@x", "clean:fog", "drift:rain", "drift:fog,snow", "correlated",
            "correlated:0", "correlated:nan", "correlated:fog", "label-shift:1", "mixed:clean+fog", "mixed:fog:snow",
        ],
    )  # fmt: skip
    def test_what_names_no_stream_is_refused(self, text):
        with pytest.raises(UsageError, match="expected"):
            parse_course(text)

    def test_clear_weather_leaves_frames_alone(self):
        assert parse_weather("clean")(FRAMES, seeded()) is FRAMES
