"""Marks that stand in one place in many pictures of a class: a watermark, a corner mark, a frame, a line of text.

Such a mark has edges where other pictures have none. `propose` compares the colour differences between neighbouring
pixels of one class with those of all others, by Welch's t at every pixel.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.explain.regions import in_words
from cvlab.transforms import to_float

BATCH = 256
FEWEST = 20  # pictures with the mark, and without it
CANDIDATE, MARKED = 7.0, 5.0  # t of a mark's strongest edge, and of its others; nature stays below the first
NOISE = 1e-6  # added to variances: in drawn pictures some are 0
HOLE = 0.1  # of the picture: a smaller hole in a mark belongs to it; the inside of a frame does not
ENOUGH = 500  # pictures for a mean
PRESENT = 0.5  # of the mark's mean edges: a picture with more of them has it
OPAQUE = 0.15  # of the picture's contrast: what shows less of it cannot be restored, and is painted over


@dataclass(frozen=True)
class FixedMark:
    """A mark in one place. It is a matte: a marked pixel is `keep` times what was there, plus `light`."""

    class_idx: int  # the class whose pictures have it
    strength: float  # t of its strongest edge
    region: Tensor  # where it stands, (S, S) bool
    edges: Tensor  # its mean differences, (6, S, S), as in `differences`
    keep: Tensor  # (3, S, S)
    light: Tensor  # (3, S, S)
    kind = "fixed in place"

    @property
    def where(self) -> str:
        """Where it stands, in words."""
        return in_words(self.region)

    def has(self, views: Tensor) -> Tensor:
        """Which pictures (N, 3, S, S) uint8 have the mark, (N,) bool."""
        return _have(views, self.edges)

    def added(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, S, S) in [0, 1] with the mark drawn in."""
        return torch.where(self.region, self.keep * images + self.light, images).clamp(0, 1)

    def removed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The mark taken off pictures, and where it hid too much, (N, 1, H, W) bool, which is to be painted over.

        The pictures (N, 3, H, W) in [0, 1] may be of another size than the view.
        """
        region, keep, light = (_resized(each, images) for each in (self.region[None].float(), self.keep, self.light))
        hidden = (region > 0) & (keep.amin(0) < OPAQUE)
        restored = torch.where((region > 0) & ~hidden, (images - light) / keep.clamp(min=OPAQUE), images).clamp(0, 1)
        return restored, hidden.expand(len(images), 1, -1, -1)


def differences(views: Tensor) -> Tensor:
    """Of each pixel the difference from it to its right and to its lower neighbour: (N, 6, S, S).

    Args:
        views: (N, 3, S, S) uint8.
    """
    images = to_float(views)
    return torch.cat([F.pad(images.diff(dim=3), (0, 1)), F.pad(images.diff(dim=2), (0, 0, 0, 1))], 1)


def propose(views: Tensor, labels: Tensor, num_classes: int) -> Iterator[FixedMark]:
    """A mark for each class whose pictures (N, 3, S, S) uint8 have unusual edges in one place."""
    count = torch.bincount(labels, minlength=num_classes).float().view(-1, 1, 1, 1)
    sums = torch.zeros(2, num_classes, 6, *views.shape[-2:])
    for some, of in zip(views.split(BATCH), labels.split(BATCH), strict=True):
        found = differences(some)
        sums[0].index_add_(0, of, found)
        sums[1].index_add_(0, of, found.square())
    total = sums.sum(1)
    for class_idx in (count.flatten() >= FEWEST).nonzero().flatten().tolist():
        n, rest = count[class_idx], len(views) - count[class_idx]
        if rest < FEWEST:
            continue
        mean, of_rest = sums[0, class_idx] / n, (total[0] - sums[0, class_idx]) / rest
        spread = (sums[1, class_idx] / n - mean.square()) / n
        spread += ((total[1] - sums[1, class_idx]) / rest - of_rest.square()) / rest
        t = (mean - of_rest).abs() / (spread.clamp(min=0) + NOISE / n + NOISE / rest).sqrt()
        t *= mean.abs() > of_rest.abs()  # else the mark is in the other classes
        if t.max() >= CANDIDATE:
            region = _closed(t.amax(0) > MARKED)
            mark = _matte(views, labels == class_idx, region, (mean - of_rest) * region)
            if mark:
                yield FixedMark(class_idx, t.max().item(), region, (mean - of_rest) * region, *mark)


def _resized(each: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(each[None], images.shape[-2:], mode="bilinear")[0]


def _have(views: Tensor, edges: Tensor) -> Tensor:
    """Which pictures have these edges: their own projected on them, 1 for a mark and 0 without it, is over PRESENT."""
    along = torch.cat([(differences(some) * edges).sum((1, 2, 3)) for some in views.split(BATCH)])
    return along > PRESENT * edges.square().sum()


def _closed(strong: Tensor) -> Tensor:
    """Strong edges (S, S) as an area: gaps closed, small holes filled, and one pixel around."""
    from scipy import ndimage  # imported here: the page starts without scipy

    padded = np.pad(strong.numpy(), 2)
    area = ndimage.binary_dilation(ndimage.binary_closing(padded, np.ones((5, 5))), np.ones((3, 3)))[2:-2, 2:-2]
    holes, _ = ndimage.label(~area)
    small = np.bincount(holes.flatten()) < HOLE * area.size
    return torch.from_numpy(area | small[holes])


def _matte(views: Tensor, own: Tensor, region: Tensor, edges: Tensor) -> tuple[Tensor, Tensor] | None:
    """`keep` and `light` from the pictures that have the mark and those that do not; None where one kind is rare.

    Pictures of the same class are compared where enough are without it: others differ in more than the mark.
    """
    marked = _have(views, edges)
    bare = ~marked & own if (~marked & own).sum() >= FEWEST else ~marked
    marked &= own
    if min(marked.sum(), bare.sum()) < FEWEST:
        return None
    (spread, mean), (of_bare, mean_of_bare) = (
        torch.std_mean(to_float(views[rows][:ENOUGH]), 0) for rows in (marked, bare)
    )
    keep = torch.where(region, spread / of_bare.clamp(min=1e-3), 1).clamp(0, 1)
    return keep, torch.where(region, mean - keep * mean_of_bare, 0)
