"""Where heatmaps can be read in a network of timm: the module of each stage, and how its output becomes a map.

timm states where each of its networks changes resolution (feature_info). These places become the stages: convolutional
ones as they are, (N, h, w, C) ones permuted, the tokens of vision transformers as the grid of their patches, without
the CLS token. Of a transformer's block the output of its first norm is taken: where only the CLS token is read at the
end, no gradient reaches the patches that leave the last block, but it does reach those that enter it.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cvlab.models.model import identity

ToMap = Callable[[Tensor], Tensor]


def tokens_to_map(activation: Tensor, prefix_tokens: int) -> Tensor:
    """(N, prefix + h*w, C) -> (N, C, h, w), h = w: patch tokens as their grid, without CLS and other prefix tokens."""
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
    """By the name of each stage's module its to_map, found from the shapes of one forward pass.

    Args:
        backbone: a network of timm in eval mode; it keeps the hooks, so give a copy on the meta device.
        images: (1, 3, S, S).
    """
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(_check_patches)
    _, outputs = module_outputs(backbone, images)
    shapes = {name: output.shape for name, (output, _) in outputs.items()}
    image_size, channels_last = images.shape[-1], getattr(backbone, "output_fmt", "NCHW") == "NHWC"
    found: dict[str, ToMap] = {}
    for i in range(len(backbone.feature_info)):
        name, reduction = backbone.feature_info[i]["module"], backbone.feature_info[i]["reduction"]
        if hasattr(backbone, "reroll"):
            block = int(name.removeprefix("blocks."))
            found[name] = partial(windows_to_map, reroll=backbone.reroll, block=block)
            continue
        sides = math.ceil(image_size / reduction), image_size // reduction
        of_module, of_norm = (to_map_of(shapes.get(each, ()), sides, channels_last) for each in (name, f"{name}.norm1"))
        if of_norm is not None and of_module is not identity:
            found[f"{name}.norm1"] = of_norm
        elif of_module is not None:
            found[name] = of_module
    return found or _last_of_each_resolution(shapes)


def module_outputs(network: nn.Module, images: Tensor) -> tuple[object, dict[str, tuple[Tensor, int]]]:
    """What a network returns, and by the name of a module its output and the version that it had then.

    They are in the order of the forward pass, of the modules that run once and return a tensor. The network keeps the
    hooks.
    """
    names = {module: name for name, module in network.named_modules()}
    outputs: dict[str, tuple[Tensor, int]] = {}
    calls: Counter[str] = Counter()

    def hook(module: nn.Module, inputs: tuple, output: object) -> None:
        calls[names[module]] += 1
        if isinstance(output, Tensor):
            outputs[names[module]] = output, output._version

    for module in names:
        module.register_forward_hook(hook)
    with torch.no_grad():
        returned = network(images)
    return returned, {name: found for name, found in outputs.items() if calls[name] == 1}


def _check_patches(conv: nn.Conv2d, inputs: tuple[Tensor]) -> None:
    """Raises ValueError if a convolution that cuts the image into patches would never see its last columns."""
    patch, channels, side = conv.stride[-1], inputs[0].shape[1], inputs[0].shape[-1]
    if channels == 3 and conv.kernel_size == conv.stride and not any(conv.padding) and side % patch:
        sizes = f"{side - side % patch} or {side - side % patch + patch}"
        raise ValueError(
            f"the network reads patches of {patch} pixels, and would never see the last {side % patch} columns of "
            f"images of {side} pixels: choose an image size of {sizes}"
        )


def to_map_of(shape: Sequence[int], sides: Sequence[int], channels_last: bool) -> ToMap | None:
    """How an output of this shape becomes (N, C, h, w), h = w; None where it is no map.

    Tokens are the grid of the first of the `sides` that does not need more of them. `channels_last` decides where there
    are as many channels as rows and columns.
    """
    if len(shape) == 4 and shape[1] == shape[2] and (channels_last or shape[2] != shape[3]):
        return channels_last_to_map
    if len(shape) == 4 and shape[2] == shape[3]:
        return identity
    if len(shape) == 3:
        for side in sides:
            if shape[1] >= side**2:
                return partial(tokens_to_map, prefix_tokens=shape[1] - side**2)
    return None


def _last_of_each_resolution(shapes: dict[str, torch.Size]) -> dict[str, ToMap]:
    """For networks whose feature_info names no module with one tensor as its output."""
    grids: dict[int, tuple[str, ToMap]] = {}  # by their side
    tokens: dict[int, tuple[str, ToMap]] = {}
    for name, shape in shapes.items():
        if len(shape) == 4 and shape[2] == shape[3] > 1:
            grids[shape[2]] = name, identity
        elif len(shape) == 3 and name.endswith(("norm1", "norm_out")):
            side = math.isqrt(shape[1])
            tokens[side] = name, partial(tokens_to_map, prefix_tokens=shape[1] - side**2)
    return dict(last for _, last in sorted((tokens or grids).items(), reverse=True))
