"""Batch normalisation fused into convolutions: a copy of a model that predicts and explains faster.

In eval mode batch normalisation is a factor and a shift per channel, which the convolution before it can apply as well
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018).
"""

from contextlib import ExitStack
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from cvlab.models.adopted import Adopted
from cvlab.models.model import Model

TOLERANCE = 1e-3  # of the largest logit: rounding stays far below it, a wrong fusion does not


@torch.no_grad()
def fused(model: Model) -> Model:
    """A copy in eval mode with batch normalisation fused into the convolutions, in channels-last memory format.

    Its stages have the same names and, within rounding, the same maps. Rounding can flip a ReLU or a max pooling whose
    inputs are nearly equal: of 1,760 maps of synthetic scenes 14 differed by more than 1e-5 of their largest value, at
    most by 2e-3, none of them at the last stage. The copy cannot be trained.

    The model itself, if it also uses the output of a convolution without its batch normalisation; or if it was adopted:
    a copy of somebody else's code may lean on the original.
    """
    if isinstance(model, Adopted):
        return model
    copy = deepcopy(model).eval().requires_grad_(False)
    shape = 1, getattr(model, "in_channels", 3), model.image_size, model.image_size
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(next(copy.parameters()).device)
    expected = copy(images)
    for conv_name, norm_name in _pairs(copy, images):
        conv, norm = copy.get_submodule(conv_name), copy.get_submodule(norm_name)
        copy.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        # timm's BatchNormAct2d also has dropout and an activation.
        copy.set_submodule(norm_name, nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity())
    if (copy(images) - expected).abs().max() > TOLERANCE * expected.abs().max():
        return model
    copy.to(memory_format=torch.channels_last)
    copy.normalize.register_forward_hook(lambda module, inputs, images: images.to(memory_format=torch.channels_last))
    return copy


def _pairs(model: Model, images: Tensor) -> list[tuple[str, str]]:
    """Names of each convolution and of the batch normalisation that reads its output, found in one forward pass."""
    names = {module: name for name, module in model.named_modules()}
    stages = {stage.module for stage in model.stages.values()}
    found: list[tuple[str, str]] = []

    def after_conv(conv: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.conv, output.version = names[conv], output._version

    def before_norm(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        if getattr(inputs[0], "version", None) == inputs[0]._version:  # else an in-place operation came between
            found.append((inputs[0].conv, names[norm]))

    with ExitStack() as hooks:
        for module in names:
            if isinstance(module, nn.Conv2d) and module not in stages:  # a stage's own output must not change
                hooks.enter_context(module.register_forward_hook(after_conv))
            elif isinstance(module, nn.BatchNorm2d):
                hooks.enter_context(module.register_forward_pre_hook(before_norm))
        model(images)
    return found
