"""Names of classes and files: whatever a file system has is trained on, measured and shown, or refused at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image
from runs import ROOT, SMALL_CLASSIFIER, discs, here, last_words, noise

from cvlab import checkpoint, fonts, metrics, render
from cvlab.page.host import sentence_of

ODD = ["$5_$10", "a|b *c* <b>x", "_'q\" #[1](x)\\", "low"]  # “low” is also a key of the scores


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes of odd names; a file whose name is no UTF-8 and one that is Markdown, of which one cannot be opened."""
    folder = noise(tmp_path_factory.mktemp("odd") / "$1 data_$2", ODD, 8)
    os.rename(folder / ODD[0] / "0.png", os.fsencode(folder / ODD[0]) + b"/caf\xe9.png")
    (folder / ODD[1] / "*x* <i>.png").write_bytes(b"no picture")
    (folder / ODD[2] / os.fsdecode(b"caf\xe9.txt")).write_text("no picture")
    return folder


def test_odd_names_go_from_the_folder_to_the_card(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    here("classifier", "--data", data, "--out", run, *SMALL_CLASSIFIER, "--epochs", 1)
    here("evaluate", run, "--data", data)
    here("check", data, "--out", tmp_path / "report")
    names = sorted(ODD)
    assert checkpoint.load(run).class_names == names
    assert list(json.loads((run / "metrics.json").read_text())["classes"]) == names
    for path in (run / "README.md", run / "report" / "README.md"):
        text = path.read_text("utf-8")
        (row,) = [line for line in text.splitlines() if line.startswith(r"| a\|b")]
        assert row.startswith(r"| a\|b \*c\* \<b\>x | ")
        assert row.replace(r"\|", "").count("|") == 6  # five cells
    assert r"\*x\* \<i\>.png" in (run / "report" / "README.md").read_text("utf-8")
    assert Image.open(run / "report" / "confusion_matrix.png").width > 300


def test_a_class_whose_name_is_no_text_is_refused_before_the_first_epoch(tmp_path: Path) -> None:
    folder = noise(tmp_path / "data")
    os.rename(folder / "a", os.fsencode(folder) + b"/caf\xe9")
    assert "is not valid UTF-8: rename it" in last_words("classifier", "--data", folder, "--out", tmp_path / "run")
    assert not [name for name in ("history.jsonl", "config.json") if (tmp_path / "run" / name).exists()]


def test_names_are_drawn_in_an_installed_font_that_has_their_characters(tmp_path: Path) -> None:
    """A font of one character, a black square, stands for the one that a user installs."""
    ideograph, images = "\u732b", [Image.new("RGB", (30, 30), "white")]
    fonts.font_with.cache_clear()
    if fonts.font_with(ideograph) is None:
        assert ideograph in fonts.without_glyphs(["plain", ideograph * 2])
        with pytest.warns(UserWarning, match=ideograph):
            render.grid(images, [ideograph], 1)
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(ideograph): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": "AAA Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "square.ttf")
    before = list(fontManager.ttflist)
    try:
        fontManager.addfont(tmp_path / "square.ttf")
        fontManager.ttflist.sort(key=lambda font: font.name)
        fonts.font_with.cache_clear()
        assert fonts.without_glyphs([ideograph]) == ""
        dark = np.asarray(render.grid(images, [ideograph * 4], 1).convert("L")) < 60
        assert dark.sum() > 300  # a box of lines has fewer
    finally:
        fontManager.ttflist[:] = before
        fonts.font_with.cache_clear()


def test_scores_of_each_class_by_hand() -> None:
    """Two pictures, three classes; tp, fp, fn, tn of each. The third class is nowhere."""
    counts = np.array([[[6, 2, 0, 8], [0, 0, 4, 12], [0, 0, 0, 16]], [[2, 0, 2, 12], [0, 4, 0, 12], [0, 0, 0, 16]]])
    found = metrics.class_scores(counts, ["sky", "low", "car"])
    assert found["iou_by_class"] == {"sky": 8 / 12, "low": 0.0, "car": None}
    assert found["mean_iou"]["value"] == pytest.approx(1 / 3)
    assert 0 <= found["mean_iou"]["low"] <= 1 / 3 <= found["mean_iou"]["high"] <= 1


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")
def test_the_name_of_a_file_steers_no_terminal(tmp_path: Path) -> None:
    data = discs(tmp_path / "data", 6)
    for part in ("images", "masks"):
        (data / part / "0.png").rename(data / part / "\x1b[31mred.png")
    Image.fromarray(np.full((40, 48), 0.5, np.float32)).save(data / "masks" / "\x1b[31mred.tiff")
    (data / "masks" / "\x1b[31mred.png").unlink()
    words = ["--data", str(data), "--out", str(tmp_path / "run")]
    ran = subprocess.run([sys.executable, "train/segmenter.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "\x1b" not in ran.stdout + ran.stderr
    assert "?[31mred" in ran.stderr


def test_the_name_of_a_file_is_shown_on_one_line_of_the_page() -> None:
    assert sentence_of(ValueError("masks/\x1b\n.png has fractions")) == "Masks/? .png has fractions."
