"""A U-Net on the stages of a ResNet, as the library segmentation_models.pytorch builds it, under its tensor names.

    images -> stem (encoder2) ------------ skip -----------> decoder2 -> decoder1 -> head -> logits
                 layer1 (encoder3) ------- skip ------> decoder3
                    layer2 (encoder4) ---- skip -> decoder4
                       layer3 (encoder5) - skip -> decoder5
                            layer4 (bottleneck)

The ResNet (He et al., 2015) halves the resolution five times, its stem the first time. Each decoder doubles it by
nearest neighbour, takes the skip of its resolution, and is two 3x3 convolutions with batch normalisation; the head is a
3x3 convolution. A number says the same resolution on both sides: decoder1 is as large as the image, and has no skip.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from cvlab.models.model import Model, Normalize, Stage

ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 convolution that keeps height and width, batch normalisation, ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class DecoderBlock(nn.Module):
    """Twice the height and width, the skip beside it, two convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(in_channels + skip_channels, out_channels)
        self.conv2 = conv_bn_relu(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.conv2(self.conv1(x))


class ResNetUNet(Model):
    """A segmenter: one sigmoid channel per class.

    Args:
        num_classes: channels of the logits.
        encoder: one of ENCODERS.
        decoder_channels: channels of decoder5, decoder4, decoder3, decoder2 and decoder1.
        mean, std: of the images in [0, 1]; by default those with which ImageNet's weights were trained.
    """

    task = "segmentation"

    def __init__(
        self,
        num_classes: int,
        encoder: str = "resnet34",
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if encoder not in ENCODERS:
            raise ValueError(f"there is no encoder {encoder!r}; known are {', '.join(ENCODERS)}")
        if len(decoder_channels) != 5:
            raise ValueError("decoder_channels are five numbers, one for each decoder")
        self.normalize = Normalize(mean, std)
        self.encoder = getattr(torchvision.models, encoder)(weights=None)
        bottleneck = self.encoder.fc.in_features
        del self.encoder.fc, self.encoder.avgpool
        skips = [bottleneck // 2, bottleneck // 4, bottleneck // 8, 64, 0]
        widths = [bottleneck, *decoder_channels]
        self.decoder = nn.Module()
        self.decoder.blocks = nn.ModuleList(DecoderBlock(widths[i], skips[i], widths[i + 1]) for i in range(5))
        self.segmentation_head = nn.Sequential(nn.Conv2d(widths[-1], num_classes, 3, padding=1))

    @property
    def stages(self) -> dict[str, Stage]:
        resnet = self.encoder
        down = {f"encoder{i}": layer for i, layer in enumerate((resnet.relu, resnet.layer1, resnet.layer2), start=2)}
        down |= {"encoder5": resnet.layer3, "bottleneck": resnet.layer4}
        up = {f"decoder{5 - i}": block for i, block in enumerate(self.decoder.blocks)}
        return {name: Stage(module) for name, module in (down | up).items()}

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2] % 32 or images.shape[-1] % 32:
            size = f"{images.shape[-2]}x{images.shape[-1]}"
            raise ValueError(f"this U-Net takes images whose sides are multiples of 32, not {size}")
        resnet = self.encoder
        skips = [resnet.relu(resnet.bn1(resnet.conv1(self.normalize(images))))]  # (N, 64, H/2, W/2)
        skips.append(resnet.layer1(resnet.maxpool(skips[-1])))  # (N, C/8, H/4, W/4), C the channels of the bottleneck
        skips.append(resnet.layer2(skips[-1]))  # (N, C/4, H/8, W/8)
        skips.append(resnet.layer3(skips[-1]))  # (N, C/2, H/16, W/16)
        x = resnet.layer4(skips[-1])  # (N, C, H/32, W/32)
        for block, skip in zip(self.decoder.blocks, [*reversed(skips), None], strict=True):
            x = block(x, skip)
        return self.segmentation_head(x)  # (N, num_classes, H, W)


def from_smp_config(config: dict) -> dict:
    """What the config.json of segmentation_models.pytorch says, as the entries of our own.

    It says nothing of class names, of the size of the training images and of their normalisation: the classes are
    numbered, the views are 256 pixels, mean and std are ImageNet's, as that library's own preprocessing has them.

    Raises:
        ValueError: another architecture than a U-Net on a ResNet, or one with parts that are not built here.
    """
    if config["_model_class"] != "Unet" or config.get("encoder_name") not in ENCODERS:
        found = f"{str(config['_model_class'])[:60]!r} on {str(config.get('encoder_name'))[:60]!r}"
        raise ValueError(f"of segmentation_models.pytorch cvlab opens Unet on {', '.join(ENCODERS)}, not {found}")
    plain = {
        "encoder_depth": (5,),
        "in_channels": (3,),
        "decoder_use_norm": (True, "batchnorm"),
        "decoder_use_batchnorm": (True, None),
        "decoder_attention_type": (None,),
        "decoder_interpolation": ("nearest",),
        "activation": (None, "identity", "sigmoid"),
        "aux_params": (None,),
    }
    for key, allowed in plain.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key} {str(config[key])[:60]!r} of segmentation_models.pytorch is not built by cvlab")
    num_classes = config.get("classes", 1)
    if type(num_classes) is not int or not 1 <= num_classes <= 1000:
        raise ValueError(f"classes is {str(num_classes)[:60]}: a segmenter has 1 to 1,000")
    return {
        "task": "segmentation",
        "network": "resnet_unet",
        "arguments": {
            "encoder": config["encoder_name"],
            "decoder_channels": config.get("decoder_channels", [256, 128, 64, 32, 16]),
        },
        "class_names": [f"class {i}" for i in range(num_classes)] if num_classes > 1 else ["foreground"],
        "image_size": 256,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "threshold": 0.5,
    }
