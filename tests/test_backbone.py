"""U-Nets on pretrained encoders: weights by name, what is frozen stays to the bit, smp opens what was trained here.

Weights are random: nothing is downloaded. The networks named test_* are timm's own miniatures.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import segmentation_models_pytorch as smp
import timm
import torch
from runs import here, last_words
from safetensors.torch import load_file, save_file

from cvlab import checkpoint
from cvlab.explain import explain, region_score
from cvlab.learning import frozen
from cvlab.models import build
from cvlab.models.smp import SmpUNet, default_view, encoder_of, load_encoder

SMALL = ["--image-size", 64, "--batch-size", 4, "--precision", "fp32", "--decoder-channels", 16, 8, 8, 4, 4]


@pytest.fixture
def unet() -> SmpUNet:
    torch.manual_seed(0)
    return build("smp", ["a"], 64, {"encoder": "resnet18", "decoder_channels": [16, 8, 8, 4, 4]})


def test_a_network_is_found_by_the_name_of_either_library() -> None:
    assert [encoder_of(name) for name in ("resnet18", "efficientnet-b0", "tu-resnet18", "tf_efficientnet_lite0")] == [
        "resnet18", "efficientnet-b0", "tu-resnet18", "tu-tf_efficientnet_lite0",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="resnet17"):
        encoder_of("resnet17")
    assert default_view("tu-tf_efficientnet_lite0") == {"image_size": 256, "mean": [0.5] * 3, "std": [0.5] * 3}


def test_deeper_levels_of_the_encoder_lie_farther_from_the_decoder(unet: SmpUNet) -> None:
    heights = frozen.heights(unet)
    first = {"encoder.conv1": 5, "encoder.layer1": 4, "encoder.layer2": 3, "encoder.layer3": 2, "encoder.layer4": 1}
    for name, height in heights.items():
        assert height == first.get(".".join(name.split(".")[:2]), 5 if name.startswith("encoder.bn1") else 0), name
    assert heights.keys() == {name for name, _ in unet.named_parameters()}


def test_what_is_frozen_does_not_learn_and_batch_normalisation_never_does(unet: SmpUNet) -> None:
    images, masks = torch.rand(4, 3, 64, 64), torch.rand(4, 1, 64, 64)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.SGD(unet.parameters(), 0.1)

    def step(levels: int) -> set[str]:
        frozen.freeze(unet, levels)
        frozen.train_mode(unet)
        torch.nn.functional.mse_loss(unet(images), masks).backward()
        optimizer.step()
        return {name for name, value in unet.state_dict().items() if not value.equal(before[name])}

    changed = step(0)
    assert not [name for name in changed if name.startswith("encoder.")]
    assert any("running_mean" in name for name in changed)  # of the decoder
    changed = step(2)
    assert {name.split(".")[1] for name in changed if name.startswith("encoder.")} == {"layer3", "layer4"}
    changed = step(5)
    inside = {name for name in changed if name.startswith("encoder.")}
    assert "encoder.conv1.weight" in inside
    norms = {name for name, module in unet.encoder.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert not [name for name in inside if name.removeprefix("encoder.").rpartition(".")[0] in norms]


@pytest.mark.parametrize("encoder", ["tu-test_resnet", "tu-test_efficientnet", "resnet18"])
def test_a_file_with_timms_names_gives_the_encoder_its_features(encoder: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = timm.create_model(encoder.removeprefix("tu-")).eval()
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    model = build("smp", ["a"], 64, {"encoder": encoder, "decoder_channels": [16, 8, 8, 4, 4]}).eval()
    load_encoder(model, tmp_path / "weights.safetensors")
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        found = model.encoder(images)[1:]
        expected = whole.forward_intermediates(images, intermediates_only=True)
    for mine, theirs in zip(found[-2:], expected[-2:], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_another_networks_file_is_refused_and_a_missing_one_named(tmp_path: Path) -> None:
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    for encoder in ("tu-test_resnet", "resnet18"):
        model = build("smp", ["a"], 64, {"encoder": encoder, "decoder_channels": [16, 8, 8, 4, 4]})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"vit\.safetensors"):
            load_encoder(model, tmp_path / "vit.safetensors")
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())
        with pytest.raises(FileNotFoundError, match="nowhere"):
            load_encoder(model, tmp_path / "nowhere.pth")


def test_weights_of_the_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for encoder in ("tu-test_resnet", "resnet18"):
        with pytest.raises(OSError, match=r"cannot be reached.*--weights"):
            load_encoder(build("smp", ["a"], 64, {"encoder": encoder}))


def test_smp_opens_what_was_saved_here(unet: SmpUNet, tmp_path: Path) -> None:
    images = torch.rand(1, 3, 64, 64)
    checkpoint.save(unet.eval(), tmp_path)
    theirs = smp.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert theirs(unet.normalize(images)).equal(unet(images))
    model = build("smp", ["a", "b"], 64, {"encoder": "tu-test_resnet", "decoder_channels": [16, 8, 8, 4, 4]}).eval()
    checkpoint.save(model, tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    theirs = smp.Unet(**{key: value for key, value in stated.items() if key not in ("cvlab", "_model_class")}).eval()
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert theirs(model.normalize(images)).equal(model(images))


def test_a_training_freezes_then_tunes_and_resumes_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(2)
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    data = runs.discs(tmp_path / "data")
    words = ["--data", data, "--backbone", "test_resnet", "--weights", tmp_path / "weights.safetensors", *SMALL]
    words += ["--epochs", 3, "--frozen-epochs", 2, "--lr", 0.01]
    here("segmenter", *words, "--out", tmp_path / "whole")
    model = checkpoint.load(tmp_path / "whole")
    assert model.config["arguments"]["encoder"] == "tu-test_resnet"
    assert list(model.config["mean"]) == default_view("tu-test_resnet")["mean"]
    maps = explain(model, torch.rand(1, 3, 64, 64), region_score(torch.ones(64, 64, dtype=torch.bool))).maps
    assert [*maps["grad_cam"]] == [*model.stages]
    with runs.ctrl_c_in_step(16), pytest.raises(KeyboardInterrupt):
        here("segmenter", *words, "--out", tmp_path / "run")
    here("segmenter", *words, "--out", tmp_path / "run", "--resume")
    assert runs.same(runs.kept(tmp_path / "run"), runs.kept(tmp_path / "whole"))
    assert "resnet17" in last_words("segmenter", *words, "--out", tmp_path / "no", "--backbone", "resnet17")


def test_two_processes_freeze_and_tune(tmp_path: Path) -> None:
    """While the encoder is frozen its parameters have no gradients, which the other process must not wait for."""
    data = runs.discs(tmp_path / "data", 20)
    words = ["--data", data, "--backbone", "test_resnet", "--no-pretrained", *SMALL, "--epochs", 2]
    words += ["--frozen-epochs", 1, "--out", tmp_path / "run"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train/segmenter.py"]
    command = [sys.executable, *torchrun, *map(str, words)]
    answer = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert len(runs.history(tmp_path / "run")) == 2
