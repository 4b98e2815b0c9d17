"""Built engines on the disk: found by everything they depend on, and never from elsewhere."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil

import pytest

from mgg_edge.errors import EngineError, SinkError, UsageError
from mgg_edge.runtime.engines.engine_cache import CACHE_VARIABLE, EngineCache, default_cache
from mgg_edge.runtime.engines.engine_key import EngineKey

DRIVER = "CUDA 12060, driver 540.4.0"
KEY = EngineKey("adapt", "a" * 64, "b" * 64, "tensorrt 10.3.0", "Orin", "sm87", DRIVER, "level auto")


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines", machine_id=machine(tmp_path, "one"))


def machine(folder, name):
    path = folder / f"machine-{name}"
    path.write_text(name)
    return path


def test_an_engine_is_found_again(cache):
    path = cache.put(KEY, b"plan", "x.mgg")
    assert cache.get(KEY) == b"plan"
    (entry,) = cache.entries()
    assert (entry.path, entry.key, entry.bundle, entry.trusted) == (path, KEY, "x.mgg", True)
    assert {file.name for file in cache.root.iterdir()} == {path.name, "device.key"}
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineKey)])
def test_an_engine_depends_on_every_fact(cache, field):
    cache.put(KEY, b"plan", "x.mgg")
    other = dataclasses.replace(KEY, **{field: "other"})
    assert cache.get(other) is None
    if field != "graph":
        (difference,) = cache.nearest(other).key.differences(other)
        assert difference.endswith("→ other")


def test_nearest_is_the_one_with_fewest_differences(cache):
    far = dataclasses.replace(KEY, library="tensorrt 9", driver="x")
    near = dataclasses.replace(KEY, driver="y")
    cache.put(far, b"1", "x.mgg")
    cache.put(near, b"2", "x.mgg")
    assert cache.nearest(KEY).key == near
    assert near.differences(KEY) == (f"driver: y → {DRIVER}",)
    assert cache.nearest(dataclasses.replace(KEY, graph="infer")) is None


@pytest.mark.parametrize("where", range(0, 400, 7))
def test_an_altered_engine_is_never_loaded(cache, where, caplog):
    path = cache.put(KEY, b"p" * 40, "x.mgg")
    data = bytearray(path.read_bytes())
    data[where % len(data)] ^= 1
    path.write_bytes(data)
    assert cache.get(KEY) is None


def test_a_truncated_engine_is_never_loaded(cache):
    path = cache.put(KEY, b"plan", "x.mgg")
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert cache.get(KEY) is None


def test_an_engine_of_another_key_under_this_name_is_not_loaded(cache):
    other = dataclasses.replace(KEY, driver="other")
    shutil.copy(cache.put(other, b"plan", "x.mgg"), cache.path(KEY))
    assert cache.get(KEY) is None


def test_a_foreign_engine_is_refused_until_it_is_taken_on(cache, tmp_path, caplog):
    elsewhere = EngineCache(tmp_path / "elsewhere", machine_id=machine(tmp_path, "one"))
    foreign = elsewhere.put(KEY, b"plan", "x.mgg")
    cache.put(dataclasses.replace(KEY, driver="own"), b"own", "y.mgg")
    shutil.copy(foreign, cache.root)
    assert cache.get(KEY) is None
    assert "built or altered elsewhere, not loaded" in caplog.text
    assert [entry.trusted for entry in cache.entries() if entry.key == KEY] == [False]
    assert cache.nearest(KEY).key != KEY
    cache.add(foreign)
    assert cache.get(KEY) == b"plan"


def test_a_copied_disk_makes_no_device_trusted(cache, tmp_path):
    cache.put(KEY, b"plan", "x.mgg")
    shutil.copytree(cache.root, tmp_path / "image")
    same = EngineCache(tmp_path / "image", machine_id=machine(tmp_path, "one"))
    other = EngineCache(tmp_path / "image", machine_id=machine(tmp_path, "two"))
    assert same.get(KEY) == b"plan"
    assert other.get(KEY) is None


def test_the_device_key_is_its_owners(cache):
    cache.put(KEY, b"plan", "x.mgg")
    assert (cache.root / "device.key").stat().st_mode & 0o777 == 0o600
    assert len((cache.root / "device.key").read_bytes()) == 32


def test_what_is_not_an_engine_is_not_taken_on(cache, tmp_path):
    (tmp_path / "x.engine").write_bytes(b"something")
    with pytest.raises(EngineError, match="expected an engine written by mgg-edge"):
        cache.add(tmp_path / "x.engine")
    cache.put_timing("t", b"times")
    with pytest.raises(EngineError, match="expected an engine written by mgg-edge"):
        cache.add(cache.root / "t.timing")


def test_the_longest_unused_engines_go_first(tmp_path):
    cache = EngineCache(tmp_path / "engines", limit_bytes=5000)
    keys = [dataclasses.replace(KEY, driver=str(number)) for number in range(4)]
    for number, key in enumerate(keys[:3]):
        os.utime(cache.put(key, bytes(1000), "x.mgg"), (number, number))
    assert cache.get(keys[0]) is not None  # used now: the second is the oldest
    cache.put(keys[3], bytes(1000), "x.mgg")
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]


def test_an_engine_over_the_limit_is_kept_alone(tmp_path):
    cache = EngineCache(tmp_path / "engines", limit_bytes=10)
    cache.put(KEY, b"old", "x.mgg")
    newest = dataclasses.replace(KEY, driver="new")
    cache.put(newest, bytes(1000), "x.mgg")
    assert (cache.get(KEY), cache.get(newest)) == (None, bytes(1000))


def test_kernel_times_are_kept_and_verified(cache):
    assert cache.timing("tensorrt-Orin") == b""
    cache.put_timing("tensorrt-Orin", b"times")
    assert cache.timing("tensorrt-Orin") == b"times"
    path = cache.root / "tensorrt-Orin.timing"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert cache.timing("tensorrt-Orin") == b""


def test_clear_deletes_engines_and_times(cache):
    cache.put(KEY, b"plan", "x.mgg")
    cache.put_timing("t", b"times")
    assert cache.clear() == 2
    assert (cache.entries(), cache.timing("t")) == ((), b"")


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match=r"cannot keep engines: .*MGG_EDGE_ENGINES"):
        EngineCache(tmp_path / "file" / "engines").put(KEY, b"plan", "x.mgg")


def _build_alone(root, counter, machine_id):
    cache = EngineCache(root, machine_id=machine_id)
    with cache.building():
        if cache.get(KEY) is None:
            with counter.open("a") as file:
                file.write("built\n")
            cache.put(KEY, b"plan", "x.mgg")


def test_of_many_processes_one_builds(cache, tmp_path):
    context, counter = multiprocessing.get_context("spawn"), tmp_path / "counter"
    arguments = (cache.root, counter, tmp_path / "machine-one")
    workers = [context.Process(target=_build_alone, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert counter.read_text() == "built\n"


def test_the_place_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(default_cache()) == "/x/mgg-edge/engines"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(default_cache()).endswith("/.cache/mgg-edge/engines")


def test_a_user_without_a_home_is_told_what_to_name(monkeypatch):
    for name in ("MGG_EDGE_ENGINES", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(UsageError, match="this user has no home directory; name a folder with MGG_EDGE_ENGINES"):
        default_cache()
