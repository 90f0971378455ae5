"""Photos cut into square tiles that overlap, and what a segmenter says of a photo put together from its tiles."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby

import torch
from torch import Tensor

SHIFT = 0.75  # of a tile's side: the next one begins there at the latest


class Tiles(Sequence[Tensor]):
    """The tiles of many photos, one after the other. A photo of the size of a tile is one tile: itself.

    Args:
        photos: (C, H, W) each, of any sizes from `side` on.
        side: of a tile, pixels.
    """

    def __init__(self, photos: Sequence[Tensor], side: int) -> None:
        self.photos, self.side = photos, side
        self.places = [
            (i, top, left)
            for i, photo in enumerate(photos)
            for top in starts(photo.shape[-2], side)
            for left in starts(photo.shape[-1], side)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        i, top, left = self.places[index]
        return window(self.photos[i], top, left, self.side)

    def middles(self, count: int) -> Tensor:
        """The squares in the middle of the first photos, (n, C, S, S)."""
        return torch.stack([middle(photo, self.side) for photo in self.photos[:count]])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Tiles":
        """The same on a device."""
        return Tiles([photo.to(device, non_blocking=non_blocking) for photo in self.photos], self.side)

    def join(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The logits of each photo, (1, C, H, W), from those of all tiles in order, in batches (n, C, S, S).

        Where tiles overlap it is their mean, weighted by `weights`: the edge of a tile knows little of what is beyond.
        """
        logits, weight = chain.from_iterable(batches), weights(self.side)
        for i, places in groupby(self.places, key=lambda place: place[0]):
            whole = total = None
            for _, top, left in places:
                tile, size = next(logits), self.photos[i].shape[-2:]
                if tile.shape[-2:] == size:  # a single one, which stays as it is
                    whole, total = tile, torch.ones(())
                    continue
                if whole is None:
                    whole, total = tile.new_zeros(len(tile), *size), tile.new_zeros(size)
                window(whole, top, left, self.side).add_(tile * weight)
                window(total, top, left, self.side).add_(weight)
            yield (whole / total)[None]


def starts(length: int, side: int) -> list[int]:
    """Where tiles begin along a photo: evenly, as few as cover it and overlap by a quarter of their side or more."""
    last = length - side
    count = 1 + math.ceil(last / (SHIFT * side))
    return [round(i * last / max(count - 1, 1)) for i in range(count)]


def weights(side: int) -> Tensor:
    """The weight of each pixel of a tile, (S, S): 1 in the middle, falling along straight lines to the edges."""
    line = 1 - (2 * (torch.arange(side) + 0.5) / side - 1).abs()
    return line[:, None] * line


def window(photo: Tensor, top: int, left: int, side: int) -> Tensor:
    """The square (..., S, S) of a photo (..., H, W) that begins there; a view, not a copy."""
    return photo[..., top : top + side, left : left + side]


def middle(photo: Tensor, side: int) -> Tensor:
    """The square (..., S, S) in the middle of a photo (..., H, W) that is at least as large."""
    return window(photo, *((length - side) // 2 for length in photo.shape[-2:]), side)
