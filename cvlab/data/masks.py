"""Masks of a segmentation folder: how they are read, and what can be wrong with them."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cvlab.data.folders import DataError, mask_files, pictures_in
from cvlab.transforms import FORMATS, open_image

MAX_MASK_CLASSES = 64
ORIENTATION = 274  # an EXIF tag; from 5 on, width and height are exchanged


def read_mask(path: str | Path, num_classes: int) -> Tensor:
    """A mask file as (num_classes, H, W) bool. Its values are 0/1 or 0/255 for one class, else 0 and class indices.

    Raises:
        DataError: not a picture, or a value that is not a class.
    """
    values = _mask_values(path)
    if num_classes == 1:
        if not set(np.unique(values)) <= {0, 1} and not set(np.unique(values)) <= {0, 255}:
            raise DataError(f"{path} has values other than 0 and 1 (or 0 and 255): so it is not a mask of one class.")
        return torch.from_numpy(values > 0)[None]
    if values.max() > num_classes:
        raise DataError(f"{path} has the value {values.max()}, but there are {num_classes} classes.")
    return torch.from_numpy(values[None] == np.arange(1, num_classes + 1)[:, None, None])


def mask_faults(folder: str | Path) -> list[str]:
    """What is wrong with the masks of a segmentation folder, a sentence for each file. Images are not decoded."""
    folder = Path(folder)
    pairs = mask_files(folder)
    there = [mask for mask in pairs.values() if mask.is_file()]
    faults = [f"images/{path.name} has no mask." for path, mask in pairs.items() if not mask.is_file()]
    alone = sorted(set(pictures_in(folder / "masks")) - set(pairs.values()))
    faults += [f"masks/{path.name} belongs to no image." for path in alone]
    _, unreadable, odd = mask_classes(there)
    faults += unreadable + odd
    for path, mask in pairs.items():
        try:
            with Image.open(path, formats=FORMATS) as image, Image.open(mask, formats=FORMATS) as drawn:
                turned = image.getexif().get(ORIENTATION, 1) >= 5
                size = image.size[::-1] if turned else image.size
                if size != drawn.size:
                    faults.append(_other_size(mask, drawn.size, size))
        except Exception:  # files that cannot be opened are named elsewhere
            continue
    return faults


def open_pair(image_path: Path, mask_path: Path, num_classes: int) -> tuple[Image.Image, Tensor]:
    """A photo and its mask (num_classes, H, W) bool.

    Raises:
        ImageError, DataError: one of them cannot be read, or their sizes differ.
    """
    image, mask = open_image(image_path), read_mask(mask_path, num_classes)
    if mask.shape[1:] != (image.height, image.width):
        raise DataError(_other_size(mask_path, mask.shape[:0:-1], image.size))
    return image, mask


def _other_size(mask_path: Path, size: Sequence[int], expected: Sequence[int]) -> str:
    return f"masks/{mask_path.name} is {size[0]} x {size[1]} pixels, its image {expected[0]} x {expected[1]}."


def _mask_values(path: str | Path) -> np.ndarray:
    try:
        with Image.open(path, formats=FORMATS) as mask:
            values = np.asarray(mask)  # a palette image gives its indices: the class of each pixel
    except Exception as error:  # damaged files raise errors of every kind
        raise DataError(f"{path} cannot be opened as a mask.") from error
    if values.ndim == 3:
        if values.shape[2] > 2 and (values[..., 1:3] != values[..., :1]).any():
            raise DataError(f"{path} is in colour, but a mask has one number for each pixel.")
        values = values[..., 0]
    return values.astype(np.uint8) if values.dtype == bool else values


def mask_classes(masks: list[Path]) -> tuple[int, list[str], list[str]]:
    """Reads all masks once.

    Returns:
        The number of classes; a sentence for each mask that cannot be opened; and one for each that has values which
        do not fit the others.
    """

    def values_in(path: Path) -> set[int] | str:
        try:
            return set(np.unique(_mask_values(path)).tolist())
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        values = list(tqdm(pool.map(values_in, masks), "checking masks", len(masks), leave=False))
    unreadable = [found for found in values if isinstance(found, str)]
    opened = {path: found for path, found in zip(masks, values, strict=True) if not isinstance(found, str)}
    # Masks of one class are 0/1 or 0/255; with any other values all masks must be class indices.
    more = {path: found for path, found in opened.items() if not found <= {0, 1} and not found <= {0, 255}}
    highest = max(map(max, opened.values())) if more else 1
    if highest <= MAX_MASK_CLASSES:
        return highest, unreadable, []
    of_one_class = len(more) < len(opened) / 2
    rule = "0 and 1, or 0 and 255, as most here" if of_one_class else f"class indices up to {MAX_MASK_CLASSES}"
    odd = []
    for path, found in opened.items():
        if (of_one_class and path in more) or (not of_one_class and max(found) > MAX_MASK_CLASSES):
            shown = ", ".join(map(str, sorted(found)[:5])) + (" ..." if len(found) > 5 else "")
            odd.append(f"{path} has the values {shown}; they must be {rule}.")
    return 1, unreadable, odd
