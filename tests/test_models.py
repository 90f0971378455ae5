"""cvlab.models: shapes, declared stages, closed-form parameter counts, normalisation as the first layer."""

import json

import pytest
import torch
from torch import nn

from cvlab.models import build


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def stage_shapes(model, images):
    """Channels and resolution of each stage, in the order in which the forward pass comes through them."""
    shapes = {}
    for name, stage in model.stages.items():
        stage.module.register_forward_hook(
            lambda module, inputs, output, name=name, stage=stage: shapes.update({name: stage.to_map(output).shape[1:]})
        )
    model(images)
    return {name: tuple(shape) for name, shape in shapes.items()}


def test_shapes_of_the_logits(classifier, segmenter, images):
    assert classifier(images).shape == (4, 3)
    assert segmenter(images).shape == (4, 2, 16, 16)
    assert segmenter(images[..., :8]).shape == (4, 2, 16, 8)  # fully convolutional


def test_convnet_stages_in_the_order_of_the_forward_pass(classifier, images):
    # The stem halves, and from the second on each stage halves again.
    expected = {"stage1": (4, 8, 8), "stage2": (8, 4, 4)}
    assert list(stage_shapes(classifier, images).items()) == list(expected.items())
    assert list(classifier.stages) == classifier.config["stages"] == list(expected)


def test_unet_stages_in_the_order_of_the_forward_pass(segmenter, images):
    expected = {
        "encoder1": (4, 16, 16),
        "encoder2": (8, 8, 8),
        "bottleneck": (16, 4, 4),
        "decoder2": (8, 8, 8),
        "decoder1": (4, 16, 16),
    }
    assert list(stage_shapes(segmenter, images).items()) == list(expected.items())
    assert list(segmenter.stages) == segmenter.config["stages"] == list(expected)


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_a_unet_has_as_many_stages_as_its_depth_says(depth):
    stages = list(build("unet", ["a"], 16, {"width": 1, "depth": depth}).stages)
    down = [f"encoder{i}" for i in range(1, depth + 1)]
    assert stages == [*down, "bottleneck", *(f"decoder{i}" for i in range(depth, 0, -1))]


def test_number_of_parameters_of_a_convnet():
    # A 3x3 convolution without bias has 9 * in * out weights, the BatchNorm after it 2 * out.
    stem = 27 * 4 + 8
    stage1 = 2 * (9 * 4 * 4 + 8 + 9 * 4 * 4 + 8)
    widening = (9 * 4 * 8 + 16) + (9 * 8 * 8 + 16) + (4 * 8 + 16)  # its shortcut is a 1x1 convolution
    stage2 = widening + 2 * (9 * 8 * 8 + 16)
    head = 8 * 3 + 3
    model = build("convnet", ["a", "b", "c"], 16, {"widths": [4, 8], "depth": 2})
    assert parameters(model) == stem + stage1 + stage2 + head == 2879


@pytest.mark.parametrize(("batch_norm", "per_channel", "total"), [(True, 2, 7554), (False, 1, 7474)])
def test_number_of_parameters_of_a_unet(batch_norm, per_channel, total):
    # Without BatchNorm (weight and bias a channel) the convolution has a bias (one a channel).
    def double_conv(before, after):
        return 9 * before * after + 9 * after * after + 2 * per_channel * after

    encoders = double_conv(3, 4) + double_conv(4, 8)
    bottleneck = double_conv(8, 16)
    ups = (4 * 16 * 8 + 8) + (4 * 8 * 4 + 4)  # 2x2 kernels
    decoders = double_conv(16, 8) + double_conv(8, 4)  # the skip doubles the channels
    head = 4 * 2 + 2
    model = build("unet", ["a", "b"], 16, {"width": 4, "depth": 2, "batch_norm": batch_norm})
    assert parameters(model) == encoders + bottleneck + ups + decoders + head == total


@pytest.mark.parametrize(
    ("num_classes", "image_size", "arguments", "total"),
    [
        (10, 224, {"widths": [64, 128, 256, 512], "hidden": [1024, 512]}, 104_842_378),
        (257, 224, {"batch_norm": True, "pools": 3, "pool_to": 4}, 2_618_881),
        (8, 64, {"widths": [32, 64, 128, 256, 512, 1024], "hidden": [], "pools": 1}, 14_676_808),
        (5, 150, {"widths": [32, 64, 128, 128], "padding": False}, 3_455_173),
    ],
    ids=["flowers102", "caltech256", "scenes8", "flowers5"],
)
def test_plain_networks_have_the_published_numbers_of_parameters(num_classes, image_size, arguments, total):
    with torch.device("meta"):
        model = build("plain", [str(i) for i in range(num_classes)], image_size, arguments)
        assert model(torch.empty(1, 3, image_size, image_size)).shape == (1, num_classes)
    assert parameters(model) == total


def test_the_last_convolution_of_the_deep_plain_network_is_number_24():
    arguments = {"widths": [2, 2, 2, 4], "depth": 2, "batch_norm": True, "pool_to": 4, "head_dropout": [0, 0.5]}
    model = build("plain", ["a", "b"], 64, arguments)
    convs = [i for i, layer in enumerate(model.features) if isinstance(layer, nn.Conv2d)]
    assert convs[-1] == 24
    assert model.stages["block4"].module is model.features[24]
    assert stage_shapes(model, torch.rand(1, 3, 64, 64))["block4"] == (4, 8, 8)
    assert model.classifier[2].in_features == 4 * 4 * 4


def test_plain_stages_in_the_order_of_the_forward_pass(images):
    model = build("plain", ["a", "b"], 16, {"widths": [2, 3, 4], "hidden": [5], "pools": 1, "padding": False})
    assert stage_shapes(model, images) == {"block1": (2, 14, 14), "block2": (3, 5, 5), "block3": (4, 3, 3)}


@pytest.mark.parametrize(
    ("image_size", "arguments"),
    [(8, {"widths": [2, 2, 2, 2]}), (16, {"head_dropout": [0.5]}), (16, {"head_dropout": [0.5] * 3})],
)
def test_a_plain_network_refuses_what_does_not_fit(image_size, arguments):
    with pytest.raises(ValueError, match=r"too small|head_dropout"):
        build("plain", ["a"], image_size, arguments)


def test_without_its_first_relu_a_plain_network_pools_the_convolution_itself(images):
    model = build("plain", ["a", "b"], 16, {"widths": [2, 3], "hidden": [], "first_relu": False})
    kinds = [type(layer).__name__ for layer in model.features]
    assert kinds == ["Conv2d", "MaxPool2d", "Conv2d", "ReLU", "MaxPool2d"]
    assert stage_shapes(model, images) == {"block1": (2, 16, 16), "block2": (3, 8, 8)}


def test_the_stem_of_a_residual_network_may_have_a_bias():
    plain, biased = (build("residual", ["a"], 16, {"widths": [2, 3], "stem_bias": bias}) for bias in (False, True))
    added = biased.state_dict().keys() - plain.state_dict().keys()
    assert added == {"stem.0.0.bias"}
    assert parameters(biased) == parameters(plain) + 2


def test_a_residual_network_keeps_half_the_resolution(images):
    model = build("residual", ["a", "b"], 16, {"widths": [2, 3, 4]})
    assert stage_shapes(model, images) == {"block1": (3, 8, 8), "block2": (4, 8, 8)}
    blocks = [9 * i * o + 9 * o * o + i * o + 6 * o for i, o in ((2, 3), (3, 4))]  # two convolutions and a shortcut
    assert parameters(model) == (27 * 2 + 4) + sum(blocks) + (4 * 2 + 2)


@pytest.mark.parametrize("network", ["plain", "residual", "convnet"])
def test_weights_fit_the_same_network_with_dropout_and_say_the_same_in_eval_mode(network, images):
    without = build(network, ["a", "b"], 16, {"widths": [4, 8, 8], "dropout": 0.0}).eval()
    dropped = build(network, ["a", "b"], 16, {"widths": [4, 8, 8], "dropout": 0.5}).eval()
    dropped.load_state_dict(without.state_dict())
    assert torch.equal(dropped(images), without(images))
    dropped.train(), without.train()
    torch.manual_seed(0)
    assert not torch.equal(dropped(images), dropped(images))
    assert torch.equal(without(images), without(images))


@pytest.mark.parametrize(
    ("network", "first"),
    [
        ("plain", ["features.0", "dropout", "features.3", "features.6"]),
        ("residual", ["stem.0.0", "stem.0.1", "blocks.0.conv1.0", "blocks.0.conv1.1", "blocks.0.dropout"]),
    ],
)
def test_dropout_stands_where_the_published_networks_have_it(network, first, images):
    """Before the second convolution, and after each block's first convolution and its normalisation."""
    model, called = build(network, ["a"], 16, {"widths": [2, 3, 4], "dropout": 0.5}), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout | nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda module, inputs, output, name=name: called.append(name))
    model(images)
    if network == "residual":  # the shortcut is taken first
        called = [name for name in called if "shortcut" not in name]
    assert called[: len(first)] == first


@pytest.mark.parametrize(
    ("network", "places", "expected"),
    [
        ("plain", [2], ["features.0", "dropout", "features.3", "features.6", "classifier.2"]),
        ("plain", [4], ["features.0", "features.3", "features.6", "dropout", "classifier.2"]),
        (
            "plain",
            [2, 3, 4],
            ["features.0", "dropout", "features.3", "dropout", "features.6", "dropout", "classifier.2"],
        ),
        ("residual", [2], ["blocks.1.dropout"]),
    ],
)
def test_dropout_stands_at_the_places_that_are_asked_for(network, places, expected, images):
    model, called = build(network, ["a"], 16, {"widths": [2, 3, 4], "dropout": 0.5, "dropout_at": places}), []
    if network == "plain":
        model = build(network, ["a"], 16, {"widths": [2, 3, 4], "hidden": [], "dropout": 0.5, "dropout_at": places})
    for name, module in model.named_modules():
        kinds = nn.Dropout if network == "residual" else nn.Dropout | nn.Conv2d | nn.Linear
        if isinstance(module, kinds) and getattr(module, "p", 1) and not name.startswith("classifier.1"):
            module.register_forward_hook(lambda module, inputs, output, name=name: called.append(name))
    model(images)
    assert called == expected
    with pytest.raises(ValueError, match="dropout_at 9"):
        build(network, ["a"], 16, {"widths": [2, 3, 4], "dropout_at": [9]})


@pytest.mark.parametrize("network", ["convnet", "unet"])
def test_normalisation_is_the_first_layer(network, images):
    mean, std = (0.1, 0.4, 0.7), (0.2, 0.3, 0.5)
    model = build(network, ["a"], 16, mean=mean, std=std).eval()
    plain = build(network, ["a"], 16, mean=(0, 0, 0), std=(1, 1, 1)).eval()
    plain.load_state_dict(model.state_dict())
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(model(images), plain(normalised))
    assert not torch.equal(model(images), plain(images))


def test_mean_and_std_are_written_in_the_config_alone(model):
    assert not [name for name in model.state_dict() if name.startswith("normalize")]
    assert (model.config["mean"], model.config["std"]) == ([0.5] * 3, [0.25] * 3)


def test_a_model_knows_what_it_was_built_with():
    model = build("unet", ["horse"], 32, {"width": 2}, crop_pct=0.9, threshold=0.3)
    known = {"task": "segmentation", "class_names": ["horse"], "image_size": 32, "crop_pct": 0.9, "threshold": 0.3}
    assert {name: getattr(model, name) for name in known} == known
    assert json.loads(json.dumps(model.config)) == model.config
    assert known.items() <= model.config.items()


@pytest.mark.parametrize("size", [(18, 16), (16, 18), (2, 16), (15, 15)])
def test_a_unet_refuses_a_side_that_it_cannot_halve(segmenter, size):
    with pytest.raises(ValueError, match="multiples of 4"):
        segmenter(torch.rand(1, 3, *size))


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        ("resnet", {}),
        ("convnet", {"width": 8}),
        ("unet", {"widths": [8]}),
        ("unet", {"num_classes": 3}),  # said by class_names
        ("convnet", {"mean": (0, 0, 0)}),  # an argument of build
    ],
)
def test_an_unknown_network_or_argument_is_refused(network, arguments):
    with pytest.raises(ValueError, match="network"):
        build(network, ["a"], 16, arguments)
