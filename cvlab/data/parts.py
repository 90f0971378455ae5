"""Data sets as parts: train, val, test.

A classification folder is DIR/<class>/* or DIR/{train,val,test}/<class>/*; a segmentation folder is DIR/images/NAME.*
with DIR/masks/NAME.png. A folder without parts is cut 70/15/15. The cut has a seed of its own, so that trainings with
different seeds share their parts. Without a folder the parts are synthetic scenes (shapes.py).
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

from cvlab.data import shapes
from cvlab.data.cache import Cache
from cvlab.data.duplicates import Copy, find_copies, fingerprint, grouped
from cvlab.data.folders import DataError, class_pictures, existing, mask_files
from cvlab.data.masks import mask_classes, open_pair
from cvlab.transforms import ImageError, open_image

PARTS = ("train", "val", "test")
SHAPES = "cvlab/shapes.py"  # name of the synthetic scenes in saved models
SHARES = {"val": 0.15, "test": 0.15}  # of the pictures of a class; the rest is for train
SHAPES_SEEDS = {"train": range(3000), "val": range(3000, 3500), "test": range(3500, 4000)}
SMALL_CLASS = 20  # pictures; a smaller class has at most three in val and in test


@dataclass
class Parts:
    """A data set cut into parts. Nothing is decoded before `read`.

    Attributes:
        name: name of the data set.
        class_names: in the order of the labels, or of the mask channels.
        samples: samples[part] is a list of whatever `open_sample` opens.
        open_sample: sample to (image, label) or (image, mask (C, H, W) bool). With `at_least`, a large JPEG that has a
            label may be decoded smaller, but to no fewer pixels a side.
        split: how the cut was made: {"split_seed": ..., "per_class": ...}.
        fingerprints: fingerprints[part] are hashes of the files' contents; empty for synthetic scenes.
        notes: sentences about what was done to the data, such as files left out.
    """

    name: str
    class_names: list[str]
    samples: dict[str, list]
    open_sample: Callable[..., tuple[Image.Image, object]]
    split: dict = field(default_factory=dict)
    fingerprints: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

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
) -> Parts:
    """The parts of a folder of classes, or of synthetic scenes if `folder` is None.

    Copies of a photo stay in one part. If a folder with parts of its own has them in two, or they are of two classes,
    the copy in train is left out and named.

    Args:
        per_class: pictures of each class for train and for val; the rest is for test.
        image_size: of the synthetic scenes, pixels.
        allow_leaks: continue although val and test share files.
        needed: parts in which every class must have a picture.
        classes: use only the first so many classes, by name.
    """
    if folder is None:
        return _shapes_parts(shapes.CLASS_NAMES, lambda scene: scene.label, image_size)
    folder = existing(folder)
    pictures = class_pictures(folder)
    given = "all" not in pictures
    if given and "val" not in pictures:
        raise DataError(f"{folder} has train and test but no val: add a folder val, which chooses the best model.")
    class_names = list(pictures["train" if given else "all"])[:classes]
    if not class_names:
        raise DataError(f"{folder} has no classes: expected one folder of pictures for each class.")
    if len(class_names) == 1:
        raise DataError(f"{folder} has one class only, “{class_names[0]}”: add a folder of pictures of something else.")
    of_class = {name: {part: pictures[part][name] for part in pictures} for name in class_names}
    copies = _Copies([path for lists in of_class.values() for paths in lists.values() for path in paths])
    split = {"split_seed": split_seed, "per_class": per_class, "classes": classes}
    parts = Parts(
        folder.resolve().name,
        class_names,
        {part: [] for part in PARTS},
        lambda sample, at_least=None: (open_image(sample[0], at_least), sample[1]),
        split,
    )
    for label, (name, cut) in enumerate(of_class.items()):
        seed = [split_seed, label]
        if given and "test" not in cut:
            cut |= _cut(cut["train"], copies, seed, {"test": SHARES["test"]})
        elif not given and per_class:
            cut = _cut(cut["all"], copies, seed, dict(zip(("train", "val"), per_class, strict=True)), rest="test")
            if len(cut["val"]) < per_class[1]:  # train is filled first, so a lack shows here
                raise DataError(
                    f"Class “{name}” of {folder} has too few pictures to take {per_class[0]} for train "
                    f"and {per_class[1]} for val: take fewer, or add some."
                )
        elif not given:
            cut = _cut(cut["all"], copies, seed, SHARES)
        if short := [part for part in needed if not cut.get(part)]:
            raise DataError(f"Class “{name}” of {folder} has no picture for the part {short[0]}: add some.")
        for part in PARTS:
            parts.samples[part] += [(path, label) for path in cut[part]]
    _separate(parts, copies, allow_leaks)
    sizes = {name: sum(len(pictures[part][name]) for part in pictures) for name in class_names}
    if small := [f"{name} ({size})" for name, size in sizes.items() if size < SMALL_CLASS]:
        parts.notes.append(f"Classes of fewer than {SMALL_CLASS} pictures: {', '.join(small)}.")
    if given and "test" not in pictures:
        parts.notes.append(f"{folder.name} has no test part: {SHARES['test']:.0%} of train was set aside as one.")
    return _with_fingerprints(parts)


# --- segmentation -----------------------------------------------------------------------------------------------------


def segmentation_parts(
    folder: str | Path | None,
    split_seed: int = 0,
    class_names: Sequence[str] | None = None,
    image_size: int = 64,
    needed: Sequence[str] = PARTS,
) -> Parts:
    """The parts of a folder of images and masks, or of synthetic scenes if `folder` is None.

    The values of masks are 0/1, 0/255, or class indices with 0 as background.

    Args:
        class_names: a name for each channel; by default "foreground", or "class 1", "class 2", ...
        image_size: of the synthetic scenes, pixels.
        needed: parts that must have a picture.
    """
    if folder is None:
        return _shapes_parts(["shape"], lambda scene: torch.from_numpy(scene.mask)[None], image_size)
    folder = existing(folder)
    pairs = mask_files(folder)
    images = [path for path, mask in pairs.items() if mask.is_file()]
    if not images:
        raise DataError(f"{folder} has no pairs: expected images/NAME.jpg (or other) with masks/NAME.png.")
    num_classes, _, odd = mask_classes([pairs[path] for path in images])
    if odd:
        raise DataError(f"{odd[0]} Such masks: {len(odd)}; train/check.py names them.")
    if class_names is None:
        class_names = ["foreground"] if num_classes == 1 else [f"class {i + 1}" for i in range(num_classes)]
    if len(class_names) != num_classes:
        raise DataError(f"The masks of {folder} have {num_classes} classes, but {len(class_names)} names were given.")
    cut = _cut(images, _Copies(images), [split_seed], SHARES)
    if short := [part for part in needed if not cut[part]]:
        raise DataError(f"{folder} has only {len(images)} pairs: too few for a part {short[0]}.")
    parts = Parts(
        folder.resolve().name,
        list(class_names),
        {part: [(path, pairs[path]) for path in cut[part]] for part in PARTS},
        lambda sample, at_least=None: open_pair(*sample, num_classes),  # never smaller: it has the size of its mask
        {"split_seed": split_seed},
    )
    parts.notes += [f"Left out: images/{path.name} has no mask." for path in pairs if path not in images]
    return _with_fingerprints(parts)


# --- shared -----------------------------------------------------------------------------------------------------------


def _shapes_parts(class_names: list[str], label_of: Callable[[shapes.Scene], object], image_size: int) -> Parts:
    def open_scene(seed: int, at_least: int | None = None) -> tuple[Image.Image, object]:
        scene = shapes.scene(seed, image_size)
        return scene.image, label_of(scene)

    return Parts(SHAPES, list(class_names), {part: list(seeds) for part, seeds in SHAPES_SEEDS.items()}, open_scene)


class _Copies:
    """Which of some files are copies of one photo (duplicates.py)."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.pairs: list[Copy] = find_copies(paths)
        self.group = dict(zip(paths, grouped(len(paths), self.pairs), strict=True))


def _cut(
    paths: list[Path], copies: _Copies, seed: list[int], shares: dict[str, float], rest: str = "train"
) -> dict[str, list[Path]]:
    """Draws a part for each of `shares` (a fraction, or a number of pictures); what is left is the part `rest`.

    Copies of a photo stay in one part: a photo that was trained on tests nothing.
    """
    together: dict[int, list[Path]] = {}
    for path in paths:
        together.setdefault(copies.group[path], []).append(path)
    groups = list(together.values())
    groups = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    cut: dict[str, list[Path]] = {}
    for part, share in shares.items():
        wanted = share if isinstance(share, int) else round(share * len(paths))
        drawn: list[Path] = []
        while groups and len(drawn) < wanted:
            drawn += groups.pop()
        cut[part] = sorted(drawn)
    return cut | {rest: sorted(path for group in groups for path in group)}


def _separate(parts: Parts, copies: _Copies, allow_leaks: bool) -> None:
    """Leaves out of train what is in val or test as well, and refuses files that val and test share.

    Copies within a part are kept: those of two classes are named, the others counted.
    """
    where = {path: (PARTS.index(part), label) for part in PARTS for path, label in parts.samples[part]}
    left_out, within = set(), 0
    for copy in copies.pairs:
        pair = copies.paths[copy.first], copies.paths[copy.second]
        first, second = sorted(pair, key=lambda path: where[path][0])
        (part, label), (other_part, other_label) = where[first], where[second]
        if part == other_part and label == other_label:
            within += 1
        elif part == other_part:
            parts.notes.append(f"{first} is a copy of {second}, which is of another class.")
        elif PARTS[part] == "train":
            left_out.add(first)
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
    parts.samples["train"] = [sample for sample in parts.samples["train"] if sample[0] not in left_out]


def _with_fingerprints(parts: Parts) -> Parts:
    parts.fingerprints = {part: sorted(fingerprint(sample[0]) for sample in parts.samples[part]) for part in PARTS}
    return parts
