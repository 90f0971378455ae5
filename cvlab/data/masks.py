"""How a mask file is read, by the trainers and as the true mask of the page, and what the masks of a folder hold."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from cvlab.data.folders import DataError
from cvlab.models.model import Channels, name_fault
from cvlab.transforms import FORMATS, MAX_BYTES, decoded_bytes, open_image

MAX_MASK_CLASSES = 64
BACKGROUND = "background"
CLASSES_FILE = "classes.txt"
UNCLEAR = "has a mask whose meaning is not clear"
ORIENTATION = 274  # an EXIF tag: 1 is upright; from 5 on, width and height are exchanged
LOSSY = ("JPEG", "WEBP", "AVIF", "HEIF")
BRIGHT = 191  # of a lossy black and white picture: white is above this, black below 255 minus this, but for some edges


# --- one file ---------------------------------------------------------------------------------------------------------


def read_mask(
    path: str | Path, num_classes: int, white: int | None = None, background: bool = False, ignore: int | None = None
) -> Tensor:
    """A mask file as (num_classes, H, W) bool, upright.

    For one class its values are 0 and 1, or black and white (255, of 16 bits 65535); for several 0 and the numbers of
    the classes from 1. A shape in one colour on transparent ground counts as white on black, a palette by its indices.

    Args:
        white: the index of the class that a black and white mask shows.
        background: puts a channel for the background before those of the classes.
        ignore: the value of pixels that are in no channel, as they are not scored: a border, or what is not labelled.

    Raises:
        DataError: no picture, or it is not clear what its values mean. The sentence says what the file holds.
    """
    try:
        values = _values(path)
        if values.size * num_classes > 2**30:
            raise DataError(f"has {values.size:,} pixels, too many for {num_classes} classes. Save it smaller.")
        found = set(np.unique(values).tolist())
        if found <= {0, 255} and (white is not None or (num_classes == 1 and ignore is None)):
            values = np.where(values > 0, 1 + (white or 0), 0)
        elif fault := _value_fault(found - {ignore}, num_classes):
            raise DataError(fault)
    except DataError as error:
        raise DataError(f"{Path(path).name} {error}") from error.__cause__
    return torch.from_numpy(values[None] == np.arange(1 - background, num_classes + 1)[:, None, None])


def _values(path: str | Path) -> np.ndarray:
    """The values of a mask, (H, W) integers; white of any kind is 255. DataError without the name of the file."""
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if decoded_bytes(opened) > MAX_BYTES:
                raise DataError(f"takes more than {MAX_BYTES / 1e6:.0f} MB. Save it smaller, and as grey of 8 bits.")
            several, lossy = getattr(opened, "is_animated", False), opened.format if opened.format in LOSSY else ""
            mask = ImageOps.exif_transpose(opened)
        if several:  # they are not counted: a file may hold a million
            raise DataError("has at least 2 pages or frames, but a mask has one. Save the right one alone.")
        values = _one_channel(mask)
    except DataError:
        raise
    except Exception as error:  # damaged files raise errors of every kind
        raise DataError("cannot be opened as a mask.") from error
    if values.dtype.itemsize > 2 and not -65536 < values.min() <= values.max() < 65536:  # NaN fails the comparison
        raise DataError("has values beyond 65,535, but a mask has the numbers of classes. Save it with 0, 1, 2 ...")
    if values.dtype.kind == "f":
        if not (values == np.round(values)).all():
            raise DataError("has fractions, but a mask has whole numbers. Save it with 0 and 255, or 0, 1, 2 ...")
        values = values.astype(np.int32)
    if values.max() == 65535 and set(np.unique(values)) <= {0, 65535}:
        return np.where(values > 0, np.uint8(255), np.uint8(0))
    if lossy and values.max() > 0:
        if values.max() <= BRIGHT or ((values > BRIGHT) | (values < 255 - BRIGHT)).mean() < 0.95:
            raise DataError(f"is a {lossy} that is not black and white. {lossy} changes numbers: save masks as PNG.")
        return np.where(values > 127, np.uint8(255), np.uint8(0))
    return values.astype(np.uint8) if values.dtype == bool else values


def _one_channel(mask: Image.Image) -> np.ndarray:
    """The channel of a picture that holds its mask: the grey values, the indices of a palette, or the transparency."""
    indices = np.asarray(mask) if mask.mode == "P" else None
    if "A" in mask.mode or "a" in mask.mode or ("transparency" in mask.info and not mask.mode.startswith("I")):
        pixels = np.asarray(mask.convert("RGBA"))
        colours, alpha = pixels[..., :3], pixels[..., 3]
        hard = set(np.unique(alpha).tolist()) <= {0, 255}
        if alpha.min() < alpha.max() or not alpha.any():
            if indices is not None and hard and ((alpha == 0) == (indices == 0)).all():
                return indices
            if (colours[alpha > 0] == colours[alpha > 0][:1]).all():
                return alpha
            if not hard or colours[alpha == 0].any():
                raise DataError(
                    "has a transparent part and several colours besides, so it is not clear which is the mask. "
                    "Save it without transparency, with one number for each pixel."
                )
        mask = mask if indices is not None else Image.fromarray(colours)
    if indices is not None:
        palette = np.reshape(mask.getpalette("RGB"), (-1, 3))
        black_and_white = (palette == palette[:, :1]).all() and set(palette.flat) == {0, 255}
        return palette[indices][..., 0] if black_and_white and indices.max() < len(palette) else indices
    values = np.asarray(mask if mask.mode in ("1", "L", "F") or mask.mode[0] == "I" else mask.convert("RGB"))
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise DataError(
                "is in colour, but a mask has one number for each pixel. Save it as a grey or palette picture with 0 "
                "for the background and 1, 2, 3 ... for the classes."
            )
        values = values[..., 0]
    return values


def _value_fault(values: set[int], num_classes: int) -> str:
    """What is wrong with the values of a mask of so many classes, and what to do; empty if nothing is."""
    if values <= {0, 1} or (num_classes == 1 and values <= {0, 255}):
        return ""
    if num_classes > 1 and min(values) >= 0 and max(values) <= num_classes:
        return ""
    shown = ", ".join(map(str, sorted(values)[:5])) + (" ..." if len(values) > 5 else "")
    rule = "0 and 1, or 0 and 255" if num_classes == 1 else f"0 for the background and 1 to {num_classes}"
    advice = " Give every pixel of the object one value."
    if len(values) > num_classes + 2 and not values <= set(range(MAX_MASK_CLASSES)) | {255}:
        advice = " Grey edges come from JPEG, soft brushes or smooth resizing: save it as PNG with hard edges."
    elif max(values) == 255 and num_classes > 1:
        advice = " If 255 marks a border or what is not labelled, --loss ce+dice leaves these pixels out."
    return f"has the values {shown}; they must be {rule}.{advice}"


# --- the masks of a folder --------------------------------------------------------------------------------------------


@dataclass
class Held:
    """What one mask holds."""

    counts: dict[int, int] = field(default_factory=dict)  # pixels of each value
    small: set[int] = field(default_factory=set)  # values left when it is shrunk to the side of the model's input
    turned: bool = False  # its photo is turned by EXIF and the mask itself is not, though both have one size
    reason: str = ""  # why the pair cannot be used, in words that are the same for all of its kind; empty if it can
    fault: str = ""  # the same as a sentence about this mask


def examine_masks(pairs: dict[Path, Path], image_size: int, channels: Channels | None = None) -> dict[Path, Held]:
    """What the mask of each picture holds, on all cores and with a progress bar. Photos are not decoded."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        held = pool.map(lambda pair: _examine_pair(*pair, image_size, channels), pairs.items())
        return dict(zip(pairs, tqdm(held, "checking masks", len(pairs), leave=False), strict=True))


def _examine_pair(image: Path, mask: Path, image_size: int, channels: Channels | None) -> Held:
    held = Held()
    try:
        values = _values(mask)
    except DataError as error:
        unreadable = error.__cause__ is not None
        held.reason, held.fault = ("has a mask that cannot be opened" if unreadable else UNCLEAR), str(error)
        return held
    held.counts = dict(zip(*(each.tolist() for each in np.unique(values, return_counts=True)), strict=True))
    rows, columns = (((np.arange(image_size) + 0.5) * side / image_size).astype(int) for side in values.shape)
    held.small = set(np.unique(values[np.ix_(rows, columns)]).tolist())
    try:
        opened = nullcontext(open_image(image, channels=channels)) if channels else Image.open(image, formats=FORMATS)
        with opened as photo, Image.open(mask, formats=FORMATS) as drawn:
            raw, turn, of_mask = photo.size, 1, 1
            with suppress(Exception):  # damaged tags have no effect, as values beyond 8 have none
                turn, of_mask = (each.getexif().get(ORIENTATION, 1) for each in (photo, drawn))
    except Exception:  # a photo that cannot be opened is named elsewhere
        return held
    size = raw[::-1] if turn in range(5, 9) else raw
    if values.shape != size[::-1]:
        height, width = values.shape
        held.reason = "has a mask of another size"
        held.fault = f"is {width} x {height} pixels, its image {size[0]} x {size[1]}."
        if values.shape == raw[::-1]:
            held.reason = "is turned by EXIF, and its mask lies on the pixels before the turn"
            held.fault += " The photo is turned by EXIF, and the mask lies on the pixels before the turn: turn it too."
    held.turned = not held.reason and turn in range(2, 9) and of_mask == 1
    return held


def count_classes(held: Sequence[Held]) -> int:
    """The number of classes that masks seem to have: 1 for 0/1 and 0/255, else the highest value that can be one."""
    opened = [set(each.counts) for each in held if each.counts]
    several = [values for values in opened if _value_fault(values, 1)]
    highest = max(map(max, opened)) if several else 1
    if highest > MAX_MASK_CLASSES and 2 * len(several) >= len(opened):
        highest = max((value for values in several for value in values if value <= MAX_MASK_CLASSES), default=1)
    return highest if 0 < highest <= MAX_MASK_CLASSES else 1


def agreed(
    folder: Path,
    pairs: dict[Path, Path],
    held: dict[Path, Held],
    class_names: Sequence[str] | None,
    exclusive: bool | None,
) -> tuple[list[str], Callable[[Path], Tensor], int | None]:
    """How the masks of a folder are read: the names of the channels, the reader of a file, and the value not scored.

    Arguments as of `cvlab.data.parts.segmentation_parts`; `pairs` are the mask of each picture, `held` what it holds.

    Raises:
        DataError: a mask has other values, or a name cannot be that of a class.
    """
    class_names = class_names or listed_classes(folder)
    num_classes = len(class_names) if class_names else count_classes(list(held.values()))
    ignore = ignored_value(list(held.values()))
    exclusive = num_classes > 1 or ignore is not None if exclusive is None else exclusive
    ignore = ignore if exclusive else None
    if odd := odd_masks(held, num_classes, ignore):
        first = next(iter(odd))
        where = pairs[first].relative_to(folder)
        raise DataError(f"{where} {odd[first]} Such masks: {len(odd)} of {len(held)}; train/check.py names them.")
    if not class_names:
        class_names = ["foreground"] if num_classes == 1 else [f"class {i + 1}" for i in range(num_classes)]
    for name in class_names:
        if fault := "is that of all other pixels" if exclusive and name == BACKGROUND else name_fault(name):
            raise DataError(f"The class name {name[:60]!a} {fault}: choose another with --class-names.")
    names = [BACKGROUND] * exclusive + list(class_names)
    return names, partial(read_mask, num_classes=num_classes, background=exclusive, ignore=ignore), ignore


def listed_classes(folder: Path) -> list[str] | None:
    """The names in classes.txt of a segmentation folder, one a line, of the values 1, 2, ...; None without the file."""
    path = folder / CLASSES_FILE
    lines = path.read_text("utf-8", "surrogateescape").splitlines() if path.is_file() else []
    return [line for line in lines if line.strip()] or None


def ignored_value(held: Sequence[Held]) -> int | None:
    """255 where some mask has it beside the number of a class: a border, or what is not labelled; else None."""
    return 255 if any(255 in each.counts and each.counts.keys() - {0, 255} for each in held) else None


def odd_masks(held: dict[Path, Held], num_classes: int, ignore: int | None = None) -> dict[Path, str]:
    """By picture, what is wrong with the values of its mask where there are so many classes."""
    values = {path: each.counts.keys() - {ignore} for path, each in held.items() if each.counts}
    faults = {path: _value_fault(found, num_classes) for path, found in values.items()}
    unclear = {path: each.fault for path, each in held.items() if each.reason == UNCLEAR}
    return unclear | {path: fault for path, fault in faults.items() if fault}


def mask_facts(held: Sequence[Held], class_names: Sequence[str], image_size: int) -> list[str]:
    """Sentences about what the masks that are used hold: how much, how often, and what shrinking leaves of it."""
    shares = [1 - each.counts.get(0, 0) / max(sum(each.counts.values()), 1) for each in held]
    lines = [
        f"Masks: {np.mean(shares):.1%} of the pixels of a picture on average ({min(shares):.1%} to {max(shares):.1%}); "
        f"empty {shares.count(0)}, full {shares.count(1)}, of {len(shares)}."
    ]
    if len(class_names) > 1:
        found = []
        for i, name in enumerate(class_names, 1):
            pictures, left = sum(i in each.counts for each in held), sum(i in each.small for each in held)
            found.append(f"{name} {pictures}" + (f" ({left} at {image_size} pixels)" if left < pictures else ""))
        lines.append(f"Pictures with each class: {', '.join(found)}.")
    emptied = sum(bool(each.counts.keys() - {0}) and each.small == {0} for each in held)
    if emptied:
        lines.append(
            f"Masks of which nothing is left at {image_size} x {image_size} pixels: {emptied} of {len(shares)}. "
            "A larger --image-size keeps them."
        )
    if turned := sum(each.turned for each in held):
        lines.append(f"Photos turned by EXIF whose masks have no such tag: {turned}. Look whether the masks fit.")
    return lines
