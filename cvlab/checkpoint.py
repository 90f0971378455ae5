"""A model as a folder that rebuilds itself: config.json and model.safetensors, strict and without pickles.

A folder may come from a stranger. Each file is opened once, is a plain file inside the folder and is no larger than it
may be; the config is checked entry by entry; the network is measured on the meta device, where it takes no memory, and
its shapes are compared with the file's before a weight is read. Nothing of the folder is ever executed.
"""

import json
import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from cvlab import atomic, hub
from cvlab.models import build
from cvlab.models.stage import MAX_CLASSES

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
# What may be asked of timm, and of which type. Other keyword arguments of timm's networks name files or code.
ALLOWED = {
    "timm": {
        "architecture": str,
        "global_pool": str,
        "class_token": bool,
        "fixed_input_size": bool,
        "drop_rate": float,
        "drop_path_rate": float,
    },
    "timm_head": {
        "architecture": str,
        "pool": bool,
        "last_stage": str,
        "channels": int,
        "hidden": list,  # of numbers
        "dropout": float,
    },
}
OPTIONAL = {"interpolation": str, "stages": list, "data": dict, "precision": str, "versions": dict}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
MAX_CONFIG_BYTES = 4 * 2**20
MAX_IMAGE_SIZE = 4096
MAX_ARGUMENT = 8192  # channels, mostly
MAX_DEPTH = 32  # modules are built one by one before any shape can be compared
MAX_NAME = 300  # characters of a class name
MAX_HEADER_BYTES = 8 * 2**20  # of model.safetensors: names and shapes
MAX_PARAMETERS = hub.MAX_WEIGHTS_BYTES // 4  # with buffers, in float32
MAX_ACTIVATIONS = 2**31  # numbers that the layers put out for one image: 8 GiB
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32")

Shapes = dict[str, tuple[int, ...]]


class CheckpointError(ValueError):
    """A folder that is no model; the message says what is wrong with which file, and what to do."""


def save(model: nn.Module, folder: str | Path, **facts: object) -> None:
    """Writes config.json and model.safetensors, each whole or not at all.

    A network of timm is written so that timm opens it without cvlab, by "local-dir:FOLDER" or, published, by
    "hf-hub:user/name": its own keys beside ours, and its own tensor names.

    Args:
        model: one made by `cvlab.models.build` or `load`.
        folder: made if it is not there.
        facts: further entries of the config, such as data={"name", "split_seed", "fingerprints"} or precision="bf16".
    """
    folder = Path(folder)
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "captum")}
    block = {**model.config, **facts, "format": FORMAT, "threshold": model.threshold, "versions": versions}
    keys_of_timm = model.timm_config() if model.config["network"] == "timm" else {}
    config = json.dumps({**keys_of_timm, "cvlab": block}, indent=1) + "\n"  # may fail: before anything is written
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _stored(model).state_dict().items()}
    atomic.write_bytes(folder / "model.safetensors", to_safetensors(weights, metadata={"format": "pt"}))
    atomic.write_text(folder / "config.json", config)


def load(folder_or_id: str | Path) -> nn.Module:
    """The model of a folder or of a Hub name "user/name[@revision]", in eval mode, on the CPU.

    It knows task, class_names, image_size, crop_pct, interpolation, threshold, stages, config and `source`: the folder,
    or user/name@commit. Classifiers of timm and U-Nets of segmentation_models.pytorch are opened like our own.

    Raises:
        CheckpointError: with a sentence for each thing that can be wrong.
        cvlab.hub.HubError: the name cannot be had from the Hub.
    """
    folder = Path(folder_or_id)
    if not folder.is_dir():
        if not hub.is_id(str(folder_or_id)):
            raise CheckpointError(
                f"{folder_or_id} is neither a folder nor a name on the Hub (user/name). Check the path."
            )
        folder = hub.pull(str(folder_or_id))
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    config = _read_config(config_file)
    arguments = {key: config[key] for key in (*REQUIRED, "interpolation") if key != "task"}
    shapes = _measured(arguments, config["task"], config_file)
    with opened(weights_file, hub.MAX_WEIGHTS_BYTES) as file:
        start, found = _read_header(file, weights_file)
        misfit = _misfit(shapes, found)
        if misfit and config["network"] != "timm":
            raise CheckpointError(f"{weights_file} does not fit config.json: {misfit}.")
        weights = _read_tensors(file, start, weights_file)
    model = build(**arguments)
    try:
        if misfit:
            weights = _in_todays_names(model, weights)
        _stored(model).load_state_dict(weights)
    except Exception as error:  # timm's converters meet tensors that they do not expect: KeyError, IndexError ...
        reason = misfit or str(error).split("\n")[0]
        raise CheckpointError(f"{weights_file} does not fit config.json: {reason}.") from error
    model.config = {**config, "stages": list(model.stages)}
    model.source = hub.source_of(folder)
    return model.eval()


def _stored(model: nn.Module) -> nn.Module:
    """The module whose tensors are in the file: of a network of timm only timm's, without a prefix."""
    return model.backbone if model.config["network"] == "timm" else model


# --- config.json ------------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict:
    """The entry 'cvlab' of a config, or the same made of timm's keys, with every entry within its limits."""
    with opened(path, MAX_CONFIG_BYTES) as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    try:
        config = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of a million digits
        raise CheckpointError(f"{path} is not valid JSON. Fetch or train the model again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no entries: it is not a model's configuration.")
    if "cvlab" in config:
        block = config["cvlab"]
        if not isinstance(block, dict):
            raise CheckpointError(f"{path}: the entry 'cvlab' is not an object.")
        if block.get("format") != FORMAT:
            raise CheckpointError(f"{path} is of format {block.get('format')!r}; this version of cvlab reads {FORMAT}.")
    elif "architecture" in config or "_model_class" in config:
        try:
            block = _from_other_library(config)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}.") from error
    else:
        raise CheckpointError(
            f"{path} was written neither by cvlab nor by timm or segmentation_models.pytorch: it cannot be opened."
        )
    if "architecture" in config and config["architecture"] != _architecture(block):
        raise CheckpointError(f"{path} names two networks: {config['architecture']!r} and {_architecture(block)!r}.")
    _check_types(block, path)
    _check_arguments(block, path)
    _check_class_names(block["class_names"], path)
    _check_numbers(block, path)
    return block


def _from_other_library(config: dict) -> dict:
    # Imported here: the page need not wait for timm and torchvision until a model asks for them.
    if "architecture" in config:
        from cvlab.models.transfer import from_timm_config

        return from_timm_config(config)
    from cvlab.models.resnet_unet import from_smp_config

    return from_smp_config(config)


def _architecture(block: dict) -> object:
    return block["arguments"].get("architecture") if isinstance(block.get("arguments"), dict) else None


def _check_types(block: dict, path: Path) -> None:
    block.setdefault("interpolation", "bilinear")
    for key, kind in (REQUIRED | OPTIONAL).items():
        if key not in block and key in OPTIONAL:
            continue
        # JSON writes 1.0 as 1 in other hands; a bool is an int to Python only.
        kinds = (int, float) if kind is float else kind
        if not isinstance(block.get(key), kinds) or isinstance(block.get(key), bool):
            raise CheckpointError(f"{path}: {key!r} is missing or is not of type {kind.__name__}.")


def _check_arguments(block: dict, path: Path) -> None:
    for key, value in block["arguments"].items():
        if block["network"] in ALLOWED:
            kind = ALLOWED[block["network"]].get(key)
            if kind is None:
                raise CheckpointError(f"{path}: the argument {key[:60]!r} of a network of timm is not allowed.")
            if not isinstance(value, (int, float) if kind is float else kind):
                raise CheckpointError(f"{path}: the argument {key!r} is not of type {kind.__name__}.")
            if isinstance(value, str | bool):
                continue
        if key == "encoder" and isinstance(value, str):
            continue  # one of a list, or refused by the network
        values, limit = value if isinstance(value, list) else [value], MAX_DEPTH if key == "depth" else MAX_ARGUMENT
        if len(values) > MAX_DEPTH or not all(isinstance(v, int | float) and abs(v) <= limit for v in values):
            raise CheckpointError(f"{path}: the argument {key!r} is no number, or is too large to be a network's.")


def _check_class_names(names: list, path: Path) -> None:
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: class_names must be a list of at least one name.")
    if len(names) > MAX_CLASSES:
        raise CheckpointError(f"{path}: there are {len(names):,} class_names, and the limit is {MAX_CLASSES:,}.")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise CheckpointError(f"{path}: the class name {twice[:60]!r} is there twice.")
    for name in names:
        if not name.strip() or len(name) > MAX_NAME:
            raise CheckpointError(f"{path}: a class name is empty or longer than {MAX_NAME} characters.")
        # Line ends and terminal codes, halves of characters, and marks that turn the reading direction around.
        if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in TURNING_MARKS for c in name):
            raise CheckpointError(f"{path}: the class name {name[:60]!a} holds characters that control a display.")


TURNING_MARKS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _check_numbers(block: dict, path: Path) -> None:
    if not 1 <= block["image_size"] <= MAX_IMAGE_SIZE:
        raise CheckpointError(f"{path}: image_size {block['image_size']} is not within 1 and {MAX_IMAGE_SIZE}.")
    for key in ("mean", "std"):
        # Python's JSON knows NaN and Infinity: both fail the comparison.
        fine = [isinstance(value, int | float) and abs(value) < 1000 for value in block[key]]
        if fine != [True] * 3:
            raise CheckpointError(f"{path}: {key} must be three numbers below 1000, one a channel.")
    if not 0 < block["crop_pct"] <= 1 or not 0 < block["threshold"] < 1 or min(block["std"]) <= 0:
        raise CheckpointError(f"{path}: crop_pct, threshold or std is outside its range.")
    if block["interpolation"] not in INTERPOLATIONS:
        raise CheckpointError(f"{path}: the interpolation {block['interpolation'][:60]!r} is not known.")


# --- the network, without memory --------------------------------------------------------------------------------------


def _measured(arguments: dict, task: str, path: Path) -> Shapes:
    """The shapes of the tensors that the network needs; it may be neither too large nor another than the config says.

    Raises:
        CheckpointError: it cannot be built, is for another task, or would take too much memory.
    """
    with _building(path), torch.device("meta"):
        model = build(**arguments).eval()
    if model.task != task:
        raise CheckpointError(f"{path} says {task}, but network {arguments['network']!r} is for {model.task}.")
    numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if numbers > MAX_PARAMETERS:
        raise CheckpointError(f"{path} describes a network of {numbers:,} numbers; the limit is {MAX_PARAMETERS:,}.")
    side = arguments["image_size"]
    with _building(path), torch.device("meta"):
        activations = _count_activations(model, torch.empty(1, 3, side, side))
    if activations > MAX_ACTIVATIONS:
        raise CheckpointError(
            f"{path}: for an image of {side} x {side} pixels the network's layers put out {activations:,} numbers; "
            f"the limit is {MAX_ACTIVATIONS:,}."
        )
    return {name: tuple(tensor.shape) for name, tensor in _stored(model).state_dict().items()}


@contextmanager
def _building(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the constructors of a thousand networks meet arguments that they do not expect
        reason = (str(error).split("\n")[0] or type(error).__name__)[:300].rstrip(".")  # torch adds its C++ stack
        raise CheckpointError(f"{path} describes a model that cannot be built: {reason}.") from error


def _count_activations(model: nn.Module, images: Tensor) -> int:
    """How many numbers the layers without layers inside put out in one forward pass."""
    count = 0

    def add(module: nn.Module, inputs: tuple, output: object) -> None:
        nonlocal count
        count += output.numel() if isinstance(output, Tensor) else 0

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(images)
    return count


# --- model.safetensors ------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path, limit: int) -> Iterator[BinaryIO]:
    """The one opening of a file of the folder: what was checked is what is read, whatever becomes of the name.

    Raises:
        CheckpointError: it is missing, no plain file, a link that leads out of the folder, or over the limit in bytes.
    """
    folder = path.parent.resolve()
    here = Path(os.path.realpath(path))  # not resolve(): a link to itself raises there
    # In the Hugging Face cache the files are links into the repository's blobs.
    homes = [folder] + [folder.parents[1] / "blobs"] * (folder.parent.name == "snapshots")
    if not any(here.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{path} is a link that leads out of its folder. Put the file itself there.")
    try:
        # Not blocking: a pipe would keep us waiting for its writer.
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
        yield file


def _read_header(file: BinaryIO, path: Path) -> tuple[bytes, Shapes]:
    """The first bytes of a safetensors file, up to where the numbers begin, and the shapes that they announce."""
    length = file.read(8)
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > MAX_HEADER_BYTES and length.startswith((b"PK", b"\x80")):
        raise CheckpointError(f"{path} is a pickle or an archive under another name: such files can run code.")
    if len(length) < 8 or header_bytes > os.fstat(file.fileno()).st_size - 8:
        raise CheckpointError(f"{path} is damaged or cut off: it is shorter than it says. Fetch or train it again.")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} has a header of {header_bytes:,} bytes; the limit is {MAX_HEADER_BYTES:,}.")
    header = file.read(header_bytes)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        dtypes = {str(entry["dtype"]) for entry in entries.values()}
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged: its header is none of safetensors. Fetch or train it again."
        ) from error
    if foreign := sorted(dtypes - set(DTYPES)):
        raise CheckpointError(f"{path} holds numbers of type {foreign[0][:20]!r}; a network has {', '.join(DTYPES)}.")
    return length + header, shapes


def _misfit(needed: Shapes, found: Shapes) -> str:
    """What is wrong with the shapes of a file; empty where they are what the network needs."""
    for name in sorted(needed.keys() | found.keys()):
        if name not in found and not name.endswith(".num_batches_tracked"):  # older files are without, torch adds it
            return f"{name} is missing from the weights"
        if name not in needed:
            return f"the network has no {name[:100]}"
        if name in found and needed[name] != found[name]:
            return f"{name} has shape {found[name]}, the network needs {needed[name]}"
    return ""


def _read_tensors(file: BinaryIO, start: bytes, path: Path) -> dict[str, Tensor]:
    try:
        weights = from_safetensors(start + file.read(hub.MAX_WEIGHTS_BYTES))
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise CheckpointError(f"{path} is damaged or cut off ({reason}). Fetch or train it again.") from error
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path} is spoiled: {name} holds values that are not finite.")
    return weights


def _in_todays_names(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an older timm, or of a network's authors, in today's tensor names, by timm's own converter."""
    from timm import model_entrypoint  # as above

    entrypoint = model_entrypoint(model.backbone.pretrained_cfg["architecture"])
    convert = entrypoint.__globals__["checkpoint_filter_fn"]
    return convert(weights, model.backbone)
