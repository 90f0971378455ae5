"""Decoded images in memory as batches: what a training step and an evaluation draw from.

DataLoader hands these data sets a whole batch of indices (`__getitems__`), so nothing is left to collate. Batches come
from the device that the images are on: where a GPU has room for them, `to` brings them there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cvlab.data.augment import train_pairs, train_views, uniforms
from cvlab.transforms import to_float


def as_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The collate_fn for data sets that return whole batches."""
    return batch


class EvaluationSet(Dataset):
    """Views and labels (or masks) as they are: batches of (N, 3, S, S) float32 in [0, 1] and labels."""

    def __init__(self, images: Sequence[Tensor], labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def to(self, device: torch.device | str) -> None:
        """Brings the images to a device, from which batches come then."""
        self.images, self.labels = [image.to(device) for image in self.images], self.labels.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return to_float(torch.stack([self.images[i] for i in indices])), self.labels[indices]


class AugmentedImages(Dataset):
    """Photos of any size (3, h, w) uint8, freshly cropped, turned and coloured in every epoch.

    Set `epoch` before each one: an augmentation depends on (seed, epoch, index) alone.
    """

    def __init__(
        self, images: Sequence[Tensor], labels: Tensor, image_size: int, seed: int, min_area: float = 0.35
    ) -> None:
        self.images, self.labels, self.image_size, self.seed, self.min_area = images, labels, image_size, seed, min_area
        self.epoch = 0

    def to(self, device: torch.device | str) -> None:
        """Brings the images to a device, from which batches come then."""
        self.images, self.labels = [image.to(device) for image in self.images], self.labels.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        u = uniforms(self.seed, self.epoch, indices).to(self.labels.device)
        views = train_views([self.images[i] for i in indices], self.image_size, u, self.min_area)
        return views, self.labels[indices]


class AugmentedPairs(Dataset):
    """N images (3, S, S) uint8 and masks (C, S, S) bool, moved together; `epoch` as in AugmentedImages."""

    def __init__(
        self, images: Sequence[Tensor], masks: Sequence[Tensor], seed: int, zoom: Sequence[float] = (1 / 1.4, 1.4)
    ) -> None:
        self.images, self.masks, self.seed, self.zoom = images, masks, seed, zoom
        self.epoch = 0

    def to(self, device: torch.device | str) -> None:
        """Brings the images to a device, from which batches come then."""
        self.images, self.masks = ([each.to(device) for each in kept] for kept in (self.images, self.masks))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, masks = (torch.stack([each[i] for i in indices]) for each in (self.images, self.masks))
        return train_pairs(images, masks, uniforms(self.seed, self.epoch, indices).to(images.device), self.zoom)


def channel_statistics(images: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, for images (3, h, w) uint8, in units of [0, 1]."""
    pixels = sum(image[0].numel() for image in images)
    mean = sum(image.flatten(1).double().sum(1) for image in images) / pixels
    square = sum(image.flatten(1).double().square().sum(1) for image in images) / pixels
    std = (square - mean.square()).sqrt()
    return [round(m / 255, 4) for m in mean.tolist()], [round(max(s / 255, 1e-3), 4) for s in std.tolist()]
