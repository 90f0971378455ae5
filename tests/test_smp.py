"""Folders of segmentation_models.pytorch: a U-Net on a ResNet is rebuilt under its tensor names, others are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError
from cvlab.explain import explain, grad_cam, region_score
from cvlab.models import build

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


def test_a_folder_of_theirs_gives_the_same_logits(tmp_path):
    theirs = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    network = theirs.Unet("resnet34", encoder_weights=None, classes=3, decoder_channels=(32, 16, 16, 8, 8)).eval()
    network.save_pretrained(tmp_path)
    ours, images = checkpoint.load(tmp_path), images_of(64, 96)
    with torch.no_grad():
        assert torch.equal(ours(images), network(ours.normalize(images)))


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
        {"encoder_name": "tu-resnet18"},
        {"encoder_name": ["resnet18"]},
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


def test_a_side_that_cannot_be_halved_five_times():
    with pytest.raises(ValueError, match="multiples of 32"):
        unet()(images_of(48, 64))
