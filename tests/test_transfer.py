"""Transfer learning: what is frozen stays to the bit, features computed once are those of every step, heads and files.

Weights are random: nothing is downloaded. The networks named test_* are timm's own miniatures.
"""

import importlib
import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import runs
import timm
import torch
import torch.nn.functional as F
from lite_weights import in_timms_names
from runs import here, history
from safetensors.torch import save_file
from torch import Tensor, nn

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError
from cvlab.data.sets import EvaluationSet
from cvlab.explain import grad_cam
from cvlab.learning import frozen, optim
from cvlab.models import build
from cvlab.models.timm import load_backbone, read_weights
from cvlab.models.timm_head import BackboneWithHead

RECIPES = [path.stem for path in runs.RECIPES if 'script = "transfer"' in path.read_text()]
SMALL = ["--backbone", "test_resnet", "--no-pretrained", "--image-size", 32, "--batch-size", 4, "--precision", "fp32"]
TWO_PHASES = ["--epochs", 1, "--unfreeze", 1, "--finetune-epochs", 2]


def network(
    architecture: str = "test_resnet", image_size: int = 32, kind: str = "timm", **arguments: object
) -> nn.Module:
    torch.manual_seed(0)
    return build(kind, ["cat", "dog", "fox"], image_size, {"architecture": architecture, **arguments}).eval()


def images_of(size: int, count: int = 4) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def learning(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# --- what learns ------------------------------------------------------------------------------------------------------


def test_the_last_two_convolutions_of_resnet18() -> None:
    """The report unfroze the first block of layer4; its last two convolutions are in the last one."""
    model = network("resnet18")
    frozen.freeze(model, 0)
    assert learning(model) == ["backbone.fc.weight", "backbone.fc.bias"]
    frozen.freeze(model, 1)
    convolutions = ["backbone.layer4.1.conv1.weight", "backbone.layer4.1.conv2.weight"]
    assert learning(model) == [*convolutions, "backbone.fc.weight", "backbone.fc.bias"]


def test_sport_vgg() -> None:
    """36 modules of features; the last ten of them, 26 to 35, hold four convolutions; the head counted by hand."""
    arguments = {"pool": False, "last_stage": "features.35", "channels": 256, "hidden": [512]}
    with torch.device("meta"):
        model = BackboneWithHead(100, 224, "vgg19", **arguments).eval()
    assert len(model.backbone.features) == 36
    own = [p.numel() for name, p in model.named_parameters() if not name.startswith("backbone")]
    assert sum(own) == (512 * 256 + 256) + (256 * 14 * 14 * 512 + 512) + (512 * 100 + 100)
    assert list(model.stages)[-2:] == ["features.35", "narrow"]
    frozen.freeze(model, 4)
    last_ten = {f"backbone.features.{i}.{kind}" for i in (28, 30, 32, 34) for kind in ("weight", "bias")}
    assert {name for name in learning(model) if name.startswith("backbone")} == last_ten
    kinds = [type(module) for module in model.backbone.features[26:]]
    assert kinds == [nn.ReLU, nn.MaxPool2d, *[nn.Conv2d, nn.ReLU] * 4]


def test_the_features_of_inception_as_the_report_has_them() -> None:
    with torch.device("meta"):
        model = network("inception_v3", 150, "timm_head", pool=False, hidden=[256], dropout=0.5)
    assert [tuple(p.shape) for p in model.head.parameters()] == [(256, 3 * 3 * 2048), (256,), (3, 256), (3,)]


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "test_vit"])
@pytest.mark.parametrize("layers", [0, 1])
def test_what_is_frozen_stays_to_the_bit(architecture: str, layers: int) -> None:
    size = 64
    model, images, labels = network(architecture, size), images_of(size), torch.tensor([0, 1, 2, 0])
    frozen.freeze(model, layers)
    before, learns = {name: value.clone() for name, value in model.state_dict().items()}, set(learning(model))
    optimizer = optim.optimizer("sgd", model, 0.1, weight_decay=0.1)
    for _ in range(3):
        frozen.train_mode(model)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert value.equal(before[name]) != (name in learns), name
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == learns


def test_rates_fall_from_layer_to_layer() -> None:
    model = network("resnet18")
    frozen.freeze(model, 2)
    factors = {name: 0.5**height for name, height in frozen.heights(model).items()}
    rates = {
        id(parameter): group["lr"]
        for group in optim.optimizer("adamw", model, 0.8, factors=factors).param_groups
        for parameter in group["params"]
    }
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found["backbone.fc.weight"] == 0.8
    assert found["backbone.layer4.1.conv1.weight"] == found["backbone.layer4.1.conv2.weight"] == 0.4
    assert found["backbone.layer4.0.downsample.0.weight"] == 0.2


# --- features computed once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "layers", "where"),
    [
        ("resnet18", 0, "backbone.fc"),
        ("resnet18", 1, "backbone.layer4.1.conv1"),
        ("vgg11", 2, "backbone.features.18"),
        ("test_convnext", 2, "backbone.stages.3.blocks.1.conv_dw"),
        ("test_byobnet", 2, "backbone.stages.2.0.shortcut"),  # a cut inside would miss what runs beside it
        ("test_vit", 0, "backbone.head"),
        ("test_vit", 1, None),  # the position embedding is added behind the patches
        ("xcit_nano_12_p8_224", 1, None),  # what learns first is never called as a module
        ("resnet18", 99, None),
    ],
)
def test_a_network_is_cut_where_learning_begins(architecture: str, layers: int, where: str | None) -> None:
    model, images = network(architecture, 64), images_of(64)
    frozen.freeze(model, layers)
    pieces = frozen.cut(model, images)
    assert (pieces is None) == (where is None)
    if pieces:
        first, rest = pieces
        assert first is model.get_submodule(where)
        with torch.no_grad():
            assert rest(frozen.entering(model, first, images)).equal(model(images))
        assert all(p.requires_grad for p in first.parameters() if p.ndim > 1)


@pytest.mark.parametrize(
    ("kind", "arguments", "layers"),
    [
        ("timm", {}, 0),
        ("timm", {}, 2),
        ("timm_head", {"hidden": [8]}, 1),
        ("timm_head", {"pool": False, "channels": 4}, 0),
    ],
)
def test_training_on_kept_features_is_training_the_network(kind: str, arguments: dict, layers: int) -> None:
    """Two steps each way, cut twice as the script does it; without dropout, which would draw another mask."""
    images, labels, weights = (images_of(32) * 255).to(torch.uint8), torch.tensor([0, 1, 2, 0]), []
    for kept in (False, True):
        model = network("test_resnet", 32, kind, **arguments, **({"dropout": 0.0} if kind == "timm_head" else {}))
        learner, pictures = model, EvaluationSet(list(images), labels)
        for depth in (3, layers) if kept else (layers,):
            frozen.freeze(model, depth)
            inputs, _ = pictures.__getitems__([0, 1])
            if kept and (pieces := frozen.cut(learner, inputs)):
                front = partial(frozen.entering, learner, pieces[0])
                learner, pictures = pieces[1], frozen.FeatureSet(pictures, 1, front, batch_size=3)
        optimizer = optim.optimizer("sgd", model, 0.1)
        for _ in range(2):
            frozen.train_mode(learner)
            inputs, targets = pictures.__getitems__([0, 1, 2, 3])
            F.cross_entropy(learner(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-6), name


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"pool": False, "channels": 4, "hidden": [8, 6], "last_stage": "layer3"}])
def test_a_head_of_ones_own_is_saved_and_loaded(arguments: dict, tmp_path: Path) -> None:
    model, images = network("test_resnet", 32, "timm_head", **arguments), images_of(32)
    checkpoint.save(model, tmp_path)
    loaded = checkpoint.load(tmp_path)
    with torch.no_grad():
        assert loaded(images).equal(model(images))
    assert list(loaded.stages) == list(model.stages)
    _, attribution = grad_cam(loaded, images)  # at the last stage: the 1x1 convolution, where there is one
    assert attribution.abs().max() > 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"architecture": "os.system"},
        {"last_stage": "/etc"},
        {"hidden": [10**9]},
        {"hidden": ["a"]},
        {"url": "x"},
        {"pool": 1},
    ],
)
def test_a_head_that_is_refused(arguments: dict, tmp_path: Path) -> None:
    checkpoint.save(network("test_resnet", 32, "timm_head", pool=False), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["cvlab"]["arguments"].update(arguments)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_weights_of_a_file(tmp_path: Path) -> None:
    """As .pth and as .safetensors, for another number of classes, and for a backbone that is cut off."""
    torch.manual_seed(3)
    theirs = timm.create_model("test_resnet").eval()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    cut_off = {"kind": "timm_head", "pool": False, "last_stage": "layer3"}
    images, found = images_of(32), []
    theirs.layer3.register_forward_hook(lambda _, inputs, activation: found.append(activation))
    with torch.no_grad():
        theirs(images)
        for name, arguments in (("a.pth", {}), ("a.safetensors", cut_off)):
            backbone = network(**arguments).backbone
            load_backbone(backbone, read_weights(tmp_path / name))
            backbone.layer3.register_forward_hook(lambda _, inputs, activation: found.append(activation))
            backbone(images)
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    backbone, weights = network().backbone, timm.create_model("test_resnet").state_dict()
    for change, named in (
        (lambda w: w.pop("layer1.0.conv1.weight"), "layer1.0.conv1.weight"),
        (lambda w: w.update({"layer1.0.conv1.weight": torch.zeros(1)}), "layer1.0.conv1.weight"),
        (lambda w: w.update({"layer9.weight": torch.zeros(1)}), "layer9.weight"),
    ):
        changed = dict(weights)
        change(changed)
        with pytest.raises(ValueError, match=named):
            load_backbone(backbone, changed)
    torch.save({"a": print}, tmp_path / "code.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("code.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)


def test_weights_of_another_size_are_loaded_as_from_the_hub(tmp_path: Path) -> None:
    """A ViT's grid of positions is resampled by timm, whether the weights come from the Hub or from --weights."""
    torch.manual_seed(3)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    overlay = {"input_size": (3, 64, 64), "file": str(tmp_path / "vit.pth")}
    expected = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    backbone = network("test_vit", 64).backbone
    load_backbone(backbone, read_weights(tmp_path / "vit.pth"))
    found = backbone.state_dict()
    assert found["pos_embed"].shape[1] != read_weights(tmp_path / "vit.pth")["pos_embed"].shape[1]
    assert all(found[name].equal(expected[name]) for name in found if not name.startswith("head"))


def test_weights_in_the_names_of_the_authors_of_convnext(tmp_path: Path) -> None:
    torch.manual_seed(3)
    wanted, theirs = timm.create_model("convnext_atto").state_dict(), {}
    names = (
        (r"^stem\.(\d)", r"downsample_layers.0.\1"), (r"^stages\.(\d)\.downsample", r"downsample_layers.\1"),
        (r"\.blocks\.", "."), ("conv_dw", "dwconv"), (r"mlp\.fc(\d)", r"pwconv\1"),
        (r"^head\.norm", "norm"), (r"^head\.fc", "head"),
    )  # fmt: skip
    for name, tensor in wanted.items():
        for pattern, original in names:
            name = re.sub(pattern, original, name)
        theirs[name] = tensor.flatten(1) if "pwconv" in name and tensor.ndim == 4 else tensor
    torch.save({"model": theirs}, tmp_path / "a.pth")
    assert "stages.0.0.dwconv.weight" in read_weights(tmp_path / "a.pth")
    backbone = network("convnext_atto", 64).backbone
    load_backbone(backbone, read_weights(tmp_path / "a.pth"))
    found = backbone.state_dict()
    assert all(found[name].equal(wanted[name]) for name in found if not name.startswith("head.fc"))


def test_weights_are_carried_over_by_position() -> None:
    wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    theirs = {f"_{name.replace('.', '_')}.{name.rsplit('.', 1)[1]}": tensor for name, tensor in wanted.items()}
    found = in_timms_names(theirs, "tf_efficientnet_lite0")
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())
    with pytest.raises(ValueError, match="cannot be"):
        in_timms_names(dict(reversed(theirs.items())), "tf_efficientnet_lite0")


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.noise(tmp_path_factory.mktemp("data") / "photos")


@pytest.mark.parametrize("views", [0, 1, 2])
def test_two_phases_leave_a_folder_that_timm_opens(views: int, photos: Path, tmp_path: Path) -> None:
    here("transfer", *SMALL, *TWO_PHASES, "--views", views, "--data", photos, "--out", tmp_path)
    lines = history(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["train_loss"] + line["val_loss"]) for line in lines)
    ours, images = checkpoint.load(tmp_path), images_of(32)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert theirs(ours.normalize(images)).equal(ours(images))
    assert theirs.pretrained_cfg["label_names"] == ours.class_names == ["a", "b", "c"]
    assert json.loads((tmp_path / "manifest.json").read_text())["epochs"] == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (1, "none")),
        (["--views", "0"], (0, "full")),
        (["--views", "3", "--augment", "minimal"], (3, "minimal")),
        (["--augment"], (0, "full")),
        (["--no-augment"], (1, "none")),
        (["--no-augment", "--views", "0"], (0, "none")),
    ],
)
def test_views_and_augmentation_follow_from_each_other(words: list, expected: tuple) -> None:
    transfer = importlib.import_module("transfer")
    assert transfer.views_of(transfer.parser().parse_args(words)) == expected


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_two_steps(name: str, photos: Path, tmp_path: Path) -> None:
    options = importlib.import_module("cli").read_recipe(name)["options"]
    size = 80 if "inception" in options["backbone"] else 32
    few = ["--image-size", size, "--batch-size", 8, "--no-pretrained", "--precision", "fp32"]
    few += ["--epochs", min(options.get("epochs", 1), 1)] + ["--finetune-epochs", 1] * ("finetune_epochs" in options)
    few += ["--per-class", 3, 1] * ("per_class" in options)
    here("transfer", "--recipe", name, *few, "--data", photos, "--out", tmp_path)
    assert all(math.isfinite(line["train_loss"] + line["val_loss"]) for line in history(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())["cvlab"]
    assert config["arguments"]["architecture"] == options["backbone"].split(".")[0]
    assert ("narrow" in config["stages"]) == ("channels" in options)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--backbone", "resnet81"], "the nearest is resnet18|resnet"),
        (["--unfreeze", 1], "--finetune-epochs"),
        (["--views", 1, "--augment", "minimal"], "--views 0"),
        (["--backbone", "test_vit", "--head", "map", "--no-pretrained"], "pooled"),
        (["--backbone", "test_resnet", "--weights", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_what_cannot_be_done_is_said(words: list, sentence: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=sentence):
        here("transfer", *words, "--data", photos, "--out", tmp_path)


def test_weights_that_cannot_be_reached_can_be_given_as_a_file(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"cannot be reached.*--weights"):
        here("transfer", "--backbone", "test_resnet", "--data", photos, "--out", tmp_path)


@pytest.mark.parametrize("more", [[], ["--views", 0]], ids=["features", "pictures"])
def test_a_second_phase_trains_in_bf16_what_the_first_one_trained(more: list, photos: Path, tmp_path: Path) -> None:
    """The first phase trains the part that learns in any phase, and the second phase cuts it again, or trains it."""
    words = [*SMALL, *TWO_PHASES, "--backbone", "resnet18", "--head", "map", "--channels", 16, "--precision", "bf16"]
    runs.as_process("transfer", *words, *more, "--data", photos, "--out", tmp_path)
    assert [line["epoch"] for line in history(tmp_path)] == [1, 2, 3]
    assert checkpoint.load(tmp_path).config["precision"] == "bf16"
