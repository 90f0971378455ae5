"""Regions that a user selects, as boolean tensors (H, W) for `cvlab.explain.region_score`.

Coordinates are pixels of the view that the network saw: x to the right and y down, (0, 0) is the pixel at the top left.
An empty region raises a ValueError that says why. `against(region_score(region))` asks for the background.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = np.ones((3, 3))  # 8: pixels that touch by a side or a corner belong together


def whole(mask: Tensor) -> Tensor:
    """The mask itself, (H, W) bool; ValueError if it is empty."""
    return _with_pixels(mask, "the mask is empty: the model found nothing here")


def component(mask: Tensor, x: int, y: int) -> Tensor:
    """The connected part of a mask (H, W) under a click; pixels that touch by a side or a corner are connected.

    Raises:
        ValueError: the click is outside the view, or not on the mask.
    """
    _check_inside(mask.shape, x, y)
    if not mask[y, x]:
        raise ValueError(f"there is no mask at x {x}, y {y}: click on something that the model found")
    from scipy import ndimage  # imported here: the page starts without scipy

    parts, _ = ndimage.label(mask.cpu().numpy(), NEIGHBOURS)
    return torch.from_numpy(parts == parts[y, x])


def pixel(size: Sequence[int], x: int, y: int) -> Tensor:
    """A single pixel of a view of `size` (H, W); ValueError if it is outside."""
    _check_inside(size, x, y)
    return box(size, (x, y), (x, y))


def box(size: Sequence[int], first: tuple[int, int], second: tuple[int, int]) -> Tensor:
    """The pixels between two opposite corners (x, y), both included; ValueError if none of them is in the view."""
    left, right = sorted((first[0], second[0]))
    top, bottom = sorted((first[1], second[1]))
    region = torch.zeros(tuple(size), dtype=torch.bool)
    region[max(top, 0) : max(bottom + 1, 0), max(left, 0) : max(right + 1, 0)] = True
    return _with_pixels(region, "the box lies outside the picture")


def false_positives(predicted: Tensor, true: Tensor) -> Tensor:
    """Pixels that were predicted and are not in the true mask, both (H, W) bool; ValueError if there are none."""
    return _with_pixels(predicted & ~true, "there is no false positive: the whole predicted mask is in the true mask")


def false_negatives(predicted: Tensor, true: Tensor) -> Tensor:
    """Pixels of the true mask that were not predicted; arguments and errors as in `false_positives`."""
    return _with_pixels(true & ~predicted, "there is no false negative: the whole true mask was predicted")


def in_words(region: Tensor) -> str:
    """Where the pixels of a region (H, W), one at least, lie in the picture: "at the upper left"."""
    ys, xs = ((each + 0.5) / side for each, side in zip(region.nonzero(as_tuple=True), region.shape, strict=True))
    if torch.hypot(xs.std(correction=0), ys.std(correction=0)) > 0.25:  # one round spot of a tenth has 0.13
        return "at several places"
    y, x = ys.mean(), xs.mean()
    row = "upper" if y < 0.36 else "lower" if y > 0.64 else ""
    column = "left" if x < 0.36 else "right" if x > 0.64 else ""
    if row and column:
        return f"at the {row} {column}"
    if row:
        return "above the middle" if row == "upper" else "below the middle"
    return f"{column} of the middle" if column else "at the middle"


def _with_pixels(region: Tensor, message: str) -> Tensor:
    if not region.any():
        raise ValueError(message)
    return region


def _check_inside(size: Sequence[int], x: int, y: int) -> None:
    if not (0 <= x < size[1] and 0 <= y < size[0]):
        raise ValueError(f"x {x}, y {y} is outside the picture of {size[1]} x {size[0]} pixels")
