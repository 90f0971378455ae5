"""cvlab.page.many: each row is what the picture alone gets, a bad one stops nothing, and tables run no formula."""

import csv
import io
from pathlib import Path

import pytest
import torch
from torch import nn

from cvlab.data import shapes
from cvlab.explain import explain, peak, predict, predicted_masks, predicted_score
from cvlab.page.many import BATCH, Row, explain_many, to_csv
from cvlab.page.unzip import Picture, list_pictures
from cvlab.transforms import open_image, view

NUMBER = BATCH + 4  # more than a batch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scenes, two files among them that are no pictures."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(NUMBER):
        shapes.scene(i, 24).image.save(folder / f"{i:02d}.png")
    for i in (3, BATCH + 1):
        (folder / f"{i:02d}.png").write_text("no picture")
    return folder


@pytest.mark.parametrize("method", ["grad_cam", "hires_cam"])
def test_each_row_is_what_the_picture_alone_gets(model: nn.Module, folder: Path, method: str) -> None:
    stage = list(model.stages)[1]
    rows = list(explain_many(model, list_pictures(sorted(folder.iterdir())), stage, method))
    assert [each.row.file for each in rows] == [f"{i:02d}.png" for i in range(NUMBER)]
    assert [each.row.number for each in rows] == list(range(1, NUMBER + 1))
    for i, each in enumerate(rows):
        if i in (3, BATCH + 1):
            assert each.row.prediction is None
            assert "not a picture" in each.row.sentence
            assert each.attribution is None
            continue
        photo = open_image(folder / each.row.file)
        assert each.photo.tobytes() == photo.tobytes()
        images = view(photo, model)
        logits = predict(model, images)
        if model.task == "classification":
            assert each.row.prediction == model.class_names[logits.argmax()]
            assert each.row.share == pytest.approx(logits.softmax(1).max().item(), abs=1e-6)
        else:
            assert each.row.share == pytest.approx(predicted_masks(model, logits)[0, 0].float().mean().item())
        if each.row.prediction:
            alone = explain(model, images, predicted_score(model), [stage], [method]).maps[method][stage]
            torch.testing.assert_close(each.attribution, alone, rtol=1e-4, atol=1e-6)
            assert each.row.peak == pytest.approx(peak(alone).item(), rel=1e-3, abs=1e-5)
        else:
            assert not each.attribution.any()
            assert each.row.peak == 0
            assert "finds nothing" in each.row.sentence


def test_progress_counts_every_picture_batch_by_batch(classifier: nn.Module, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    pictures = list_pictures(sorted(folder.iterdir()))
    explained = explain_many(classifier, pictures, progress=lambda *counts: told.append(counts))
    next(explained)
    assert told == []  # nothing runs ahead of who asks
    list(explained)
    assert told == [(BATCH, NUMBER), (NUMBER, NUMBER)]


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
    row = Row(1, text, text, -0.5, -1e-7, text, 0.25)
    _, cells = csv.reader(io.StringIO(to_csv([row])))
    assert cells == ["1", f"'{text}", f"'{text}", "-0.5", "-1e-07", f"'{text}", "0.25"]


def test_text_that_is_no_formula_is_as_it_was() -> None:
    for text in ("photo.png", "a=b", "x, y", 'say "hi"', "caf\u00e9", ""):
        _, cells = csv.reader(io.StringIO(to_csv([Row(1, text, None, None, None, "")])))
        assert cells == ["1", text, "", "", "", "", ""]


def test_a_job_of_bad_pictures_alone_still_has_its_rows(classifier: nn.Module, tmp_path: Path) -> None:
    bad = [Picture("a", sentence="no."), Picture("b", tmp_path / "gone.png")]
    rows = [each.row for each in explain_many(classifier, bad)]
    assert rows[0].sentence == "No."
    assert rows[1].prediction is None
    assert list(explain_many(classifier, [])) == []


def test_another_stage_or_method_is_a_sentence(classifier: nn.Module) -> None:
    with pytest.raises(ValueError, match="stage9"):
        next(explain_many(classifier, [Picture("a")], "stage9"))


def test_the_same_file_may_come_twice(classifier: nn.Module, folder: Path) -> None:
    twice = list(explain_many(classifier, [*list_pictures([folder / "00.png"]), *list_pictures([folder / "00.png"])]))
    assert [each.row.prediction for each in twice] == 2 * [twice[0].row.prediction]
    assert all(each.photo is not None for each in twice)
