"""Folders of segmentation_models.pytorch: U-Nets on any encoder open with the same logits, the rest is refused."""

import json
import sys
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from captum.attr import LayerGradCam
from safetensors.torch import save_file

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError
from cvlab.explain import explain, grad_cam, region_score
from cvlab.models import build
from cvlab.models.fused import fused
from cvlab.models.smp import from_smp_config

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
from conformance import as_trained

CONFIG = {  # as save_pretrained of version 0.6 writes it
    "_model_class": "Unet", "activation": None, "aux_params": None, "classes": 2, "decoder_attention_type": None,
    "decoder_channels": [32, 16, 16, 8, 8], "decoder_interpolation": "nearest", "decoder_use_norm": "batchnorm",
    "encoder_depth": 5, "encoder_name": "resnet18", "encoder_weights": None, "in_channels": 3,
}  # fmt: skip


def unet():
    torch.manual_seed(0)
    arguments = {"encoder": "resnet18", "decoder_channels": CONFIG["decoder_channels"]}
    return build("resnet_unet", ["a", "b"], 64, arguments, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(unet().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def images_of(height=64, width=64):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


ENCODERS = {
    "resnet34": [2, 3, 4, 5],
    "vgg11": [2, 3, 4, 5],
    "mobilenet_v2": [2, 3, 4, 5],
    "efficientnet-b0": [2, 3, 4, 5],
    "mit_b0": [3, 4, 5],  # transformers begin at a quarter of the resolution
    "tu-test_resnet": [2, 3, 4, 5],
    "tu-mobilenetv3_small_050": [2, 3, 4, 5],
    "tu-test_mambaout": [3, 4, 5],  # (N, h, w, C)
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_folder_of_theirs_gives_the_same_logits_and_a_map_at_every_stage(encoder, tmp_path):
    torch.manual_seed(0)
    theirs = smp.Unet(encoder, encoder_weights=None, classes=3, decoder_channels=(32, 16, 16, 8, 8)).eval()
    theirs.save_pretrained(tmp_path)
    ours, images = checkpoint.load(tmp_path), images_of(64, 96)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(ours.normalize(images)))
    found = explain(ours, images, region_score(torch.ones(64, 96, dtype=torch.bool)))
    down = {f"encoder{i}": 2 ** (i - 1) for i in ENCODERS[encoder]}
    up = {f"decoder{i}": 2 ** (i - 1) for i in range(5, 0, -1)}
    sides = {name: tuple(attribution.shape[2:]) for name, attribution in found.maps["grad_cam"].items()}
    assert sides == {name: (64 // n, 96 // n) for name, n in (down | {"bottleneck": 32} | up).items()}
    assert list(sides) == [*down, "bottleneck", *up]
    assert all(attribution.any() for attribution in found.maps["grad_cam"].values())


@pytest.mark.parametrize("encoder", ["resnet18", "tu-test_mambaout"])
def test_a_fused_copy_has_the_same_maps(encoder):
    torch.manual_seed(0)
    model, images = as_trained(build("smp", ["a"], 64, {"encoder": encoder})), images_of()
    region = torch.zeros(64, 64, dtype=torch.bool)
    region[8:40, 16:50] = True
    expected, found = (explain(m, images, region_score(region)).maps["grad_cam"] for m in (model, fused(model)))
    for stage, attribution in expected.items():
        assert (found[stage] - attribution).abs().max() <= 1e-3 * attribution.abs().max(), stage


def test_an_encoder_whose_features_timm_takes_by_hooks_is_explained_at_the_skips():
    """Its encoder stages are the skips, whose gradient has the part through the skip alone: there as a view."""
    torch.manual_seed(0)
    model = as_trained(build("smp", ["a"], 64, {"encoder": "tu-legacy_xception", "decoder_channels": [8, 8, 8, 8, 8]}))
    images, score = images_of(), region_score(torch.ones(64, 64, dtype=torch.bool))
    found = explain(model, images, score).maps["grad_cam"]
    assert [model.stages[f"encoder{i}"].module for i in range(2, 6)] == [*model.skips][:4]
    for name, stage in model.stages.items():
        stage.module.register_forward_hook(lambda module, inputs, output: output[...])
        expected = LayerGradCam(lambda images: score(model(images)), stage.module).attribute(images)
        assert (found[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("depth", [3, 4])
def test_an_encoder_of_fewer_levels(depth, tmp_path):
    torch.manual_seed(0)
    channels = [32, 16, 8, 8][:depth]
    theirs = smp.Unet("resnet18", depth, None, classes=1, decoder_channels=channels).eval()
    theirs.save_pretrained(tmp_path)
    ours, images = checkpoint.load(tmp_path), images_of()
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(ours.normalize(images)))
    down, up = [f"encoder{i}" for i in range(2, depth + 1)], [f"decoder{i}" for i in range(depth, 0, -1)]
    assert list(ours.stages) == [*down, "bottleneck", *up]


def test_an_encoder_of_one_size_only_is_shown_that_size(folder):
    config = CONFIG | {"encoder_name": "tu-swin_tiny_patch4_window7_224"}
    assert from_smp_config(config)["image_size"] == 224
    assert from_smp_config(CONFIG)["image_size"] == 256


def test_a_folder_saved_under_the_name_resnet_unet_opens(folder):
    model = unet()
    assert model.config["network"] == "resnet_unet"
    checkpoint.save(model, folder / "ours")
    with torch.no_grad():
        assert torch.equal(checkpoint.load(folder / "ours")(images_of()), model(images_of()))


def test_it_is_opened_and_saved_as_ours(folder):
    model, images = checkpoint.load(folder), images_of()
    with torch.no_grad():
        expected = unet()(images)
        assert torch.equal(model(images), expected)
        checkpoint.save(model, folder / "ours")
        assert torch.equal(checkpoint.load(folder / "ours")(images), expected)
    assert model.class_names == ["class 0", "class 1"]


def test_stages_have_the_resolution_of_their_number(folder):
    model = checkpoint.load(folder)
    maps = explain(model, images_of(), region_score(torch.ones(64, 64, dtype=torch.bool))).maps["grad_cam"]
    sides = {name: attribution.shape[-1] for name, attribution in maps.items()}
    assert sides == {
        "encoder2": 32, "encoder3": 16, "encoder4": 8, "encoder5": 4, "bottleneck": 2,
        "decoder5": 4, "decoder4": 8, "decoder3": 16, "decoder2": 32, "decoder1": 64,
    }  # fmt: skip
    model.threshold = 1e-6  # an untrained network that finds something
    _, attribution = grad_cam(model, images_of(), stage="decoder3")
    assert attribution.shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    "entries",
    [
        {"_model_class": "os.system"},
        {"_model_class": "FPN"},
        {"encoder_name": "resnet17"},
        {"encoder_name": "tu-resnet18"},  # its tensors have other names
        {"encoder_name": "tu-vit_tiny_patch16_224"},  # no pyramid of features
        {"encoder_name": "tu-hf-hub:user/name"},
        {"encoder_name": "tu-resnet18.../../name"},
        {"encoder_name": "../resnet18"},
        {"encoder_name": ["resnet18"]},
        {"encoder_name": None},
        {"checkpoint_path": "/etc/passwd"},
        {"output_stride": 16},
        {"encoder_depth": 4},
        {"in_channels": 1},
        {"decoder_use_norm": {"type": "os.system"}},
        {"decoder_attention_type": "scse"},
        {"activation": "os.system"},
        {"aux_params": {"classes": 3}},
        {"classes": 10**9},
        {"classes": "2"},
        {"decoder_channels": [8]},
        {"decoder_channels": "wide"},
        {"decoder_channels": [10**6] * 5},
        {"decoder_channels": [16] * 5},
        {"encoder_name": "resnet34"},
    ],
    ids=str,
)
def test_what_is_not_built_here_is_refused(folder, entries):
    (folder / "config.json").write_text(json.dumps(CONFIG | entries))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value)


def test_sides_that_cannot_be_halved_five_times_are_seen_as_smp_sees_them():
    model, images = unet(), images_of(48, 70)
    theirs = smp.Unet("resnet18", encoder_weights=None, classes=2, decoder_channels=CONFIG["decoder_channels"]).eval()
    theirs.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images), theirs(model.normalize(images)))
