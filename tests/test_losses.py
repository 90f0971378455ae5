"""Losses against closed forms on small tensors, and against torchvision."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from cvlab.learning.losses import SEGMENTATION_LOSSES, bce, cross_entropy, dice, focal

SURE = 40.0  # sigmoid(40) is 1 in float32


def mask_of(*rows: str) -> Tensor:
    """(1, 1, H, W) bool: "#" is foreground."""
    return torch.tensor([[[[pixel == "#" for pixel in row] for row in rows]]])


def as_logits(masks: Tensor) -> Tensor:
    return SURE * (2 * masks.float() - 1)


TOP = mask_of("####", "####", "....", "....")
LEFT = mask_of("##..", "##..", "##..", "##..")
NOTHING = mask_of("....", "....", "....", "....")


def random_pair(channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4, channels, 5, 6, generator=generator, dtype=torch.float64)
    return logits, torch.rand(logits.shape, generator=generator) < 0.4


def test_bce_of_logits_0_is_ln_2() -> None:
    assert bce(torch.zeros(1, 1, 4, 4), TOP).item() == pytest.approx(math.log(2))
    assert bce(torch.zeros(2, 3, 4, 4), TOP.expand(2, 3, 4, 4)).item() == pytest.approx(math.log(2))


def test_bce_by_hand() -> None:
    """-ln of the probability of what is true, mean over pixels."""
    logits = torch.tensor([[[[2.0, -1.0]]]])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert bce(logits, torch.tensor([[[[True, True]]]])).item() == pytest.approx(expected)
    # A sure error costs its logit.
    assert bce(as_logits(~TOP), TOP).item() == pytest.approx(SURE)


def test_dice_of_right_and_wrong_and_empty_masks() -> None:
    assert dice(as_logits(TOP), TOP).item() == pytest.approx(0, abs=1e-6)
    assert dice(as_logits(NOTHING), NOTHING).item() == pytest.approx(0, abs=1e-6)
    assert dice(as_logits(~TOP), TOP).item() == pytest.approx(1 - 1 / 17)  # no overlap, 8 + 8 pixels, smooth = 1
    assert dice(as_logits(TOP), NOTHING).item() == pytest.approx(1 - 1 / 9)


def test_dice_of_half_an_overlap() -> None:
    """The top and the left half share 4 of 8 pixels: 1 - (2 * 4 + smooth) / (8 + 8 + smooth)."""
    assert dice(as_logits(TOP), LEFT).item() == pytest.approx(1 - 9 / 17)
    assert dice(as_logits(TOP), LEFT, smooth=0).item() == pytest.approx(1 / 2)
    # Undecided everywhere, 16 probabilities of 1/2 share 4 with the mask.
    assert dice(torch.zeros(1, 1, 4, 4), TOP).item() == pytest.approx(1 - 9 / 17)


def test_dice_is_of_each_image_and_channel() -> None:
    """Not of all pixels together, where a large mask would outweigh a small one."""
    logits = torch.cat([as_logits(TOP), as_logits(NOTHING), as_logits(TOP)])
    masks = torch.cat([TOP, TOP, LEFT])
    expected = (0 + (1 - 1 / 9) + (1 - 9 / 17)) / 3
    assert dice(logits, masks).item() == pytest.approx(expected, abs=1e-6)
    assert dice(logits.view(1, 3, 4, 4), masks.view(1, 3, 4, 4)).item() == pytest.approx(expected, abs=1e-6)


def test_focal_without_focus_is_half_the_cross_entropy() -> None:
    logits, masks = random_pair()
    torch.testing.assert_close(focal(logits, masks, gamma=0, alpha=0.5), bce(logits, masks) / 2)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.75), (1.5, 0.5)])
def test_focal_is_torchvisions(gamma: float, alpha: float) -> None:
    logits, masks = random_pair()
    expected = sigmoid_focal_loss(logits, masks.double(), alpha=alpha, gamma=gamma, reduction="mean")
    torch.testing.assert_close(focal(logits, masks, gamma, alpha), expected)


def test_focal_of_an_undecided_pixel() -> None:
    """alpha (1 - 1/2)^2 ln 2 where there is something, (1 - alpha) of it where there is nothing."""
    assert focal(torch.zeros(1, 1, 4, 4), TOP | ~TOP).item() == pytest.approx(0.25 * 0.25 * math.log(2))
    assert focal(torch.zeros(1, 1, 4, 4), NOTHING).item() == pytest.approx(0.75 * 0.25 * math.log(2))


def test_the_sum_of_two() -> None:
    logits, masks = random_pair()
    torch.testing.assert_close(SEGMENTATION_LOSSES["bce+dice"](logits, masks), bce(logits, masks) + dice(logits, masks))


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_channels_count_equally(name: str) -> None:
    logits, masks = random_pair(channels=3)
    criterion = SEGMENTATION_LOSSES[name]
    each = torch.stack([criterion(logits[:, c : c + 1], masks[:, c : c + 1]) for c in range(3)])
    torch.testing.assert_close(criterion(logits, masks), each.mean())


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_losses_fall_along_their_gradient(name: str) -> None:
    logits, masks = random_pair()
    logits.requires_grad_()
    loss = SEGMENTATION_LOSSES[name](logits, masks)
    loss.backward()
    assert SEGMENTATION_LOSSES[name](logits - 0.1 * logits.grad, masks) < loss


@pytest.mark.parametrize("size", [50.0, 1000.0])
@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_gradients_are_finite_at_extreme_logits(name: str, size: float) -> None:
    for right in (1, -1):
        for masks in (TOP, NOTHING):
            logits = (right * size * (2 * masks.float() - 1)).requires_grad_()
            loss = SEGMENTATION_LOSSES[name](logits, masks)
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(logits.grad).all()


def test_class_weights_by_hand() -> None:
    """120, 24 and 6 of 150: 150 / (3 * 120) and so on. A class of which there is none cannot divide by zero."""
    for labels, expected in (([0] * 120 + [1] * 24 + [2] * 6, [5 / 12, 25 / 12, 25 / 3]), ([0, 0, 0], [0.5, 1.5])):
        loss, n = cross_entropy(0.0, "balanced", torch.tensor(labels), len(expected)), len(expected)
        weights = [loss(torch.zeros(1, n), torch.tensor([i])).item() / math.log(n) for i in range(n)]
        assert weights == pytest.approx(expected)


def test_weighted_cross_entropy_by_hand() -> None:
    """Uniform logits lose log 2 an image: 3 images of weight 2/3 and one of weight 2, as indices and as targets."""
    labels, logits = torch.tensor([0, 0, 0, 1]), torch.zeros(4, 2)
    loss = cross_entropy(0.0, "balanced", labels, 2)
    targets = torch.nn.functional.one_hot(labels).float()
    assert loss(logits, labels).item() == loss(logits, targets).item() == pytest.approx(math.log(2))
    assert loss(logits[:3], labels[:3]).item() == pytest.approx(2 / 3 * math.log(2))
    assert loss(logits[3:], labels[3:]).item() == pytest.approx(2 * math.log(2))
    assert cross_entropy(0.0, "none", labels, 2)(logits[3:], labels[3:]).item() == pytest.approx(math.log(2))
