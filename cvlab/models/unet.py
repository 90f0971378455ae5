"""U-Net (Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015).

    images -> encoder1 ------------- skip -------------> decoder1 -> head -> logits
                 encoder2 --------- skip ---------> decoder2
                    encoder3 ----- skip -----> decoder3
                             bottleneck

An encoder is two 3x3 convolutions; 2x2 max pooling leads down. A transposed 2x2 convolution leads up, the skip is
concatenated, and a decoder is two 3x3 convolutions. The head is a 1x1 convolution to one channel per class.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlab.models.model import Model, Stage


def double_conv(in_channels: int, out_channels: int, batch_norm: bool, dropout: float) -> nn.Sequential:
    """Two 3x3 convolutions with ReLU, height and width kept; dropout of whole channels at the end."""
    layers = []
    for channels in (in_channels, out_channels):
        layers.append(nn.Conv2d(channels, out_channels, 3, padding=1, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(out_channels))
        layers.append(nn.ReLU())
    if dropout:
        layers.append(nn.Dropout2d(dropout))
    return nn.Sequential(*layers)


class UNet(Model):
    """A segmenter: one channel per class.

    Args:
        width: channels of the first encoder; each level down has twice as many.
        depth: levels above the bottleneck. Height and width of the images must be multiples of 2**depth.
        batch_norm: batch normalisation after every 3x3 convolution.
        dropout: probability that a channel is dropped after an encoder and after the bottleneck.
    """

    task = "segmentation"

    def __init__(
        self, num_classes: int, width: int = 64, depth: int = 3, batch_norm: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.encoders = nn.ModuleList(
            double_conv(channels, widths[level], batch_norm, dropout)
            for level, channels in enumerate([3, *widths[: depth - 1]])
        )
        # These compute nothing: they are places to read a skip apart from the path down to the bottleneck.
        self.skips = nn.ModuleList(nn.Identity() for _ in range(depth))
        self.bottleneck = double_conv(widths[depth - 1], widths[depth], batch_norm, dropout)
        # Index 0 of both lists is decoder1, the finest; the forward pass runs through them from the end.
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(widths[level + 1], widths[level], 2, stride=2) for level in range(depth)
        )
        self.decoders = nn.ModuleList(
            double_conv(2 * widths[level], widths[level], batch_norm, dropout=0.0) for level in range(depth)
        )
        self.head = nn.Conv2d(width, num_classes, 1)

    @property
    def stages(self) -> dict[str, Stage]:
        down = {f"encoder{i}": Stage(encoder) for i, encoder in enumerate(self.encoders, start=1)}
        up = {f"decoder{i}": Stage(decoder) for i, decoder in enumerate(self.decoders, start=1)}
        return {**down, "bottleneck": Stage(self.bottleneck), **dict(reversed(up.items()))}

    @property
    def cuts(self) -> tuple[dict[str, nn.Module], Sequence[str]]:
        """What enters the decoder, the skips from the uppermost on and the bottleneck, and the modules after it."""
        skips = {f"skip{i}": skip for i, skip in enumerate(self.skips, start=1)}
        return {**skips, "bottleneck": self.bottleneck}, ("ups", "decoders", "head")

    def forward(self, images: Tensor) -> Tensor:
        multiple = 2 ** len(self.encoders)
        if images.shape[-2] % multiple or images.shape[-1] % multiple:
            size = f"{images.shape[-2]}x{images.shape[-1]}"
            raise ValueError(f"this U-Net takes images whose sides are multiples of {multiple}, not {size}")
        x = self.normalize(images)
        skips = []
        for encoder, skip in zip(self.encoders, self.skips, strict=True):
            x = encoder(x)  # (N, width * 2^level, H / 2^level, W / 2^level)
            skips.append(skip(x))
            x = F.max_pool2d(x, 2)
        x = self.bottleneck(x)
        for up, decoder, skip in zip(reversed(self.ups), reversed(self.decoders), reversed(skips), strict=True):
            x = decoder(torch.cat([skip, up(x)], dim=1))
        return self.head(x)  # (N, num_classes, H, W)
