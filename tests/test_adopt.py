"""Somebody's own networks as models: where their stages are, that their maps are Captum's, and files of one's own."""

import html
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
import torchvision
import transformers
from captum.attr import LayerGradCam
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from runs import as_process, colours, discs, here, read
from torch import Tensor, nn

import app
from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError
from cvlab.data import shapes
from cvlab.explain import class_score, explain, grad_cam, region_score
from cvlab.models import Model, adopt, probabilities
from cvlab.models.adopted import from_file
from cvlab.models.fused import fused
from cvlab.models.model import Grid, identity
from cvlab.page.models import Models, offered_models
from cvlab.page.panels import draw
from cvlab.page.question import Question
from cvlab.page.visit import Visits
from cvlab.transforms import open_image, view
from cvlab.trust import judge
from cvlab.trust.familiarity import features

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
from conformance import Scored, as_trained, captum_map

ROOT = Path(__file__).resolve().parents[1]
ABC = ["a", "b", "c"]


def image_of(side: int) -> Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def check_maps(model: Model, score: Callable | None = None) -> None:
    """At every stage the map is the one of captum.attr.LayerGradCam, and is not the same everywhere."""
    side = model.image_size
    image, region = image_of(side), torch.zeros(side, side, dtype=torch.bool)
    region[side // 4 : side // 2, side // 4 : side // 3 * 2] = True
    segments = model.task == "segmentation"
    found = explain(model, image, region_score(region) if segments else class_score(1)).maps["grad_cam"]
    for name, stage in model.stages.items():
        if segments and stage.to_map is identity:
            expected = LayerGradCam(Scored(model, region), stage.module).attribute(image).detach()
        elif not segments:
            expected = captum_map(model, image, name, 1)
        else:
            continue
        assert expected.amax() > expected.amin(), name
        assert (found[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """Channels, rows and columns at every stage."""
    found = {}
    for name, stage in model.stages.items():
        stage.module.register_forward_hook(
            lambda m, i, o, name=name, to_map=stage.to_map: found.update({name: tuple(to_map(o).shape[1:])})
        )
    model(image_of(model.image_size))
    return found


# --- networks of our own ----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with two convolutions and squeeze-and-excitation; its last ReLU acts in place."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1)
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(outside, outside, 1)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv2(F.relu(self.conv1(x)))
        found = found * self.gate(self.pool(found)).sigmoid()
        return F.relu_(self.shortcut(x).add_(found))


class Classifier(nn.Module):
    """Four resolutions, a ReLU in place behind a module, an auxiliary head, and dropout before the last layer."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.pool = nn.MaxPool2d(2)
        self.blocks = nn.Sequential(Block(4, 6, 1), Block(6, 8, 2), Block(8, 8, 1))
        self.last = nn.Sequential(nn.Conv2d(8, 10, 3, 2, 1), nn.ReLU(inplace=True))
        self.aux = nn.Conv2d(8, outputs, 1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(10, outputs)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu_(self.stem(x))
        x = self.blocks(self.pool(x))
        aux = self.aux(x)
        x = self.dropout(self.last(x))
        return {"out": self.head(x.mean((2, 3))), "aux": aux}


def double(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(Block(inside, outside, 1), nn.Conv2d(outside, outside, 3, padding=1), nn.ReLU(inplace=True))


class ResUNet(nn.Module):
    """A U-Net of residual blocks, as students write one."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([double(3, 4), double(4, 6)])
        self.middle = double(6, 8)
        self.up = nn.ModuleList([nn.ConvTranspose2d(8, 6, 2, 2), nn.ConvTranspose2d(6, 4, 2, 2)])
        self.decode = nn.ModuleList([double(12, 6), double(8, 4)])
        self.head = nn.Conv2d(4, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            skips.append(down(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for up, decode in zip(self.up, self.decode, strict=True):
            x = decode(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


class Transformer(nn.Module):
    """A ViT whose CLS token is read at the end."""

    def __init__(self, prefix: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 8))
        layer = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(**layer) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.prefix, self.patches(x).flatten(2).transpose(1, 2)], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


def adopted(make: Callable[..., nn.Module], *arguments: object, **options: object) -> Model:
    torch.manual_seed(0)
    return adopt(as_trained(make(*arguments)), **({"class_names": ABC, "image_size": 32} | options))


def test_a_classifiers_stages_are_the_last_places_of_each_resolution_through_which_all_goes() -> None:
    model = adopted(Classifier)
    assert shapes_of(model) == {"stem": (4, 32, 32), "blocks.0": (6, 16, 16), "blocks": (8, 8, 8), "last": (10, 4, 4)}
    check_maps(model)
    assert [stage.stride for stage in model.stages.values()] == [1, 2, 4, 8]


def test_an_adopted_model_has_what_any_model_has() -> None:
    module = Classifier()
    module.stem.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in module.parameters()]
    with torch.no_grad():
        model = adopt(as_trained(module), ABC, 32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert not any(each._forward_hooks for each in module.modules())
    image = image_of(32)
    own = module((image - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
    assert torch.equal(model(image), own["out"])
    known = {"task", "network", "arguments", "class_names", "image_size", "mean", "std", "crop_pct", "crop_mode"}
    assert set(model.config) == known | {"threshold", "interpolation", "exclusive", "stages"}
    assert model.config["stages"] == list(model.stages)
    assert not model.training
    assert fused(model) is model
    assert judge(model, image, grad_cam(model, image)[1]).sentence


def test_a_segmenters_stages_fall_to_the_bottleneck_and_rise() -> None:
    """Its head is no stage: the map there is the mask itself. The default is the first decoder."""
    model = adopted(ResUNet, 2, class_names=["_background_", "road"], task="segmentation")
    levels = {"down.0": (4, 32, 32), "down.1": (6, 16, 16), "bottleneck": (8, 8, 8)}
    assert shapes_of(model) == levels | {"decode.0": (6, 16, 16), "decode.1": (4, 32, 32)}
    check_maps(model)
    logits, attribution = grad_cam(model, image_of(32), 1)
    assert (logits.shape, attribution.shape) == ((1, 2, 32, 32), (1, 1, 16, 16))
    assert model.stages["bottleneck"].module is model.network.middle


@pytest.mark.parametrize(
    ("names", "exclusive"), [(["background", "road"], True), (["road", "car"], False), (["background"], False)]
)
def test_classes_exclude_each_other_where_the_first_is_the_background(names: list[str], exclusive: bool) -> None:
    model = adopted(ResUNet, len(names), class_names=names, task="segmentation")
    assert (model.exclusive, model.first_object) == (exclusive, exclusive)
    model.exclusive = True
    assert model.first_object == 1


@pytest.mark.parametrize("prefix", [1, 3])
def test_tokens_are_a_grid_and_are_read_where_they_still_count(prefix: int) -> None:
    """The patches that leave the last block get no gradient; those that enter its first norm do."""
    model = adopted(Transformer, prefix)
    assert shapes_of(model) == {"layers.2.norm1": (8, 8, 8)}
    check_maps(model)
    to_map = model.stages["layers.2.norm1"].to_map
    tokens = torch.arange(prefix + 64).view(1, -1, 1)
    assert torch.equal(to_map(tokens)[0, 0], torch.arange(prefix, prefix + 64).view(8, 8))


def test_features_of_tokens_are_those_of_their_map() -> None:
    """The audit compares pictures by them."""
    model, image = adopted(Transformer), image_of(32)
    _, attribution = grad_cam(model, image)
    assert attribution.shape == (1, 1, 8, 8)
    seen = []
    model.network.layers[2].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output[:, 1:]))
    model(image)
    deviation, mean = torch.std_mean(seen[0], 1, correction=0)
    torch.testing.assert_close(features(model, image), torch.cat([deviation, mean], 1))


def test_as_many_channels_as_rows_are_not_mistaken_for_rows() -> None:
    """(N, 8, 8, 8) is channels-last behind a linear layer, and channels-first behind a convolution."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.gelu(self.linear(self.conv(x).permute(0, 2, 3, 1))).mean((1, 2)))

    model = adopted(Last, stages=["conv", "linear"])
    cube = torch.arange(512).view(1, 8, 8, 8)
    assert torch.equal(model.stages["conv"].to_map(cube), cube)
    assert torch.equal(model.stages["linear"].to_map(cube), cube.permute(0, 3, 1, 2))
    check_maps(model)


def test_features_that_others_hooks_take_are_read_before_them() -> None:
    """What a hook of the network's own has taken is not what a later hook passes on."""

    class Hooked(ResUNet):
        def __init__(self, outputs: int) -> None:
            super().__init__(outputs)
            self.taken = []
            self.down[0].register_forward_hook(lambda module, inputs, output: self.taken.append(output))

        def forward(self, x: Tensor) -> Tensor:
            self.taken.clear()
            x = self.down[1](F.max_pool2d(self.down[0](x), 2))
            x = self.up[0](self.middle(F.max_pool2d(x, 2)))
            return self.head(self.decode[1](torch.cat([self.taken[0], self.up[1](x)], 1)))

    model = adopted(Hooked, 1, class_names=["road"], task="segmentation")
    assert next(iter(model.stages)) == "down.0.2"
    check_maps(model)
    with pytest.raises(ValueError, match=r"down\.0"):
        adopted(Hooked, 1, class_names=["road"], task="segmentation", stages=["down.0"])


def test_a_grid_of_somebody_elses_is_left_alone() -> None:
    class Detector(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.last.grid = [1, 2]

    model = adopted(Detector)
    assert model.network.last.grid == [1, 2]
    assert model.stages["last"].grid is None
    assert isinstance(model.stages["stem"].grid, Grid)


# --- what the user says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "found"),
    [
        (["blocks.1", "last.0"], {"blocks.1": (8, 8, 8), "last.0": (10, 4, 4)}),
        ({"middle": "blocks.0.conv2", "end": "last"}, {"middle": (6, 16, 16), "end": (10, 4, 4)}),
    ],
)
def test_stages_that_are_named(stages: list | dict, found: dict) -> None:
    model = adopted(Classifier, stages=stages)
    assert shapes_of(model) == found
    check_maps(model)


@pytest.mark.parametrize("stage", ["blocks.9", "aux", "head", "", "dropout.x"])
def test_what_cannot_be_a_stage_is_named(stage: str) -> None:
    with pytest.raises(ValueError, match=f"“{stage}” cannot be a stage"):
        adopted(Classifier, stages=[stage])


def test_a_module_that_runs_twice_is_no_stage() -> None:
    class Twice(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            x = self.last[0](self.blocks(self.stem(x)))
            return self.head(self.last[1](self.last[1](x) + 1).mean((2, 3)))

    assert list(adopted(Twice).stages)[-1] == "last.0"
    with pytest.raises(ValueError, match="must run once"):
        adopted(Twice, stages=["last.1"])


@pytest.mark.parametrize(
    "form",
    [
        lambda logits: logits,
        lambda logits: {"out": logits, "aux": 2 * logits},
        lambda logits: {"logits": logits},
        lambda logits: SimpleNamespace(logits=logits, hidden_states=None),
    ],
)
def test_forms_of_logits(form: Callable) -> None:
    class Returns(ResUNet):
        def forward(self, x: Tensor) -> object:
            return form(F.avg_pool2d(super().forward(x), 4))

    model = adopted(Returns, 3, task="segmentation")
    quarter = F.avg_pool2d(ResUNet.forward(model.network, model.normalize(image_of(32))), 4)
    expected = F.interpolate(quarter, (32, 32), mode="bilinear", align_corners=False)
    assert torch.equal(model(image_of(32)), expected)


class Broken(Classifier):
    """A classifier whose logits are spoiled."""

    def __init__(self, spoil: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.spoil = spoil

    def forward(self, x: Tensor) -> object:
        return self.spoil(super().forward(x)["out"])


def doubled_in_place(logits: Tensor) -> Tensor:
    """Autograd needs the exponential as it was."""
    return logits.exp().mul_(2)


@pytest.mark.parametrize(
    ("spoil", "options", "said"),
    [
        (lambda logits: logits[:, :2], {}, "2 classes, and class_names has 3"),
        (lambda logits: logits, {"class_names": ["a"]}, "3 classes, and class_names has 2"),
        (lambda logits: logits[0], {}, r"must return logits \(N, C\).* a tensor \(3,\)"),
        (lambda logits: logits[..., None, None], {}, "must return logits"),
        (lambda logits: logits, {"task": "segmentation"}, r"logits \(N, C, h, w\)"),
        (lambda logits: [logits], {}, "not a list"),
        (lambda logits: {"scores": logits}, {}, "not a NoneType"),
        (lambda logits: logits.detach(), {}, "no gradient"),
        (lambda logits: logits * 0, {}, "no stage was found"),
        (doubled_in_place, {}, "inplace operation"),
        (lambda logits: logits, {"task": "detection"}, "no task 'detection'"),
    ],
)
def test_what_does_not_fit_is_a_sentence(spoil: Callable, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        adopted(Broken, spoil, **options)


def test_a_size_that_a_module_cannot_take_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="images of 30 x 30 pixels"):
        adopted(ResUNet, 1, class_names=["road"], task="segmentation", image_size=30)


@pytest.mark.parametrize(("names", "found"), [(["healthy", "ill"], ["healthy", "ill"]), (["ill"], ["not ill", "ill"])])
def test_a_single_logit_tells_two_classes_apart(names: list[str], found: list[str]) -> None:
    model, image = adopted(Classifier, 1, class_names=names), image_of(32)
    assert model.class_names == found
    z = model.network(model.normalize(image))["out"]
    torch.testing.assert_close(probabilities(model, model(image))[:, 1:], z.sigmoid())
    check_maps(model)


def test_names_are_told_apart() -> None:
    assert adopted(Classifier, class_names=["crane", "crane", "cow"]).class_names == ["crane", "crane (2)", "cow"]


def test_saving_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="adopted cannot be saved"):
        checkpoint.save(adopted(Classifier), tmp_path / "folder")
    assert not list(tmp_path.iterdir())


# --- networks of others -----------------------------------------------------------------------------------------------

FAMILIES = {  # of torchvision the smallest of each; the side of the view, and the stages
    "alexnet": (64, ["features.1", "features.4", "features.11"]),
    "convnext_tiny": (64, ["features.2.0", "features.4.0", "features.6.0", "features"]),
    "densenet121": (64, ["features.relu0", *(f"features.denseblock{i}" for i in (1, 2, 3)), "features"]),
    "efficientnet_b0": (64, ["features.1", "features.2", "features.3", "features.5", "features"]),
    "efficientnet_v2_s": (64, ["features.1", "features.2", "features.3", "features.5", "features"]),
    "googlenet": (64, ["conv1", "conv3", "inception3b", "inception4e", "inception5b"]),
    "inception_v3": (
        107,
        [*(f"Conv2d_{i}" for i in ("1a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")), "Mixed_5d", "Mixed_6e", "Mixed_7c"],
    ),
    "mnasnet0_5": (64, ["layers.7", "layers.8", "layers.9", "layers.11", "layers"]),
    "mobilenet_v2": (64, ["features.1", "features.3", "features.6", "features.13", "features"]),
    "mobilenet_v3_small": (64, ["features.0", "features.1", "features.3", "features.8", "features"]),
    "regnet_y_400mf": (64, ["stem", *(f"trunk_output.block{i}" for i in (1, 2, 3)), "trunk_output"]),
    "resnet18": (64, ["relu", "layer1", "layer2", "layer3", "layer4"]),
    "shufflenet_v2_x0_5": (64, ["conv1", "maxpool", "stage2", "stage3", "conv5"]),
    "squeezenet1_1": (64, ["features.1", "features.4", "features.7", "features"]),
    "swin_t": (64, ["features.1", "features.3", "features.5", "permute"]),
    "swin_v2_t": (64, ["features.1", "features.3", "features.5", "permute"]),
    "vgg11": (64, ["features.1", "features.4", "features.9", "features.14", "features.19", "features"]),
    "vit_b_32": (64, ["encoder.layers.encoder_layer_11.ln_1"]),
}
OPTIONS = {
    "vit_b_32": {"image_size": 64},
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_classifiers_of_torchvision(name: str) -> None:
    side, stages = FAMILIES[name]
    options = {"weights": None, "num_classes": 3, **OPTIONS.get(name, {})}
    torch.manual_seed(0)
    model = adopt(as_trained(torchvision.models.get_model(name, **options)), ABC, side)
    assert list(model.stages) == stages
    check_maps(model)


def test_a_small_maxvit_of_torchvision() -> None:
    """Its attention has windows side by side, which are no maps."""
    torch.manual_seed(0)
    sizes = {"stem_channels": 8, "partition_size": 2, "block_channels": [8, 16, 16, 16], "block_layers": [1] * 4}
    network = torchvision.models.MaxVit((64, 64), **sizes, head_dim=8, stochastic_depth_prob=0.0, num_classes=3)
    model = adopt(as_trained(network), ABC, 64)
    assert list(model.stages) == ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    check_maps(model)


SEGMENTERS = {
    "fcn_resnet50": ["backbone.relu", "backbone.layer1", "classifier.2"],
    "deeplabv3_mobilenet_v3_large": ["backbone.1", "backbone.3", "backbone.6", "classifier.3"],
    "lraspp_mobilenet_v3_large": ["backbone.1", "backbone.3", "backbone.4", "backbone.16"],
}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmenters_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3)
    model = adopt(as_trained(network), ["__background__", "a", "b"], 64, task="segmentation")
    assert list(model.stages) == SEGMENTERS[name]
    assert model.exclusive
    check_maps(model)


def test_a_unet_of_smp() -> None:
    torch.manual_seed(0)
    unet = smp.Unet("resnet18", encoder_weights=None, classes=1, decoder_channels=(32, 16, 16, 8, 8))
    model = adopt(as_trained(unet), ["road"], 64, task="segmentation")
    down = ["encoder.relu", "encoder.layer1", "encoder.layer2", "encoder.layer3", "bottleneck"]
    assert list(model.stages) == [*down, *(f"decoder.blocks.{i}" for i in range(4)), "decoder"]
    check_maps(model)


SMALL = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64, "num_labels": 3}
CLASSIFIERS = {
    "ViT": ({**SMALL, "num_hidden_layers": 2, "patch_size": 16}, ["vit.layers.1.layernorm_before"]),
    "Dinov2": ({**SMALL, "num_hidden_layers": 2, "patch_size": 16}, ["dinov2.layernorm"]),
    "ConvNext": (
        {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64], "num_labels": 3},
        [f"convnext.encoder.stages.{i}" for i in range(4)],
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    settings, stages = CLASSIFIERS[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = adopt(as_trained(transformers.AutoModelForImageClassification.from_config(config)), ABC, 64)
    assert list(model.stages) == stages
    check_maps(model)


def test_a_segformer_of_transformers() -> None:
    """Its logits have a quarter of the resolution, and hooks of its own take the features of its stages."""
    torch.manual_seed(0)
    config = transformers.SegformerConfig(depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], num_labels=3)
    network = transformers.SegformerForSemanticSegmentation(config)
    model = adopt(as_trained(network), ["wall", "floor", "door"], 64, task="segmentation")
    norms = [f"segformer.stages.{i}.layer_norm" for i in range(3)]
    assert list(model.stages) == [*norms, "bottleneck", "decode_head.activation"]
    assert model(image_of(64)).shape == (1, 3, 64, 64)
    check_maps(model)


# --- a file of one's own ----------------------------------------------------------------------------------------------

FILE = """\
import torch
from cvlab.models import adopt
from networks import Small

def classifier():
    torch.manual_seed(0)
    return adopt(Small(4), ["circle", "square", "star", "triangle"], 32)

def colours():
    torch.manual_seed(0)
    return adopt(Small(2), ["blue", "red"], 32)

def segmenter():
    torch.manual_seed(0)
    return adopt(Small(1, masks=True), ["disc"], 32, task="segmentation")

def module():
    return Small(4)

def broken():
    return adopt(Small(4), ["one"], 32)

nothing = None
"""
NETWORKS = """\
from torch import nn

class Small(nn.Sequential):
    def __init__(self, outputs, masks=False):
        head = [nn.Conv2d(8, outputs, 1)] if masks else [nn.Flatten(), nn.Linear(8 * 64, outputs)]
        super().__init__(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), *head)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "networks.py").write_text(NETWORKS)
    (folder / "net.py").write_text(FILE)
    (folder / "damaged.py").write_text("import torch\n\ndef model(:\n")
    (folder / "raises.py").write_text("\n\nraise RuntimeError('weights.pth is missing')\n")
    return folder / "net.py"


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "scene.png"
    shapes.scene(4019, 96).image.save(path)
    return str(path)


def test_the_page_opens_a_file_of_ones_own(file: Path, photo: str) -> None:
    """Named from the folder that it is in, or from elsewhere. It finds its neighbours."""
    relative = os.path.relpath(file, ROOT)
    names = [f"{file}:classifier", f"{relative}:segmenter"]
    command = [sys.executable, "app.py", *names, "--port", "7941"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1) as server:
        try:
            assert any("7941" in line for line in server.stdout)
            client = Client("http://127.0.0.1:7941", verbose=False)
            image = handle_file(photo)
            model = from_file(names[0])
            seen = view(open_image(photo), model)
            answer = client.predict(image=image, model=names[0], api_name="/predict")
            found = {each["label"]: each["confidence"] for each in answer["confidences"]}
            probs = probabilities(model, model(seen))[0].tolist()
            assert found == pytest.approx(dict(zip(model.class_names, probs, strict=True)), abs=1e-6)
            asked = {"image": image, "model": names[0], "class_name": "star"}
            *_, peak = client.predict(**asked, stage="1", api_name="/grad_cam")
            _, attribution = grad_cam(model, seen, 2, "1")
            assert peak == pytest.approx((attribution.max() * 256).item(), rel=1e-4)
            assert client.predict(**asked, stage="3", api_name="/judge")
            assert client.predict(image=image, model=names[1], api_name="/predict")["shares"]
            with pytest.raises(AppError, match="no model"):
                client.predict(image=image, model=f"{file}:colours", api_name="/predict")
        finally:
            server.terminate()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.py:model", "There is no file"),
        ("net.py:missing", "there is no function missing"),
        ("net.py:nothing", "there is no function nothing"),
        ("net.py:module", "returns a Small: let it return cvlab.models.adopt"),
        ("net.py:broken", "net.py fails in line 21: ValueError: the module gives logits of 4 classes"),
        ("damaged.py:model", "damaged.py fails: SyntaxError"),
        ("raises.py:model", "raises.py fails in line 3: RuntimeError: weights.pth is missing"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_at_the_start(
    file: Path, name: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", str(file.parent / name)])
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    with pytest.raises(SystemExit):
        app.main()
    assert said in capsys.readouterr().err


def test_nobody_but_the_command_line_names_a_file(file: Path, photo: str) -> None:
    """Neither a visitor nor a link nor CVLAB_MODELS: the file does not run."""
    name, ran = f"{file.parent / 'ran.py'}:model", file.parent / "ran"
    (file.parent / "ran.py").write_text(f"open({str(ran)!r}, 'w')")
    with pytest.raises(ValueError, match="neither a folder"):
        offered_models(ROOT, [name])
    models = Models(offered_models(ROOT, []))
    for typed in (name, f'"{name}"', f"checkpoints/{name}"):
        with pytest.raises(ValueError, match="There is no model"):
            models[typed]
    with pytest.raises(CheckpointError):
        checkpoint.load(name)
    assert "There is no model" in draw(Visits(models).ask(photo, name, Question()), ["sentence"])["sentence"]
    assert not ran.exists()


@pytest.mark.parametrize("function", ["classifier", "segmenter"])
def test_every_panel_is_drawn_and_the_code_makes_the_same_map(
    file: Path, photo: str, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{file}:{function}"
    answer = Visits(Models({name: name})).ask(photo, name, Question())
    panels = ("sentence", "look", "side", "facts", "grad_cam", "picker", "stages", "three", "code", "record", "link")
    shown = draw(answer, panels)
    assert "is not in a folder" in shown["record"]
    assert "from_file" in shown["code"]
    answer.work_out_verdict()
    assert draw(answer, ["chip", "reasons"])["reasons"]
    monkeypatch.chdir(tmp_path)
    (lines,) = re.findall(r'<pre class="code"[^>]*>(.*?)</pre>', shown["code"], re.S)
    (tmp_path / Path(photo).name).write_bytes(Path(photo).read_bytes())
    names: dict = {}
    exec(html.unescape(lines), names)  # as a reader runs them
    torch.testing.assert_close(names["attribution"], answer.attribution, rtol=1e-5, atol=1e-6)


def test_the_commands_take_a_file_of_ones_own(file: Path, tmp_path: Path) -> None:
    data = colours(tmp_path / "colours", 12)
    here("evaluate", f"{file}:colours", "--data", data, "--part", "all", "--out", tmp_path / "a")
    assert read(tmp_path / "a" / "metrics.json")["n"] == 24
    as_process("explain", f"{file}:colours", "--data", data, "--part", "all", "--out", tmp_path / "b")
    assert len((tmp_path / "b" / "manifest.jsonl").read_text().splitlines()) == 24
    as_process("audit", f"{file}:colours", "--data", data, "--part", "all", "--out", tmp_path / "c")
    assert read(tmp_path / "c" / "audit.json")["n"] == 24
    masks = discs(tmp_path / "discs", 8)
    here("evaluate", f"{file}:segmenter", "--data", masks, "--part", "all", "--out", tmp_path / "d")
    assert 0 <= read(tmp_path / "d" / "metrics.json")["iou"]["value"] <= 1


def test_the_file_in_the_readme_is_one(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```\n(# net\.py.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "net.py").write_text(snippet)
    (tmp_path / "mine.py").write_text(
        "from test_adopt import ResUNet as Network\ndef ResUNet(weights): return Network(2).eval()\n"
    )
    model = from_file(f"{tmp_path / 'net.py'}:model")
    assert (model.class_names, model.task, model.exclusive) == (["background", "road"], "segmentation", True)
