"""Networks by name: `build` makes a `Model` (model.py) of any of them, `adopt` of somebody's own module."""

import inspect
from collections.abc import Sequence
from importlib import import_module

import torch

from cvlab.models.adopted import adopt
from cvlab.models.geometry import locate
from cvlab.models.model import Grid, Model, Normalize, Stage, device, mask_levels, probabilities

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
) -> Model:
    """A model with random weights.

    Args:
        network: a key of `NETWORKS`.
        arguments: keyword arguments of the network itself (its widths and the like).
        mean, std: per channel, of images in [0, 1]; the model's first layer normalises with them.
        class_names and others: attributes of `Model`.

    Raises:
        ValueError: the network is unknown or does not take an argument.
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
    model.normalize = Normalize(mean, std)
    model.describe(
        network=network,
        arguments=arguments,
        class_names=list(class_names),
        image_size=image_size,
        mean=list(mean),
        std=list(std),
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        threshold=threshold,
        interpolation=interpolation,
        exclusive=exclusive,
    )
    locate(model)
    return model


def settings_in(config: dict) -> dict:
    """The arguments of `build` in a model's config, by name."""
    return {name: config[name] for name in inspect.signature(build).parameters}


def check_size(network: str, image_size: int, arguments: dict) -> None:
    """Raises ValueError if a network of `build` cannot take images of this size. It is tried without any memory."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = build(network, ["a", "b"], image_size, arguments).eval()
            model(torch.empty(1, 3, image_size, image_size))
    except ValueError:
        raise
    except Exception as error:  # networks fail in many ways
        name, reason = arguments.get("architecture", network), str(error).split("\n")[0].rstrip(".")
        raise ValueError(
            f"{name} cannot take images of {image_size} x {image_size} pixels ({reason}): choose another --image-size."
        ) from error
