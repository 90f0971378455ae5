"""A residual convolutional network for training from scratch.

    images -> normalize -> stem -> stage1 -> ... -> stageN -> global average pooling -> dropout -> linear -> logits

Every stage halves the resolution by 2x2 max pooling (the first one does not), then has `depth` residual blocks of two
3x3 convolutions (He et al., "Deep Residual Learning for Image Recognition", 2015). The pooled features enter one linear
layer, so the raw Grad-CAM of the last stage adds up to logit - bias: the map shows all the evidence.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.models.model import Model, Stage


def conv_bn(in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = False) -> nn.Sequential:
    """Convolution of stride 1 that keeps height and width, then batch normalisation (which makes a bias redundant)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + f(x)) with two 3x3 convolutions in f; a 1x1 shortcut where the channels change.

    `dropout` is applied after the first of them.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = conv_bn(in_channels, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv_bn(out_channels, out_channels)
        self.shortcut = conv_bn(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.dropout(self.conv1(x)))))


class ConvNet(Model):
    """A classifier from scratch.

    Args:
        widths: channels of each stage; one entry per stage.
        depth: residual blocks per stage.
        dropout: probability, before the linear layer.
    """

    task = "classification"

    def __init__(
        self, num_classes: int, widths: Sequence[int] = (24, 48, 96, 192), depth: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        # The stem halves the resolution: full-size feature maps cost the most time and add little.
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.blocks = nn.ModuleList()
        in_channels = widths[0]
        for width in widths:
            residual = [ResidualBlock(in_channels if i == 0 else width, width) for i in range(depth)]
            self.blocks.append(nn.Sequential(*residual))
            in_channels = width
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(in_channels, num_classes)

    @property
    def stages(self) -> dict[str, Stage]:
        return {f"stage{i}": Stage(block) for i, block in enumerate(self.blocks, start=1)}

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(self.normalize(images))  # (N, widths[0], H/2, W/2)
        for i, block in enumerate(self.blocks):
            if i > 0:
                x = F.max_pool2d(x, 2)
            x = block(x)  # (N, widths[i], H/2^(i+1), W/2^(i+1))
        features = self.dropout(x.mean(dim=(2, 3)))  # (N, widths[-1])
        return self.head(features)  # (N, num_classes)
