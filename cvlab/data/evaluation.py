"""The data that a trained model is measured on: its own parts, as the model sees them."""

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cvlab.data.folders import existing, pictures_in
from cvlab.data.parts import PARTS, SHAPES, Parts, classification_parts, segmentation_parts
from cvlab.models import Model
from cvlab.models.model import TILES
from cvlab.transforms import large_view, open_image, square_view, to_uint8, whole_view

MOST = 2000  # pictures that say what a model's photos look like, or what others do


def parts_of(model: Model, data: Path | None, part: str) -> tuple[Parts, int]:
    """The parts as they were when the model was trained, and how many of the pictures it was trained on.

    Args:
        data: the data folder; None for a model of synthetic scenes.
        part: the part that is needed, or "all": samples["all"] holds the pictures of all parts.
    """
    facts, size, names, channels = model.config.get("data", {}), model.image_size, model.class_names, model.channels
    seed, per_class, classes = (facts.get(key) for key in ("split_seed", "per_class", "classes"))
    needed = () if part == "all" else (part,)
    if data is None and facts.get("name") != SHAPES:
        trained_on = facts.get("name", "pictures whose name was not recorded")
        raise ValueError(f"The model was trained on {trained_on}: give their folder with --data.")
    if model.task == "classification":
        parts = classification_parts(data, seed or 0, per_class, size, True, needed, classes, names, None, channels)
    else:
        names = names[model.first_object :]
        parts = segmentation_parts(data, seed or 0, names, size, needed, None, model.exclusive, channels)
    trained_on = parts.as_recorded(facts.get("fingerprints", {}))
    parts.samples["all"] = [sample for name in PARTS for sample in parts.samples[name]]
    return parts, trained_on


def is_own_test_part(model: Model, parts: Parts) -> bool:
    """Whether the test part is the one that was set aside when the model was trained, and not other pictures."""
    facts = model.config.get("data", {})
    if recorded := facts.get("fingerprints"):
        return parts.fingerprints["test"] == recorded["test"]
    return facts.get("name", parts.name) == parts.name


def read_views(parts: Parts, part: str, model: Model) -> tuple[Tensor, list]:
    """The pictures of a part as the model sees them, (N, 3, S, S) uint8, and their labels or masks."""
    views, labels = parts.read(part, lambda image: to_uint8(square_view(image, model)))
    return torch.stack(views), labels


def read_photos(parts: Parts, part: str, model: Model) -> tuple[list[Tensor], list[Tensor]]:
    """All that a segmenter sees of the photos of a part, (3, H, W) uint8 each, and their masks.

    That is one view (3, S, S) of each, or for a segmenter that sees tiles the `large_view`.
    """
    seen = large_view if model.crop_mode == TILES else whole_view
    return parts.read(part, lambda image: to_uint8(seen(image, model.image_size)))


def open_views(paths: Sequence[Path], model: Model) -> tuple[Tensor, list[str]]:
    """Single pictures as the model sees them, (N, 3, S, S) uint8, and their names."""
    views = [to_uint8(square_view(open_image(path, None, model.channels), model)) for path in paths]
    return torch.stack(views), [path.name for path in paths]


def foreign_views(folder: Path, model: Model) -> Tensor:
    """At most MOST pictures of anything in a folder and its subfolders, as the model sees them, (N, 3, S, S) uint8."""
    paths = pictures_in(existing(folder), {}, arrays=bool(model.channels))
    samples = {"others": random.Random(0).sample(paths, min(MOST, len(paths)))}
    parts = Parts(folder.name, [], samples, lambda path, at_least=None: (open_image(path, at_least, model.channels), 0))
    return read_views(parts, "others", model)[0]


def note_test_read(folder: Path, data: str) -> None:
    """Adds a line to test_reads.jsonl in a folder: when the test part was read, of which data, by which command.

    To be called when all was read and before a score is told.
    A test part that is read again and again, until a model does well on it, is no longer a test.
    """
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "data": data, "command": sys.argv}
    with open(folder / "test_reads.jsonl", "a", encoding="utf-8") as file:  # two commands may end at once
        file.write(json.dumps(line) + "\n")
