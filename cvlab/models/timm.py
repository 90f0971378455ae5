"""Any classifier of timm as a cvlab model, and what timm's own folders and weights say.

images -> normalize -> backbone (timm's network with its head) -> logits
"""

import inspect
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import adapt_input_conv, get_pretrained_cfg, is_model, load_state_dict, model_entrypoint
from timm.models.vgg import ConvMlp
from torch import Tensor, nn

from cvlab.files import LFS_POINTER, NOT_FETCHED
from cvlab.models.model import MAX_CLASSES, Model, Stage, misfit, shapes_of, unique
from cvlab.models.timm_stages import maps_of

# What timm's files of networks call the function that its loader asks to convert tensors of others.
CONVERTERS = ("checkpoint_filter_fn", "checkpoint_filter_fn_classifier", "_filter_fn", "_filter_torchvision_pretrained")


class WholeConv2d(nn.Conv2d):
    """A convolution whose kernel is as large as its input, computed as a matrix product: an eighth of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, D, 1, 1)."""
        if x.shape[-2:] != self.kernel_size:
            return super().forward(x)
        weight = self.weight
        if weight.is_contiguous(memory_format=torch.channels_last):  # so that flatten copies nothing
            x, weight = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
        return F.linear(x.flatten(1), weight.flatten(1), self.bias)[..., None, None]


class TimmClassifier(Model):
    """A classifier of timm with random weights. `backbone` is timm's module, and its tensor names are timm's.

    Args:
        image_size: a network that is made for one size is made for this one.
        architecture: one of `timm.list_models()`, such as "resnet18".
        global_pool: how features become one vector ("avg", "token" and others); by default as the architecture does.
        class_token: whether a transformer has a CLS token; by default as the architecture does.
        fixed_input_size: whether the network is made for one image size; by default as the architecture is.
        single_output: timm's network has one output z for two classes. The logits are -z/2 and z/2, whose softmax is
            the sigmoid of z.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth (Huang et al., "Deep Networks with Stochastic Depth", 2016).

    Raises:
        ValueError: no such architecture, or one without any stage where a map could be read.
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
        single_output: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        given = {"global_pool": global_pool, "class_token": class_token}
        # Not passed where they are 0: not every network of timm takes these two.
        given |= {"drop_rate": drop_rate or None, "drop_path_rate": drop_path_rate or None}
        self.model_args = {key: value for key, value in given.items() if value is not None}
        if single_output and num_classes != 2:
            raise ValueError("a single output tells two classes apart")
        self.single_output, outputs = single_output, 1 if single_output else num_classes

        def make() -> nn.Module:
            return timm_network(architecture, image_size, fixed_input_size, num_classes=outputs, **self.model_args)

        self.backbone = make()
        for module in self.backbone.modules():
            if isinstance(module, ConvMlp):  # VGG's first linear layer, which timm writes as a convolution
                module.fc1.__class__ = WholeConv2d  # the same parameters, another forward pass
        with torch.device("meta"):  # a twin without memory shows which shapes the modules return
            self._maps = maps_of(make().eval(), torch.empty(1, 3, image_size, image_size))
        if not self._maps:
            raise ValueError(f"timm's {architecture} has no stage that could be explained")

    @property
    def stages(self) -> dict[str, Stage]:
        return {name: Stage(self.backbone.get_submodule(name), to_map) for name, to_map in self._maps.items()}

    def forward(self, images: Tensor) -> Tensor:
        logits = self.backbone(self.normalize(images))  # (N, num_classes)
        return torch.cat([-logits, logits], 1) / 2 if self.single_output else logits

    def library_config(self) -> dict:
        """What timm needs to build the same network and its transforms: the top level of config.json."""
        known, num_classes = self.backbone.pretrained_cfg, self.backbone.num_classes
        as_seen = {key: self.config[key] for key in ("interpolation", "crop_pct", "crop_mode", "mean", "std")}
        of_timm = {key: known[key] for key in ("input_size", "fixed_input_size", "first_conv", "classifier")}
        of_timm["input_size"] = (self.in_channels, *known["input_size"][1:])
        return {
            "architecture": known["architecture"],
            "num_classes": num_classes,
            "num_features": self.backbone.num_features,
            "label_names": self.class_names,
            "model_args": self.model_args | ({"in_chans": self.in_channels} if self.channels else {}),
            "pretrained_cfg": {**of_timm, **as_seen, "num_classes": num_classes},
        }


def timm_network(
    architecture: str, image_size: int, fixed_input_size: bool | None = None, **arguments: object
) -> nn.Module:
    """A network of timm with random weights for square views; ValueError if timm has no such architecture."""
    if not is_model(architecture):
        raise ValueError(f"timm has no network {architecture[:60]!a}; see timm.list_models()")
    size = {"input_size": (3, image_size, image_size)}
    if fixed_input_size is not None:
        size["fixed_input_size"] = fixed_input_size
    return timm.create_model(architecture, pretrained_cfg_overlay=size, **arguments)


# --- folders of timm --------------------------------------------------------------------------------------------------


def from_timm_config(config: dict) -> dict:
    """The entries of cvlab's config.json from timm's: network, arguments, class_names, image_size and so on.

    Only what is named here is read: addresses of weights, names of files and the like have no effect.

    Raises:
        ValueError: the network is unknown, has no head or is not for square RGB images, or an entry is malformed.
    """
    architecture, given = config.get("architecture"), config.get("pretrained_cfg", config)  # older ones are flat
    if not isinstance(architecture, str) or not is_model(architecture):
        raise ValueError(f"timm has no network {str(architecture)[:60]!a}")
    if not isinstance(given, dict):
        raise ValueError("pretrained_cfg is not an object")
    known = _stated(architecture) | given
    num_classes = config.get("num_classes", given.get("num_classes"))
    if type(num_classes) is not int or not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes is {str(num_classes)[:60]}: a classifier has 1 to {MAX_CLASSES:,}")
    model_args = config.get("model_args") or {}
    if not isinstance(model_args, dict):
        raise ValueError("model_args is not an object")
    arguments = {key: value for key, value in model_args.items() if value is not None}
    if arguments.pop("in_chans", 3) != 3 or arguments.pop("num_classes", num_classes) != num_classes:
        raise ValueError("model_args contradicts num_classes, or the network is not for RGB images")
    if (sides := arguments.pop("img_size", None)) is not None:
        sides = sides if isinstance(sides, list) else [sides, sides]
        known |= {"input_size": [3, *sides], "fixed_input_size": True}
    input_size = known["input_size"]
    if not isinstance(input_size, list) or len(input_size) != 3 or input_size[0] != 3:
        raise ValueError("input_size is not [3, side, side]")
    if input_size[1] != input_size[2]:
        raise ValueError(f"input_size {input_size} is not square: cvlab shows a model square views")
    if num_classes == 1:
        arguments["single_output"] = True
    return {
        "task": "classification",
        "network": "timm",
        "arguments": {**arguments, "architecture": architecture, "fixed_input_size": known["fixed_input_size"]},
        "class_names": _class_names(known | config, num_classes),
        **_view(known),
        "threshold": 0.5,
    }


def _class_names(stated: dict, num_classes: int) -> list[str]:
    """Descriptions of label_names where there are some, else label_names, else ImageNet's names, else numbers."""
    names, descriptions = stated.get("label_names"), stated.get("label_descriptions")
    if num_classes == 1 and not (isinstance(names, list | dict) and len(names) == 1):
        num_classes = 2  # a single output tells two classes apart; from one name comes also "not NAME"
    numbered = [f"class {i}" for i in range(num_classes)]
    if names is None:
        return imagenet_names(num_classes) or numbered
    if isinstance(names, dict):  # JSON has the indices as strings
        names = [names.get(str(i), name) for i, name in enumerate(numbered)]
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(name, str) for name in names):
        raise ValueError(f"label_names is not a list of {num_classes} names, one for each class")
    if isinstance(descriptions, dict):
        names = [descriptions.get(name, name) for name in names]
    names = unique([str(name) for name in names])
    return [f"not {names[0]}", *names] if num_classes == 1 else names


def imagenet_names(num_classes: int) -> list[str] | None:
    """Names of the ImageNet subset with so many classes, in timm's order; None where there is no such subset."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return None
    return unique([description.split(",")[0] for description in ImageNetInfo(subset).label_descriptions()])


# --- weights of timm --------------------------------------------------------------------------------------------------


def default_view(architecture: str) -> dict:
    """The arguments of `build` that fit timm's own weights of a network: {image_size, mean, std, crop_pct, ...}."""
    return _view(_stated(architecture))


def _stated(architecture: str) -> dict:
    """What timm states of its own weights of a network, as JSON has it."""
    stated = get_pretrained_cfg(architecture).to_dict()
    return {key: list(value) if isinstance(value, tuple) else value for key, value in stated.items()}


def _view(stated: dict) -> dict:
    crop_mode = "squash" if stated["crop_mode"] == "squash" else "center"
    same = {key: stated[key] for key in ("mean", "std", "crop_pct", "interpolation")}
    return {"image_size": stated["input_size"][-1], "crop_mode": crop_mode, **same}


def load_pretrained(backbone: nn.Module, name: str, image_size: int, file: Path | None = None) -> None:
    """Gives a backbone the weights in a file, or without one timm's own of a network, from the Hub or its local cache.

    Args:
        name: of timm, with or without a tag that says what it was trained on ("inception_v3.tf_in1k").

    Raises:
        OSError: there are none, or the Hub cannot be reached.
        ValueError: they cannot be read, or are of another network.
    """
    if file:
        weights = read_weights(file)
    else:
        size = {"input_size": (3, image_size, image_size)}
        try:
            weights = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=size).state_dict()
        except Exception as error:  # of the Hub's client, of the network, of timm for a network without weights
            raise OSError(
                f"The pretrained weights of {name} cannot be reached ({_reason(error)}). Give them as a file with "
                "--weights, or start with --no-pretrained."
            ) from error
    try:
        load_backbone(backbone, weights)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{file or name} does not fit {name}: {error}.") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth file that holds tensors only (weights_only=True).

    FileNotFoundError if there is no such file, ValueError if it cannot be read as weights.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"it {NOT_FETCHED}")
        return load_state_dict(str(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {path}.") from error
    except Exception as error:  # of the zip archive, of the pickle, of safetensors, of a list in the place of a dict
        raise ValueError(f"{path} cannot be read as weights, .pth or .safetensors: {_reason(error)}.") from error


def in_current_names(architecture: str, network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an older timm, of a network's authors or of another image size, as timm's own loader converts them."""
    known = vars(sys.modules[model_entrypoint(architecture).__module__])
    convert = next((known[name] for name in CONVERTERS if name in known), None)
    if convert is None:
        return weights
    takes = inspect.signature(convert).parameters
    settings = {"adapt_layer_scale": True} if "adapt_layer_scale" in takes else {}  # names of the authors of DeiT III
    return convert(dict(weights), *[network][: len(takes) - 1], **settings)


def _reason(error: Exception) -> str:
    return (str(error).split("\n")[0] or type(error).__name__)[:200].rstrip(". ")


def load_backbone(backbone: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads weights of the same network, also of its authors or of another size, without their classifier.

    A backbone that ends at an earlier stage takes what it has. Weights of a first layer for RGB are repeated for other
    channels, and divided by how often.

    Raises:
        ValueError: a tensor is missing, has another shape, or belongs to another network; the message names it.
    """
    architecture, size = backbone.pretrained_cfg["architecture"], backbone.pretrained_cfg["input_size"][-1]
    with torch.device("meta"):
        whole = timm_network(architecture, size)
    try:
        weights = in_current_names(architecture, whole, weights)
    except Exception as error:  # of tensors of another network
        raise ValueError(f"timm cannot convert the weights, which begin with {', '.join(list(weights)[:3])}") from error
    classifiers = whole.pretrained_cfg["classifier"] or ()
    in_classifier = tuple(f"{each}." for each in ([classifiers] if isinstance(classifiers, str) else classifiers))
    used = {name: tensor for name, tensor in weights.items() if not name.startswith(in_classifier)}
    needed = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith(in_classifier)}
    if fault := misfit(shapes_of(needed), shapes_of(used)):
        raise ValueError(f"{fault}; the weights begin with {', '.join(list(weights)[:3])}")
    own = backbone.state_dict()
    for name in (each for each in own if each in used and own[each].shape != used[each].shape):
        used[name] = adapt_input_conv(own[name].shape[1], used[name])
    backbone.load_state_dict({name: tensor for name, tensor in used.items() if name in own}, strict=False)
