"""cvlab.page.question: what a link holds, which score is asked for, and which pixels a click means."""

from urllib.parse import parse_qsl

import pytest
import torch
from torch import Tensor, nn

from cvlab.explain import predict
from cvlab.page.question import Question, from_query, mask_of, parse_points, picked, region_of, score_of, to_query


@pytest.fixture
def logits(segmenter: nn.Module) -> Tensor:
    """Of two classes at 16 x 16: of the first, positive in two squares that do not touch."""
    logits = torch.full((1, 2, 16, 16), -1.0)
    logits[0, 0, 2:5, 2:5] = 3.0
    logits[0, 0, 8:12, 8:12] = 2.0
    return logits


def test_a_link_restores_the_question_and_leaves_out_what_is_as_usual() -> None:
    question = Question("a & b", "c?", True, "stage2", "hires_cam", "box", "1,2 3,4", 0.25, "jet", 0.5, True)
    link = to_query("user/name@main", question)
    assert dict(parse_qsl(link[1:]))["model"] == "user/name@main"
    assert from_query(dict(parse_qsl(link[1:]))) == question
    assert to_query("flowers", Question()) == "?model=flowers"


@pytest.mark.parametrize(
    "wrong", [{"threshold": "nan"}, {"method": "x"}, {"opacity": "2"}, {"region": "<b>"}, {"x": "y"}]
)
def test_what_a_link_says_wrongly_is_left_out(wrong: dict) -> None:
    assert from_query({"stage": "stage1"} | wrong) == Question(stage="stage1")


@pytest.mark.parametrize(
    "wrong",
    [
        {"opacity": float("nan")},
        {"threshold": 1.0},
        {"against": "yes"},
        {"class_name": ["a"]},
        {"method": "x"},
        {"colormap": "magic"},
    ],
)
def test_what_no_widget_can_say_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        Question(**wrong)


def test_what_is_only_drawing_is_not_asked() -> None:
    assert Question(opacity=0.1, colormap="jet", common_scale=True, method="hires_cam").asked == Question().asked
    assert Question(against=True).asked != Question().asked


def test_scores_are_those_of_the_logits(classifier: nn.Module, segmenter: nn.Module, logits: Tensor) -> None:
    of = torch.tensor([[1.0, 5.0, 2.0]])
    assert score_of(Question(), classifier)(of) == 5  # the predicted class
    assert score_of(Question("fox", "cat"), classifier)(of) == 1
    assert score_of(Question("fox", against=True), classifier)(of) == -2
    assert score_of(Question(), segmenter)(logits) == pytest.approx((9 * 3 + 16 * 2) / 25)
    assert score_of(Question("horse", "rider"), segmenter)(logits) == pytest.approx((9 * 3 + 16 * 2) / 25 + 1)
    assert score_of(Question(region="part", points="3,3"), segmenter)(logits) == 3
    assert score_of(Question(region="pixel", points="0,15"), segmenter)(logits) == -1
    with pytest.raises(ValueError, match="itself"):
        score_of(Question("cat", "cat"), classifier)(of)


def test_regions_are_the_pixels_that_are_meant(segmenter: nn.Module, logits: Tensor) -> None:
    def pixels(**asked: object) -> int:
        return int(region_of(Question(**asked), segmenter, logits, true).sum())

    true = torch.zeros(16, 16, dtype=torch.bool)
    true[2:5, 2:7] = True
    assert pixels() == 25
    assert pixels(threshold=0.9) == 9  # sigmoid(2) is 0.88, sigmoid(3) 0.95
    assert pixels(region="part", points="9,9") == 16
    assert pixels(region="box", points="0,0 3,1") == 8
    assert pixels(region="false positives") == 16
    assert pixels(region="false negatives") == 6
    assert mask_of(Question(class_name="rider"), segmenter, logits).sum() == 0


def test_a_click_means_what_is_under_it(segmenter: nn.Module, logits: Tensor) -> None:
    def said(question: Question, *points: tuple) -> tuple[str, str]:
        chosen = picked(question, segmenter, logits, list(points))
        return chosen.region, chosen.points

    assert said(Question(), (3, 3)) == ("part", "3,3")
    assert said(Question(), (0, 15)) == ("pixel", "0,15")
    assert said(Question(), (99, -4)) == ("pixel", "15,0")
    assert said(Question(), (1, 1), (4, 4), (9, 2)) == ("box", "1,1 9,2")
    assert said(Question(region="box"), (1, 1)) == ("box", "1,1")
    assert said(Question(region="box", points="1,1"), (9, 9)) == ("box", "1,1 9,9")  # two taps, as on a phone
    assert said(Question(region="stroke", points="1,1"), (9, 9), (9, 12)) == ("stroke", "9,9 9,12")


@pytest.mark.parametrize("text", ["", "here", "1", "1,2 x", "1;2", "1,2 " * 501])
def test_what_is_no_place_is_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        parse_points(text)


def test_places_may_be_written_loosely() -> None:
    assert parse_points(" 1, 2; -3,4 ") == [(1, 2), (-3, 4)]


def test_the_question_of_a_models_own_answer_is_its_prediction(classifier: nn.Module, images: Tensor) -> None:
    logits = predict(classifier, images[:1])
    assert score_of(Question(), classifier)(logits) == logits.max()
