"""Two networks that take milliseconds to explain, with BatchNorm statistics as after training."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: pytest runs two processes side by side

import pytest
import torch
from torch import Tensor, nn

from cvlab.models import Model, build


def tiny(network: str) -> Model:
    torch.manual_seed(0)
    if network == "convnet":
        model = build("convnet", ["cat", "dog", "fox"], 16, {"widths": [4, 8], "depth": 2, "dropout": 0.5})
    else:
        model = build("unet", ["horse", "rider"], 16, {"width": 4, "depth": 2, "dropout": 0.5})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, mean=1.0, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


@pytest.fixture
def classifier() -> Model:
    """16 x 16 pixels, three classes, stage1 (4, 8, 8) and stage2 (8, 4, 4)."""
    return tiny("convnet")


@pytest.fixture
def segmenter() -> Model:
    """16 x 16 pixels, two classes, five stages from (4, 16, 16) to the bottleneck's (16, 4, 4)."""
    return tiny("unet")


@pytest.fixture(params=["convnet", "unet"])
def model(request: pytest.FixtureRequest) -> Model:
    """The classifier, then the segmenter."""
    return tiny(request.param)


@pytest.fixture
def images() -> Tensor:
    """(4, 3, 16, 16) in [0, 1]."""
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
