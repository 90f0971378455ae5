"""The audit: planted marks are found where they are, and what a hand-made model makes of them is measured."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cvlab.audit import fixed, patches
from cvlab.audit.labels import odd_labels
from cvlab.audit.prove import prove, without
from cvlab.models import Model

SIDE, EACH = 32, 80  # pixels; pictures of each of three classes
CORNER = torch.zeros(SIDE, SIDE, dtype=torch.bool)
CORNER[2:9, 3:11] = True


def blobs(seed: int, count: int = 3 * EACH) -> torch.Tensor:
    """Smooth random colours, (count, 3, SIDE, SIDE) in [0, 1], with a little noise."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=draw)
    smooth = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic")
    return (smooth + 0.02 * torch.randn(smooth.shape, generator=draw)).clamp(0, 1)


def as_views(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().to(torch.uint8)


def with_corner(images: torch.Tensor, opacity: float) -> torch.Tensor:
    """A red rectangle of some opacity."""
    red = torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1)
    return torch.where(CORNER, (1 - opacity) * images + opacity * red, images)


@pytest.fixture(params=[1.0, 0.5], ids=["opaque", "half-transparent"])
def planted(request):
    """Views, labels, the same pictures bare, and which have the mark: 0.8 of class 1, 0.1 of the others."""
    bare, labels = blobs(0), torch.arange(3).repeat(EACH)
    share = torch.where(labels == 1, 0.8, 0.1)
    has = torch.rand(len(bare), generator=torch.Generator().manual_seed(1)) < share
    images = torch.where(has.view(-1, 1, 1, 1), with_corner(bare, request.param), bare)
    return as_views(images), labels, bare, has, request.param


def test_a_fixed_mark_is_found_with_its_class_place_and_pictures(planted):
    views, labels, _, has, _ = planted
    (mark,) = fixed.propose(views, labels, 3)
    assert mark.class_idx == 1
    assert (mark.region & CORNER).sum() == CORNER.sum()
    assert mark.region.sum() < 2 * CORNER.sum()
    assert mark.where == "at the upper left"
    assert (mark.has(views) == has).float().mean() > 0.98
    assert (mark.lacks(views) == ~has).float().mean() > 0.98


def test_the_matte_of_a_fixed_mark_draws_it_in_and_takes_it_off(planted):
    views, labels, _, _, opacity = planted
    (mark,) = fixed.propose(views, labels, 3)
    assert mark.keep[:, 4:8, 5:9].mean().item() == pytest.approx(1 - opacity, abs=0.15)
    others = blobs(5, 40)
    drawn = with_corner(others, opacity)
    assert (mark.added(others) - drawn).abs()[:, :, CORNER].mean() < 0.05
    taken = without(mark, drawn)
    assert (taken - others).abs()[:, :, CORNER].mean() < (0.1 if opacity < 1 else 0.2)
    assert torch.equal(taken[:, :, SIDE // 2 :], drawn[:, :, SIDE // 2 :])


def test_the_mark_of_other_classes_is_not_blamed_on_the_one_without_it():
    images, labels = blobs(2), torch.arange(3).repeat(EACH)
    marked = torch.where((labels != 0).view(-1, 1, 1, 1), with_corner(images, 1.0), images)
    assert all(mark.class_idx != 0 for mark in fixed.propose(as_views(marked), labels, 3))


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_proposed_without_a_mark(seed):
    views, labels = as_views(blobs(seed + 10)), torch.arange(3).repeat(EACH)
    assert not list(fixed.propose(views, labels, 3))
    assert not list(patches.propose(views, labels, 3))


def cross() -> torch.Tensor:
    """A sticker: a yellow square with a blue cross, (3, 15, 15)."""
    pixels = torch.tensor([0.9, 0.8, 0.1]).view(3, 1, 1).expand(3, 15, 15).clone()
    pixels[:, 6:9, 2:13] = pixels[:, 2:13, 6:9] = torch.tensor([0.1, 0.1, 0.7]).view(3, 1, 1)
    return pixels


def stuck(images: torch.Tensor, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """The sticker at random places, and the corners of these."""
    corners = np.random.default_rng(seed).integers(0, SIDE - 15, (len(images), 2))
    images = images.clone()
    for image, (y, x) in zip(images, corners, strict=True):
        image[:, y : y + 15, x : x + 15] = cross()
    return images, corners


def test_a_mark_at_random_places_is_found_and_hidden_where_it_is():
    bare, labels = blobs(3), torch.arange(3).repeat(EACH)
    images, corners = stuck(bare, 0)
    has = (labels == 2) & (torch.arange(len(labels)) % 4 > 0)
    images = torch.where(has.view(-1, 1, 1, 1), images, bare)
    (mark,) = patches.propose(as_views(images), labels, 3)
    assert mark.class_idx == 2
    assert (mark.has(as_views(images)) == has).float().mean() > 0.95
    assert mark.lacks(as_views(images))[~has].float().mean() > 0.95
    _, hidden = mark.removed(images[has])
    for square, (y, x) in zip(hidden[:, 0], corners[has.numpy()], strict=True):
        assert square[y + 2 : y + 13, x + 2 : x + 13].float().mean() > 0.9
        assert square.sum() <= (patches.SIDE + 2 * patches.MARGIN) ** 2
    drawn = mark.added(bare[:20])
    assert ((drawn != bare[:20]).any(1).flatten(1).sum(1) <= patches.SIDE**2).all()
    assert mark.has(as_views(drawn)).all()


def test_likeness_is_the_correlation_with_the_pixels_at_a_place():
    pixels, images = torch.rand(3, 13, 13), torch.rand(2, 3, 40, 40)
    mark = patches.Patch(0, 1.0, pixels, pixels)
    found = mark._likeness(images)
    assert found.shape == (2, 28, 28)
    for i, y, x in ((0, 0, 0), (1, 27, 5), (0, 11, 27)):
        here = images[i, :, y + 2 : y + 11, x + 2 : x + 11].flatten().numpy()
        assert found[i, y, x].item() == pytest.approx(
            np.corrcoef(here, pixels[:, 2:11, 2:11].flatten())[0, 1], abs=1e-3
        )


class Reader(Model):
    """Two classes; class 1 gets `weight` times the mean red of the corner less its mean green."""

    task = "classification"

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.class_names, self.image_size, self.weight = ["a", "b"], SIDE, weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red, green = images[:, 0, CORNER].mean(1), images[:, 1, CORNER].mean(1)
        return torch.stack([torch.zeros(len(images)), self.weight * (red - green)], 1)


@pytest.mark.parametrize(
    ("weight", "level"), [(6.0, "used"), (0.0, "there but not used"), (-6.0, "there but not used")]
)
def test_a_mark_is_used_if_taking_it_out_or_putting_it_in_moves_the_answer(planted, weight, level):
    views, labels, _, _, opacity = planted
    (mark,) = fixed.propose(views, labels, 3)
    bare, model = blobs(7), Reader(weight)
    own = labels == 1
    held = as_views(torch.where(own.view(-1, 1, 1, 1), with_corner(bare, opacity), bare))
    proof = prove(model, mark, held, labels, tried=2)
    assert proof.level == level
    assert proof.marked == own.nonzero().flatten().tolist()
    true = model(with_corner(bare, opacity)).softmax(1)[:, 1] - model(bare).softmax(1)[:, 1]
    assert proof.added["value"] == pytest.approx(true[~own].mean().item(), abs=0.03)
    if opacity < 1:  # what an opaque mark hid cannot be known
        assert proof.removed["value"] == pytest.approx(true[own].mean().item(), abs=0.05)


def test_the_more_marks_are_tried_the_wider_are_the_bounds(planted):
    views, labels, *_ = planted
    (mark,) = fixed.propose(views, labels, 3)
    one, ten = (prove(Reader(6.0), mark, views, labels, tried).added for tried in (1, 10))
    assert one["value"] == ten["value"]
    # z of 0.975 and of 0.9975
    assert (ten["high"] - ten["value"]) / (one["high"] - one["value"]) == pytest.approx(2.8070 / 1.9600, abs=1e-3)


def test_swapped_labels_come_first():
    draw = torch.Generator().manual_seed(0)
    centres, labels = 3 * torch.randn(4, 8, generator=draw), torch.arange(4).repeat(100)
    features = centres[labels] + torch.randn(400, 8, generator=draw)
    swapped = torch.randperm(400, generator=draw)[:20].tolist()
    given = labels.clone()
    given[swapped] = (given[swapped] + 1) % 4
    found = odd_labels(features, given)
    first = found[:20]
    assert len({row for row, _ in first} & set(swapped)) >= 18
    right = [likely == labels[row] for row, likely in first if row in swapped]
    assert sum(right) >= 0.8 * len(right)


def test_classes_of_few_pictures_are_not_doubted():
    assert odd_labels(torch.rand(9, 4), [0] * 6 + [1] * 3) == []
