"""Any classifier of timm behind cvlab's interface: a backbone that was trained on much, and a linear head.

    images -> normalize -> backbone (timm, its head included) -> logits

timm says of each of its networks where its resolution steps lie (feature_info). These become the stages: convolutional
ones as they are, (N, h, w, C) ones permuted, the tokens of vision transformers as the grid that they were cut from,
without CLS. Of a transformer's block the output of its first norm is taken: where only the CLS token is read at the
end, no gradient reaches the patches that leave the last block, but it does reach those that enter it.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg, is_model, load_state_dict
from timm.models.vgg import ConvMlp
from torch import Tensor, nn

from cvlab.models.model import MAX_CLASSES, Model, Normalize, Stage, identity

ToMap = Callable[[Tensor], Tensor]


class WholeConv2d(nn.Conv2d):
    """A convolution as a matrix product where its kernel is as large as its input: an eighth of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, D, 1, 1)."""
        if x.shape[-2:] != self.kernel_size:
            return super().forward(x)
        weight = self.weight
        if weight.is_contiguous(memory_format=torch.channels_last):  # so that vectors are views of it
            x, weight = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
        return F.linear(x.flatten(1), weight.flatten(1), self.bias)[..., None, None]


class TimmClassifier(Model):
    """A classifier of timm, freshly initialised. `backbone` is timm's module, and its tensor names are timm's.

    Args:
        num_classes: length of the logits.
        image_size: side of the square view; a network that is made for one size is made for this one.
        architecture: one of `timm.list_models()`, such as "resnet18".
        global_pool: how features become one vector ("avg", "token" and others); by default as the architecture does.
        class_token: whether a transformer has a CLS token; by default as the architecture does.
        fixed_input_size: whether the network is made for one image size; by default as the architecture is.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth (Huang et al., "Deep Networks with Stochastic Depth", 2016).
        mean, std: of the images in [0, 1].

    Raises:
        ValueError: no such architecture, or one without a map that could be explained.
    """

    task = "classification"

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        architecture: str,
        global_pool: str | None = None,
        class_token: bool | None = None,
        fixed_input_size: bool | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if not is_model(architecture):
            raise ValueError(f"timm has no network {architecture!r}; see timm.list_models()")
        size = {"input_size": (3, image_size, image_size)}
        if fixed_input_size is not None:
            size["fixed_input_size"] = fixed_input_size
        given = {"global_pool": global_pool, "class_token": class_token}
        # Zeros are not given: not every network has these two.
        given |= {"drop_rate": drop_rate or None, "drop_path_rate": drop_path_rate or None}
        self.model_args = {key: value for key, value in given.items() if value is not None}
        make = partial(
            timm.create_model,
            architecture,
            pretrained=False,
            num_classes=num_classes,
            pretrained_cfg_overlay=size,
            **self.model_args,
        )
        self.normalize = Normalize(mean, std)
        self.backbone = make()
        for module in self.backbone.modules():
            if isinstance(module, ConvMlp):  # VGG's first linear layer, which timm writes as a convolution
                module.fc1.__class__ = WholeConv2d
        with torch.device("meta"):  # a twin without memory shows what comes out where
            twin = make().eval()
            maps = maps_of(twin, torch.empty(1, 3, image_size, image_size))
        if not maps:
            raise ValueError(f"timm's {architecture} has no stage that could be explained")
        self._maps = maps

    @property
    def stages(self) -> dict[str, Stage]:
        return {name: Stage(self.backbone.get_submodule(name), to_map) for name, to_map in self._maps.items()}

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(self.normalize(images))  # (N, num_classes)

    def timm_config(self) -> dict:
        """The keys by which timm builds the same network and its transforms, for the top level of config.json."""
        known = self.backbone.pretrained_cfg
        return {
            "architecture": known["architecture"],
            "num_classes": self.backbone.num_classes,
            "num_features": self.backbone.num_features,
            "label_names": self.class_names,
            "model_args": self.model_args,
            "pretrained_cfg": {
                "input_size": list(known["input_size"]),
                "fixed_input_size": known["fixed_input_size"],
                "interpolation": self.interpolation,
                "crop_pct": self.crop_pct,
                "crop_mode": "center",
                "mean": self.config["mean"],
                "std": self.config["std"],
                "num_classes": self.backbone.num_classes,
                "first_conv": known["first_conv"],
                "classifier": known["classifier"],
            },
        }


def from_timm_config(config: dict) -> dict:
    """What timm's config.json says, as the entries of our own: network, arguments, class_names, image_size and so on.

    Only what is named here is read: addresses of weights, names of files and the like have no effect.

    Raises:
        ValueError: a network of another library, one without a head, not for square RGB images, or an argument that
            cannot be allowed.
    """
    architecture, view = config.get("architecture"), config.get("pretrained_cfg", config)  # older ones are flat
    if not isinstance(architecture, str) or not is_model(architecture):
        raise ValueError(f"architecture {str(architecture)[:60]!r} is no network of timm")
    if not isinstance(view, dict):
        raise ValueError("pretrained_cfg is not an object")
    num_classes = config.get("num_classes", view.get("num_classes"))
    if type(num_classes) is not int or not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes is {str(num_classes)[:60]}: a classifier has 1 to {MAX_CLASSES:,}")
    known = get_pretrained_cfg(architecture)
    asked = config.get("model_args") or {}
    if not isinstance(asked, dict):
        raise ValueError("model_args is not an object")
    asked = {key: value for key, value in asked.items() if value is not None}
    if asked.pop("in_chans", 3) != 3 or asked.pop("num_classes", num_classes) != num_classes:
        raise ValueError("model_args contradicts num_classes, or the network is not for RGB images")
    sides = asked.pop("img_size", None)
    input_size = [3, *_pair(sides)] if sides is not None else view.get("input_size", known.input_size)
    if not isinstance(input_size, list | tuple) or len(input_size) != 3 or input_size[0] != 3:
        raise ValueError("input_size is not [3, side, side]")
    if input_size[1] != input_size[2]:
        raise ValueError(f"input_size {list(input_size)} is not square: cvlab shows a model square views")
    fixed = view.get("fixed_input_size", known.fixed_input_size) or sides is not None
    return {
        "task": "classification",
        "network": "timm",
        "arguments": {**asked, "architecture": architecture, "fixed_input_size": fixed},
        "class_names": _class_names(config, view, num_classes),
        "image_size": input_size[1],
        "mean": view.get("mean", list(known.mean)),
        "std": view.get("std", list(known.std)),
        "crop_pct": view.get("crop_pct", known.crop_pct),
        "interpolation": view.get("interpolation", known.interpolation),
        "threshold": 0.5,
    }


def _pair(sides: object) -> Sequence:
    return sides if isinstance(sides, list) else [sides, sides]


def _class_names(config: dict, view: dict, num_classes: int) -> list:
    """label_names by their descriptions where there are some; else ImageNet's, else numbers."""
    names = config.get("label_names", view.get("label_names"))
    descriptions = config.get("label_descriptions", view.get("label_descriptions")) or {}
    if isinstance(names, dict):  # JSON has the indices as strings
        names = [names.get(str(i), f"class {i}") for i in range(num_classes)]
    if names is None:
        return imagenet_names(num_classes) or [f"class {i}" for i in range(num_classes)]
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise ValueError(f"label_names is not a list of {num_classes} names, one for each class")
    if isinstance(descriptions, dict):
        names = [descriptions.get(name, name) for name in names]
    return unique([str(name) for name in names])


def default_view(architecture: str) -> dict:
    """What `build` should be told for a network with timm's own weights: {image_size, mean, std, crop_pct, ...}."""
    known = get_pretrained_cfg(architecture)
    return {
        "image_size": known.input_size[-1],
        "mean": list(known.mean),
        "std": list(known.std),
        "crop_pct": known.crop_pct,
        "interpolation": known.interpolation,
    }


def pretrained_weights(name: str, image_size: int) -> dict[str, Tensor]:
    """timm's weights of a network, from the Hub or from where they were kept when they were fetched before.

    Args:
        name: of timm, with or without a tag that says what it was trained on ("inception_v3.tf_in1k").

    Raises:
        OSError: they cannot be had.
    """
    size = {"input_size": (3, image_size, image_size)}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=size).state_dict()
    except Exception as error:  # of the Hub's client, of the network, of timm for a network without weights
        reason = (str(error).split("\n")[0] or type(error).__name__)[:200].rstrip(". ")
        raise OSError(f"The pretrained weights of {name} cannot be reached ({reason})") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth that holds tensors and nothing that could run.

    Raises:
        ValueError: it is no such file.
    """
    try:
        return load_state_dict(str(path))  # timm's, with weights_only=True
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {path}.") from error
    except Exception as error:  # of the zip archive, of the pickle, of safetensors, of a list in the place of a dict
        reason = (str(error).split("\n")[0] or type(error).__name__)[:200].rstrip(". ")
        raise ValueError(f"{path} cannot be read as weights, .pth or .safetensors: {reason}.") from error


def load_backbone(backbone: nn.Module, weights: dict[str, Tensor]) -> None:
    """Gives a backbone the weights of the same network; those of its classifier, and of parts cut off, are not needed.

    Raises:
        ValueError: a tensor is missing, has another shape, or is of another network; the first one is named.
    """
    with torch.device("meta"):
        whole = timm.create_model(backbone.pretrained_cfg["architecture"])
    classifiers = whole.pretrained_cfg["classifier"] or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    own = {name for name in whole.state_dict() if name.startswith(tuple(f"{each}." for each in classifiers))}
    needed = {name: tensor for name, tensor in backbone.state_dict().items() if name not in own}
    for name, tensor in needed.items():
        if name not in weights and name.endswith(".num_batches_tracked"):  # older files are without
            continue
        if name not in weights:
            raise ValueError(f"{name} is missing from the weights, which begin with {', '.join(list(weights)[:3])}")
        if weights[name].shape != tensor.shape:
            found, wanted = tuple(weights[name].shape), tuple(tensor.shape)
            raise ValueError(f"{name} has shape {found} in the weights, and {wanted} in the network")
    if foreign := [name for name in weights if name not in whole.state_dict()]:
        raise ValueError(f"the network has no {foreign[0]}, which is in the weights")
    backbone.load_state_dict({name: weights[name] for name in needed if name in weights}, strict=False)


def imagenet_names(num_classes: int) -> list[str] | None:
    """Names of the ImageNet subset with so many classes, in timm's order; None where there is no such subset."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return None
    return unique([description.split(",")[0] for description in ImageNetInfo(subset).label_descriptions()])


def unique(names: Sequence[str]) -> list[str]:
    """The names with a number behind each repetition: crane, crane (2). A page finds a class by its name."""
    found: list[str] = []
    repeats: dict[str, int] = {}
    taken: set[str] = set()
    for name in names:
        numbered = name
        while numbered in taken:
            repeats[name] = repeats.get(name, 1) + 1
            numbered = f"{name} ({repeats[name]})"
        taken.add(numbered)
        found.append(numbered)
    return found


# --- stages -----------------------------------------------------------------------------------------------------------


def tokens_to_map(activation: Tensor, prefix_tokens: int) -> Tensor:
    """(N, prefix + h*w, C) -> (N, C, h, w), h = w: patch tokens as the grid they were cut from, CLS and others left."""
    patches = activation[:, prefix_tokens:]
    side = math.isqrt(patches.shape[1])
    return patches.transpose(1, 2).unflatten(2, (side, side))


def channels_last_to_map(activation: Tensor) -> Tensor:
    """(N, h, w, C) -> (N, C, h, w)."""
    return activation.permute(0, 3, 1, 2)


def windows_to_map(activation: Tensor, reroll: nn.Module, block: int) -> Tensor:
    """(N, h*w, C) -> (N, C, h, w) for Hiera, whose tokens lie in the order of its windows."""
    return channels_last_to_map(reroll(activation.contiguous(), block))


def maps_of(backbone: nn.Module, images: Tensor) -> dict[str, ToMap]:
    """The module of each stage and its to_map, found by what comes out of the modules in one forward pass."""
    shapes: dict[str, Sequence[int]] = {}  # in the order of the forward pass
    calls: Counter[str] = Counter()

    def recorder(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            calls[name] += 1
            if isinstance(output, Tensor):
                shapes[name] = output.shape

        return hook

    for name, module in backbone.named_modules():
        module.register_forward_hook(recorder(name))
    with torch.no_grad():
        backbone(images)
    shapes = {name: shape for name, shape in shapes.items() if calls[name] == 1}
    image_size, channels_last = images.shape[-1], getattr(backbone, "output_fmt", "NCHW") == "NHWC"
    found: dict[str, ToMap] = {}
    for i in range(len(backbone.feature_info)):
        feature = backbone.feature_info[i]
        if hasattr(backbone, "reroll"):
            block = int(feature["module"].removeprefix("blocks."))
            found[feature["module"]] = partial(windows_to_map, reroll=backbone.reroll, block=block)
            continue
        to_map = _to_map(shapes.get(feature["module"], ()), image_size, feature["reduction"], channels_last)
        if to_map is identity:
            found[feature["module"]] = identity
            continue
        norm = feature["module"] + ".norm1"
        to_map_of_norm = _to_map(shapes.get(norm, ()), image_size, feature["reduction"], channels_last)
        if to_map_of_norm is not None:
            found[norm] = to_map_of_norm
        elif to_map is not None:
            found[feature["module"]] = to_map
    if found:
        return found
    # feature_info names no module with one tensor as its output: take the last layer of each resolution instead.
    grids: dict[int, tuple[str, ToMap]] = {}
    tokens: dict[int, tuple[str, ToMap]] = {}
    for name, shape in shapes.items():
        if len(shape) == 4 and shape[2] == shape[3] > 1:
            grids[shape[2]] = name, identity
        elif len(shape) == 3 and name.endswith(("norm1", "norm_out")):
            side = math.isqrt(shape[1])
            tokens[side] = name, partial(tokens_to_map, prefix_tokens=shape[1] - side**2)
    return dict(last for _, last in sorted((tokens or grids).items(), reverse=True))


def _to_map(shape: Sequence[int], image_size: int, reduction: int, channels_last: bool) -> ToMap | None:
    """How an output of this shape becomes (N, C, h, w), h = w; None where it has no such form.

    `channels_last` decides where there are as many channels as rows and columns.
    """
    if len(shape) == 4 and shape[1] == shape[2] and (channels_last or shape[2] != shape[3]):
        return channels_last_to_map
    if len(shape) == 4 and shape[2] == shape[3]:
        return identity
    if len(shape) == 3:
        for side in (math.ceil(image_size / reduction), image_size // reduction):
            if shape[1] >= side**2:
                return partial(tokens_to_map, prefix_tokens=shape[1] - side**2)
    return None
