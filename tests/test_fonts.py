"""From fonts to glyph masters: what is kept, what is left out and why, how families are named and joined."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the learn half needs the export extra")
matplotlib = pytest.importorskip("matplotlib", reason="its fonts are the test's")

from mgg_edge.errors import SourceError, UsageError  # noqa: E402
from mgg_edge.learn import debian, fonts  # noqa: E402
from mgg_edge.scenes.glyphs import CHARACTERS, Face, load_glyphs  # noqa: E402

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parent.parent
TTF = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def masters_of(name):
    return list(fonts.rasterise(TTF / name))


def test_a_face_becomes_36_masters_with_upright_ink():
    ((family, name, masters),) = masters_of("DejaVuSans-Bold.ttf")
    assert (family, name) == ("DejaVu Sans", "DejaVu Sans Bold")
    assert (masters.shape, masters.dtype) == ((36, 48, 48), np.uint8)
    assert all(master.max() > 200 for master in masters)
    letter = masters[CHARACTERS.index("L")]
    assert letter[:, :24].sum() > 1.5 * letter[:, 24:].sum()
    assert letter.sum(1).argmax() > 24 > masters[CHARACTERS.index("T")].sum(1).argmax()  # its foot, and a T's head


def test_weights_of_a_family_share_its_name():
    names = {masters_of(f"DejaVuSans{style}.ttf")[0][0] for style in ("", "-Bold", "-Oblique", "-BoldOblique")}
    assert names == {"DejaVu Sans"}


def test_what_is_no_reading_face_is_left_out_and_says_why(monkeypatch):
    monkeypatch.setattr(fonts, "UNFIT_NAME", re.compile("Oblique"))
    ((_, _, rejected),) = masters_of("DejaVuSans-Oblique.ttf")
    assert str(rejected) == "unfit by its name"
    ((_, _, rejected),) = masters_of("STIXSizOneSymReg.ttf")
    assert str(rejected) in ("lacks some of the 36 characters", "some character has no ink")


@pytest.mark.parametrize("name", ["D050000L", "Noto Emoji", "UnifrakturMaguntia Book", "Latin Modern Math"])
def test_names_of_symbols_and_broken_scripts_are_known(name):
    assert fonts.UNFIT_NAME.search(name)
    assert not fonts.UNFIT_NAME.search("Open Sans Bold")


def test_a_file_that_is_no_font_is_left_out(tmp_path):
    (tmp_path / "x.ttf").write_bytes(b"junk")
    ((_, _, rejected),) = fonts.rasterise(tmp_path / "x.ttf")
    assert "cannot open it" in str(rejected)


def test_equal_faces_are_kept_once_and_equal_drawings_join_their_families():
    plain, serif = (masters_of(name)[0][2] for name in ("DejaVuSans.ttf", "DejaVuSerif.ttf"))
    nearly = plain.copy()
    nearly[0, 0, 0] += 1
    found = fonts.distinct_faces(
        [(Face("B copy", "x"), nearly), (Face("A", "x"), plain), (Face("A", "y"), plain), (Face("Serif", "z"), serif)]
    )
    assert [face.name for face, _ in found] == ["x", "x", "z"]
    families = fonts.join_families([face for face, _ in found], np.stack([masters for _, masters in found]))
    assert families == ["A", "A", "Serif"]


def test_lists_of_packages(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# some\nfonts-agave\n\nfonts-go # comment\n")
    assert fonts.read_packages(path) == ["fonts-agave", "fonts-go"]
    path.write_text("fonts-agave\nbash\n")
    with pytest.raises(UsageError, match="line 2: expected 'fonts-NAME', found 'bash'"):
        fonts.read_packages(path)
    with pytest.raises(UsageError, match="no such list"):
        fonts.read_packages(tmp_path / "none.txt")
    assert len(fonts.read_packages(ROOT / "scripts" / "fonts-packages.txt")) > 100


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not here")
def test_only_packages_of_the_main_archive_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    for section in ("fonts", "non-free/fonts"):
        tree = tmp_path / section.replace("/", "-")
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "usr/share/doc/fonts-x").mkdir(parents=True)
        (tree / "usr/share/doc/fonts-x/copyright").write_text("Files: *\nLicense: OFL-1.1\n text\nLicense: OFL-1.1\n")
        fields = ("Package: fonts-x", "Version: 1-2", f"Section: {section}", "Architecture: all", "Maintainer: x")
        (tree / "DEBIAN/control").write_text("\n".join((*fields, "Description: x", "")))
        archive = tmp_path / f"{tree.name}.deb"
        subprocess.run(["dpkg-deb", "--build", str(tree), str(archive)], check=True, capture_output=True)
        if section == "fonts":
            package = debian.unpack(archive.relative_to(tmp_path.parent), Path(tmp_path.name))
            assert (package.folder / "usr/share/doc/fonts-x/copyright").exists()
            assert (package.name, package.version, package.licence) == ("fonts-x", "1-2", "OFL-1.1")
        else:
            with pytest.raises(SourceError, match="main archive, found section 'non-free/fonts'"):
                debian.unpack(archive, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not here")
def test_the_full_build(tmp_path):
    out = tmp_path / "glyphs.safetensors"
    words = [sys.executable, str(ROOT / "scripts" / "build_data.py"), "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if "run `apt-get update`" in done.stderr:
        pytest.skip("the packages are not to be had here")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["faces"] == len(load_glyphs(out)) > 900
    assert facts["families"] > 180
    assert min(facts["families_by_split"].values()) >= 10


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not here")
def test_the_photographs(tmp_path):
    script = str(ROOT / "scripts" / "build_photographs.py")
    words = [sys.executable, script, "--out", str(tmp_path / "p"), "--count", "80"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if "run `apt-get update`" in done.stderr:
        pytest.skip("the packages are not to be had here")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["pictures"], len(list((tmp_path / "p").glob("*.jpg")))) == (80, 80)
    assert min(facts["photographs"], facts["cut_outs"]) >= 60
    again = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (again.returncode, "expected a folder that is not there yet" in again.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="apt-get is not here")
def test_scenes_and_things(tmp_path):
    script, out = str(ROOT / "scripts" / "build_objects.py"), tmp_path / "objects"
    done = subprocess.run([sys.executable, script, "--out", str(out)], capture_output=True, text=True, cwd=ROOT)
    if "run `apt-get update`" in done.stderr:
        pytest.skip("the packages are not to be had here")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["scenes"] > 170
    assert facts["stamps"] > 330
    assert facts["furniture"] > 750
    lines = (ROOT / "scripts" / "objects.txt").read_text().splitlines()[1:]
    named = [line.split()[0] for line in lines]
    assert [name for name in named if not (out / "stamps" / name).is_file()] == []
    assert len(set(named)) == len(named) > 200
