"""cvlab.plots: what is drawn of scores, read back from the figures that matplotlib is given."""

import numpy as np
import pytest
import torch
from PIL import Image

from cvlab import plots
from cvlab.plots import confused_pairs_picture, confusion_picture, curves, many_curves


def is_readable(picture: Image.Image) -> bool:
    """It has a size that a screen shows, and more than one colour."""
    return min(picture.size) > 100 and max(picture.size) < 3000 and len(picture.getcolors(2**24)) > 2


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that were drawn."""
    seen, as_picture = [], plots.as_picture
    monkeypatch.setattr(plots, "as_picture", lambda figure: seen.append(figure) or as_picture(figure))
    return seen


def lines(score: str, epochs: int, **more: float) -> list[dict]:
    return [
        {"epoch": i, "train_loss": 1 / i, "val_loss": 1.2 / i, f"train_{score}": 1 - 0.5 / i, f"val_{score}": 0.2 * i}
        | more
        for i in range(1, epochs + 1)
    ]


@pytest.mark.parametrize("score", ["accuracy", "iou"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_curves_of_both_tasks(score, epochs):
    picture = curves(lines(score, epochs))
    assert is_readable(picture)
    assert picture.width > 2 * picture.height


def test_a_segmenter_is_marked_by_its_iou_and_all_its_scores_are_drawn(figures):
    """The first line is of a run that an older version began; x is not known."""
    more = {f"{part}_{name}": 0.9 for part in ("train", "val") for name in ("accuracy", "precision", "recall", "f1")}
    history = lines("iou", 1) + lines("iou", 3, **more, train_x=1, val_x=1)[1:]
    assert is_readable(curves(history, 2))
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == ["loss", "iou", "accuracy", "precision", "recall", "f1"]
    assert panels[1].get_legend().get_texts()[-1].get_text() == "kept: 0.400"
    np.testing.assert_equal(panels[5].lines[1].get_ydata(), [np.nan, 0.9, 0.9])


def test_loss_and_score_of_all_runs_are_drawn_for_both_parts(figures):
    histories = {"001": lines("accuracy", 2), "002": lines("accuracy", 3)}
    assert is_readable(many_curves(histories, {"001": 1, "002": 3}, "002"))
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels] == [
        "loss on training", "accuracy on training", "loss on validation", "accuracy on validation"
    ]  # fmt: skip
    assert panels[2].lines[1].get_ydata() == pytest.approx([1.2, 0.6, 0.4])
    assert [line.get_linewidth() for line in panels[2].lines] == [1, 3]
    assert "002, best: 0.600" in [text.get_text() for text in figures[0].legends[0].get_texts()]


def test_a_confusion_matrix_grows_with_its_classes():
    two = confusion_picture(torch.tensor([[5, 1], [0, 0]]), ["cat", "dog"])  # no dog in this part
    five = confusion_picture(torch.eye(5, dtype=torch.int64) * 9, [f"class {i}" for i in range(5)])
    assert is_readable(two)
    assert is_readable(five)
    assert five.width > two.width
    assert five.height > two.height


def test_one_mistake_among_very_many_classes_is_seen_at_its_place(figures):
    """2,500 classes are more than the picture has cells: a cell then shows the highest of several shares."""
    n = 2500
    matrix = torch.zeros(n, n, dtype=torch.int64)
    matrix[1234, 77] = 1
    assert is_readable(
        confusion_picture(matrix, [f"class {i} of a very long name, longer than fits" for i in range(n)])
    )
    cells = figures[0].axes[0].images[0].get_array()
    assert np.argwhere(cells).tolist() == [[1234 // 3, 77 // 3]]
    assert cells.max() == 1
    assert len(figures[0].axes[0].get_xticks()) == 40


def test_the_most_confused_pairs_are_named_with_their_counts(figures):
    matrix = torch.diag(torch.full((50,), 5))
    matrix[3, 4], matrix[4, 3], matrix[9, 0] = 2, 7, 1
    assert is_readable(confused_pairs_picture(matrix, [f"c{i}" for i in range(50)]))
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c4 as c3", "c3 as c4", "c9 as c0"]
    assert [text.get_text() for text in axes.texts] == ["7 of 12", "2 of 7", "1 of 6"]
