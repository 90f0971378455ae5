"""Reads config.json of a model folder and checks every entry: the folder may come from a stranger."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cvlab.files import LFS_POINTER, NOT_FETCHED, printable
from cvlab.models.model import MAX_CLASSES, MAX_MASKS, TILES, name_fault

FORMAT = 1
REQUIRED = {
    "task": str,
    "network": str,
    "arguments": dict,
    "class_names": list,
    "image_size": int,
    "mean": list,
    "std": list,
    "crop_pct": float,
    "threshold": float,
}
# Types of the arguments of networks that other libraries build. Any other one could name files or code.
OTHER_LIBRARIES = ("timm", "timm_head", "smp", "resnet_unet")
ALLOWED_ARGUMENTS = {
    "architecture": str,
    "global_pool": str,
    "class_token": bool,
    "fixed_input_size": bool,
    "single_output": bool,
    "drop_rate": float,
    "drop_path_rate": float,
    "pool": bool,
    "last_stage": str,
    "channels": int,
    "hidden": list,  # of numbers
    "dropout": float,
    "encoder": str,
    "decoder_channels": list,
}
OPTIONAL = {"interpolation": str, "crop_mode": str, "exclusive": bool, "stages": list, "channels": dict}
OPTIONAL |= {"data": dict, "options": dict, "precision": str, "versions": dict}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", TILES)
MAX_CONFIG_BYTES = 4 * 2**20
MAX_ARGUMENT = 8192  # channels, mostly
SHARES = ("dropout", "head_dropout", "drop_rate", "drop_path_rate")  # arguments between 0 and 1
# The ranges of numbers that make sense, and how many there are of each. Images lie between 0 and 1, and so do their
# means. The limits are of what decides on a heatmap (cvlab/trust/judge.py), the other thresholds of trust/conformal.py.
RANGES = {"image_size": (1, 4096, 1), "crop_pct": (0.1, 1, 1), "mean": (0, 1, 3), "std": (0.001, 10, 3)}
RANGES |= {"threshold": (1e-6, 1 - 1e-6, 1), "temperature": (0.05, 20, 1), "limits": (-2, 2, 2)}
RANGES |= dict.fromkeys(("set_threshold", "core_threshold", "rim_threshold"), (0, 1, 1))
MAX_DEPTH = 32  # also of lists: modules are built one by one before any shape can be compared


class CheckpointError(ValueError):
    """The folder cannot be opened as a model; the message names the file, what is wrong with it, and what to do."""


@contextmanager
def opened(path: Path, limit: int) -> Iterator[BinaryIO]:
    """Opens a file of the folder once, and checks the open file: replacing it on disk afterwards changes nothing.

    Raises:
        CheckpointError: it is missing, not a plain file, a link to outside the folder, or larger than `limit` bytes.
    """
    folder = path.parent.resolve()
    here = Path(os.path.realpath(path))  # not resolve(): a link to itself raises there
    homes = [folder]
    if folder.parent.name == "snapshots":  # in the Hugging Face cache the files are links into the repository's blobs
        homes.append(folder.parents[1] / "blobs")
    if not any(here.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path} is a link that leads out of its folder. Put the file itself there.")
    try:
        # Non-blocking: opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is not a model folder: it has no {path.name}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not a plain file.")
    with open(descriptor, "rb") as file:
        if found.st_size > limit:
            raise CheckpointError(f"{path} has {found.st_size:,} bytes, and the limit is {limit:,}.")
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise CheckpointError(f"{path} {NOT_FETCHED}")
        file.seek(0)
        yield file


def read_config(path: Path) -> dict:
    """The entry "cvlab" of config.json, or the same entries made from timm's or smp's, each one checked.

    Raises:
        CheckpointError: the file cannot be read, or an entry is missing, malformed or beyond its limits.
    """
    with opened(path, MAX_CONFIG_BYTES) as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    try:
        config = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of a million digits
        raise CheckpointError(f"{path} is not valid JSON. Download or train the model again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object, so it is not a model's configuration.")
    if "cvlab" in config:
        block = config["cvlab"]
        if not isinstance(block, dict):
            raise CheckpointError(f"{path}: the entry “cvlab” is not an object.")
        if block.get("format") != FORMAT:
            found = str(block.get("format"))[:60]
            raise CheckpointError(f"{path} has the format {found!a}; this version of cvlab reads {FORMAT}.")
    elif "architecture" in config or "_model_class" in config:
        try:
            block = _from_other_library(config)
        except ValueError as error:
            raise CheckpointError(f"{path}: {printable(str(error)[:300])}.") from error  # it may quote the file
    else:
        raise CheckpointError(
            f"{path} was not written by cvlab, timm or segmentation_models.pytorch: it cannot be opened."
        )
    _check_types(block, path)
    architectures = [each.get("architecture") for each in (config, block["arguments"])]
    if "architecture" in config and architectures[0] != architectures[1]:
        both = " and ".join(ascii(str(name)[:60]) for name in architectures)
        raise CheckpointError(f"{path} names two networks: {both}.")
    _check_arguments(block, path)
    _check_class_names(block["class_names"], block["task"], path)
    if block["task"] == "classification" and len(block["class_names"]) == 1:
        raise CheckpointError(f"{path}: with a single class every probability would be 1. A classifier needs two.")
    if block["crop_mode"] == TILES and block["task"] == "classification":
        raise CheckpointError(f"{path}: the crop_mode “tiles” is for segmenters.")
    if block["exclusive"] and (block["task"] == "classification" or len(block["class_names"]) == 1):
        raise CheckpointError(f"{path}: “exclusive” is for segmenters of a background and at least one class.")
    _check_numbers(block, path)
    return block


def _from_other_library(config: dict) -> dict:
    # Imported here: the page starts faster without timm and torchvision.
    if "architecture" in config:
        from cvlab.models.timm import from_timm_config

        return from_timm_config(config)
    from cvlab.models.smp import from_smp_config

    return from_smp_config(config)


def _check_types(block: dict, path: Path) -> None:
    block.setdefault("interpolation", "bilinear")
    block.setdefault("crop_mode", "center")
    block.setdefault("exclusive", False)
    for key, kind in (REQUIRED | OPTIONAL).items():
        if key not in block and key in OPTIONAL:
            continue
        # Other JSON writers write 1.0 as 1; to Python, a bool is an int.
        kinds = (int, float) if kind is float else kind
        if not isinstance(block.get(key), kinds) or (isinstance(block.get(key), bool) and kind is not bool):
            raise CheckpointError(f"{path}: “{key}” is missing or is not of type {kind.__name__}.")


def _check_arguments(block: dict, path: Path) -> None:
    """Types for the networks of other libraries; for all of them numbers and lists of numbers within the limits."""
    for key, value in block["arguments"].items():
        if block["network"] in OTHER_LIBRARIES:
            kind = ALLOWED_ARGUMENTS.get(key)
            if kind is None:
                raise CheckpointError(f"{path}: the argument {key[:60]!a} of {block['network']} is not allowed.")
            if not isinstance(value, (int, float) if kind is float else kind):
                raise CheckpointError(f"{path}: the argument “{key}” is not of type {kind.__name__}.")
            if isinstance(value, str | bool):
                continue  # names are looked up by the network itself
        limit = 1 if key in SHARES else MAX_DEPTH if key == "depth" else MAX_ARGUMENT
        values = value if isinstance(value, list) else [value]
        if len(values) > MAX_DEPTH or not all(isinstance(v, int | float) and 0 <= v <= limit for v in values):
            raise CheckpointError(f"{path}: the argument {key[:60]!a} is not a number from 0 to {limit}, or too long.")


def _check_class_names(names: list, task: str, path: Path) -> None:
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: class_names must be a list of at least one name.")
    most = MAX_CLASSES if task == "classification" else MAX_MASKS
    if len(names) > most:
        raise CheckpointError(f"{path}: there are {len(names):,} class_names, and the limit is {most:,}.")
    twice, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise CheckpointError(f"{path}: the class name {twice[:60]!a} is there twice.")
    for name in names:
        if fault := name_fault(name):
            raise CheckpointError(f"{path}: the class name {name[:60]!a} {fault}.")


def _check_numbers(block: dict, path: Path) -> None:
    for key, (least, most, count) in RANGES.items():
        given = block.get(key, [least] * count)
        count = block.get("channels", {}).get("count", count) if key in ("mean", "std") else count
        numbers = given if isinstance(given, list) else [given]
        # Python's JSON reads NaN and Infinity: both fail the comparison.
        if len(numbers) != count or not all(type(each) in (int, float) and least <= each <= most for each in numbers):
            wanted = f"{'a number' if count == 1 else f'{count} numbers'} from {least} to {most}"
            raise CheckpointError(f"{path}: {key} is {str(given)[:60]!a}; it must be {wanted}.")
    most = RANGES["image_size"][1]
    if block["image_size"] / block["crop_pct"] > most:
        raise CheckpointError(f"{path}: image_size / crop_pct, the side to which photos are resized, is over {most}.")
    for key, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if block[key] not in known:
            raise CheckpointError(f"{path}: the {key} {block[key][:60]!a} is none of {', '.join(known)}.")
