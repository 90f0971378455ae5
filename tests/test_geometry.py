"""Where the cells of a stage look, against centres of gradients, values worked out by hand, and a moved spot."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvlab.explain import class_score, heatmap
from cvlab.explain.hooks import passes
from cvlab.models import Model, Stage, build
from cvlab.models.geometry import locate

SIDE = 64


class Layers(Model):
    """Any layers, as a model whose one stage is the last of them."""

    task = "classification"
    image_size = SIDE

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    @property
    def stages(self):
        return {"last": Stage(self.layers[-1])}

    def forward(self, images):
        return self.layers(images).mean((2, 3))


class MergedNeighbours(nn.Module):
    """2 x 2 neighbours become channels by reshaping, as in Swin."""

    def forward(self, x):
        return F.pixel_unshuffle(x, 2)


class TwoWays(nn.Module):
    """A block of ResNet with stride 2, and a gate from pooled features, which is open."""

    def __init__(self):
        super().__init__()
        self.conv, self.shortcut = nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 1, 2)

    def forward(self, x):
        return (self.conv(x) + self.shortcut(x)) * (100 * F.adaptive_avg_pool2d(x, 1)).sigmoid()


class PaddedRight(nn.Module):
    """Stride 2 as TensorFlow pads it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


CASES = {
    "convolution": [nn.Conv2d(3, 3, 3, padding=1)],
    "no padding": [nn.Conv2d(3, 3, 5)],
    "dilation": [nn.Conv2d(3, 3, 3, padding=1, dilation=2)],
    "stride": [nn.Conv2d(3, 3, 7, stride=2, padding=3), nn.Conv2d(3, 3, 3, stride=2, padding=1)],
    "even kernel": [nn.Conv2d(3, 3, 4, stride=4), nn.Conv2d(3, 3, 2, stride=2)],
    "pooling": [nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.AvgPool2d(2), nn.Conv2d(3, 3, 3, padding=1)],
    "pooling to a size": [nn.Conv2d(3, 3, 3, padding=1), nn.AdaptiveAvgPool2d(8)],
    "transposed": [nn.Conv2d(3, 3, 4, stride=4), nn.ConvTranspose2d(3, 3, 2, stride=2)],
    "transposed with padding": [nn.Conv2d(3, 3, 4, stride=4), nn.ConvTranspose2d(3, 3, 4, stride=2, padding=1)],
    "upsampled": [nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, padding=1)],
    "merged by reshaping": [nn.Conv2d(3, 3, 4, stride=4), MergedNeighbours(), nn.Conv2d(12, 3, 3, padding=1)],
    "two ways": [TwoWays(), TwoWays()],
    "padded on one side": [PaddedRight(), PaddedRight(), nn.BatchNorm2d(3), nn.ReLU()],
}


@pytest.mark.parametrize("name", CASES)
def test_the_centre_of_a_cell_is_that_of_its_gradient(name):
    """With weights of 1 the gradient of four columns of cells is spread evenly around their centre."""
    model = Layers(*CASES[name]).eval()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    locate(model)
    grid = model.stages["last"].grid
    images = torch.rand(1, 3, SIDE, SIDE, requires_grad=True)
    output = model.layers(images)
    first = output.shape[-1] // 2 - 2
    seen = torch.autograd.grad(output[..., first : first + 4].sum(), images)[0]
    columns = seen.sum((0, 1, 2))
    centre = (columns * torch.arange(SIDE)).sum() / columns.sum()
    assert grid.offset + grid.stride * (first + 1.5) == pytest.approx(centre.item(), abs=1e-3)
    assert grid.side == SIDE


def test_known_networks():
    """Halving with padding keeps cell 0 over pixel 0; pooling and patches put it in the middle of what they merge."""
    for architecture, offset in (("resnet18", 0.0), ("vgg11", 15.5), ("convnext_atto", 15.5), ("regnety_002", 0.0)):
        stage = list(build("timm", ["a", "b"], 64, {"architecture": architecture}).stages.values())[-1]
        assert (stage.offset, stage.stride) == (offset, 32.0), architecture
    tokens = list(build("timm", ["a", "b"], 224, {"architecture": "vit_tiny_patch16_224"}).stages.values())
    assert {(stage.offset, stage.stride) for stage in tokens} == {(7.5, 16.0)}


def test_the_model_is_left_as_it_was():
    model = build("convnet", ["a", "b"], 32, {"widths": [4, 8]})
    assert model.training
    assert all(
        torch.equal(m.running_mean, torch.zeros(len(m.running_mean)))
        for m in model.modules()
        if hasattr(m, "running_mean")
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_a_cell_is_drawn_over_its_centre():
    model = build("convnet", ["a", "b"], 32, {"widths": [4, 8]})
    stage = model.stages["stage2"]
    assert (stage.offset, stage.stride) == (1.0, 4.0)
    attribution = torch.zeros(1, 1, 8, 8)
    attribution[..., 3, 5] = 1
    heat = heatmap(attribution, (32, 32), stage)[0, 0]
    assert divmod(heat.argmax().item(), 32) == (1 + 3 * 4, 1 + 5 * 4)
    assert heat.max() == 1
    assert heat[1 + 3 * 4, 1 + 5 * 4 + 2] == pytest.approx(0.5)  # halfway to the next cell
    assert (heat > 0).sum() == 7 * 7
    large = heatmap(attribution, (96, 96), stage)[
        0, 0
    ]  # over an enlargement by 3: pixel 3x + 1 is the middle of pixel x
    assert divmod(large.argmax().item(), 96) == (3 * 13 + 1, 3 * 21 + 1)


def test_where_cells_are_centred_in_what_they_cover_nothing_changes():
    model = build("unet", ["a"], 32, {"width": 4, "depth": 2})
    for name, side in (("bottleneck", 8), ("decoder1", 32)):
        attribution = torch.randn(2, 1, side, side)
        drawn = heatmap(attribution, (48, 48), model.stages[name])
        assert torch.allclose(drawn, heatmap(attribution, (48, 48)), atol=1e-5)


def test_a_spot_is_found_where_it_is():
    """Half a cell of a ResNet's last stage is 16 pixels: drawn so far off, a map would point at another object."""
    torch.manual_seed(0)
    model = build("timm", ["a", "b"], 224, {"architecture": "resnet18"}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # the last one of a block begins at 0
    spots = [(80, 80), (80, 140), (110, 112), (146, 96), (128, 124)]
    images = torch.full((1 + len(spots), 3, 224, 224), 0.5)
    for image, (row, column) in zip(images[1:], spots, strict=True):
        image[:, row - 4 : row + 5, column - 4 : column + 5] = 1
    blank, *seen = passes(model, images, class_score(0), {"layer4": model.stages["layer4"].module})[0].activations[
        "layer4"
    ]
    errors = []
    for activation, spot in zip(seen, spots, strict=True):
        change = (activation - blank).pow(2).sum(0)[None, None]
        heat = heatmap(change, (224, 224), model.stages["layer4"])[0, 0]
        across = torch.arange(224.0)
        errors.append([(heat.sum(1 - axis) @ across / heat.sum() - spot[axis]).item() for axis in (0, 1)])
    assert torch.tensor(errors).median(0).values.abs().max() < 4
