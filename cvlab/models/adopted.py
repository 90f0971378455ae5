"""Somebody's own network as a cvlab model: `adopt` wraps any module and finds its stages, `from_file` runs a function.

images -> normalize -> module -> logits, of a segmenter as large as the images
"""

import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.models.geometry import locate
from cvlab.models.model import Model, Normalize, Stage, unique
from cvlab.models.timm_stages import ToMap
from cvlab.models.tracing import maps_in, places_in

FORMS = {"classification": "(N, C)", "segmentation": "(N, C, h, w)"}  # of logits
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
    image = torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        maps = maps_in(module, model, image.requires_grad_())
        count = model(image).shape[1]
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
    if count != len(names):
        raise ValueError(f"the module gives logits of {count} classes, and class_names has {len(names)}")
    if stages is None:
        places = places_in(module, maps, image_size, len(names), rises=task == "segmentation")
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
    settings = {"class_names": names, "image_size": image_size, "mean": list(mean), "std": list(std)}
    settings |= {"crop_pct": 1.0, "crop_mode": "center", "threshold": 0.5, "interpolation": "bilinear"}
    exclusive = task == "segmentation" and len(names) > 1 and "background" in names[0].lower()
    model.describe(network="adopted", arguments={}, **settings, exclusive=exclusive)
    locate(model)
    return model


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
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        at, reason = f" in line {lines[-1]}" if lines else "", " ".join(str(error).split())[:500]
        raise ValueError(f"{path} fails{at}: {type(error).__name__}: {reason}") from error
    if not isinstance(model, Model):
        raise ValueError(f"{name} returns a {type(model).__name__}: let it return cvlab.models.adopt(module, ...).")
    model.source = name
    return model.eval()
