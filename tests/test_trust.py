"""cvlab.trust: what is hidden, and that verdicts follow evidence whose place is known."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cvlab.trust import hide, hottest_part, judge

ROOT = Path(__file__).resolve().parents[1]


class Brightness(nn.Module):
    """Class 0 (or the mask, everywhere) is as likely as the top left quarter is bright."""

    class_names, threshold, image_size = ("bright", "dark"), 0.5, 32

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task, self.stages = task, {}

    def forward(self, images: Tensor) -> Tensor:
        mean = images[:, :, :16, :16].mean((1, 2, 3))
        if self.task == "classification":
            return torch.stack([8 * mean - 4, 4 - 8 * mean], 1)
        return (8 * mean - 4)[:, None, None, None].expand(-1, 1, 32, 32)


def bright_quarter() -> Tensor:
    images = torch.full((1, 3, 32, 32), 0.2)
    images[:, :, 2:14, 2:14] = 1.0
    return images


def square(rows: slice, columns: slice, size: int = 32) -> Tensor:
    region = torch.zeros(1, 1, size, size)
    region[:, :, rows, columns] = 1.0
    return region


def test_hidden_pixels_take_the_colours_around_them() -> None:
    """A patch on one colour vanishes without a trace; all that is visible stays to the bit."""
    plain = torch.tensor([0.2, 0.5, 0.9]).reshape(1, 3, 1, 1).expand(1, 3, 37, 50)
    patched = plain.clone()
    patched[:, :, 5:30, 10:35] = torch.rand(1, 3, 25, 25, generator=torch.Generator().manual_seed(0))
    region = (patched != plain).any(1, keepdim=True)
    torch.testing.assert_close(hide(patched, region), plain)
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    region = square(slice(20, 30), slice(40, 60), 64).bool().expand(2, -1, -1, -1)
    grown = square(slice(19, 31), slice(39, 61), 64).bool().expand(2, 3, -1, -1)
    assert torch.equal(hide(noise, region)[~grown], noise[~grown])


def test_a_picture_of_which_nothing_is_left_is_its_mean_colour() -> None:
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    hidden = hide(noise, torch.ones(1, 1, 16, 16, dtype=torch.bool))
    torch.testing.assert_close(hidden, noise.mean((2, 3), keepdim=True).expand_as(noise))
    assert torch.equal(hide(noise, torch.zeros(1, 1, 16, 16, dtype=torch.bool)), noise)


def test_the_hottest_part_has_the_area_that_was_asked_for_and_never_cold_pixels() -> None:
    heat = torch.arange(100.0).reshape(1, 1, 10, 10)
    assert hottest_part(heat, 0.1).nonzero().tolist() == [[9, column] for column in range(10)]
    assert hottest_part(square(slice(0, 1), slice(0, 3)), 0.1).sum() == 3
    with pytest.raises(ValueError, match="nothing to hide"):
        hottest_part(torch.zeros(1, 1, 10, 10), 0.1)


def test_a_map_that_is_the_same_everywhere_has_no_hottest_part() -> None:
    """Any tenth of it would be an arbitrary one."""
    with pytest.raises(ValueError, match="same everywhere"):
        hottest_part(torch.full((1, 1, 4, 4), 0.7), 0.1)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_map_of_what_decides_is_believable_and_its_opposite_is_not(task: str) -> None:
    """Class 0 is the brightness of the top left quarter, so its importance is known: there, and nowhere else."""
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.4
    images = noise + bright_quarter() * 0.6
    right, wrong = square(slice(0, 16), slice(0, 16)), square(slice(16, 32), slice(16, 32))
    found = judge(Brightness(task), images, {"right": right, "wrong": wrong, "flat": right * 0 + 1})
    assert [each.level for each in found.values()] == ["believable", "not believable", "doubtful"]
    assert judge(Brightness(task), images, right) == found["right"]
