"""Saves a model as config.json and model.safetensors, and loads it from them.

A folder may come from a stranger. Each file is opened once, and must be a plain file inside the folder of limited size.
Every entry of the config is checked. The network is first built on the meta device, where it takes no memory, and its
shapes are compared with the file's before any weight is read. Nothing in the folder is ever executed.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cvlab.checkpoint import hub
from cvlab.checkpoint.config import FORMAT, CheckpointError, opened, read_config
from cvlab.files import read_json, to_json, write_bytes, write_text
from cvlab.models import NETWORKS, Model, build, device, settings_in
from cvlab.models.adopted import IN_FILE, from_file
from cvlab.models.model import Shapes, misfit, shapes_of

MAX_HEADER_BYTES = 8 * 2**20  # of model.safetensors: names and shapes
MAX_PARAMETERS = hub.MAX_WEIGHTS_BYTES // 4  # with buffers, in float32
COPIES, KEPT, MASKS = 3, 2, 6  # of weights, activations and logits at once, while a model is opened and explained
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32")


def save(model: Model, folder: str | Path, **facts: object) -> None:
    """Writes config.json and model.safetensors, each whole or not at all.

    timm opens a saved network of timm without cvlab, as "local-dir:FOLDER" or, once published, as "hf-hub:user/name":
    the config also has timm's own entries, and tensors have timm's names. smp opens U-Nets on its own encoders alike.

    Args:
        model: made by `cvlab.models.build` or `load`.
        folder: created if it does not exist.
        facts: further entries of the config, such as data={"name", "split_seed", "fingerprints"} or precision="bf16".

    Raises:
        CheckpointError: the model was adopted.
    """
    if model.config["network"] not in NETWORKS:
        raise CheckpointError(
            "A network that was adopted cannot be saved as a checkpoint: its code is not cvlab's. Save its weights "
            "with your own code, and adopt it again where it is needed."
        )
    folder = Path(folder)
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "captum")}
    block = {**model.config, **facts, "format": FORMAT, "threshold": model.threshold, "versions": versions}
    keys_of_library = model.library_config() if hasattr(model, "library_config") else {}
    config = to_json({**keys_of_library, "cvlab": block}, indent=1) + "\n"  # first, because it may fail
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in _stored(model).state_dict().items()}
    (folder / hub.ONNX).unlink(missing_ok=True)  # first: it must not stand beside other weights
    write_bytes(folder / "model.safetensors", to_safetensors(weights, metadata={"format": "pt"}))
    (folder / hub.STATISTICS).unlink(missing_ok=True)  # of the model that was there before
    if model.statistics:
        write_bytes(folder / hub.STATISTICS, to_safetensors(model.statistics))
    write_text(folder / "config.json", config)


def annotate(folder: str | Path, **entries: object) -> None:
    """Sets entries of ours in the config.json of a saved model.

    Raises:
        CheckpointError: another library wrote the folder.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    if "cvlab" not in config:
        raise CheckpointError(f"{path} was not written by cvlab: save the model first with cvlab.checkpoint.save.")
    config["cvlab"] |= entries
    write_text(path, to_json(config, indent=1) + "\n")


def load(folder_or_id: str | Path, most_gib: float = 16) -> Model:
    """The model of a folder or of a Hub name "user/name[@revision]" or page, in eval mode, on the CPU.

    It has all attributes of `Model`; `source` is the folder, or user/name@commit. Folders of timm's classifiers and of
    U-Nets of segmentation_models.pytorch open in the same way. To open and explain it may take so many GiB of memory.

    Raises:
        CheckpointError: the folder is missing, damaged or not allowed; the message says what is wrong.
        cvlab.checkpoint.hub.HubError: the model cannot be downloaded from the Hub.
    """
    folder = Path(folder_or_id)
    if not folder.is_dir():
        if not hub.is_id(hub.name_of(str(folder_or_id))):
            raise CheckpointError(
                f"{folder_or_id} is neither a folder nor a name on the Hub (user/name). Check the path."
            )
        try:
            folder = hub.pull(str(folder_or_id))
        except hub.HubError as error:
            if folder.parent.is_dir():  # a path that was mistyped
                beside = ", ".join(sorted(path.name for path in folder.parent.iterdir() if path.is_dir())[:20])
                raise CheckpointError(
                    f"There is no folder {folder}; {folder.parent} has {beside or 'none'}. Nor was it found on the Hub."
                ) from error
            raise hub.HubError(f"There is no folder {folder}, and the Hub has no answer: {error}") from error
    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    config = read_config(config_file)
    arguments = settings_in(config)
    shapes, activations = _measured(arguments, config["task"], config_file, most_gib)
    with opened(weights_file, hub.MAX_WEIGHTS_BYTES) as file:
        start, found = _read_header(file, weights_file)
        fault = misfit(shapes, found)
        if fault and config["network"] != "timm":
            raise CheckpointError(f"{weights_file} does not fit config.json: {fault}.")
        weights = _read_tensors(file, start, weights_file)
    model = build(**arguments)
    model.activations = activations
    try:
        if fault:
            from cvlab.models.timm import in_current_names  # here, because the page starts faster without timm

            weights = in_current_names(config["arguments"]["architecture"], model.backbone, weights)
        _stored(model).load_state_dict(weights)
    except Exception as error:  # timm's converters fail in many ways on tensors of another network
        reason = fault or str(error).split("\n")[0]
        raise CheckpointError(f"{weights_file} does not fit config.json: {reason}.") from error
    model.config = {**config, "stages": list(model.stages)}
    if (path := folder / hub.STATISTICS).exists():
        with opened(path, max(300_000, 3_000 * len(model.class_names))) as file:
            model.statistics = _read_tensors(file, _read_header(file, path)[0], path)
    model.temperature = config.get("temperature", 1.0)
    model.source = hub.source_of(folder)
    return model.eval()


def load_own(name: str) -> Model:
    """As `load`, on the GPU if there is one; also of FILE.py:FUNCTION, which is run: for names of its owner only."""
    return (from_file(name) if IN_FILE.fullmatch(name) else load(name)).to(device())


def _stored(model: Model) -> Model:
    """The module whose tensors are in the file: timm's own network, so that names have no prefix, or the model."""
    return model.backbone if model.config["network"] == "timm" else model


# --- the network on the meta device -----------------------------------------------------------------------------------


def _measured(arguments: dict, task: str, path: Path, most_gib: float) -> tuple[Shapes, int]:
    """The tensors' shapes, and the numbers in a forward pass; CheckpointError for another task or too much memory."""
    with _building(path), torch.device("meta"):
        model = build(**arguments).eval()
    if model.task != task:
        raise CheckpointError(f"{path} says {task}, but network {arguments['network']!r} is for {model.task}.")
    numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if numbers > MAX_PARAMETERS:
        raise CheckpointError(f"{path} describes a network of {numbers:,} numbers; the limit is {MAX_PARAMETERS:,}.")
    side = arguments["image_size"]
    with _building(path), torch.device("meta"), torch.no_grad(), _Count() as count:
        logits = model(torch.empty(1, model.in_channels, side, side))
    needed = 4 * (COPIES * numbers + KEPT * count.numbers + MASKS * logits.numel()) / 2**30
    if needed > most_gib:
        advice = "use a smaller network, smaller views or fewer classes"
        raise CheckpointError(f"{path}: it takes about {needed:.1f} GiB of memory, over {most_gib:g}: {advice}.")
    return shapes_of(_stored(model).state_dict()), count.numbers


@contextmanager
def _building(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the constructors of a thousand networks fail in many ways
        reason = (str(error).split("\n")[0] or type(error).__name__)[:300].rstrip(".")  # torch adds its C++ stack
        raise CheckpointError(f"{path} describes a model that cannot be built: {reason}.") from error


class _Count(TorchDispatchMode):
    """Counts the numbers in all tensors that a forward pass makes: autograd keeps nearly all of them."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.numbers += sum(each.numel() for each in tree_leaves(found) if isinstance(each, Tensor))
        return found


# --- model.safetensors ------------------------------------------------------------------------------------------------


def _read_header(file: BinaryIO, path: Path) -> tuple[bytes, Shapes]:
    """The bytes of a safetensors file before the numbers begin, and the shapes that they state."""
    length = file.read(8)
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > MAX_HEADER_BYTES and length.startswith((b"PK", b"\x80")):
        raise CheckpointError(f"{path} is a pickle or an archive under another name: such files can run code.")
    if len(length) < 8 or header_bytes > os.fstat(file.fileno()).st_size - 8:
        raise CheckpointError(
            f"{path} is damaged or cut off: it is shorter than its header states. Download or train it again."
        )
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
            f"{path} is damaged: its header is not one of safetensors. Download or train it again."
        ) from error
    if foreign := sorted(dtypes - set(DTYPES)):
        raise CheckpointError(f"{path} has numbers of type {foreign[0][:20]!a}; allowed are {', '.join(DTYPES)}.")
    return length + header, shapes


def _read_tensors(file: BinaryIO, start: bytes, path: Path) -> dict[str, Tensor]:
    most = min(hub.MAX_WEIGHTS_BYTES, os.fstat(file.fileno()).st_size)  # so much memory is taken at once
    try:
        weights = from_safetensors(start + file.read(most))
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:200]
        raise CheckpointError(f"{path} is damaged or cut off ({reason}). Download or train it again.") from error
    for name, tensor in weights.items():
        if not tensor.float().isfinite().all():  # as the network will hold them: 1e300 becomes infinite
            raise CheckpointError(f"{path} is damaged: {name} has values that are not finite in float32.")
    return weights
