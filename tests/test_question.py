"""cvlab.page.question: what a link holds, which score is asked for, and which pixels a click means."""

from urllib.parse import parse_qsl

import pytest
import torch
from torch import Tensor, nn

from cvlab.explain import predict
from cvlab.models import Model, build
from cvlab.page.question import (
    Question,
    class_indices,
    from_query,
    mask_of,
    parse_points,
    picked,
    region_of,
    score_of,
    to_query,
)


@pytest.fixture
def logits(segmenter: nn.Module) -> Tensor:
    """Of two classes at 16 x 16: of the first, positive in two squares that do not touch."""
    logits = torch.full((1, 2, 16, 16), -1.0)
    logits[0, 0, 2:5, 2:5] = 3.0
    logits[0, 0, 8:12, 8:12] = 2.0
    return logits


def test_a_link_restores_the_question_and_leaves_out_what_is_as_usual() -> None:
    question = Question("a & b", "c?", True, "stage2", "hires_cam", "box", "1,2 3,4", 0.25, "jet", 0.5)
    link = to_query("user/name@main", question)
    assert dict(parse_qsl(link[1:]))["model"] == "user/name@main"
    assert from_query(dict(parse_qsl(link[1:]))) == question
    assert to_query("flowers", Question()) == "?model=flowers"


@pytest.mark.parametrize(
    "wrong", [{"threshold": "nan"}, {"method": "x"}, {"opacity": "2"}, {"region": "<b>"}, {"common_scale": "True"}]
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
    assert Question(opacity=0.1, colormap="jet", method="hires_cam").asked == Question().asked
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

    true = torch.zeros(3, 16, 16, dtype=torch.bool)  # the background, horse, rider
    true[1, 2:5, 2:7] = True
    true[0] = ~true[1]
    assert pixels() == 25
    assert pixels(threshold=0.9) == 9  # sigmoid(2) is 0.88, sigmoid(3) 0.95
    assert pixels(region="part", points="9,9") == 16
    assert pixels(region="box", points="0,0 3,1") == 8
    assert pixels(region="false positives") == 16
    assert pixels(region="false negatives") == 6
    true[0, 8:12, 8:11] = False  # not scored
    assert pixels(region="false positives") == 4
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


@pytest.fixture
def shapes_net() -> Model:
    """A segmenter of a background, circle and star, which exclude each other."""
    return build("unet", ["background", "circle", "star"], 16, {"width": 4, "depth": 2}, exclusive=True).eval()


@pytest.fixture
def of_shapes() -> Tensor:
    """Its logits: 9 pixels of circle and 16 of star, the rest background."""
    logits = torch.tensor([2.0, 0.0, 0.0])[None, :, None, None].repeat(1, 1, 16, 16)
    logits[0, 1, 2:5, 2:5] = 3.0
    logits[0, 2, 8:12, 8:12] = 4.0
    return logits


def test_the_class_by_default_is_the_object_that_covers_most(
    shapes_net: Model, of_shapes: Tensor, segmenter: nn.Module, logits: Tensor
) -> None:
    assert class_indices(Question(), shapes_net, of_shapes) == (2, None)
    assert class_indices(Question(), segmenter, logits) == (0, None)
    assert class_indices(Question(), segmenter, logits.flip(1)) == (1, None)
    assert score_of(Question(), shapes_net)(of_shapes) == 4
    assert mask_of(Question("background"), shapes_net, of_shapes).sum() == 256 - 9 - 16


def test_a_click_asks_about_the_class_that_is_there(
    shapes_net: Model, of_shapes: Tensor, segmenter: nn.Module, logits: Tensor
) -> None:
    def asked(question: Question, model: Model, found: Tensor, *points: tuple) -> tuple:
        chosen = picked(question, model, found, list(points))
        return chosen.class_name, chosen.rather_than, chosen.region

    of_star = Question("star", "background")
    assert asked(Question(), shapes_net, of_shapes, (3, 3)) == ("circle", "", "part")
    assert asked(of_star, shapes_net, of_shapes, (3, 3)) == ("circle", "background", "part")
    assert asked(Question("star", "circle"), shapes_net, of_shapes, (3, 3)) == ("circle", "", "part")
    assert asked(of_star, shapes_net, of_shapes, (15, 0)) == ("star", "background", "pixel")  # on no object
    assert asked(of_star, shapes_net, of_shapes, (3, 3), (9, 9)) == ("star", "background", "box")
    logits[0, 1, 3, 3] = 5.0  # both masks are here, and the level of the second is the higher one
    assert asked(Question(), segmenter, logits, (3, 3)) == ("rider", "", "part")
    assert asked(Question(), segmenter, logits, (2, 2)) == ("horse", "", "part")
    assert asked(Question("rider"), segmenter, logits, (9, 9)) == ("horse", "", "part")


@pytest.mark.parametrize("region", [{"region": "part"}, {"region": "pixel"}, {"region": "box", "points": "8,8 9,9"}])
def test_a_class_rather_than_the_background_is_the_difference_of_their_logits(
    shapes_net: Model, of_shapes: Tensor, region: dict
) -> None:
    asked = {"class_name": "star", "rather_than": "background", "points": "9,9"} | region
    assert score_of(Question(**asked), shapes_net)(of_shapes) == 4 - 2


@pytest.mark.parametrize("text", ["", "here", "1", "1,2 x", "1;2"])
def test_what_is_no_place_is_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        parse_points(text)


def test_places_may_be_written_loosely() -> None:
    assert parse_points(" 1, 2; -3,4 ") == [(1, 2), (-3, 4)]


def test_the_question_of_a_models_own_answer_is_its_prediction(classifier: nn.Module, images: Tensor) -> None:
    logits = predict(classifier, images[:1])
    assert score_of(Question(), classifier)(logits) == logits.max()
