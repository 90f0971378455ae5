"""Masks of a segmentation folder: how a file is read, and what can be wrong with it."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cvlab.data.folders import DataError, pictures_in
from cvlab.transforms import FORMATS, open_image

MAX_MASK_CLASSES = 64
ORIENTATION = 274  # the tag of EXIF; from 5 on, width and height change places


def read_mask(path: str | Path, num_classes: int) -> Tensor:
    """A mask file as (num_classes, H, W) bool: 0/1 and 0/255 for one class, else class indices with 0 as background.

    Raises:
        DataError: not a picture, or a value that stands for no class.
    """
    values = _mask_values(path)
    if num_classes == 1:
        if not set(np.unique(values)) <= {0, 1} and not set(np.unique(values)) <= {0, 255}:
            raise DataError(f"{path} has values other than 0 and 1 (or 0 and 255): it is not a mask of one class.")
        return torch.from_numpy(values > 0)[None]
    if values.max() > num_classes:
        raise DataError(f"{path} has the value {values.max()}, but there are {num_classes} classes.")
    return torch.from_numpy(values[None] == np.arange(1, num_classes + 1)[:, None, None])


def mask_faults(folder: str | Path) -> list[str]:
    """What is wrong with the masks of a segmentation folder, a sentence for each file; images are not decoded."""
    folder = Path(folder)
    pairs = {path: folder / "masks" / f"{path.stem}.png" for path in pictures_in(folder / "images")}
    there = [mask for mask in pairs.values() if mask.is_file()]
    without = [path.name for path, mask in pairs.items() if not mask.is_file()]
    faults = [f"images/{name} has no mask." for name in without]
    unasked = sorted(set(pictures_in(folder / "masks")) - set(pairs.values()))
    faults += [f"masks/{path.name} belongs to no image." for path in unasked]
    _, closed, odd = mask_classes(there)
    faults += closed + odd
    for path, mask in pairs.items():
        try:
            with Image.open(path, formats=FORMATS) as image, Image.open(mask, formats=FORMATS) as drawn:
                turned = image.getexif().get(ORIENTATION, 1) >= 5
                size = image.size[::-1] if turned else image.size
                if size != drawn.size:
                    faults.append(_other_size(mask, drawn.size, size))
        except Exception:  # what cannot be opened is named elsewhere
            continue
    return faults


def open_pair(image_path: Path, mask_path: Path, num_classes: int) -> tuple[Image.Image, Tensor]:
    """A photo and its mask (num_classes, H, W) bool; a DataError where their sizes differ."""
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
    except Exception as error:  # as in open_image: a damaged file raises anything
        raise DataError(f"{path} cannot be opened as a mask.") from error
    if values.ndim == 3 and (values[..., 1:3] != values[..., :1]).any() and values.shape[2] > 2:
        raise DataError(f"{path} is in colour: a mask holds one number for each pixel.")
    values = values[..., 0] if values.ndim == 3 else values
    return values.astype(np.uint8) if values.dtype == bool else values


def mask_classes(masks: list[Path]) -> tuple[int, list[str], list[str]]:
    """How many classes the masks have, and a sentence for each that cannot be opened, and for each of odd values."""

    def values_in(path: Path) -> set[int] | str:
        try:
            return set(np.unique(_mask_values(path)).tolist())
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        values = list(tqdm(pool.map(values_in, masks), "checking masks", len(masks), leave=False))
    closed = [found for found in values if isinstance(found, str)]
    opened = {path: found for path, found in zip(masks, values, strict=True) if not isinstance(found, str)}
    more = {path: found for path, found in opened.items() if not found <= {0, 1} and not found <= {0, 255}}
    highest = max(map(max, opened.values())) if more else 1
    if highest <= MAX_MASK_CLASSES:
        return highest, closed, []
    of_one_class = len(more) < len(opened) / 2
    rule = "0/1 or 0/255, as most here do" if of_one_class else f"class indices up to {MAX_MASK_CLASSES}"
    odd = []
    for path, found in opened.items():
        if (of_one_class and path in more) or (not of_one_class and max(found) > MAX_MASK_CLASSES):
            shown = ", ".join(map(str, sorted(found)[:5])) + (" ..." if len(found) > 5 else "")
            odd.append(f"{path} has the values {shown}: it must hold {rule}.")
    return 1, closed, odd
