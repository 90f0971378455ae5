"""A model as a folder that rebuilds itself: config.json and model.safetensors, strict and without pickles."""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn

from cvlab import atomic, hub
from cvlab.models import build

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
MAX_CONFIG_BYTES = 4 * 2**20
MAX_IMAGE_SIZE = 4096
MAX_ARGUMENT = 8192  # channels, mostly
MAX_DEPTH = 32  # modules are built one by one before any shape can be compared


class CheckpointError(ValueError):
    """A folder that is no model; the message says what is wrong with which file, and what to do."""


def save(model: nn.Module, folder: str | Path, **facts: object) -> None:
    """Writes config.json and model.safetensors, each whole or not at all.

    Args:
        model: one made by `cvlab.models.build` or `load`.
        folder: made if it is not there.
        facts: further entries of the config, such as data={"name", "split_seed", "fingerprints"} or precision="bf16".
    """
    folder = Path(folder)
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "captum")}
    block = {**model.config, **facts, "format": FORMAT, "threshold": model.threshold, "versions": versions}
    config = json.dumps({"cvlab": block}, indent=1) + "\n"  # before anything is written: a fact may be no JSON
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    atomic.write_bytes(folder / "model.safetensors", to_safetensors(weights, metadata={"format": "pt"}))
    atomic.write_text(folder / "config.json", config)


def load(folder_or_id: str | Path) -> nn.Module:
    """The model of a folder or of a Hub name "user/name[@revision]", in eval mode, on the CPU.

    It knows task, class_names, image_size, crop_pct, threshold, stages and config. Nothing of the folder is executed:
    the network is looked up by name, its shapes are compared with the file's before memory is taken, and every tensor
    must be there, finite, and no other.

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
    config = _read_config(folder)
    arguments = {key: config[key] for key in REQUIRED if key != "task"}
    try:
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in build(**arguments).state_dict().items()}
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
        reason = str(error).split("\n")[0]  # torch adds its C++ stack
        raise CheckpointError(f"{folder / 'config.json'} describes a model that cannot be built: {reason}.") from error
    weights_file = folder / "model.safetensors"
    _check_weights(weights_file, shapes)
    model = build(**arguments)
    if model.task != config["task"]:
        raise CheckpointError(
            f"{folder / 'config.json'} says {config['task']}, but network {config['network']!r} is for {model.task}."
        )
    weights = load_file(weights_file)
    if spoiled := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{weights_file} is spoiled: {spoiled[0]} holds values that are not finite.")
    model.load_state_dict(weights)
    model.config = config
    return model.eval()


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json.")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_CONFIG_BYTES // 2**20} MB: not a model's configuration.")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of a million digits
        raise CheckpointError(f"{path} is not valid JSON. Fetch or train the model again.") from error
    config = config.get("cvlab") if isinstance(config, dict) else None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} has no entry 'cvlab': the folder was not written by cvlab.")
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of format {config.get('format')!r}; this version of cvlab reads {FORMAT}.")
    for key, kind in REQUIRED.items():
        # JSON writes 1.0 as 1 in other hands; a bool is an int to Python only.
        kinds = (int, float) if kind is float else kind
        if not isinstance(config.get(key), kinds) or isinstance(config.get(key), bool):
            raise CheckpointError(f"{path}: {key!r} is missing or is not of type {kind.__name__}.")
    if not 1 <= config["image_size"] <= MAX_IMAGE_SIZE:
        raise CheckpointError(f"{path}: image_size {config['image_size']} is not within 1 and {MAX_IMAGE_SIZE}.")
    if not config["class_names"] or not all(isinstance(name, str) for name in config["class_names"]):
        raise CheckpointError(f"{path}: class_names must be a list of at least one name.")
    for key, value in config["arguments"].items():
        values, limit = value if isinstance(value, list) else [value], MAX_DEPTH if key == "depth" else MAX_ARGUMENT
        if len(values) > MAX_DEPTH or not all(isinstance(v, int | float) and abs(v) <= limit for v in values):
            raise CheckpointError(f"{path}: the argument {key!r} is no number, or is too large to be a network's.")
    for key in ("mean", "std"):
        # Python's JSON knows NaN and Infinity: both fail the comparison.
        fine = [isinstance(value, int | float) and abs(value) < 1000 for value in config[key]]
        if fine != [True] * 3:
            raise CheckpointError(f"{path}: {key} must be three numbers below 1000, one a channel.")
    if not 0 < config["crop_pct"] <= 1 or not 0 < config["threshold"] < 1 or min(config["std"]) <= 0:
        raise CheckpointError(f"{path}: crop_pct, threshold or std is outside its range.")
    return config


def _check_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no model.safetensors: the weights are missing.")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}). Fetch or train the model again.") from error
    for name in sorted(shapes.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{path} does not fit config.json: {name} is missing from the weights.")
        if name not in shapes:
            raise CheckpointError(f"{path} does not fit config.json: the network has no {name}.")
        if shapes[name] != found[name]:
            raise CheckpointError(
                f"{path} does not fit config.json: {name} has shape {found[name]}, the network needs {shapes[name]}."
            )
