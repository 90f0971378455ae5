"""Somebody's own network as a cvlab model: `adopt` wraps any module and finds its stages, `from_file` runs a function.

images -> normalize -> module -> logits, of a segmenter as large as the images
"""

import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.models.geometry import locate
from cvlab.models.model import Model, Normalize, Stage, unique
from cvlab.models.timm_stages import ToMap, module_outputs, to_map_of

FORMS = {"classification": "(N, C)", "segmentation": "(N, C, h, w)"}  # of logits
MOST_PREFIX = 16  # tokens before the patches: CLS, registers
# Their outputs are no features: another module's output as it is, one whose resolution was chosen, or attention.
NOT_STAGES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AdaptiveAvgPool2d, nn.Softmax)
IN_FILE = re.compile(r"(.+\.py):(\w+)")  # FILE.py:FUNCTION


class Adopted(Model):
    """A model whose `network` is somebody else's. `places` has by stage its module's name and to_map."""

    def __init__(self, module: nn.Module, task: str) -> None:
        super().__init__()
        self.network, self.task = module, task
        self.places: dict[str, tuple[str, ToMap]] = {}

    @property
    def stages(self) -> dict[str, Stage]:
        return {stage: Stage(self.network.get_submodule(name), to_map) for stage, (name, to_map) in self.places.items()}

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(self.normalize(images))
        if isinstance(logits, Mapping):  # torchvision's segmenters have "out", transformers' models "logits"
            logits = logits.get("logits", logits.get("out"))
        logits = getattr(logits, "logits", logits)
        form = FORMS[self.task]
        if not isinstance(logits, Tensor) or logits.ndim != form.count(",") + 1:
            found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(f"for {self.task} the module must return logits {form}, alone or as .logits, not {found}")
        if self.task == "classification":  # one logit z tells two classes apart: the softmax of these is z's sigmoid
            return torch.cat([-logits, logits], 1) / 2 if logits.shape[1] == 1 else logits
        size = images.shape[-2:]
        return logits if logits.shape[-2:] == size else F.interpolate(logits, size, mode="bilinear")


def adopt(
    module: nn.Module,
    class_names: Sequence[str],
    image_size: int,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    task: str = "classification",
    stages: Sequence[str] | dict[str, str] | None = None,
) -> Model:
    """Somebody's own trained network, in eval mode, as a model that can be explained, tested and shown on the page.

    A photo is seen whole by a segmenter; of a classifier's the centre is, as large as possible: set `crop_pct` where it
    was trained otherwise. Several classes of a segmenter exclude each other (softmax) where the first one's name says
    "background"; else each has a mask of its own (sigmoid). Set `exclusive` where that is not so: then the first class
    is the background, whatever its name.

    Args:
        module: takes (N, 3, S, S) and returns logits (N, C) or (N, C, h, w): a tensor, {"out": tensor}, or an object or
            dict with `logits`. A single logit tells two classes apart.
        class_names: one per class, in the order of the logits; of a single logit also one, which then means two, "not
            NAME" and NAME.
        image_size: S, side of the square view, pixels.
        mean, std: per channel, of images in [0, 1], with which it was trained; 0 and 1 if it normalises itself.
        task: "classification" or "segmentation".
        stages: where maps are read: names of modules as in `module.named_modules()`, or {name of a stage: module}. By
            default the last module of each resolution whose output the logits depend on; of a segmenter on the way
            down, where its end is called bottleneck, and on the way up.

    Raises:
        ValueError: the module cannot take such images, its logits are of another form or number, or they do not depend
            on what it computes from the images; a named stage cannot be one, or none was found.
    """
    if task not in FORMS:
        raise ValueError(f"there is no task {task!r}: a network is for {' or '.join(FORMS)}")
    model = Adopted(module, task).eval()
    device = next(module.parameters()).device
    model.normalize = Normalize(mean, std).to(device)
    images = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)  # then those outputs have gradients that depend on the images
        logits, outputs = module_outputs(model, images.requires_grad_())
        features = {name: output for name, (output, _) in outputs.items() if output.requires_grad}
        gradients = torch.autograd.grad(logits.square().sum(), list(features.values()), allow_unused=True)
    except ValueError:
        raise
    except Exception as error:  # networks fail in many ways
        reason, size = str(error).split("\n")[0].rstrip("."), f"{image_size} x {image_size}"
        raise ValueError(f"the module cannot take images of {size} pixels, or has no gradient ({reason})") from error
    finally:
        for parameter in trained:
            parameter.requires_grad_()
    names = unique([str(name) for name in class_names])
    if task == "classification" and len(names) == 1:
        names = [f"not {names[0]}", *names]
    if logits.shape[1] != len(names):
        raise ValueError(f"the module gives logits of {logits.shape[1]} classes, and class_names has {len(names)}")
    maps = _maps(model, images.detach(), features, gradients)
    if stages is None:
        # A segmenter's map of one channel a class is its answer, not what the answer comes from.
        out = {name for name, each in maps.items() if task == "segmentation" and each.shape[1] == len(names)}
        out |= _branches(maps) | {name for name in maps if isinstance(module.get_submodule(name), NOT_STAGES)}
        places = _places(maps, [name for name in maps if name not in out], image_size, task == "segmentation")
    else:
        places = stages if isinstance(stages, dict) else {name: name for name in stages}
    if unfit := [name for name in places.values() if name not in maps or not maps[name].used]:
        raise ValueError(
            f"the module “{unfit[0]}” cannot be a stage: in a forward pass it must run once, and return a map "
            "(N, C, h, w) or (N, h, w, C) or tokens (N, T, C) that the logits depend on"
        )
    if not places:
        raise ValueError(
            "no stage was found: no module that runs once returns a map (N, C, h, w) or (N, h, w, C), or tokens "
            "(N, T, C), that the logits depend on; random weights may be 0 in the last layer"
        )
    model.places = {stage: (name, maps[name].to_map) for stage, name in places.items()}
    model.describe(
        network="adopted",
        arguments={},
        class_names=names,
        image_size=image_size,
        mean=list(mean),
        std=list(std),
        crop_pct=1.0,
        crop_mode="center",
        threshold=0.5,
        interpolation="bilinear",
        exclusive=task == "segmentation" and len(names) > 1 and "background" in names[0].lower(),
    )
    locate(model)
    return model


class Map(NamedTuple):
    """What a module returns, as a map (N, C, h, w)."""

    shape: torch.Size
    to_map: ToMap
    used: bool  # whether the logits depend on it


def _maps(
    model: Adopted, images: Tensor, features: dict[str, Tensor], gradients: Sequence[Tensor | None]
) -> dict[str, Map]:
    """The map of each module that returns one, by the module's name, in the order of the forward pass.

    Where only the CLS token is read, no gradient reaches the patches that leave the last block: their map is not used.
    """
    cubes = [name for name, each in features.items() if each.ndim == 4 and len(set(each.shape[1:])) == 1]
    channels_last = set()
    if cubes:  # as many channels as rows: where the view is smaller they are still as many
        with suppress(Exception):  # of a network for one size only
            _, smaller = module_outputs(model, images[..., ::2, ::2])
            channels_last = {name for name in cubes if smaller[name][0].shape[3] == features[name].shape[3]}
    sides: set[int] = set()  # that tokens may have: of a map, or of one merged from it
    found = {}
    for (name, output), gradient in zip(features.items(), gradients, strict=True):
        count = output.shape[1] if output.ndim == 3 else 0
        fitting = [side for side in sides or {math.isqrt(count)} if 0 <= count - side**2 <= MOST_PREFIX]
        to_map = to_map_of(output.shape, sorted(fitting, reverse=True), name in channels_last)
        if to_map is None or len(output) > 1 or not name.startswith("network."):
            continue  # windows lie side by side as if they were images
        shape = to_map(output).shape
        sides |= {shape[-1], math.ceil(shape[-1] / 2)}
        used = gradient is not None and bool(to_map(gradient).any())
        found[name.removeprefix("network.")] = Map(shape, to_map, used)
    return found


def _branches(maps: dict[str, Map]) -> set[str]:
    """Names of maps inside a block that takes maps of their side and returns another: each may be one of several."""
    order, sides = list(maps), [each.shape[-1] for each in maps.values()]
    found: set[str] = set()
    for i, block in enumerate(order):
        first = i
        while first and order[first - 1].startswith(f"{block}."):
            first -= 1
        taken = sides[first - 1] if first else sides[i]
        if taken != sides[i] and set(sides[first:i]) <= {taken, sides[i], 1}:  # else it is an encoder, not a block
            found |= {order[j] for j in range(first, i) if sides[j] == taken}
    return found


def _places(maps: dict[str, Map], features: Sequence[str], image_size: int, rises: bool) -> dict[str, str]:
    """By the name of each stage its module, chosen from the `features`, names of maps.

    Used maps of equal side that follow each other are a run, and its last one stands for it. Of a classifier those runs
    are stages whose side is larger than all that come after, so that side paths are left out. So it is with a segmenter
    (`rises`) down to its bottleneck; above it, those whose side none before it exceeds, each side once. The bottleneck
    is where this gives most stages, and of several the longest run.
    """
    runs: list[tuple[int, list[str]]] = []
    seen = {math.ceil(image_size / 2**level) for level in range(6)}
    for name in features:
        side = maps[name].shape[-1]
        if not maps[name].used or side == 1:
            continue
        if runs and side == runs[-1][0]:
            runs[-1][1].append(name)
        elif side in seen or not runs or side < runs[-1][0]:  # else attention, or a pyramid of pooled maps
            runs.append((side, [name]))
            seen.add(side)
    at = [side for side, _ in runs]

    def kept(bottom: int) -> list[int]:
        down = [i for i in range(bottom + 1) if at[i] > max(at[i + 1 : bottom + 1], default=0)]
        above = range(bottom + 1, len(at))
        return down + [i for i in above if at[i] == max(at[bottom : i + 1]) > at[bottom] and at[i] not in at[i + 1 :]]

    bottoms = range(len(at)) if rises else range(len(at))[-1:]
    bottom = max(bottoms, key=lambda i: (len(kept(i)), len(runs[i][1])), default=0)
    stages = kept(bottom) if runs else []
    return {"bottleneck" if i == bottom < stages[-1] else runs[i][1][-1]: runs[i][1][-1] for i in stages}


def from_file(name: str) -> Model:
    """The model that a function without arguments returns, by its file and name: "FILE.py:FUNCTION". Runs the file.

    ValueError if there is no such file or function, it fails, or returns anything else.
    """
    path, function = IN_FILE.fullmatch(name).groups()
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}.")
    sys.path.insert(0, str(Path(path).resolve().parent))  # as python FILE.py does, so that it finds its neighbours
    spec = importlib.util.spec_from_file_location(f"own_{Path(path).stem}", path)
    own = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(own)
        if not callable(make := getattr(own, function, None)):
            raise ValueError(f"there is no function {function} in it")
        model = make()
    except (Exception, SystemExit) as error:  # of anybody's code
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        at = f" in line {lines[-1]}" if lines else ""
        raise ValueError(f"{path} fails{at}: {type(error).__name__}: {error}") from error
    if not isinstance(model, Model):
        raise ValueError(f"{name} returns a {type(model).__name__}: let it return cvlab.models.adopt(module, ...).")
    model.source = name
    return model.eval()
