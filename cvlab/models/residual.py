"""A residual network without downsampling: every block has half the resolution of the image.

    images -> normalize -> stem -> block1 -> ... -> blockN -> global average pooling -> linear -> logits

The stem is a 3x3 convolution, batch normalisation, ReLU and 2x2 max pooling; the blocks are those of convnet.py. The
linear layer reads the mean of the last block, so its raw Grad-CAM adds up to logit - bias.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from cvlab.models.convnet import ResidualBlock, conv_bn
from cvlab.models.model import Model, Stage


class ResidualNet(Model):
    """A classifier from scratch.

    Args:
        widths: channels of the stem, then of each block.
        stem_bias: whether the stem's convolution has a bias, which its batch normalisation makes redundant.
        dropout: its probability after a block's first convolution and batch normalisation.
        dropout_at: the blocks that have it, counted from 1; by default all.
    """

    task = "classification"

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = (32, 64, 128, 256, 512, 1024),
        stem_bias: bool = False,
        dropout: float = 0.0,
        dropout_at: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, widths[0], bias=stem_bias), nn.ReLU(), nn.MaxPool2d(2))
        self.dropout_places = range(1, len(widths))
        if unknown := set(dropout_at) - set(self.dropout_places):
            raise ValueError(f"dropout_at {min(unknown)} is not a number from 1 to {len(widths) - 1}")
        self.blocks = nn.ModuleList(
            ResidualBlock(before, after, dropout if i in (dropout_at or self.dropout_places) else 0.0)
            for i, (before, after) in enumerate(pairwise(widths), start=1)
        )
        self.head = nn.Linear(widths[-1], num_classes)

    @property
    def stages(self) -> dict[str, Stage]:
        return {f"block{i}": Stage(block) for i, block in enumerate(self.blocks, start=1)}

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(self.normalize(images))  # (N, widths[0], H/2, W/2)
        for block in self.blocks:
            x = block(x)  # (N, widths[i], H/2, W/2)
        return self.head(x.mean(dim=(2, 3)))  # (N, num_classes)
