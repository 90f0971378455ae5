"""Marks that recur in the pictures of a class at any place: a sticker, a logo, a stamp.

The steepest places of each picture are cut out as patches. A patch of which many pictures of its class have a copy, and
few others, is proposed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.audit.fixed import BATCH, FEWEST, differences
from cvlab.transforms import to_float

SIDE, INNER, SHIFT = 13, 9, 2  # pixels of a patch, of what is compared of it, and by how much it may be moved for that
MARGIN = 3  # pixels around a patch that are painted over too: the mark may be larger
PLACES = 3  # patches of each picture
MOST = 150  # pictures of each class that are searched
ALIKE = 0.85  # correlation of colours from which two patches show the same
RECURS, MORE = 0.3, 0.25  # share of the class that has it at least, and by how much more than of other pictures


@dataclass(frozen=True)
class Patch:
    """A mark that may stand anywhere."""

    class_idx: int  # the class whose pictures have it
    strength: float  # the share of its pictures that have it, less that of others
    pixels: Tensor  # the mark, (3, SIDE, SIDE) in [0, 1]
    natural: Tensor  # a place of another picture of the class as large as the mark, as a control
    kind = "recurring"
    where = "anywhere"

    def has(self, views: Tensor) -> Tensor:
        """Which pictures (N, 3, S, S) uint8 have the mark, (N,) bool."""
        best = [self._likeness(to_float(some)).amax((1, 2)) for some in views.split(BATCH)]
        return torch.cat(best) > ALIKE

    def added(self, images: Tensor, control: bool = False) -> Tensor:
        """Pictures (N, 3, S, S) in [0, 1] with the mark, or as a control with the natural place, at random places."""
        pixels = self.natural if control else self.pixels
        places = _squares(_drawn(images), images.shape[-1]).expand_as(images)
        return images.masked_scatter(places, pixels.expand(len(images), -1, -1, -1))

    def removed(self, images: Tensor, control: bool = False) -> tuple[Tensor, Tensor]:
        """The pictures, and the square of each to be painted over, (N, 1, S, S) bool: the mark, or a random one."""
        corners = _drawn(images) if control else _largest(self._likeness(images))
        square = _squares(corners, images.shape[-1]).float()
        return images, F.max_pool2d(square, 2 * MARGIN + 1, 1, MARGIN) > 0

    def _likeness(self, images: Tensor) -> Tensor:
        """Pearson's r of the mark's middle with each place of pictures, by the corner of the patch there: (N, h, w)."""
        middle = _middle(self.pixels[None], SHIFT, SHIFT).view(1, 3, INNER, INNER)
        mean, square = (F.avg_pool2d(each, INNER, 1).mean(1) for each in (images, images.square()))
        lengths = ((square - mean.square()).clamp(min=1e-6) * middle.numel()).sqrt()
        return (F.conv2d(images, middle)[:, 0] / lengths)[:, SHIFT:-SHIFT, SHIFT:-SHIFT]


def propose(views: Tensor, labels: Tensor, num_classes: int) -> Iterator[Patch]:
    """For each class the patch that recurs most in its pictures (N, 3, S, S) uint8, where it does so often enough."""
    order = torch.randperm(len(views), generator=torch.Generator().manual_seed(0))
    for class_idx in range(num_classes):
        is_own = labels[order] == class_idx
        own, others = order[is_own][:MOST], order[~is_own][:MOST]
        if min(len(own), len(others)) < FEWEST or views.shape[-1] < 2 * SIDE:
            continue
        patches, elsewhere = steepest(views[own]), steepest(views[others])
        alike = _alike(patches, patches).view(-1, len(own), PLACES).amax(2)
        alike.scatter_(1, torch.arange(len(patches))[:, None] // PLACES, 0)  # a patch has a copy in another picture
        inside = (alike > ALIKE).float().mean(1)
        outside = (_alike(patches, elsewhere).view(-1, len(others), PLACES).amax(2) > ALIKE).float().mean(1)
        # Of copies of one mark the one that is most like the others is cut out best.
        best = int((inside - outside + 1e-3 * alike.mean(1)).argmax())
        if inside[best] >= RECURS and inside[best] - outside[best] >= MORE:
            # Patches of one picture do not overlap: beside one with the mark, another has nothing of it.
            like = _alike(patches[best][None], patches)[0].view(-1, PLACES)
            beside = (like.amax(1, keepdim=True) > ALIKE) & (like <= ALIKE)
            natural = patches[int(like.masked_fill(~beside, 2).argmin())]
            yield Patch(class_idx, (inside[best] - outside[best]).item(), patches[best], natural)


def steepest(views: Tensor) -> Tensor:
    """The patches of each picture with the strongest edges that do not overlap: (N * PLACES, 3, SIDE, SIDE) in [0, 1].

    Args:
        views: (N, 3, S, S) uint8.
    """
    energy = torch.cat([F.avg_pool2d(differences(some).square().sum(1), SIDE, 1) for some in views.split(BATCH)])
    each, steps = torch.arange(len(views))[:, None, None], torch.arange(SIDE)
    found = []
    for _ in range(PLACES):
        rows, columns = _largest(energy).T
        at = each, slice(None), (rows[:, None] + steps)[:, :, None], (columns[:, None] + steps)[:, None]
        found.append(to_float(views[at].permute(0, 3, 1, 2)))
        places = torch.arange(energy.shape[-1])
        near = ((places - rows[:, None]).abs() < SIDE)[:, :, None] & ((places - columns[:, None]).abs() < SIDE)[:, None]
        energy = energy.masked_fill(near, -1)
    return torch.stack(found, 1).flatten(0, 1)


def _largest(values: Tensor) -> Tensor:
    """Row and column of the largest of each (N, h, w): (N, 2)."""
    flat = values.flatten(1).argmax(1)
    return torch.stack([flat // values.shape[-1], flat % values.shape[-1]], 1)


def _drawn(images: Tensor) -> Tensor:
    """Corners of patches at random, (N, 2); for equal numbers of pictures the same ones."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(images.shape[-1] - SIDE + 1, (len(images), 2), generator=draw)


def _squares(corners: Tensor, side: int) -> Tensor:
    """The patches with these corners (N, 2) in pictures of a side: (N, 1, side, side) bool."""
    inside = (torch.arange(side) >= corners[..., None]) & (torch.arange(side) < corners[..., None] + SIDE)
    return inside[:, None, 0, :, None] & inside[:, None, 1, None]


def _middle(patches: Tensor, down: int, across: int) -> Tensor:
    """INNER x INNER pixels of patches (K, 3, SIDE, SIDE) as vectors of mean 0 and length 1, (K, 3 * INNER**2)."""
    rows = patches[..., down : down + INNER, across : across + INNER].flatten(1)
    return F.normalize(rows - rows.mean(1, keepdim=True), dim=1)


def _alike(patches: Tensor, others: Tensor) -> Tensor:
    """Pearson's r of the middle of each patch with each of the others, moved so that they agree most: (K, M)."""
    middle, best = _middle(patches, SHIFT, SHIFT), torch.full((len(patches), len(others)), -1.0)
    for down in range(2 * SHIFT + 1):
        for across in range(2 * SHIFT + 1):
            best = torch.maximum(best, middle @ _middle(others, down, across).T)
    return best
