"""cvlab.page.many: each row is what the picture alone gets, a bad one stops nothing, and tables run no formula."""

import base64
import csv
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from cvlab.data import shapes
from cvlab.explain import default_stage, explain, peak, predict, predicted_masks, predicted_score
from cvlab.page import many
from cvlab.page.many import PHOTO_SIDE, Row, clean, explain_files, explain_picture, to_csv
from cvlab.page.picture import heat_layer
from cvlab.page.question import COLORMAPS, Question
from cvlab.transforms import open_image, view

NUMBER = 20
BAD = (3, 17)  # no pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scenes, two files among them that are no pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(NUMBER):
        shapes.scene(i, 24).image.save(folder / f"{i:02d}.png")
    for i in BAD:
        (folder / f"{i:02d}.png").write_text("no picture")
    return folder


def embedded(html: str, kind: str) -> list[Image.Image]:
    """The pictures of a kind that stand in HTML."""
    found = re.findall(rf"data:image/{kind};base64,([\w+/=]+)", html)
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in found]


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam"])
def test_each_row_is_what_the_picture_alone_gets(model: nn.Module, folder: Path, method: str) -> None:
    stage = list(model.stages)[1]
    for i, path in enumerate(sorted(folder.iterdir())):
        row, figure = explain_picture(model, path, Question(stage=stage, method=method), i + 1)
        assert (row.number, row.file) == (i + 1, f"{i:02d}.png")
        if i in BAD:
            assert row.prediction is None
            assert "not a picture" in row.sentence
            assert figure == ""
            continue
        photo = open_image(folder / row.file)
        assert embedded(figure, "jpeg")[0].size == photo.size
        images = view(photo, model)
        logits = predict(model, images)
        if model.task == "classification":
            assert row.prediction == model.class_names[logits.argmax()]
            assert row.share == pytest.approx(logits.softmax(1).max().item(), abs=1e-6)
        else:
            covered = predicted_masks(model, logits)[0].float().mean((1, 2))  # the class that covers most
            assert row.share == pytest.approx(covered.max().item())
            assert row.prediction == (model.class_names[covered.argmax()] if covered.any() else None)
        (heat,) = embedded(figure, "png")
        if row.prediction:
            alone = explain(model, images, predicted_score(model), [stage], [method]).maps[method][stage]
            (expected,) = embedded(heat_layer(alone, COLORMAPS[0], model.stages[stage]), "png")
            np.testing.assert_allclose(np.asarray(heat, int), np.asarray(expected, int), atol=1)
            assert row.peak == pytest.approx(peak(alone).item(), rel=1e-3, abs=1e-5)
        else:
            assert not np.asarray(heat).any()
            assert row.peak == 0
            assert "finds nothing" in row.sentence


def test_a_photo_of_the_gallery_is_small(classifier: nn.Module, tmp_path: Path) -> None:
    shapes.scene(0, 24).image.resize((2 * PHOTO_SIDE, 30)).save(tmp_path / "wide.png")
    _, figure = explain_picture(classifier, tmp_path / "wide.png", Question(stage="stage1"), 1)
    assert embedded(figure, "jpeg")[0].size == (PHOTO_SIDE, 15)


def test_progress_counts_every_picture_and_the_gallery_ends_where_the_table_goes_on(
    classifier: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "MOST_SHOWN", 5)
    told: list[tuple[int, int]] = []
    gallery, rows = explain_files(classifier, sorted(folder.iterdir()), Question(), told.append)
    assert told == [(done, NUMBER) for done in range(1, NUMBER + 1)]
    assert gallery.count("<figure>") == 5
    assert "20 pictures." in gallery
    assert "The first 5 are shown; the table holds all." in gallery
    (table,) = re.findall('data:text/csv;base64,(.*?)"', gallery)
    lines = list(csv.DictReader(base64.b64decode(table).decode("utf-8-sig").splitlines()))
    assert [line["file"] for line in lines] == [row.file for row in rows] == [f"{i:02d}.png" for i in range(NUMBER)]
    first = [str(row.number) for row in sorted(rows, key=lambda row: row.place) if row.prediction]
    assert re.findall('data-number="(.*?)"', gallery) == first + first[:5]  # the table, then the gallery


def test_mistakes_come_first_the_surest_first_then_doubts_and_what_is_no_picture_last(
    classifier: nn.Module, folder: Path, tmp_path: Path
) -> None:
    """Every second name begins with the class that is least likely, so that it is a mistake."""
    named = tmp_path / "named"
    named.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        wrong = "" if i in BAD else predict(classifier, view(open_image(path), classifier)).argmin().item()
        prefix = f"{classifier.class_names[wrong]}_" if i % 2 and i not in BAD else ""
        path.rename(named / f"{prefix}{path.name}")
    _, rows = explain_files(classifier, sorted(named.iterdir()), Question(), lambda _: None)
    rows = sorted(rows, key=lambda row: row.place)
    mistakes = [row for row in rows if row.look == "mistake"]
    assert rows[: len(mistakes)] == mistakes
    assert all("_" in row.file and row.true not in ("", row.prediction) for row in mistakes)
    assert len(mistakes) == NUMBER // 2 - len(BAD)
    assert [row.share for row in mistakes] == sorted((row.share for row in mistakes), reverse=True)
    assert [row.look for row in rows[-len(BAD) :]] == ["not opened"] * len(BAD)
    doubts = [many.REASONS.index(row.look) for row in rows]
    assert doubts == sorted(doubts)
    assert {row.look == "unsure" for row in rows if row.share and row.share < 0.6 and not row.true} <= {True}


@pytest.mark.parametrize(
    ("file", "names", "expected"),
    [
        ("daisy_12.jpg", ["daisy", "roses"], "daisy"),
        ("Daisy12.JPG", ["daisy"], "daisy"),
        ("daisyfield.jpg", ["daisy"], ""),
        ("my daisy.jpg", ["daisy"], ""),
        ("sea-lion 3.png", ["sea", "sea_lion"], "sea_lion"),
        ("class12.png", ["class 1", "class 12"], "class 12"),
        ("12.png", ["1", "12"], ""),  # files are numbered, too
        ("\u00e4hre_1.png", ["\u00c4hre"], "\u00c4hre"),
        (".png", ["***", ""], ""),
    ],
)
def test_the_true_class_is_what_the_name_of_a_file_begins_with(file: str, names: list[str], expected: str) -> None:
    assert many.true_class(file, names) == expected


FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    " =1",
    "\t=1",
    "\uff1d1+1",
    '=HYPERLINK("http://evil","x")',
    "=cmd|' /C calc'!A0",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_cell_is_no_formula(text: str) -> None:
    row = Row(1, text, text, -0.5, -1e-7, text, 0.25, text)
    _, cells = csv.reader(io.StringIO(to_csv([row])))
    assert cells == ["1", f"'{text}", f"'{text}", "-0.5", "-1e-07", f"'{text}", "0.25", f"'{text}", "", ""]


def test_text_that_is_no_formula_is_as_it_was() -> None:
    for text in ("photo.png", "a=b", "x, y", 'say "hi"', "caf\u00e9", ""):
        _, cells = csv.reader(io.StringIO(to_csv([Row(1, text, None, None, None, "")])))
        assert cells == ["1", text, *[""] * 8]


def test_a_job_of_bad_pictures_alone_still_has_its_rows(classifier: nn.Module, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.png", b"")
    bad = [tmp_path / "gone.png", tmp_path, tmp_path / "photos.zip"]
    gallery, rows = explain_files(classifier, bad, Question(), lambda _: None)
    assert "<figure>" not in gallery
    assert "Not opened: 3." in gallery
    assert [row.prediction for row in rows] == [None] * 3
    sentences = [row.sentence for row in rows]
    words = ["Gone.png cannot be read", "cannot be read", "unpack it"]
    assert all(word in sentence for word, sentence in zip(words, sentences, strict=True))
    with pytest.raises(ValueError, match="Choose pictures"):
        explain_files(classifier, [], Question(), lambda _: None)


def test_pictures_beyond_the_limit_are_counted_and_not_opened(
    classifier: nn.Module, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "MOST_PICTURES", 2)
    files = [*sorted(folder.iterdir())[:2], *3 * [tmp_path / "gone.png"]]
    gallery, rows = explain_files(classifier, files, Question(), lambda _: None)
    assert [row.file for row in rows] == ["00.png", "01.png"]
    assert "No more than 2 are taken: 3 are left out." in gallery


def test_labels_can_be_seen_and_are_short() -> None:
    assert clean("caf\u00e9.png") == "caf\u00e9.png"
    assert clean("a\x00b\ud800\u202e") == "a?b??"
    assert len(clean("x" * 10_000 + ".png")) == many.MAX_NAME
    assert clean("x" * 10_000 + ".png").endswith("x.png")


def test_at_a_stage_that_is_not_there_the_default_one_is_read(classifier: nn.Module, folder: Path) -> None:
    def rows(stage: str) -> list[Row]:
        return explain_files(classifier, [folder / "00.png"], Question(stage=stage), lambda _: None)[1]

    assert rows("stage9") == rows(default_stage(classifier)) != rows("stage1")


def test_the_same_file_may_come_twice(classifier: nn.Module, folder: Path) -> None:
    files = 2 * [folder / "00.png"]
    gallery, (first, second) = explain_files(classifier, files, Question(), lambda _: None)
    assert first[1:] == second[1:]
    assert gallery.count("<figure>") == 2
