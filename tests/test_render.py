"""cvlab.render: a picture shows what the map says. Zero stays zero, and nothing is stretched by its minimum."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from cvlab.render import (
    COLORMAP,
    grid,
    heatmap_picture,
    mask_overlay,
    overlay,
    relative_heat,
    save_png,
    spread,
    to_picture,
    training_frame,
)

SIZE = (12, 16)  # height, width


def color(value: float) -> np.ndarray:
    return np.array(matplotlib.colormaps[COLORMAP](value)[:3])


@pytest.fixture
def view() -> torch.Tensor:
    """(1, 3, 12, 16), of values that 8 bits hold."""
    return torch.randint(0, 256, (1, 3, *SIZE), generator=torch.Generator().manual_seed(0)) / 255


@pytest.fixture
def attribution() -> torch.Tensor:
    """(1, 1, 3, 4), signed."""
    return torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0))


def test_a_tensor_becomes_the_picture_it_was_made_of(view):
    pixels = np.asarray(to_picture(view))
    assert pixels.shape == (*SIZE, 3)
    assert torch.equal(torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255, view[0])
    assert to_picture(view[0]) == to_picture(view)


@pytest.mark.parametrize("values", [0.0, -3.0])
def test_a_map_without_evidence_leaves_the_photo_unchanged(view, values):
    assert overlay(view, torch.full((1, 1, 3, 4), values)) == to_picture(view)


def test_a_heatmap_without_evidence_is_the_colour_of_zero():
    for values in (0.0, -3.0):
        pixels = np.asarray(heatmap_picture(torch.full((1, 1, 3, 4), values), SIZE))
        assert (pixels == np.round(color(0.0) * 255)).all()


def test_the_scale_of_a_map_does_not_show_and_its_zero_does(view, attribution):
    drawn = overlay(view, attribution)
    assert overlay(view, 8 * attribution) == drawn
    assert heatmap_picture(attribution / 8, SIZE) == heatmap_picture(attribution, SIZE)
    # Where the minimum were subtracted, a constant would make no difference: no pixel would keep its colour.
    shifted = overlay(view, attribution - attribution.min() + 1)
    difference = np.asarray(shifted).astype(int) - np.asarray(overlay(view, attribution - attribution.min()))
    assert np.abs(difference).max() > 30


def test_relative_heat_by_hand():
    attribution = torch.tensor([[[[4.0, -1.0], [1.0, 2.0]]]])
    assert relative_heat(attribution, (2, 2)).tolist() == [[1.0, 0.0], [0.25, 0.5]]
    assert relative_heat(-attribution.relu(), (2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    everywhere = torch.tensor([[[[4.0, 2.0], [3.0, 1.0]]]])
    assert relative_heat(everywhere, (2, 2)).tolist() == [[1.0, 0.5], [0.75, 0.25]]  # the least is not made 0


def test_the_colour_over_a_pixel_by_hand():
    # At the largest evidence 0.7 of the colour for 1 covers the photo; at a quarter of it, half of that opacity.
    view = torch.tensor([[[[0.2, 0.2, 0.2]], [[0.4, 0.4, 0.4]], [[0.6, 0.6, 0.6]]]])
    pixels = np.asarray(overlay(view, torch.tensor([[[[4.0, 1.0, -4.0]]]])))[0]
    photo = np.array([0.2, 0.4, 0.6])
    expected = [0.3 * photo + 0.7 * color(1.0), 0.65 * photo + 0.35 * color(0.25), photo]
    assert np.abs(pixels - 255 * np.array(expected)).max() <= 1  # opacity has 256 levels


def test_a_mask_leaves_what_it_covers_and_pales_the_rest():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    mask, inner = np.zeros(SIZE, dtype=bool), np.zeros(SIZE, dtype=bool)
    mask[2:9, 5:16] = True  # up to the right edge of the picture
    inner[3:8, 6:16] = True
    drawn = np.asarray(mask_overlay(photo, mask))
    assert (drawn[inner] == pixels[inner]).all()
    assert not drawn[mask & ~inner].any()  # the line between
    grey = np.round(160 + 0.35 * np.asarray(photo.convert("L")))
    assert (drawn[~mask] == grey[~mask, None]).all()
    assert mask_overlay(photo, np.ones(SIZE, dtype=bool)) == photo


def assert_readable(picture):
    """RGB, of a size for a page, and not one flat colour."""
    assert picture.mode == "RGB"
    assert all(100 <= side <= 1500 for side in picture.size)
    assert len(picture.getcolors(picture.width * picture.height)) > 10


def test_a_row_grows_with_its_pictures(view):
    one, three = (grid([to_picture(view)] * n, list("abc")[:n], columns=n) for n in (1, 3))
    assert_readable(one)
    assert_readable(three)
    assert three.width == pytest.approx(3 * one.width, abs=3)
    assert three.height == one.height
    square = grid([to_picture(view)] * 3, ["a", "b", "c"], columns=2)  # one place stays empty
    assert_readable(square)
    assert square.width == pytest.approx(2 * one.width, abs=3)
    assert square.height == pytest.approx(2 * one.height, abs=3)


def test_the_picture_of_an_epoch_has_a_row_for_each_picture_of_a_segmenter(classifier, segmenter):
    views, masks = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), [torch.ones(2, 16, 16, dtype=torch.bool)] * 2
    one_row, two_rows = training_frame(classifier, views, "epoch 1"), training_frame(segmenter, views, "epoch 1", masks)
    for frame, columns, rows in ((one_row, 6, 1), (two_rows, 4, 2)):
        assert_readable(frame)
        assert frame.size == grid([frame] * columns * rows, [""] * columns * rows, columns).size


def test_a_saved_picture_is_the_picture(view, tmp_path):
    save_png(to_picture(view), tmp_path / "report" / "view.png")
    assert Image.open(tmp_path / "report" / "view.png").convert("RGB") == to_picture(view)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["view.png"]


def test_pictures_to_explain_are_drawn_at_random_by_a_seed():
    labels = torch.arange(8).repeat_interleave(5)
    assert spread(labels).tolist() == torch.linspace(0, 39, 6).long().tolist()
    for choice, count in (("ten", 10), ("classes", 10)):
        drawn = [spread(labels, choice, seed).tolist() for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]
        assert len(set(drawn[0])) == count
    of_classes = labels[spread(labels, "classes", 3)]
    assert of_classes.unique(return_counts=True)[1].tolist() == [2] * 5
    assert len(spread(labels[:3], "ten")) == 3
    assert len(spread(labels[:3], "classes")) == 2
