"""cvlab.page.snippet: the lines make the map that was asked for, and a name can never become code."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cvlab import checkpoint
from cvlab.data import shapes
from cvlab.explain import explain, predict
from cvlab.page.question import Question, score_of
from cvlab.page.snippet import as_python
from cvlab.transforms import open_image, view


@pytest.fixture
def there(tmp_path: Path, classifier: nn.Module, segmenter: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both models, a photo and its true mask, in which the lines are run."""
    segmenter.head.bias.data.fill_(0.0)
    for name, model in (("classifier", classifier), ("segmenter", segmenter)):
        checkpoint.save(model, tmp_path / name)
    shapes.scene(0, 40).image.save(tmp_path / "photo.png")
    mask = np.zeros((40, 40), np.uint8)
    mask[:, :20] = 2  # the second class
    Image.fromarray(mask).save(tmp_path / "true.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made_by(lines: str) -> Tensor:
    names: dict = {}
    exec(lines, names)  # as a reader runs them
    assert Image.open("overlay.png").size == (16, 16)
    return names["attribution"]


def check(source: str, model: nn.Module, question: Question, true: Tensor | None = None) -> None:
    images = view(open_image("photo.png"), model)
    score = score_of(question, model, true)
    wanted = explain(model, images, score, [question.stage], [question.method]).maps[question.method][question.stage]
    assert wanted.any()
    found = made_by(as_python(source, "photo.png", model, question, "true.png"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"class_name": "dog"},
        {"class_name": "dog", "rather_than": "fox"},
        {"class_name": "dog", "rather_than": "fox", "against": True},
        {"class_name": "fox", "against": True, "method": "hires_cam", "stage": "stage1"},
    ],
)
def test_a_classifiers_map_is_made_again(there: Path, classifier: nn.Module, asked: dict) -> None:
    check("classifier", classifier, Question(**{"stage": "stage2"} | asked))


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"threshold": 0.3},
        {"region": "pixel", "points": "1,1 3,12"},
        {"region": "box", "points": "2,3 9,8"},
        {"region": "false positives", "threshold": 0.3},
        {"region": "false negatives", "threshold": 0.6},
        {"rather_than": "horse", "against": True},
        {"class_name": "", "rather_than": "horse", "method": "grad_cam", "threshold": 0.3},
    ],
)
def test_a_segmenters_map_is_made_again(there: Path, segmenter: nn.Module, asked: dict) -> None:
    true = torch.zeros(3, 16, 16, dtype=torch.bool)  # the background, horse, rider
    true[2, :, :8] = True
    true[0, :, 8:] = True
    usual = {"class_name": "rider", "stage": "decoder1", "method": "hires_cam"}
    check("segmenter", segmenter, Question(**usual | asked), true)


def test_the_part_of_the_mask_under_a_click(there: Path, segmenter: nn.Module) -> None:
    probs = predict(segmenter, view(open_image("photo.png"), segmenter))[0, 0].sigmoid()
    threshold = probs.median().item()
    y, x = (probs > threshold).nonzero()[0].tolist()
    check("segmenter", segmenter, Question(stage="bottleneck", region="part", points=f"{x},{y}", threshold=threshold))


HOSTILE = [
    "'); import os; os.mkdir('executed'); ('",
    '"); __import__("os").mkdir("executed"); ("',
    "'''\nimport os\nos.mkdir('executed')\n'''",
    "\\'); import os; os.mkdir('executed') #",
    "{__import__('os').mkdir('executed')}",
    "a\r\nb\u2028c\u2029d\x0ce\x00f",
    "\u202etac",
    "\ud800",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_literals_wherever_they_come_from(classifier: nn.Module, segmenter: nn.Module, name: str) -> None:
    """The lines parse to the same program, whatever the names are, and hold no character that a reader cannot see."""
    for model, region in ((classifier, "mask"), (segmenter, "false positives")):
        lines, plain = (
            as_python(text, text, model, Question(text, text, stage=text, region=region), text) for text in (name, "x")
        )
        trees = [list(ast.walk(ast.parse(each))) for each in (lines, plain)]
        assert [type(node) for node in trees[0]] == [type(node) for node in trees[1]]
        found, expected = ([node.value for node in tree if isinstance(node, ast.Constant)] for tree in trees)
        assert found == [name if value == "x" else value for value in expected]
        assert found.count(name) >= 6
        assert lines.replace("\n", "").isprintable()


@pytest.mark.parametrize("points", ["", "1,1); evil(", "a,b"])
def test_what_is_no_place_is_a_sentence(segmenter: nn.Module, points: str) -> None:
    with pytest.raises(ValueError, match="Choose a place"):
        as_python("m", "p", segmenter, Question(region="pixel", points=points))
