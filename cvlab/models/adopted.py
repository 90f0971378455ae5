"""Somebody's own network as a cvlab model: `adopt` wraps any module and finds its stages, `from_file` runs a function.

images -> normalize -> module -> logits, of a segmenter as large as the images
"""

import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.models.geometry import locate
from cvlab.models.model import Model, Normalize, Stage, unique
from cvlab.models.timm_stages import ToMap, to_map_of

FORMS = {"classification": "(N, C)", "segmentation": "(N, C, h, w)"}  # of logits
MOST_PREFIX = 16  # tokens before the patches: CLS, registers
# Their outputs are no features: another module's output as it is, one whose resolution was chosen, or attention.
NOT_STAGES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.Softmax)
ROUNDING = 1e-3  # of the largest gradient: as much as two ways of adding up may differ
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
        with torch.no_grad():
            model(images)  # some put hooks on their own modules when they are first used
        model.requires_grad_(False)  # then just those outputs have gradients that depend on the images
        logits, outputs = _trace(model, images.requires_grad_())
        maps = _maps(model, images, logits, outputs)
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
    if stages is None:
        # A segmenter's map of one channel a class is its answer, not what the answer comes from.
        out = {name for name, each in maps.items() if task == "segmentation" and each.shape[1] == len(names)}
        out |= _branches(maps) | {name for name in maps if isinstance(module.get_submodule(name), NOT_STAGES)}
        out |= {name for name, each in maps.items() if each.gradient is None or each.shape[-1] == 1}
        places = _places(maps, [name for name in maps if name not in out], image_size, task == "segmentation")
    else:
        places = stages if isinstance(stages, dict) else {name: name for name in stages}
    if unfit := [name for name in places.values() if name not in maps or maps[name].gradient is None]:
        raise ValueError(
            f"the module “{unfit[0]}” cannot be a stage: in a forward pass it must run once, and return a map "
            "(N, C, h, w) or (N, h, w, C) or tokens (N, T, C) that the logits depend on"
        )
    if not places:
        raise ValueError(
            "no stage was found: no module that runs once returns a map (N, C, h, w) or (N, h, w, C), or tokens "
            "(N, T, C), that the logits depend on; or the network has no weights yet, and gives 0 for any image"
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


def _trace(model: Adopted, images: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The logits; and by name, in the order of the forward pass, what modules that run once return, and pass on.

    That is a view of the former, as when a map is explained. What takes the former itself, before the hook, takes it
    past the view.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str, module: nn.Module, inputs: tuple, output: object) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        view = output[...]
        calls.setdefault(name, []).append((output, view))
        return view.clone()  # an operation in place changes neither

    with ExitStack() as hooks, torch.enable_grad():
        for name, each in model.network.named_modules():
            hooks.enter_context(each.register_forward_hook(partial(hook, name)))
        logits = model(images)
    return logits, {name: found[0] for name, found in calls.items() if name and len(found) == 1}


class Map(NamedTuple):
    """What a module returns, as a map (N, C, h, w)."""

    view: Tensor  # the output
    gradient: Tensor | None  # of the logits with respect to it; None where it has no part in them, or not the whole one
    to_map: ToMap

    @property
    def shape(self) -> torch.Size:
        """(N, C, h, w)."""
        return self.to_map(self.view).shape


def _maps(model: Adopted, images: Tensor, logits: Tensor, outputs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Map]:
    """The map of each module that returns one, by the module's name, in the order of the forward pass.

    Where only the CLS token is read, no gradient reaches the patches that leave the last block: they have no part.
    """
    outputs = {name: pair for name, pair in outputs.items() if pair[0].requires_grad and len(pair[0]) == 1}
    both = [tensor for pair in outputs.values() for tensor in pair]
    score = (logits - logits.mean()).abs().sum()  # the mean of probabilities would say nothing
    gradients = torch.autograd.grad(score, both, allow_unused=True, retain_graph=True)
    cubes = [name for name, (output, _) in outputs.items() if output.ndim == 4 and len(set(output.shape[1:])) == 1]
    channels_last = set()
    if cubes:  # as many channels as rows: what changes at the top of the images is felt at the top, in any channel
        changed = images.detach().clone()
        changed[:, :, : images.shape[2] // 4] = 0
        _, others = _trace(model, changed)
        for name in cubes:
            felt = (others[name][0] - outputs[name][0]).detach().abs()[0]
            if felt[: len(felt) // 2].sum() > felt[:, : len(felt) // 2].sum():
                channels_last.add(name)
    sides: set[int] = set()  # that tokens may have: of a map, or of one merged from it
    found = {}
    for (name, (output, view)), whole, gradient in zip(outputs.items(), gradients[::2], gradients[1::2], strict=True):
        count = output.shape[1] if output.ndim == 3 else 0
        fitting = [side for side in sides or {math.isqrt(count)} if 0 <= count - side**2 <= MOST_PREFIX]
        to_map = to_map_of(output.shape, sorted(fitting, reverse=True), name in channels_last)
        if to_map is None:
            continue
        used = gradient is not None and gradient.equal(whole) and to_map(gradient).any()
        found[name] = Map(view, gradient if used else None, to_map)
        sides |= {found[name].shape[-1], math.ceil(found[name].shape[-1] / 2)}
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

    Maps of equal side that follow each other are a run, and its `_end` stands for it. Of a classifier those runs are
    stages whose side is larger than all that come after, so that side paths are left out. So it is with a segmenter
    (`rises`) down to its bottleneck; above it, those whose side none before it exceeds, each side once. The bottleneck
    is where this gives most stages, and of several the longest run.
    """
    runs: list[tuple[int, list[str]]] = []
    run = (image_size + 1, [])
    known = {math.ceil(image_size / 2**level) for level in range(6)}
    for name in features:
        side = maps[name].shape[-1]
        before = [each for each in runs if each[0] == side]
        if side < run[0] or (rises and side > run[0] and (before or side in known)):
            runs.append(run := (side, []))
        elif side > run[0]:  # back from a side path; else it is attention, or a pyramid of pooled maps
            if rises or not before:
                continue
            run = before[-1]
        run[1].append(name)
    at = [side for side, _ in runs]

    def kept(bottom: int) -> list[int]:
        down = [i for i in range(bottom + 1) if at[i] > max(at[i + 1 : bottom + 1], default=0)]
        above = range(bottom + 1, len(at))
        return down + [i for i in above if at[i] == max(at[bottom : i + 1]) > at[bottom] and at[i] not in at[i + 1 :]]

    bottoms = range(len(at)) if rises else range(len(at))[-1:]
    bottom = max(bottoms, key=lambda i: (len(kept(i)), len(runs[i][1])), default=0)
    stages = {i: _end(runs[i][1], maps) for i in kept(bottom)} if runs else {}
    return {"bottleneck" if i == bottom < max(stages) else name: name for i, name in stages.items()}


def _end(run: Sequence[str], maps: dict[str, Map]) -> str:
    """The last map of a run through which all goes: the output of a residual block, but nothing inside of one."""

    def all_goes_through(later: str, earlier: str) -> bool:
        after, before = maps[later], maps[earlier]
        inputs = after.view, before.view, after.gradient
        (found,) = torch.autograd.grad(*inputs, allow_unused=True, retain_graph=True)
        whole = before.to_map(before.gradient)
        return found is not None and (before.to_map(found) - whole).abs().max() <= ROUNDING * whole.abs().max()

    end = run[0]
    if all_goes_through(run[-1], end):  # as usual
        return run[-1]
    for name in run[1:]:
        if all_goes_through(name, end):
            end = name
    return end


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
