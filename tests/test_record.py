"""What a folder tells about its model, on the card and on the page, and that a stranger's text becomes no markup."""

import html
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt

from cvlab import checkpoint
from cvlab.checkpoint import card
from cvlab.data import shapes
from cvlab.metrics import paired_interval
from cvlab.models import build
from cvlab.page.record import audit_panel, record_panel, side_by_side

ROOT = Path(__file__).resolve().parents[1]
MARK = "<img src=x onerror=alert(1)>"
ODD = ["a|b *c* <b>x", "_x_ y_z", "`tick` ~~no~~", "# [l](u) &amp; \\| $x$", "**1**"]
DATA = {
    "name": "my_*data*",
    "split_seed": 0,
    "fingerprints": {"train": ["a", "b", "c"], "val": ["d"], "test": ["e", "f"]},
}


def test_a_shipped_model_tells_scores_curves_training_data_and_card() -> None:
    shown = record_panel(ROOT / "checkpoints" / "shapes-classifier")
    metrics = json.loads((ROOT / "checkpoints" / "shapes-classifier" / "metrics.json").read_text())
    assert f"{metrics['accuracy']['value']:.4f}" in shown
    assert "python train/classifier.py" in shown
    assert 'alt="Confusion matrix' in shown
    assert "cannot be shown" not in shown


@pytest.mark.parametrize("text", [MARK, "{}", "[]", '{"cvlab": 1}', '{"n": NaN, "part": []}', "[" * 10**5, "\0", '"x"'])
def test_whatever_a_stranger_writes_stays_text(tmp_path: Path, text: str) -> None:
    for name in ("metrics.json", "manifest.json", "config.json", "history.jsonl", "README.md"):
        (tmp_path / name).write_text(text)
    assert "<img src=x" not in record_panel(tmp_path)


def test_names_are_escaped_and_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "report").mkdir(parents=True)
    shapes.scene(1, 32).image.save(tmp_path / "secret.png")
    (tmp_path / "secret.txt").write_text("secret words")
    os.symlink(tmp_path / "secret.txt", folder / "README.md")
    os.symlink(tmp_path / "secret.png", folder / "report" / "a.png")
    score = {"value": 0.5, "low": 0.4, "high": 0.6}
    (folder / "metrics.json").write_text(json.dumps({"part": MARK, "n": 3, MARK: score}))
    shown = record_panel(folder)
    assert "secret words" not in shown
    assert "data:image" not in shown
    assert "<img" not in shown
    assert "0.4000 to 0.6000" in shown


# --- the same sections as Markdown and as HTML ------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with odd names, one score, and four epochs: the best loss in the second, the best accuracy after."""
    folder = tmp_path / "odd_*model*"
    checkpoint.save(build("convnet", ODD, 32, {"widths": [8, 16]}), folder, data=DATA)
    shares = {"precision": 0.25, "recall": 0.5, "f1-score": 0.125, "support": 7.0}
    score = {"value": 0.5, "low": 0.375, "high": 0.625}
    metrics = {"part": "test", "n": 64, "accuracy": score, "classes": dict.fromkeys(ODD, shares)}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    lines = [
        {"epoch": 1 + i, "train_loss": loss, "val_loss": loss, "train_accuracy": accuracy, "val_accuracy": accuracy}
        for i, (loss, accuracy) in enumerate([(0.9, 0.5), (0.2, 0.6), (0.3, 0.8), (0.4, 0.7)])
    ]
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    manifest = {"command": "train/classifier.py --data 'a ```b'", "epochs": 4, "minutes": 2.5, "hardware": "2 cores"}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"parameters": 1234, "best_epoch": 2}))
    return folder


def cells(folder: Path) -> tuple[list[str], str]:
    """The cells of the tables of a folder's card, as a browser shows them, and all of its HTML."""
    text = (folder / "README.md").read_text("utf-8").split("---\n", 2)[2]
    rendered = MarkdownIt("commonmark").enable("table").render(text)
    return [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", rendered)], rendered


def test_odd_names_are_shown_as_they_are(folder: Path) -> None:
    card.write(folder)
    found, rendered = cells(folder)
    expected = [("accuracy", "0.5000", "0.3750 to 0.6250"), *((name, "0.250", "0.500", "0.125", "7") for name in ODD)]
    assert found == [cell for row in expected for cell in row]
    assert "<h1>odd_*model*</h1>" in rendered
    assert html.escape(f"classes: {', '.join(ODD)}") in rendered
    assert "<code>train/classifier.py --data 'a ```b'\n</code>" in rendered.replace("&#x27;", "'").replace(
        "&quot;", '"'
    )
    assert not re.search("<(b|em|strong|a|del)[ >]", rendered)


def test_card_and_page_tell_the_same(folder: Path) -> None:
    card.write(folder)
    written, shown = html.unescape(cells(folder)[1]), html.unescape(record_panel(folder))
    facts = ("1,234", "2 cores", "64 pictures", "train 3, val 1, test 2", "0.3750 to 0.6250", "squashed", "centre crop")
    assert [fact in written for fact in facts] == [fact in shown for fact in facts] == [True] * 5 + [False, True]


@pytest.mark.parametrize(("best_epoch", "score"), [(2, "loss"), (3, "accuracy")])
def test_the_score_that_chose_the_epoch_is_named(folder: Path, best_epoch: int, score: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text()) | {"best_epoch": best_epoch, "best_by": score}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    card.write(folder)
    for text in (cells(folder)[1], record_panel(folder)):
        (kept,) = re.findall(rf"epoch {best_epoch}\b.*?<", text)
        assert {name for name in ("loss", "accuracy") if name in kept} == {score}


def test_a_model_of_unknown_data_is_not_said_to_know_synthetic_scenes(folder: Path) -> None:
    checkpoint.save(build("convnet", ODD, 32, {"widths": [8, 16]}), folder)
    card.write(folder)
    assert "ynthetic" not in (folder / "README.md").read_text() + record_panel(folder)


def test_a_broken_part_leaves_the_others(folder: Path) -> None:
    (folder / "metrics.json").write_text('{"n": "many"}')
    shown = record_panel(folder)
    assert shown.count("cannot be shown") == 1
    assert "2 cores" in shown


@pytest.mark.parametrize(("count", "drawn"), [(1, 1), (12, 12), (13, 7), (30, 10)])
def test_of_many_epochs_some_are_shown_and_the_last(tmp_path: Path, count: int, drawn: int) -> None:
    (tmp_path / "report" / "epochs").mkdir(parents=True)
    for i in range(count):
        shapes.scene(1, 32).image.save(tmp_path / "report" / "epochs" / f"epoch_{i + 1:03}.png")
    shown = record_panel(tmp_path)
    assert shown.count("<img") == drawn
    assert f'alt="Epoch {count:03}"' in shown


def test_what_an_audit_found_is_told_and_its_photographs_are_not_published(folder: Path) -> None:
    effect = {"value": 0.3, "low": 0.2, "high": 0.4}
    suspect = {"level": "used", "sentence": f"{MARK} is fixed in place", "class_name": MARK}
    found = {"n": 9, "accuracy": effect, "suspects": [suspect], "tried": [suspect], "telling": {"brightness": 0.5}}
    found["labels"] = [{"file": f"{MARK}.png", "label": "a", "likely": "b"}]
    group = {"fact": MARK, "side": "at most", "bound": 0.25, "n": 12, "error": 0.625, "rest": 0.125, "more": effect}
    found |= {"groups": [group], "chance": 0.2}
    (folder / "audit.json").write_text(json.dumps(found))
    (folder / "audit").mkdir()
    shapes.scene(1, 32).image.save(folder / "audit" / "suspect-1.png")
    assert "is fixed in place" not in record_panel(folder)  # it has a tab of its own
    shown = audit_panel(folder)
    assert "is fixed in place" in shown
    assert 'alt="Suspect 1"' in shown
    assert all(told in shown for told in ("at most 0.25", "0.625", "0.125", "0.20"))
    assert MARK not in shown
    for model_id, linked in ((None, True), ("user/name", False)):
        card.write(folder, model_id)
        text = (folder / "README.md").read_text()
        assert ("audit/suspect-1.png" in text) == linked
        assert "is fixed in place" in text
        assert MARK not in text


def measured(folder: Path, pictures: object, **more: object) -> Path:
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"part": "test", "n": 4, "pictures": pictures} | more))
    return folder


def test_two_reports_stand_side_by_side_with_the_difference_on_the_same_pictures(tmp_path: Path) -> None:
    """Of 8 pictures, one has 7 right, the other 3, among them the one that the first has wrong."""
    ours = {f"{i}": i != 0 for i in range(8)}
    theirs = {f"{i}": i < 3 for i in reversed(range(8))}
    first, second = measured(tmp_path / "a", ours), measured(tmp_path / "b", theirs)
    shown = side_by_side({MARK: first, "b": second})
    value, low, high = paired_interval(np.array([*ours.values()], float), np.arange(8) < 3.0, np.mean)
    assert value == 0.5
    assert f"+0.5000 (95% interval {low:+.4f} to {high:+.4f})" in shown
    assert shown.count("Measured on 4 pictures") == 2
    assert MARK not in shown
    assert "-0.5000 (" in side_by_side({"b": second, "a": first})


@pytest.mark.parametrize(
    ("pictures", "more", "reason"),
    [
        ({"a": True, "b": False}, {}, "95% interval"),
        ({"a": True, "c": False}, {}, "other pictures"),
        ({"a": True}, {}, "other pictures"),
        ({"a": 0.5, "b": 0.25}, {"iou": {"value": 0.5, "low": 0.4, "high": 0.6}}, "another task"),
        ({}, {}, "no single picture of second"),
        ({"a": MARK, "b": []}, {}, "cannot be shown"),
        ("x", {}, "cannot be shown"),
    ],
)
def test_a_difference_that_cannot_be_told_is_not(tmp_path: Path, pictures: object, more: dict, reason: str) -> None:
    first, second = measured(tmp_path / "a", {"a": True, "b": True}), measured(tmp_path / "b", pictures, **more)
    shown = side_by_side({"first": first, "second": second})
    assert reason in shown
    assert ("95% interval -" in shown or "95% interval +" in shown) == (reason == "95% interval")


@pytest.mark.parametrize("text", ["", MARK, "{}", "[]", '{"iou": 1}', "[" * 10**5, '{"tried": [{}], "n": "<b>"}'])
def test_the_tab_of_the_audit_tells_how_to_ask_and_shows_no_strangers_markup(tmp_path: Path, text: str) -> None:
    if text:
        (tmp_path / "audit.json").write_text(text)
    shown = audit_panel(tmp_path)
    assert shown
    assert "<b>" not in shown
    assert "<img" not in shown
    assert ("train/audit.py" in shown) == (text in ("", "{}", "[]"))


def test_the_tab_of_the_audit_of_a_segmenter(tmp_path: Path) -> None:
    score = {"value": 0.75, "low": 0.5, "high": 0.875}
    found = {"n": 9, "iou": score, "suspects": [], "tried": [], "labels": [], "groups": [], "telling": {}}
    (tmp_path / "audit.json").write_text(json.dumps(found))
    assert "0.750 (0.500 to 0.875)" in audit_panel(tmp_path)
