"""Data sets as parts: train, val, test.

A classification folder is DIR/<class>/* or DIR/{train,val,test}/<class>/*; a segmentation folder is DIR/images/NAME.*
with DIR/masks/NAME.png, also with parts (folders.py). A folder without parts is cut 70/15/15; a missing val or test is
cut from train. The cut has a seed of its own, so that trainings with different seeds share their parts. Without a
folder the parts are synthetic scenes (shapes.py).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cvlab.data import from_hub, shapes
from cvlab.data.cache import Cache
from cvlab.data.duplicates import Copies, fingerprint
from cvlab.data.folders import DataError, class_pictures, existing, left_out_notes, mask_pairs
from cvlab.data.masks import BACKGROUND, agreed, examine_masks, mask_facts
from cvlab.models.model import Channels, name_fault
from cvlab.transforms import ImageError, open_image

PARTS = ("train", "val", "test")
SHAPES = "cvlab/shapes.py"  # name of the synthetic scenes in saved models
SHARES = {"val": 0.15, "test": 0.15}  # of the pictures of a class; the rest is for train
SHAPES_SEEDS = {"train": range(3000), "val": range(3000, 3500), "test": range(3500, 4000)}
SMALL_CLASS = 20  # pictures; a smaller class has at most three in val and in test


@dataclass
class Parts:
    """A data set cut into parts. Nothing is decoded before `read`."""

    name: str  # of the data set
    class_names: list[str]  # in the order of the labels, or of the mask channels
    samples: dict[str, list]  # samples[part] is a list of whatever `open_sample` opens
    # Sample to (image, label) or (image, mask (C, H, W) bool). With `at_least`, a large JPEG that has a label may be
    # decoded smaller, but to no fewer pixels a side.
    open_sample: Callable[..., tuple[Image.Image, object]]
    split: dict = field(default_factory=dict)  # how the cut was made: {"split_seed": ..., "per_class": ...}
    # By part hashes of the files' contents; empty for synthetic scenes.
    fingerprints: dict[str, list[str]] = field(default_factory=dict)
    # Sentences about what the data holds and what was done to it; files left out are counted by reason.
    notes: list[str] = field(default_factory=list)

    @property
    def exclusive(self) -> bool:
        """Whether each pixel of a mask has one class, the first of which is the background."""
        return self.class_names[:1] == [BACKGROUND]

    @property
    def facts(self) -> dict:
        """What config.json records, so that a later evaluation knows which pictures were trained on."""
        return {"name": self.name, **self.split, "fingerprints": self.fingerprints}

    def as_recorded(self, fingerprints: dict[str, list[str]]) -> int:
        """Moves every picture into the part that a training recorded for it; others stay in their part.

        Returns the number of pictures that were trained on.
        """
        if not fingerprints:
            return 0
        known = {text: part for part, texts in fingerprints.items() for text in texts}
        cut, self.samples = self.samples, {part: [] for part in PARTS}
        for part, samples in cut.items():
            for sample in samples:
                self.samples[known.get(fingerprint(sample[0]), part)].append(sample)
        _with_fingerprints(self)
        return sum(known.get(text) == "train" for text in self.fingerprints["train"])

    def read(
        self,
        part: str,
        prepare: Callable[[Image.Image], Tensor],
        prepare_mask: Callable[[Tensor], Tensor] | None = None,
        at_least: int | None = None,
        cache: Cache | None = None,
    ) -> tuple[list[Tensor], list]:
        """Decodes a part, on all cores and with a progress bar: [prepare(image), ...] and [label or mask, ...].

        Files that cannot be opened are named in `notes`, and their samples dropped.

        Args:
            prepare: image to the tensor that is kept, uint8.
            prepare_mask: mask to the tensor that is kept, bool; by default the mask itself.
            at_least: large JPEGs may be decoded smaller, but to no fewer pixels a side (see `open_image`).
            cache: where the tensors are kept; by default a cache for this part alone.
        """
        samples = self.samples[part]

        def read_one(sample: object) -> tuple[Tensor, object, object] | str:
            try:
                image, label = self.open_sample(sample, at_least=at_least)
                return prepare(image), prepare_mask(label) if prepare_mask else label, sample
            except (ImageError, DataError) as error:
                return str(error)

        def readable() -> Iterator[tuple[Tensor, object, object]]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for row in tqdm(pool.map(read_one, samples), f"reading {part}", len(samples), leave=False):
                    if isinstance(row, str):
                        self.notes.append(f"Left out of {part}: {row}")
                    else:
                        yield row

        kept = (cache or Cache()).keep(readable())
        if not kept:
            raise DataError(f"No picture in the part {part} of {self.name} can be used. {' '.join(self.notes[:3])}")
        images, labels, self.samples[part] = map(list, zip(*kept, strict=True))
        return images, labels


# --- classification ---------------------------------------------------------------------------------------------------


def classification_parts(
    folder: str | Path | None,
    split_seed: int = 0,
    per_class: tuple[int, int] | None = None,
    image_size: int = 64,
    allow_leaks: bool = False,
    needed: Sequence[str] = ("train", "val"),
    classes: int | None = None,
    class_names: Sequence[str] | None = None,
    copies: Copies | None = None,
    channels: Channels | None = None,
) -> Parts:
    """The parts of a folder of classes, or of synthetic scenes if `folder` is None.

    Copies of a photo stay in one part. If a folder with parts of its own has them in two, or they are of two classes,
    the copy in train is left out and named.

    Args:
        per_class: pictures of each class for train and for val; the rest is for test.
        image_size: of the synthetic scenes, pixels.
        allow_leaks: continue although val and test share files.
        needed: parts in which every class must have a picture; with `class_names` one class is enough.
        classes: use only the first so many classes, by name.
        class_names: of a trained model; a class of it that the folder lacks is named in a note.
        copies, channels: the pictures of the folder if they were compared before, and if they are no photos.
    """
    if folder is None:
        return _shapes_parts(shapes.CLASS_NAMES, lambda scene: scene.label, image_size)
    found = class_pictures(existing(folder), arrays=bool(channels))
    copies = copies or Copies(found.pictures, channels)
    found.left_out |= dict.fromkeys(copies.faults, "cannot be opened")
    names = list(next(iter(found.parts.values())))[:classes]
    if class_names is None:
        _check_classes(names, folder)
    elif unknown := set(names) - set(class_names):
        theirs, ours = ", ".join(sorted(unknown)), ", ".join(class_names)
        raise DataError(f"{folder} has classes that the model does not know: {theirs}. It knows {ours}.")
    split = {"split_seed": split_seed, "per_class": per_class, "classes": classes}
    parts = _empty_parts(folder, class_names or names, split)
    parts.open_sample = lambda sample, at_least=None: (open_image(sample[0], at_least, channels), sample[1])
    sizes = {}
    for label, name in enumerate(parts.class_names):
        given = {
            part: [path for path in of.get(name, []) if path not in copies.faults] for part, of in found.parts.items()
        }
        sizes[name] = sum(map(len, given.values()))
        seed = [split_seed, label]
        if "all" in given and per_class:
            cut = copies.cut(given["all"], seed, dict(zip(("train", "val"), per_class, strict=True)), rest="test")
            if len(cut["val"]) < per_class[1]:  # train is filled first, so a lack shows here
                raise DataError(
                    f"Class “{name}” of {folder} has too few pictures to take {per_class[0]} for train "
                    f"and {per_class[1]} for val: take fewer, or add some."
                )
        else:
            cut = _divided(given, copies, seed)
        for part in PARTS:
            parts.samples[part] += [(path, label) for path in cut[part]]
    parts.notes += _missing_parts(found.parts)
    for part in needed:
        there = {label for _, label in parts.samples[part]}
        without = [name for label, name in enumerate(parts.class_names) if label not in there]
        if without and (class_names is None or not there):
            raise DataError(f"Class “{without[0]}” of {folder} has no picture for the part {part}: add some.")
        if without:
            parts.notes.append(f"Classes without a picture in {part}: {', '.join(without)}. They are not measured.")
    if small := [f"{name} ({size})" for name, size in sizes.items() if 0 < size < SMALL_CLASS]:
        parts.notes.append(f"Classes of fewer than {SMALL_CLASS} pictures: {', '.join(small)}.")
    return _separated(parts, copies, allow_leaks, found.left_out, folder)


def _check_classes(names: list[str], folder: str | Path) -> None:
    """Raises DataError for a folder that cannot be trained on, whatever its pictures are."""
    if not names:
        raise DataError(f"{folder} has no classes: expected one folder of pictures for each class.")
    if len(names) == 1:
        raise DataError(f"{folder} has one class only, “{names[0]}”: add a folder of pictures of something else.")
    for name in names:
        if fault := name_fault(name):
            raise DataError(f"The name of the folder {name[:60]!a} in {folder} {fault}: rename it, then it is a class.")


# --- segmentation -----------------------------------------------------------------------------------------------------


def segmentation_parts(
    folder: str | Path | None,
    split_seed: int = 0,
    class_names: Sequence[str] | None = None,
    image_size: int = 64,
    needed: Sequence[str] = PARTS,
    copies: Copies | None = None,
    exclusive: bool | None = None,
    channels: Channels | None = None,
) -> Parts:
    """The parts of a folder of images and masks, or of synthetic scenes if `folder` is None.

    The values of masks are 0/1, 0/255, or class indices with 0 as background.

    Args:
        class_names: without the background; by default those in classes.txt of the folder, else "foreground", or
            "class 1", "class 2", ... as the masks have.
        image_size: side of the model's input, pixels: of the synthetic scenes, and for what is left of small masks.
        needed: parts that must have a picture.
        copies, channels: the pictures of the folder if they were compared before, and if they are no photos.
        exclusive: each pixel has one class, and masks have a channel for the background before the others; a pixel of
            the value 255 beside numbers of classes is in no channel, and not scored. By default where there are
            several classes or such pixels.
    """
    if folder is None and exclusive:
        return _shapes_parts([BACKGROUND, *shapes.CLASS_NAMES], _one_hot, image_size, mixed=True)
    if folder is None:
        return _shapes_parts(["shape"], lambda scene: torch.from_numpy(scene.mask)[None], image_size)
    found = mask_pairs(existing(folder), arrays=bool(channels))
    pairs = {image: mask for part in found.parts.values() for image, mask in part.items()}
    if not pairs:
        names = ", ".join(sorted(path.name for path in Path(folder).iterdir() if path.is_dir())[:5])
        there = " ".join(left_out_notes(found.left_out, folder)) or f"Its folders: {names or 'none'}."
        raise DataError(f"{folder} has no pairs: expected images/NAME.jpg (or other) with masks/NAME.png. {there}")
    copies = copies or Copies(list(pairs), channels)
    found.left_out |= dict.fromkeys(copies.faults, "cannot be opened")
    held = examine_masks(pairs, image_size, channels)
    names, read, ignore = agreed(Path(folder), pairs, held, class_names, exclusive)
    found.left_out |= {path: each.reason for path, each in held.items() if each.reason}
    given = {part: [path for path in images if path not in found.left_out] for part, images in found.parts.items()}
    cut = _divided(given, copies, [split_seed])
    sound = sum(map(len, given.values()))
    if (short := [part for part in needed if not cut[part]]) or not sound:
        there = " ".join(left_out_notes(found.left_out, folder))
        raise DataError(f"{folder} has only {sound} pairs: too few for a part {' '.join(short[:1])}. {there}".strip())
    parts = _empty_parts(folder, names, {"split_seed": split_seed})
    parts.samples = {part: [(path, pairs[path]) for path in cut[part]] for part in PARTS}
    # Never decoded smaller: a photo has the size of its mask.
    parts.open_sample = lambda sample, at_least=None: (open_image(sample[0], None, channels), read(sample[1]))
    used = [held[path] for path in pairs if path not in found.left_out]
    if not_scored := sum(each.counts.pop(ignore, 0) for each in used):
        parts.notes.append(f"Pixels of the value {ignore}, which are not scored: {not_scored:,}.")
    parts.notes += _missing_parts(found.parts) + mask_facts(used, names[parts.exclusive :], image_size)
    return _separated(parts, copies, True, found.left_out, folder)


# --- shared -----------------------------------------------------------------------------------------------------------


def _one_hot(scene: shapes.Scene) -> Tensor:
    """The visible pixels of the background and of each kind of shape, (C, H, W) bool."""
    return torch.from_numpy(scene.kinds[None] == np.arange(-1, len(shapes.CLASS_NAMES))[:, None, None])


def _shapes_parts(
    class_names: list[str], label_of: Callable[[shapes.Scene], object], image_size: int, mixed: bool = False
) -> Parts:
    def open_scene(seed: int, at_least: int | None = None) -> tuple[Image.Image, object]:
        scene = shapes.scene(seed, image_size, mixed=mixed)
        return scene.image, label_of(scene)

    return Parts(SHAPES, list(class_names), {part: list(seeds) for part, seeds in SHAPES_SEEDS.items()}, open_scene)


def _empty_parts(folder: str | Path, class_names: Sequence[str], split: dict) -> Parts:
    name = os.fsencode(from_hub.name_of(Path(folder).resolve())).decode("utf-8", "replace")
    return Parts(name, list(class_names), {part: [] for part in PARTS}, open_image, split)


def _divided(given: dict[str, list[Path]], copies: Copies, seed: list[int]) -> dict[str, list[Path]]:
    """The pictures by part: a folder's own parts; what it has no folder for is cut from its pictures, or from train."""
    if "all" in given:
        return copies.cut(given["all"], seed, SHARES)
    cut = {part: given.get(part, []) for part in PARTS}
    missing = {part: share for part, share in SHARES.items() if part not in given}
    return cut | copies.cut(given["train"], seed, missing) if "train" in given and missing else cut


def _missing_parts(given: dict[str, dict]) -> list[str]:
    missing = [part for part in SHARES if part not in given] if "train" in given else []
    return [f"There is no {part} part: {SHARES[part]:.0%} of train was set aside as one." for part in missing]


def _separated(parts: Parts, copies: Copies, allow_leaks: bool, left_out: dict[Path, str], folder: str | Path) -> Parts:
    """Leaves out of train what is in val or test as well, and refuses files that val and test share.

    Copies within a part are kept: those of two classes are named, the others counted. `left_out` is named at the end.
    """
    rows = [(path, part, label) for part in PARTS for path, label in parts.samples[part]]
    where = {path: (PARTS.index(part), label if isinstance(label, int) else 0) for path, part, label in rows}
    copied, within = set(), 0
    for copy in copies.pairs:
        pair = copies.paths[copy.first], copies.paths[copy.second]
        if not where.keys() >= set(pair):  # one of them is left out
            continue
        first, second = sorted(pair, key=lambda path: where[path][0])
        (part, label), (other_part, other_label) = where[first], where[second]
        if part == other_part and label == other_label:
            within += 1
        elif part == other_part:
            parts.notes.append(f"{first} is a copy of {second}, which is of another class.")
        elif PARTS[part] == "train":
            copied.add(first)
            parts.notes.append(f"Left out of train: {first} is a copy of {second}.")
        elif copy.exact and not allow_leaks:
            raise DataError(
                f"{first} and {second} are the same file, in val and in test: remove one, or use --allow-leaks."
            )
        else:
            parts.notes.append(f"{first} in val is a copy of {second} in test.")
    if within:
        parts.notes.append(
            f"Pairs of copies within a part and class: {within}. They are kept; train/check.py names them."
        )
    parts.samples["train"] = [sample for sample in parts.samples["train"] if sample[0] not in copied]
    parts.notes += left_out_notes(left_out, Path(folder))
    return _with_fingerprints(parts)


def _with_fingerprints(parts: Parts) -> Parts:
    parts.fingerprints = {part: sorted(fingerprint(sample[0]) for sample in parts.samples[part]) for part in PARTS}
    return parts
