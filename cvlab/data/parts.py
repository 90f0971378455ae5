"""Data sets as parts: train, val, test.

A classification folder is DIR/<class>/* or DIR/{train,val,test}/<class>/*; a segmentation folder is DIR/images/NAME.*
with DIR/masks/NAME.png. Where no parts are given they are cut 70/15/15 by a seed of their own, so that trainings with
different seeds share them. With no folder at all the parts are synthetic scenes (shapes.py).
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
from cvlab.data.folders import DataError, class_folders, existing, given_parts, pictures_in
from cvlab.data.masks import mask_classes, open_pair
from cvlab.transforms import ImageError, open_image

PARTS = ("train", "val", "test")
SHAPES = "cvlab/shapes.py"  # what saved models call the synthetic scenes of shapes.py
SHARES = {"val": 0.15, "test": 0.15}  # of a class; the rest is for training
SHAPES_SIZES = {"train": 3000, "val": 500, "test": 500}
SMALL_CLASS = 20  # pictures: of fewer, val and test get three at most


@dataclass
class Parts:
    """A data set cut into parts; nothing is decoded before `read`.

    Attributes:
        name: of the data set, for the card.
        class_names: in the order of the labels (or of the mask channels).
        samples: samples[part] is a list of whatever `open_sample` opens.
        open_sample: sample to (image, label) or (image, mask (C, H, W) bool). Given `at_least`, an image with a label
            may be smaller than its file's, but not below so many pixels a side.
        split: what decided the cut: {"split_seed": ..., "per_class": ...}.
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
        """What config.json keeps of the data, so that a later evaluation knows what was trained on."""
        return {"name": self.name, **self.split, "fingerprints": self.fingerprints}

    def as_recorded(self, fingerprints: dict[str, list[str]]) -> int:
        """Puts every picture that a training recorded into the part that it was in then.

        Pictures that are not recorded stay in the part of this cut. Returns how many were trained on.
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

        Files that cannot be opened are left out and named in `notes`, and their samples dropped.

        Args:
            prepare: image to what is kept of it, uint8.
            prepare_mask: mask to what is kept of it, bool; by default the whole.
            at_least: large JPEGs may be decoded smaller, but not below so many pixels a side (see `open_image`).
            cache: keeps everything; by default one of its own.

        Raises:
            DataError: nothing in the part can be opened.
            OSError: the disk has no room for what the cache does not keep in memory.
        """
        samples = self.samples[part]
        good: list = []

        def read_one(sample: object) -> tuple[Tensor, object] | str:
            try:
                image, label = self.open_sample(sample, at_least=at_least)
                return prepare(image), prepare_mask(label) if prepare_mask else label
            except (ImageError, DataError) as error:
                return str(error)

        def readable() -> Iterator[tuple[Tensor, object]]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                opened = tqdm(pool.map(read_one, samples), f"reading {part}", len(samples), leave=False)
                for sample, pair in zip(samples, opened, strict=True):
                    if isinstance(pair, str):
                        self.notes.append(f"Left out of {part}: {pair}")
                    else:
                        good.append(sample)
                        yield pair

        kept = (cache or Cache()).keep(readable())
        if not kept:
            raise DataError(f"No picture of the part {part!r} of {self.name} can be used. {' '.join(self.notes[:3])}")
        self.samples[part] = good
        return [image for image, _ in kept], [label for _, label in kept]


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
    """The parts of a folder of classes, or of synthetic scenes where `folder` is None.

    Copies of a photo stay in one part. Where the folder has parts of its own, or the copies are of two classes, the one
    in train is left out and named.

    Args:
        split_seed: decides the cut, where the folder has none of its own.
        per_class: take so many of each class for train and val; the rest is test.
        image_size: of the synthetic scenes.
        allow_leaks: go on although files of val stand in test, too.
        needed: parts in which every class must have a picture.
        classes: take the first so many, in the order of their names; by default all.

    Raises:
        DataError: no such folder, fewer than two classes in it, a class that is too small to be cut, or the same file
            in val and test.
    """
    if folder is None:
        return _shapes_parts(shapes.CLASS_NAMES, lambda scene: scene.label, image_size)
    folder = existing(folder)
    given = {part: folder / name for part, name in given_parts(folder).items()}
    roots = given or {"all": folder}
    class_names = class_folders(given["train"] if given else folder)[:classes]
    if not class_names:
        raise DataError(f"{folder} has no classes: expected one folder of pictures for each class.")
    split = {"split_seed": split_seed, "per_class": per_class, "classes": classes}
    parts = Parts(folder.resolve().name, class_names, {part: [] for part in PARTS}, _open_labelled, split)
    if len(class_names) == 1:
        raise DataError(f"{folder} has one class only, {class_names[0]!r}: add a folder of what it is to be told from.")
    pictures = {name: {part: pictures_in(root / name) for part, root in roots.items()} for name in class_names}
    copies = _Copies([path for lists in pictures.values() for paths in lists.values() for path in paths])
    for label, name in enumerate(class_names):
        if given:
            cut = pictures[name]
            if "test" not in given:
                cut["train"], cut["test"] = _cut(cut["train"], copies, [split_seed, label], {"test": SHARES["test"]})
        else:
            shares = dict(zip(("train", "val"), per_class, strict=True)) if per_class else SHARES
            pieces = _cut(pictures[name]["all"], copies, [split_seed, label], shares)
            cut = dict(zip(("test" if per_class else "train", *shares), pieces, strict=True))
            if per_class and len(cut["val"]) < per_class[1]:  # train is filled first, so a lack shows here
                raise DataError(
                    f"Class {name!r} of {folder} has too few pictures to take {per_class[0]} for train "
                    f"and {per_class[1]} for val: take fewer, or add some."
                )
        if short := [part for part in needed if not cut.get(part)]:
            raise DataError(f"Class {name!r} of {folder} has no picture for the part {short[0]!r}: add some.")
        for part in PARTS:
            parts.samples[part] += [(path, label) for path in cut.get(part, [])]
    _separate(parts, copies, allow_leaks)
    sizes = {name: sum(map(len, lists.values())) for name, lists in pictures.items()}
    if small := [f"{name} ({size})" for name, size in sizes.items() if size < SMALL_CLASS]:
        parts.notes.append(f"Classes of fewer than {SMALL_CLASS} pictures: {', '.join(small)}.")
    if given and "test" not in given:
        parts.notes.append(f"{folder.name} has no test part: {SHARES['test']:.0%} of train was set aside as one.")
    return _with_fingerprints(parts)


def _open_labelled(sample: tuple[Path, int], at_least: int | None = None) -> tuple[Image.Image, int]:
    path, label = sample
    return open_image(path, at_least), label


# --- segmentation -----------------------------------------------------------------------------------------------------


def segmentation_parts(
    folder: str | Path | None,
    split_seed: int = 0,
    class_names: Sequence[str] | None = None,
    image_size: int = 64,
    needed: Sequence[str] = PARTS,
) -> Parts:
    """The parts of a folder of images and masks, or of synthetic scenes where `folder` is None.

    Masks are 0/1, 0/255, or class indices with 0 as background.

    Args:
        split_seed: decides the cut.
        class_names: one name per channel; by default "foreground", or "class 1", "class 2", ...
        image_size: of the synthetic scenes.
        needed: parts that must have a picture.

    Raises:
        DataError: no such folder, no pairs in it, or masks with values that are neither.
    """
    if folder is None:
        return _shapes_parts(["shape"], lambda scene: torch.from_numpy(scene.mask)[None], image_size)
    folder = existing(folder)
    images = pictures_in(folder / "images")
    pairs = {path: folder / "masks" / f"{path.stem}.png" for path in images}
    missing = [path.name for path, mask in pairs.items() if not mask.is_file()]
    images = [path for path in images if pairs[path].is_file()]
    if not images:
        raise DataError(f"{folder} has no pairs: expected images/NAME.jpg (or other) with masks/NAME.png.")
    num_classes, _, odd = mask_classes([pairs[path] for path in images])
    if odd:
        raise DataError(f"{odd[0]} Such masks: {len(odd)}; train/check.py names them.")
    if class_names is None:
        class_names = ["foreground"] if num_classes == 1 else [f"class {i + 1}" for i in range(num_classes)]
    if len(class_names) != num_classes:
        raise DataError(f"The masks of {folder} have {num_classes} classes, but {len(class_names)} names were given.")
    train, *others = _cut(images, _Copies(images), [split_seed], SHARES)
    cut = dict(zip(PARTS, (train, *others), strict=True))
    if short := [part for part in needed if not cut[part]]:
        raise DataError(f"{folder} has only {len(images)} pairs: too few for a part {short[0]!r}.")
    parts = Parts(
        folder.resolve().name,
        list(class_names),
        {part: [(path, pairs[path]) for path in cut[part]] for part in PARTS},
        lambda sample, at_least=None: open_pair(*sample, num_classes),  # whole: of the size of its mask
        {"split_seed": split_seed},
    )
    parts.notes += [f"Left out: images/{name} has no mask." for name in missing]
    return _with_fingerprints(parts)


# --- shared -----------------------------------------------------------------------------------------------------------


def _shapes_parts(class_names: list[str], label_of: Callable[[shapes.Scene], object], image_size: int) -> Parts:
    first = 0
    samples = {}
    for part, count in SHAPES_SIZES.items():
        samples[part] = list(range(first, first + count))
        first += count

    def open_scene(seed: int, at_least: int | None = None) -> tuple[Image.Image, object]:
        scene = shapes.scene(seed, image_size)
        return scene.image, label_of(scene)

    return Parts(SHAPES, list(class_names), samples, open_scene)


class _Copies:
    """Which of some files are copies of one photo (duplicates.py)."""

    def __init__(self, paths: list[Path]) -> None:
        self.pairs: list[Copy] = find_copies(paths)
        self.paths = paths
        self.group = dict(zip(paths, grouped(len(paths), self.pairs), strict=True))

    def together(self, paths: list[Path]) -> list[list[Path]]:
        """The files with all copies of a photo in one list; lists and files in the order of `paths`."""
        groups: dict[int, list[Path]] = {}
        for path in paths:
            groups.setdefault(self.group[path], []).append(path)
        return list(groups.values())


def _cut(paths: list[Path], copies: _Copies, seed: list[int], shares: dict[str, float]) -> tuple[list[Path], ...]:
    """The rest, then a piece for each of `shares` (a fraction, or a number of pictures), drawn by the seed.

    Copies of a photo stay in one piece: a training photo in another part would be no test.
    """
    groups = copies.together(paths)
    groups = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    pieces = []
    for share in shares.values():
        wanted = share if isinstance(share, int) else round(share * len(paths))
        piece: list[Path] = []
        while groups and len(piece) < wanted:
            piece += groups.pop()
        pieces.append(sorted(piece))
    return sorted(path for group in groups for path in group), *pieces


def _separate(parts: Parts, copies: _Copies, allow_leaks: bool) -> None:
    """Leaves out of train what stands in val or test as well; refuses files that val and test share.

    Copies within a part are kept; those of two classes are named, the others counted.
    """
    where = {path: (PARTS.index(part), label) for part in PARTS for path, label in parts.samples[part]}
    dropped, repeated = set(), 0
    for copy in copies.pairs:
        pair = sorted((copies.paths[copy.first], copies.paths[copy.second]), key=lambda path: where[path][0])
        (first_part, first_label), (second_part, second_label) = (where[path] for path in pair)
        first, second = pair
        if first_part == second_part and first_label == second_label:
            repeated += 1
        elif first_part == second_part:
            parts.notes.append(f"{first} is a copy of {second}, which is of another class.")
        elif PARTS[first_part] == "train":
            dropped.add(first)
            parts.notes.append(f"Left out of train: {first} is a copy of {second}.")
        elif copy.exact and not allow_leaks:
            raise DataError(
                f"{first} and {second} are the same file, in val and in test: remove one, or go on with --allow-leaks."
            )
        else:
            parts.notes.append(f"{first} in val is a copy of {second} in test.")
    if repeated:
        parts.notes.append(
            f"Pairs of copies within a part and class: {repeated}. They are kept; train/check.py names them."
        )
    parts.samples["train"] = [sample for sample in parts.samples["train"] if sample[0] not in dropped]


def _with_fingerprints(parts: Parts) -> Parts:
    parts.fingerprints = {part: sorted(fingerprint(sample[0]) for sample in parts.samples[part]) for part in PARTS}
    return parts
