"""Decoded images in memory as batches: what a training step and an evaluation read.

DataLoader gives these data sets a whole list of indices (`__getitems__`), and they return a whole batch, on the device
that their images are on.
"""

import math
import os
from collections.abc import Sequence
from functools import partial

import torch
from accelerate.utils import send_to_device
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cvlab.data.augment import mirrored, random_square, train_pairs, train_views, uniforms
from cvlab.data.cache import Cache
from cvlab.data.parts import SHAPES, Parts
from cvlab.tiles import Tiles
from cvlab.transforms import centre_view, large_mask, large_view, resized, to_float, to_uint8, whole_mask, whole_view

AUGMENTATIONS = ("none", "minimal", "full")
NORMALIZATIONS = ("imagenet", "data")
CACHE_MARGIN = 1.25  # training photos are kept this much larger than a view, so that crops stay sharp


class EvaluationSet(Dataset):
    """Views and labels as they are: batches of (N, 3, S, S) float32 in [0, 1] and labels."""

    def __init__(self, images: Sequence[Tensor], labels: Tensor | Sequence[Tensor]) -> None:
        self.images, self.labels = images, labels

    def to(self, device: torch.device | str) -> None:
        """Moves images and labels to a device."""
        self.images, self.labels = send_to_device((self.images, self.labels), device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return to_float(torch.stack([self.images[i] for i in indices])), self.labels[indices]


class AugmentedImages(EvaluationSet):
    """Photos of any size (3, h, w) uint8, with a new random crop, rotation, flip and colour in every epoch.

    Set `epoch` before each one: the augmentation of an image depends on (seed, epoch, index) alone.

    Args:
        augment: one of `AUGMENTATIONS`. For all but "full" the photos are views (3, S, S); "minimal" mirrors half.
        how: further arguments of `train_views`.
    """

    def __init__(
        self, images: Sequence[Tensor], labels: Tensor, image_size: int, seed: int, augment: str = "full", **how: float
    ) -> None:
        super().__init__(images, labels)
        self.image_size, self.seed, self.augment, self.how, self.epoch = image_size, seed, augment, how, 0

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        u = uniforms(self.seed, self.epoch, indices).to(self.labels.device)
        if self.augment == "full":
            return train_views([self.images[i] for i in indices], self.image_size, u, **self.how), self.labels[indices]
        views, labels = super().__getitems__(indices)
        return mirrored(views, u) if self.augment == "minimal" else views, labels


class AugmentedPairs(EvaluationSet):
    """N images (3, h, w) uint8 and, as labels, masks (C, h, w) bool, augmented alike; `epoch` as in AugmentedImages.

    Args:
        augment: one of `AUGMENTATIONS`; `how` are further arguments of `train_pairs`.
        crop: take a random square of so many pixels of each; by default all are squares of one size.
    """

    def __init__(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor],
        seed: int,
        augment: str = "full",
        crop: int | None = None,
        **how: object,
    ) -> None:
        super().__init__(images, masks)
        self.seed, self.augment, self.crop, self.how, self.epoch = seed, augment, crop, how, 0

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        u = uniforms(self.seed, self.epoch, indices)
        pairs = [(self.images[i], self.labels[i]) for i in indices]
        if self.crop:
            pairs = [[random_square(each, self.crop, row) for each in pair] for pair, row in zip(pairs, u, strict=True)]
        images, masks = map(torch.stack, zip(*pairs, strict=True))
        u = u.to(images.device)
        if self.augment == "full":
            return train_pairs(images, masks, u, **self.how)
        if self.augment == "minimal":
            images, masks = mirrored(images, u), mirrored(masks, u)
        return to_float(images), masks


def classification_sets(
    parts: Parts, view: dict, cache: Cache, seed: int, augment: str = "full", fast: bool = False, **how: float
) -> tuple[AugmentedImages, EvaluationSet]:
    """Reads train and val of a classification folder, each photo decoded once.

    Photos for full augmentation are kept a little larger than a view, the others exactly as the model will see them.

    Args:
        view: what the model will see of a photo: arguments of `centre_view`.
        augment: one of `AUGMENTATIONS`, of the training photos; `how` are further arguments of `train_views`.
        fast: large JPEGs of train may be decoded at a smaller scale.
    """
    image_size, seen = view["image_size"], partial(centre_view, **view)
    size = image_size if parts.name == SHAPES else math.ceil(image_size / view["crop_pct"] * CACHE_MARGIN)
    shape = {name: view[name] for name in ("interpolation", "crop_mode") if name in view}
    kept = partial(resized, size=size, **shape) if augment == "full" else seen
    least = 2 * size if fast else None
    images, labels = parts.read("train", lambda image: to_uint8(kept(image)), at_least=least, cache=cache)
    views, val_labels = parts.read("val", lambda image: to_uint8(seen(image)), cache=cache)
    train_set = AugmentedImages(images, torch.tensor(labels), image_size, seed, augment, **how)
    return train_set, EvaluationSet(views, torch.tensor(val_labels))


def segmentation_sets(
    parts: Parts, image_size: int, cache: Cache, seed: int, crop: bool = False, **augmentation: object
) -> tuple[AugmentedPairs, EvaluationSet, list[Tensor]]:
    """Reads train and val of a segmentation folder: photos squashed to `image_size`, or with `crop` as they are.

    `augmentation` are arguments of AugmentedPairs. Returns training pairs; the `Tiles` of val, with their indices as
    labels; the val masks (C, H, W) at the photos' own resolution, at which they are scored.
    """
    views = (large_view, large_mask) if crop else (whole_view, whole_mask)
    seen, seen_mask = (partial(each, image_size=image_size) for each in views)
    images, masks = parts.read("train", lambda image: to_uint8(seen(image)), seen_mask, cache=cache)
    photos, val_masks = parts.read("val", lambda image: to_uint8(seen(image)), cache=cache)
    tiles = Tiles(photos, image_size)
    train_set = AugmentedPairs(images, masks, seed, crop=image_size if crop else None, **augmentation)
    return train_set, EvaluationSet(tiles, torch.arange(len(tiles))), val_masks


def summary(parts: Parts, cache: Cache) -> str:
    """What the data is and what was done to it, in a few lines."""
    lengths = ", ".join(f"{part} {len(samples)}" for part, samples in parts.samples.items())
    classes = ", ".join(parts.class_names[:8])
    lines = [f"{parts.name}: {len(parts.class_names)} classes ({classes}), pictures: {lengths}"]
    lines += [f"  decoded once and kept: {cache}", *(f"  {note}" for note in parts.notes[:20])]
    if len(parts.notes) > 20:
        lines.append(f"  ... and {len(parts.notes) - 20} more.")
    return "\n".join(lines)


def normalization(name: str, images: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, in units of [0, 1], by a name of `NORMALIZATIONS`.

    They are those of ImageNet, or those over all pixels of the images (3, h, w) uint8.
    """
    if name == "imagenet":
        return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    pixels = sum(image[0].numel() for image in images)
    mean = sum(image.flatten(1).double().sum(1) for image in images) / pixels
    square = sum(image.flatten(1).double().square().sum(1) for image in images) / pixels
    std = (square - mean.square()).sqrt()
    return [round(m / 255, 4) for m in mean.tolist()], [round(max(s / 255, 1e-3), 4) for s in std.tolist()]


def whole_batches(batch_size: int, length: int) -> int:
    """The batch size, at most the number of images, and even in each process, as images are mixed in pairs."""
    least = 2 * int(os.environ.get("WORLD_SIZE", 1))
    if min(batch_size, length) < least:
        raise ValueError(f"A batch needs {least} images; there are {length}, and --batch-size is {batch_size}.")
    return min(batch_size, length) // least * least


def loaders(train_set: Dataset, val_set: Dataset, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Shuffled whole batches of train, all of val in order. Each draws from its own generator, not from torch's."""
    options = {"batch_size": whole_batches(batch_size, len(train_set)), "collate_fn": channels_last}
    train = DataLoader(train_set, shuffle=True, drop_last=True, generator=torch.Generator(), **options)
    return train, DataLoader(val_set, generator=torch.Generator(), **options)


def channels_last(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The collate_fn of these sets: batches are whole already; convolutions are faster in this memory format."""
    images, labels = batch
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images, labels


def onto_gpu(device: torch.device, *data_sets: EvaluationSet) -> None:
    """Moves the pictures to a GPU if they take at most half of its free memory. Batches are then augmented there."""
    size = sum(image.nbytes for data_set in data_sets for image in data_set.images)
    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 2:
        for data_set in data_sets:
            data_set.to(device)
