"""`Model`, the base class of all networks: it takes images in [0, 1] and declares the stages to explain."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

MAX_CLASSES = 50_000  # of a classifier; the largest ImageNet has 21,843
MOST_NAMES = 1_000  # in a list of classes that people or programs are shown; what has more is cut
MAX_MASKS = 1_000  # classes of a segmenter, each with a mask of all pixels
MAX_NAME = 300  # characters of a class name
MAX_CHANNELS = 64  # of a picture
TILES = "tiles"  # a segmenter's `crop_mode`
BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they change the reading direction


def name_fault(name: str) -> str:
    """Why a text cannot be the name of a class; empty if it can."""
    if not name.strip() or len(name) > MAX_NAME:
        return f"is empty or longer than {MAX_NAME} characters"
    if any(unicodedata.category(c) == "Cs" for c in name):  # halves of surrogate pairs, or bytes of a file's name
        return "is not valid UTF-8"
    # Line ends and terminal codes.
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") or c in BIDI_CONTROLS for c in name):
        return "contains control characters"
    return ""


def unique(names: Sequence[str]) -> list[str]:
    """The names with a number after each repetition: crane, crane (2). A class is found by its name."""
    found: dict[str, None] = {}  # keeps the order
    repeats: dict[str, int] = {}
    for name in names:
        numbered = name
        while numbered in found:
            repeats[name] = repeats.get(name, 1) + 1
            numbered = f"{name} ({repeats[name]})"
        found[numbered] = None
    return list(found)


Shapes = dict[str, tuple[int, ...]]  # of tensors, by their names


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    """The shapes of stored tensors."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def misfit(needed: Shapes, found: Shapes) -> str:
    """What is wrong with the shapes of stored tensors; empty where they fit the network."""
    for name in sorted(needed.keys() | found.keys()):
        if name not in found and not name.endswith(".num_batches_tracked"):  # older files do not have it, torch adds it
            return f"{name} is missing from the weights"
        if name not in needed:
            return f"the network has no {name[:100]}"
        if name in found and needed[name] != found[name]:
            return f"{name} has shape {found[name]}, the network needs {needed[name]}"
    return ""


def identity(activation: Tensor) -> Tensor:
    """For convolutional stages, whose activation already is a map (N, C, h, w)."""
    return activation


class Grid(NamedTuple):
    """Where the cells of a stage look. Positions are in pixels of the view, 0 in the middle of its first pixel."""

    offset: float  # centre of the receptive field of the first cell of a row or column
    stride: float  # from one centre to the next
    side: int  # of the view


@dataclass(frozen=True)
class Stage:
    """A place in a network where a heatmap can be read."""

    module: nn.Module  # its output is the stage's activation
    # Rearranges that output into (N, C, h, w). It may permute, reshape or drop entries (the CLS token of a
    # transformer), nothing else, because it is applied to the gradient too.
    to_map: Callable[[Tensor], Tensor] = identity

    @property
    def grid(self) -> Grid | None:
        """Where its cells look; None where `cvlab.models.geometry.locate` did not find it."""
        grid = getattr(self.module, "grid", None)
        return grid if isinstance(grid, Grid) else None  # somebody's own module may have another `grid`

    @property
    def offset(self) -> float | None:
        """`Grid.offset` of its grid."""
        return self.grid and self.grid.offset

    @property
    def stride(self) -> float | None:
        """`Grid.stride` of its grid."""
        return self.grid and self.grid.stride


def device() -> torch.device:
    """Where commands and the page let a model work: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Channels(NamedTuple):
    """How pictures are read and shown that are no photos, but TIFF or .npy; config.json has it as "channels"."""

    count: int
    shown: Sequence[int]  # the three that people see as red, green and blue, counted from 1
    range: Sequence[float] = ()  # the values that become 0 and 1; without it pictures are of uint8


class Normalize(nn.Module):
    """(images - mean) / std per channel, as part of the model, so that training and serving cannot differ."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Not persistent: mean and std are stored in config.json only.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Model(nn.Module):
    """A network from images (N, 3, S, S) in [0, 1] to logits (N, C) or (N, C, H, W), with what is needed to use it.

    A subclass sets `task`, normalises in `forward` and declares its `stages`; `cvlab.models.build` sets the rest, and
    makes it with `num_classes`, the number C of logits, and, where its layers depend on it, with `image_size`.
    """

    task: str  # "classification" or "segmentation"
    class_names: list[str]  # one per class, in the order of the logits
    image_size: int  # S, side of the square view that the model sees, pixels
    crop_pct: float  # a classifier's view is the centre crop of a photo whose shorter side is image_size / crop_pct
    # "center", or "squash": then both sides are image_size / crop_pct, whatever the photo's shape. A segmenter's is
    # TILES where it sees photos as they are, piece by piece, else it sees the whole photo squashed.
    crop_mode: str
    interpolation: str  # how photos are resized, as in its training: Pillow's name in lower case
    threshold: float  # a segmenter's mask is where `mask_levels` exceed it
    config: dict  # what is needed to build it again; config.json holds it under "cvlab"
    # A segmenter gives each pixel one class, and the first class is the background; else each class has its own mask.
    exclusive: bool = False
    channels: Channels | None = None  # None for photos
    in_channels: int = 3  # of its images; where it is another number, that one stands for the 3 of (N, 3, S, S)
    temperature: float = 1.0  # the logits divided by it give the `probabilities`; 1 where none was fitted
    statistics: dict[str, Tensor] | None = None  # of its photos, for `cvlab.trust.familiarity`; None if not fitted
    activations: int = 0  # numbers that a forward pass computes for one image; 0 for a model that was not loaded
    source: str = ""  # where it was loaded from: a folder, or user/name@commit on the Hub; empty for one just built

    def __init__(self) -> None:
        super().__init__()
        self.normalize = nn.Identity()  # the first module; `build` puts Normalize in its place

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages by name, in the order of the forward pass."""
        raise NotImplementedError

    @property
    def first_object(self) -> int:
        """Index of the first class that is not the background."""
        return int(self.exclusive)

    def as_rgb(self, images: Tensor) -> Tensor:
        """Its images (..., in_channels, H, W) as people see them, (..., 3, H, W)."""
        return images[..., [int(i) - 1 for i in self.channels.shown], :, :] if self.channels else images

    def describe(self, **config: object) -> None:
        """Sets `config`, with the task and the names of the stages, and the attributes that it has values of."""
        self.config = {"task": self.task, **config, "stages": list(self.stages)}
        for name in ("class_names", "image_size", "crop_pct", "crop_mode", "threshold", "interpolation", "exclusive"):
            setattr(self, name, config[name])


def probabilities(model: Model, logits: Tensor) -> Tensor:
    """The probabilities of logits (N, C) or (N, C, H, W), calibrated by the model's temperature, in the same shape."""
    scaled = logits / getattr(model, "temperature", 1.0)  # of any module with a task
    one_of_all = model.task == "classification" or getattr(model, "exclusive", False)
    # The softmax of a single logit would be 1 for ever: its probability is the sigmoid.
    return scaled.softmax(1) if one_of_all and logits.shape[1] > 1 else scaled.sigmoid()


def mask_levels(model: Model, logits: Tensor) -> Tensor:
    """What is compared with the threshold of a mask, in [0, 1], of logits (N, C, H, W), in the same shape.

    The probability; where classes exclude each other, the sigmoid of a class's lead over the best of the others, which
    is above 0.5 where the class is the likeliest.
    """
    if not getattr(model, "exclusive", False):
        return probabilities(model, logits)
    best, index = logits.max(1, keepdim=True)
    second = logits.scatter(1, index, -torch.inf).amax(1, keepdim=True)
    others = best.expand_as(logits).scatter(1, index, second)
    return ((logits - others) / model.temperature).sigmoid()
