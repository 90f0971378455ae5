"""cvlab.page.picture and words: layers lie where the model looked, and sentences say what the map says."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cvlab.models import Grid, Stage
from cvlab.page.html import bars
from cvlab.page.picture import heat_layer, hottest_edge, outline
from cvlab.page.words import percent, place, shares_of_evidence
from cvlab.render import heatmap_picture, overlay
from cvlab.transforms import seen_part, view

WHOLE = (0, 0, 1, 1)


def spot(rows: slice, columns: slice, side: int = 20) -> torch.Tensor:
    """A map (1, 1, side, side) with evidence in one rectangle."""
    attribution = torch.zeros(1, 1, side, side)
    attribution[..., rows, columns] = 1
    return attribution


def corners(path: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a path."""
    points = np.array([[float(each) for each in point.split()] for point in re.findall(r"[\d.]+ [\d.]+", path)])
    return *points.min(0), *points.max(0)


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (30, 90), (33, 33)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.8])
def test_the_part_that_a_classifier_saw_is_where_its_view_was_cut(
    classifier: nn.Module, size: tuple[int, int], crop_pct: float
) -> None:
    """What is painted over that part alone fills the view, and what is painted around it does not enter."""
    classifier.crop_pct = crop_pct
    width, height = (10 * each for each in size)
    x, y, across, down = seen_part(classifier, (height, width))
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[round(y * height) : round((y + down) * height), round(x * width) : round((x + across) * width)] = 255
    seen = view(Image.fromarray(pixels), classifier)
    assert seen[..., 1:-1, 1:-1].min() > 0.95
    assert view(Image.fromarray(255 - pixels), classifier).mean() < 0.1


def test_a_segmenter_saw_all_of_the_photo(segmenter: nn.Module) -> None:
    assert seen_part(segmenter, (30, 90)) == WHOLE


def test_of_a_squashed_photo_the_model_sees_the_same_share_of_both_sides(classifier: nn.Module) -> None:
    classifier.crop_mode, classifier.crop_pct = "squash", 0.8  # 16 of 20 pixels, whatever the shape was
    assert seen_part(classifier, (30, 90)) == pytest.approx((0.1, 0.1, 0.8, 0.8))
    classifier.crop_pct = 1.0
    assert seen_part(classifier, (30, 90)) == WHOLE


def test_an_outline_lies_around_what_is_above_the_level_and_is_closed_at_the_border() -> None:
    levels = np.zeros((10, 20))
    levels[2:6, 5:15] = 1
    assert corners(outline(levels, 0.5, WHOLE)) == (250, 200, 750, 600)
    assert corners(outline(levels, 0.5, (0.5, 0, 0.5, 1))) == (625, 200, 875, 600)
    assert corners(outline(np.ones((4, 4)), 0.5, WHOLE)) == (0, 0, 1000, 1000)
    levels[3:5, 8:12] = 0  # a hole
    levels[8, 0] = 1
    path = outline(levels, 0.5, WHOLE)
    assert path.count("M") == path.count("Z") == 3
    assert outline(np.zeros((4, 4)), 0.5, WHOLE) == ""


def test_no_evidence_stays_see_through_and_the_maximum_is_the_brightest() -> None:
    attribution = spot(slice(5, 10), slice(5, 10)) - 0.5 * spot(slice(15, 20), slice(0, 20))
    drawn = Image.open(io.BytesIO(base64.b64decode(heat_layer(attribution, "gray").partition(",")[2]))).convert("RGBA")
    pixels = np.asarray(drawn.resize((20, 20), Image.Resampling.NEAREST))
    assert tuple(pixels[7, 7]) == (255, 255, 255, 255)
    assert pixels[12:, :, 3].max() == 0
    assert heat_layer(attribution / 2, "gray") == heat_layer(attribution, "gray")
    assert hottest_edge(-attribution.relu(), WHOLE) == ""


def test_the_line_encloses_the_hottest_tenth() -> None:
    edge = hottest_edge(spot(slice(0, 10), slice(0, 4)), WHOLE)  # a tenth of the picture
    assert corners(edge) == pytest.approx((0, 0, 200, 500), abs=30)


def test_a_hot_cell_is_drawn_and_named_where_its_stage_looks() -> None:
    """Padded halving puts cell i over pixel 32i of 256, half a cell up and left of where stretching would draw it."""
    stage = Stage(nn.Identity())
    stage.module.grid = Grid(0.0, 32.0, 256)
    attribution = spot(slice(3, 4), slice(5, 6), 8)
    x, y = (160.5 / 256, 96.5 / 256)
    drawn = Image.open(io.BytesIO(base64.b64decode(heat_layer(attribution, "gray", stage=stage).partition(",")[2])))
    pictures = (
        np.asarray(drawn.convert("RGBA"), float)[..., 0],
        np.asarray(heatmap_picture(attribution, (256, 256), "gray", stage=stage).convert("L"), float),
    )
    black = torch.zeros(1, 3, 256, 256)
    for pixels in (*pictures, np.asarray(overlay(black, attribution, "gray", stage=stage).convert("L"), float)):
        rows, columns = np.nonzero(pixels == pixels.max())
        side = len(pixels)
        assert ((columns.mean() + 0.5) / side, (rows.mean() + 0.5) / side) == pytest.approx((x, y), abs=0.005)
    left, top, right, bottom = corners(hottest_edge(attribution, WHOLE, stage))
    assert ((left + right) / 2000, (top + bottom) / 2000) == pytest.approx((x, y), abs=0.005)
    region = torch.zeros(256, 256, dtype=torch.bool)
    region[64:129, 128:193] = True
    assert shares_of_evidence(attribution, region, stage)["around it"] == 0
    assert shares_of_evidence(attribution, region)["around it"] > 0.05
    corner = spot(slice(5, 6), slice(5, 6), 8)
    assert (place(corner, stage), place(corner)) == ("at the middle", "at the lower right")


def test_a_single_hot_pixel_of_a_fine_map_is_seen_and_zero_stays_zero() -> None:
    attribution = spot(slice(30, 31), slice(150, 151), 224)
    drawn = Image.open(io.BytesIO(base64.b64decode(heat_layer(attribution, "gray").partition(",")[2])))
    rows, columns = np.nonzero(np.asarray(drawn.convert("RGBA"))[..., 3])
    assert np.asarray(drawn.convert("RGBA"))[rows, columns, 3].max() == 255
    assert max(np.ptp(rows), np.ptp(columns)) <= 1
    assert ((columns.mean() + 0.5) / drawn.width, (rows.mean() + 0.5) / drawn.height) == pytest.approx(
        (150.5 / 224, 30.5 / 224), abs=1 / 64
    )


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        ((8, 12), (8, 12), "at the middle"),
        ((0, 5), (0, 5), "at the upper left"),
        ((8, 12), (15, 20), "right of the middle"),
        ((15, 20), (8, 12), "below the middle"),
    ],
)
def test_a_place_is_named_as_it_is_seen(rows: tuple[int, int], columns: tuple[int, int], words: str) -> None:
    assert place(spot(slice(*rows), slice(*columns))) == words


def test_two_far_spots_are_several_places_and_a_blank_map_none() -> None:
    corner = spot(slice(0, 4), slice(0, 4))
    assert place(corner + corner.flip(2, 3)) == "at several places"
    assert place(-corner) == ""


def test_evidence_is_shared_out_between_inside_edge_and_around() -> None:
    region = torch.zeros(40, 40, dtype=torch.bool)
    region[10:30, 10:30] = True
    inside, around = (spot(slice(*place), slice(*place), 40) for place in ((15, 20), (35, 40)))
    assert shares_of_evidence(inside, region)["inside it"] == 1
    assert shares_of_evidence(around, region)["around it"] == 1
    both = shares_of_evidence(inside + around, region)
    assert both == pytest.approx({"inside it": 0.5, "along its edge": 0, "around it": 0.5})
    border = spot(slice(10, 11), slice(10, 30), 40)
    assert shares_of_evidence(border, region)["along its edge"] == 1
    assert shares_of_evidence(-border, region) == {}


def test_a_share_that_is_not_nothing_or_all_never_reads_so() -> None:
    assert [percent(share) for share in (0, 0.001, 0.834, 0.999, 1)] == ["0%", "under 1%", "83%", "over 99%", "100%"]


def test_many_classes_are_all_there_the_first_five_at_once() -> None:
    table, _, rest = bars({f"class {i}": i / 4950 for i in range(100)}, "Probability").partition("<details")
    assert re.findall(r'row">class (\d+)<', table) == ["99", "98", "97", "96", "95"]
    assert len(re.findall("<tr>", rest)) == 95
    assert "<summary>95 more<" in rest
    assert "<details" not in bars({"a": 1.0}, "Probability")
