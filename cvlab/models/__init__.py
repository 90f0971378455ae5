"""Networks by name: `build` makes a `Model` (model.py) of any of them, `adopt` of somebody's own module."""

import inspect
from collections.abc import Sequence
from importlib import import_module

import torch
from torch import nn

from cvlab.models.adopted import adopt
from cvlab.models.geometry import locate
from cvlab.models.model import MAX_CHANNELS, Channels, Grid, Model, Normalize, Stage, device, mask_levels, probabilities

# Module and class. Each is imported when it is first built: importing timm and torchvision, which the last four need,
# takes as long as importing torch itself.
NETWORKS = {
    "convnet": ("convnet", "ConvNet"),
    "plain": ("plain", "PlainNet"),
    "residual": ("residual", "ResidualNet"),
    "unet": ("unet", "UNet"),
    "timm": ("timm", "TimmClassifier"),
    "timm_head": ("timm_head", "BackboneWithHead"),
    "smp": ("smp", "SmpUNet"),
    "resnet_unet": ("smp", "SmpUNet"),  # its name in folders that were saved when only ResNets could be encoders
}


def network_class(network: str) -> type[Model]:
    """The class of a key of `NETWORKS`."""
    module, name = NETWORKS[network]
    return getattr(import_module(f"{__name__}.{module}"), name)


def build(
    network: str,
    class_names: Sequence[str],
    image_size: int,
    arguments: dict | None = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
    crop_pct: float = 1.0,
    threshold: float = 0.5,
    interpolation: str = "bilinear",
    crop_mode: str = "center",
    exclusive: bool = False,
    channels: Channels | dict | None = None,
) -> Model:
    """A model with random weights.

    Args:
        network: a key of `NETWORKS`.
        arguments: keyword arguments of the network itself (its widths and the like).
        mean, std: per channel, of images in [0, 1]; the model's first layer normalises with them.
        class_names and others: attributes of `Model`.

    Raises:
        ValueError: the network is unknown or does not take an argument, or `channels` cannot be meant.
    """
    if network not in NETWORKS:
        raise ValueError(f"unknown network “{network}”; known are {', '.join(NETWORKS)}")
    arguments = dict(arguments or {})
    make = network_class(network)
    parameters = inspect.signature(make).parameters
    given = {"num_classes": len(class_names), "image_size": image_size}
    known = set(parameters) - set(given)
    if unknown := sorted(set(arguments) - known):
        raise ValueError(f"network “{network}” takes no argument “{unknown[0]}”; it takes {', '.join(sorted(known))}")
    model = make(**arguments, **{key: value for key, value in given.items() if key in parameters})
    if channels:
        channels = model.channels = Channels(**channels) if isinstance(channels, dict) else channels
        count, shown, limits = channels
        in_order = len(limits) in (0, 2) and [*limits] == sorted({float(each) for each in limits})
        if not 1 <= count <= MAX_CHANNELS or len(shown) != 3 or {*shown} - {*range(1, count + 1)} or not in_order:
            raise ValueError(f"channels are 1 to {MAX_CHANNELS}, three of them are shown, and a range is LOW HIGH")
        first = next(each for each in model.modules() if isinstance(each, nn.Conv2d))  # it reads the images
        first.in_channels = model.in_channels = count
        first.weight = nn.Parameter(first.weight.new_empty(len(first.weight), count, *first.kernel_size))
        first.reset_parameters()
    model.normalize = Normalize(mean, std)
    settings = {"class_names": list(class_names), "image_size": image_size, "mean": list(mean), "std": list(std)}
    settings |= {"crop_pct": crop_pct, "crop_mode": crop_mode, "threshold": threshold, "interpolation": interpolation}
    settings |= {"exclusive": exclusive} | ({"channels": channels._asdict()} if channels else {})
    model.describe(network=network, arguments=arguments, **settings)
    locate(model)
    return model


def settings_in(config: dict) -> dict:
    """The arguments of `build` in a model's config, by name."""
    return {name: config[name] for name in inspect.signature(build).parameters if name in config}


def check_size(network: str, image_size: int, arguments: dict, channels: Channels | None = None) -> None:
    """Raises ValueError if a network of `build` cannot take images of this size. It is tried without any memory."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = build(network, ["a", "b"], image_size, arguments, (0.5,), (0.25,), channels=channels).eval()
            model(torch.empty(1, model.in_channels, image_size, image_size))
    except ValueError:
        raise
    except Exception as error:  # networks fail in many ways
        name, reason = arguments.get("architecture", network), str(error).split("\n")[0].rstrip(".")
        raise ValueError(
            f"{name} cannot take images of {image_size} x {image_size} pixels ({reason}): choose another --image-size."
        ) from error
