"""Scenes are what their seed says, and their mask is the evidence of their label."""

import numpy as np
import pytest
from scipy import ndimage

from cvlab.data.shapes import CLASS_NAMES, Scene, scene

SEEDS = 300


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(seed, 48) for seed in range(SEEDS)]


def test_a_scene_depends_on_its_seed_alone() -> None:
    first = scene(5)
    np.random.seed(3)
    again, other = scene(5), scene(6)
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert np.array_equal(first.mask, again.mask)
    assert first.label == again.label
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))


def test_pictures_masks_and_labels_fit_together(scenes: list[Scene]) -> None:
    for each in scenes:
        assert each.image.mode == "RGB"
        assert each.image.size == (48, 48)
        assert each.mask.shape == (48, 48)
        assert each.mask.dtype == bool


def test_every_label_occurs_about_equally_often(scenes: list[Scene]) -> None:
    counts = np.bincount([each.label for each in scenes], minlength=len(CLASS_NAMES))
    assert len(counts) == len(CLASS_NAMES)
    share = SEEDS / len(CLASS_NAMES)
    assert (np.abs(counts - share) < 4 * np.sqrt(share)).all()


def test_the_evidence_is_visible(scenes: list[Scene]) -> None:
    areas = np.array([each.mask.mean() for each in scenes])
    assert (areas > 0.01).mean() >= 0.99
    assert areas.max() < 0.6  # and it is not the whole picture


def step_across_outline(each: Scene, mask: np.ndarray) -> float:
    """Mean difference of neighbours of which one is in the mask."""
    steps = np.abs(np.diff(np.asarray(each.image, float), axis=1)).mean(axis=-1)
    return steps[mask[:, 1:] != mask[:, :-1]].mean()


def test_the_mask_lies_on_the_shapes_that_are_drawn(scenes: list[Scene]) -> None:
    """The picture changes at the mask's outline, and not where the outline is mirrored, turned or two pixels off."""
    there = np.mean([step_across_outline(each, each.mask) for each in scenes])
    for move in (np.fliplr, np.flipud, np.transpose, lambda mask: np.roll(mask, 2, axis=1)):
        assert there > 3 * np.mean([step_across_outline(each, move(each.mask)) for each in scenes])


def test_the_mask_holds_one_or_two_shapes(scenes: list[Scene]) -> None:
    larger_parts = []
    for each in scenes:
        parts, _ = ndimage.label(each.mask)
        areas = np.bincount(parts.ravel())[1:]
        larger_parts.append((areas > 0.4 * areas.max()).sum())
    assert 0.3 < np.mean(np.array(larger_parts) == 2) < 0.7  # half of them, less those that overlap, and cut ones
    assert np.mean(np.array(larger_parts) > 2) < 0.05


def test_what_a_distractor_covers_is_no_evidence(scenes: list[Scene]) -> None:
    """One or two convex shapes together have no hole: a hole in their mask is what lies over them."""
    convex = [each.mask for each in scenes if CLASS_NAMES[each.label] in ("circle", "square", "triangle")]
    assert sum((ndimage.binary_fill_holes(mask) & ~mask).sum() > 5 for mask in convex) >= 5


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_shows_the_same_scene_at_every_size(seed: int) -> None:
    small, large = scene(seed, 64), scene(seed, 128)
    assert small.label == large.label
    reduced = large.mask.reshape(64, 2, 64, 2).mean(axis=(1, 3)) > 0.5
    assert (reduced & small.mask).sum() / (reduced | small.mask).sum() > 0.85
    pixels = np.asarray(large.image, float).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(pixels - np.asarray(small.image)).mean() < 10  # of 255; two other scenes differ by about 60


def test_the_label_cannot_be_read_off_where_or_how_large_the_evidence_is(scenes: list[Scene]) -> None:
    """Means of each class against those of all: what is left to tell the classes is their shape."""
    y, x = np.mgrid[:48, :48] / 48
    positions = np.array([[x[each.mask].mean(), y[each.mask].mean()] for each in scenes if each.mask.any()])
    labels = np.array([each.label for each in scenes if each.mask.any()])
    error = positions.std(0) / np.sqrt(SEEDS / len(CLASS_NAMES))
    for label in range(len(CLASS_NAMES)):
        assert (np.abs(positions[labels == label].mean(0) - positions.mean(0)) < 4 * error).all()


def test_a_scene_is_drawn_again_without_an_object(scenes: list[Scene]) -> None:
    """What does not show the object stays as it was, to the last bit; what it covered is seen."""
    for seed in range(20):
        whole = scenes[seed]
        for number, pixels in enumerate(whole.objects):
            again = scene(seed, 48, without=[number])
            changed = (np.asarray(again.image) != np.asarray(whole.image)).any(-1)
            # Tips are thinner than a pixel and belong to no object.
            assert (changed & ~ndimage.binary_dilation(pixels, iterations=2)).sum() <= 5
            assert not pixels.any() or changed[pixels].mean() > 0.9
            assert not again.objects[number].any()
            others = np.arange(len(whole.objects)) != number
            assert (again.objects[others] | ~whole.objects[others]).all()  # at least as visible as before
            assert again.label == whole.label


def test_objects_and_mask_fit_together(scenes: list[Scene]) -> None:
    for each in scenes[:50]:
        assert (each.objects.sum(0) <= 1).all()  # a pixel shows one object
        inside = [(pixels & each.mask).any() for pixels in each.objects]
        shown = each.objects[inside].any(0)
        assert np.array_equal(shown, each.mask)
