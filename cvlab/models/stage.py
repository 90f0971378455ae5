"""What every network is made with: a stage that can be explained, and normalisation as the first layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MAX_CLASSES = 50_000  # of a classifier; the largest ImageNet has 21,843


def identity(activation: Tensor) -> Tensor:
    """The activation of a convolutional stage is a map already: (N, C, h, w)."""
    return activation


@dataclass(frozen=True)
class Stage:
    """A place in a network where a heatmap can be read.

    Attributes:
        module: the module whose output is the stage's activation.
        to_map: rearranges that output into (N, C, h, w). It may permute, reshape or drop entries (the CLS token of a
            transformer), nothing else: the gradient is brought into the same form by the same function.
    """

    module: nn.Module
    to_map: Callable[[Tensor], Tensor] = identity


class Normalize(nn.Module):
    """(images - mean) / std per channel, inside the model, so that training and serving cannot differ."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Not persistent: mean and std are written once, in config.json.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
