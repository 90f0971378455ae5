"""cvlab.regions against regions drawn by hand, and through to the score they are for."""

import pytest
import torch

from cvlab.explain import against, explain, predict, region_score
from cvlab.explain.regions import box, component, false_negatives, false_positives, pixel, whole


def drawn(text):
    return torch.tensor([[mark == "#" for mark in row] for row in text.split()])


MASK = drawn(
    """
    ##...
    #..#.
    ..#..
    ....#
    """
)


def test_the_component_under_a_click():
    assert torch.equal(component(MASK, x=0, y=1), drawn("##... #.... ..... ....."))
    # Corners connect.
    assert torch.equal(component(MASK, x=3, y=1), drawn("..... ...#. ..#.. ....."))
    assert torch.equal(component(MASK, x=4, y=3), drawn("..... ..... ..... ....#"))


def test_the_components_make_up_the_mask():
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) > 0.75
    left = whole(mask).clone()
    while left.any():
        y, x = left.nonzero()[0].tolist()
        part = component(mask, x, y)
        assert part[y, x]
        assert not (part & ~left).any()  # no pixel belongs to two
        left &= ~part


def test_a_pixel():
    assert torch.equal(pixel((2, 3), x=2, y=0), drawn("..# ..."))


@pytest.mark.parametrize("corners", [((1, 0), (2, 1)), ((2, 1), (1, 0)), ((1, 1), (2, 0))])
def test_a_box_from_any_corner(corners):
    assert torch.equal(box((3, 4), *corners), drawn(".##. .##. ...."))


def test_a_box_is_cut_at_the_edge():
    assert torch.equal(box((3, 4), (-5, 1), (0, 9)), drawn(".... #... #..."))
    assert box((3, 4), (-5, -5), (9, 9)).all()


def test_false_positives_and_negatives():
    predicted, true = drawn("##.. ##.. ...."), drawn(".... ###. ....")
    assert torch.equal(false_positives(predicted, true), drawn("##.. .... ...."))
    assert torch.equal(false_negatives(predicted, true), drawn(".... ..#. ...."))


@pytest.mark.parametrize(
    "ask",
    [
        lambda: whole(MASK & False),
        lambda: component(MASK, x=2, y=0),
        lambda: component(MASK, x=5, y=0),
        lambda: component(MASK, x=0, y=-1),
        lambda: pixel((4, 5), x=0, y=4),
        lambda: box((4, 5), (5, 0), (9, 3)),
        lambda: box((4, 5), (-3, -3), (-1, 3)),
        lambda: false_positives(MASK, MASK),
        lambda: false_negatives(MASK, MASK),
    ],
)
def test_an_empty_answer_is_refused(ask):
    with pytest.raises(ValueError, match=" "):
        ask()


def test_evidence_for_the_background_is_that_against_the_region(segmenter, images):
    region = box((16, 16), (3, 3), (9, 12))
    score = region_score(region, 1)
    found, opposite = (explain(segmenter, images, each) for each in (score, against(score)))
    torch.testing.assert_close(found.scores, predict(segmenter, images)[:, 1, 3:13, 3:10].mean((1, 2)))
    assert torch.equal(opposite.scores, -found.scores)
    for stage, attribution in found.maps["grad_cam"].items():
        assert torch.equal(opposite.maps["grad_cam"][stage], -attribution)
