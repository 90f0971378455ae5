"""Convolutional networks without shortcuts, as taught in courses and common around 2014, with VGG's module names.

    images -> normalize -> features: block1 -> ... -> blockN -> flatten -> classifier: hidden layers -> linear -> logits

A block is `depth` times 3x3 convolution (and batch normalisation) and ReLU, then 2x2 max pooling. `features` is one
sequence, whose indices count every layer: with depth 2 and batch normalisation the last convolution of four blocks is
features[24] (Simonyan and Zisserman, "Very Deep Convolutional Networks", 2014). train/recipes/ has the arguments of
the published networks.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from cvlab.models.model import Model, Stage


class PlainNet(Model):
    """A classifier from scratch for one image size: its first linear layer reads every position.

    Args:
        widths: channels of each block.
        depth: convolutions per block.
        hidden: lengths of the linear layers before the last one.
        pools: how many blocks, from the first, end in max pooling; by default all.
        pool_to: rows and columns to which the last map is averaged; 0 leaves it as it is.
        padding: zeros around each map keep height and width; without them every convolution makes both 2 smaller.
        batch_norm: batch normalisation after every convolution.
        first_relu: whether a ReLU follows the first convolution.
        dropout: its probability.
        dropout_at: before which convolutions it stands, counted from 1; the number after the last convolution means
            before the linear layers.
        head_dropout: one probability for the dropout before each linear layer; by default none.

    Raises:
        ValueError: the images are too small for so many blocks, head_dropout has another length, or there is no such
            place for dropout.
    """

    task = "classification"

    def __init__(
        self,
        num_classes: int,
        image_size: int,
        widths: Sequence[int] = (32, 64, 128, 256),
        depth: int = 1,
        hidden: Sequence[int] = (512,),
        pools: int | None = None,
        pool_to: int = 0,
        padding: bool = True,
        batch_norm: bool = False,
        first_relu: bool = True,
        dropout: float = 0.0,
        dropout_at: Sequence[int] = (2,),
        head_dropout: Sequence[float] = (),
    ) -> None:
        super().__init__()
        head_dropout = list(head_dropout) or [0.0] * (len(hidden) + 1)
        if len(head_dropout) != len(hidden) + 1:
            raise ValueError(f"head_dropout has {len(head_dropout)} numbers for {len(hidden) + 1} linear layers")
        layers: list[nn.Module] = []
        convs: list[int] = []  # indices of layers
        channels, side = 3, image_size
        for block, width in enumerate(widths):
            for _ in range(depth):
                convs.append(len(layers))
                layers.append(nn.Conv2d(channels, width, 3, padding=int(padding)))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                if first_relu or len(convs) > 1:
                    layers.append(nn.ReLU())
                channels, side = width, side if padding else side - 2
            if pools is None or block < pools:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        if side < 1:
            raise ValueError(f"images of {image_size} pixels are too small for {len(widths)} blocks")
        if pool_to:
            layers.append(nn.AdaptiveAvgPool2d(pool_to))
            side = pool_to
        self.features = nn.Sequential(*layers)
        self.last_convs = convs[depth - 1 :: depth]
        # Outside of `features`: the tensor names are the same with and without dropout.
        self.dropout, self.dropout_places = nn.Dropout(dropout), range(2, len(convs) + 2)
        if unknown := set(dropout_at) - set(self.dropout_places):
            raise ValueError(f"dropout_at {min(unknown)} is not a number from 2 to {len(convs) + 1}")
        self.dropout_before = {[*convs, len(layers)][place - 1] for place in dropout_at}
        sizes = [channels * side**2, *hidden, num_classes]
        head = [nn.Flatten()]
        for (before, after), p in zip(pairwise(sizes), head_dropout, strict=True):
            head += [nn.Dropout(p), nn.Linear(before, after), nn.ReLU()]
        self.classifier = nn.Sequential(*head[:-1])  # no ReLU after the logits

    @property
    def stages(self) -> dict[str, Stage]:
        """The last convolution of each block, before its ReLU."""
        return {f"block{i}": Stage(self.features[conv]) for i, conv in enumerate(self.last_convs, start=1)}

    def forward(self, images: Tensor) -> Tensor:
        x = self.normalize(images)
        for i, layer in enumerate((*self.features, self.classifier)):
            if i in self.dropout_before:
                x = self.dropout(x)
            x = layer(x)
        return x  # (N, num_classes)
