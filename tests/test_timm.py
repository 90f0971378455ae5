"""Networks of timm behind cvlab's interface: the same logits in both libraries, and maps that Captum gives too.

Weights are random: nothing is downloaded. The networks named test_* are timm's own miniatures.
"""

import json
import sys
from pathlib import Path

import pytest
import sklearn.datasets
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError
from cvlab.explain import class_score, explain, grad_cam
from cvlab.explain.many import describe, explain_predictions
from cvlab.models import build, check_size
from cvlab.models.timm import WholeConv2d, default_view, from_timm_config, imagenet_names, unique
from cvlab.transforms import open_image, view
from cvlab.trust.diagnosis import diagnose
from cvlab.trust.hiding import Hiding

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
from conformance import as_trained, captum_map

# One a family: how it keeps its features, and the side of its views.
FAMILIES = {
    "test_resnet": 64,
    "test_byobnet": 64,
    "test_convnext": 64,
    "test_nfnet": 64,
    "mobilenetv3_small_050": 64,
    "regnetx_002": 64,
    "densenet121": 64,
    "ese_vovnet19b_slim_dw": 64,
    "test_mambaout": 64,  # (N, h, w, C)
    "swin_tiny_patch4_window7_224": 56,  # (N, h, w, C)
    "test_vit": 64,  # tokens, read by a CLS token
    "test_vit3": 64,  # tokens, pooled by attention
    "xcit_nano_12_p8_224": 64,
    "levit_128s": 64,
    "pit_ti_224": 224,  # tokens in tuples
    "hiera_tiny_224": 224,  # tokens in the order of windows
}


def tiny(architecture="test_resnet", image_size=64, names=("cat", "dog", "fox"), **arguments):
    torch.manual_seed(0)
    model = build("timm", names, image_size, {"architecture": architecture, **arguments}, crop_pct=0.9)
    return as_trained(model)


def images_of(size, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# --- explanations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", FAMILIES)
def test_maps_are_captums(architecture):
    size = FAMILIES[architecture]
    model, images = tiny(architecture, size), images_of(size)
    explanation = explain(model, images, class_score(1))
    with torch.no_grad():
        assert torch.equal(explanation.logits, model(images))
    for stage in model.stages:
        found, expected = explanation.maps["grad_cam"][stage], captum_map(model, images, stage, 1)
        assert found.shape == expected.shape
        assert expected.abs().max() > 0, stage
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), stage
    last = list(model.stages)[-1]
    _, attribution = grad_cam(model, images, 1, last)
    assert (attribution - captum_map(model, images, last, 1)).abs().max() <= 1e-5 * attribution.abs().max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_over_its_whole_input_is_a_matrix_product(layout):
    torch.manual_seed(0)
    product = WholeConv2d(4, 5, 3).to(memory_format=layout)
    for side in (3, 6):  # of the larger one it is a convolution as ever
        x = torch.rand(2, 4, side, side).to(memory_format=layout)
        assert torch.allclose(product(x), torch.nn.Conv2d.forward(product, x), atol=1e-6)
    with torch.device("meta"):
        vgg = build("timm", ["a", "b"], 224, {"architecture": "vgg11"}).backbone
        assert type(vgg.pre_logits.fc1) is WholeConv2d
        assert set(vgg.state_dict()) == set(timm.create_model("vgg11").state_dict())


@pytest.mark.parametrize("architecture", [a for a in FAMILIES if a not in ("levit_128s", "pit_ti_224")])
def test_a_map_lies_as_the_picture_does(architecture):
    """timm's own feature maps have the same numbers at the same places."""
    size = FAMILIES[architecture]
    model, images = tiny(architecture, size), images_of(size, 1)
    outputs = {}
    for name, stage in model.stages.items():
        # Of a transformer's block its first norm is read: what timm gives is what enters the next block's.
        module = model.backbone.get_submodule(name.removesuffix(".norm1"))
        module.register_forward_hook(lambda m, i, o, name=name, to_map=stage.to_map: outputs.update({name: to_map(o)}))
    with torch.no_grad():
        model(images)
        theirs = model.backbone.forward_intermediates(model.normalize(images), norm=False, intermediates_only=True)
    for ours in outputs.values():
        assert any(their.shape == ours.shape and torch.equal(their, ours) for their in theirs)


@pytest.mark.parametrize(
    ("architecture", "first", "last"),
    [
        ("vgg16", ("features.3", (64, 224, 224)), ("features.30", (512, 7, 7))),
        ("resnet18", ("act1", (64, 112, 112)), ("layer4", (512, 7, 7))),
        ("vit_tiny_patch16_224", ("blocks.0.norm1", (192, 14, 14)), ("blocks.11.norm1", (192, 14, 14))),
        ("swin_tiny_patch4_window7_224", ("layers.0", (96, 56, 56)), ("layers.3", (768, 7, 7))),
        ("convnext_tiny", ("stages.0", (96, 56, 56)), ("stages.3", (768, 7, 7))),
    ],
)
def test_stages_of_well_known_networks(architecture, first, last):
    with torch.device("meta"):
        model = build("timm", ["a"], 224, {"architecture": architecture}).eval()
        shapes = {}
        for name, stage in model.stages.items():
            stage.module.register_forward_hook(
                lambda m, i, o, name=name, to_map=stage.to_map: shapes.update({name: tuple(to_map(o).shape[1:])})
            )
        model(torch.empty(1, 3, 224, 224))
    found = list(shapes.items())
    assert (found[0], found[-1]) == (first, last)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_mambaout"])
def test_what_cvlab_saves_timm_opens_with_the_same_logits(architecture, tmp_path):
    model, images = tiny(architecture), images_of(64)
    checkpoint.save(model, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    loaded = checkpoint.load(tmp_path)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(theirs(model.normalize(images)), expected)
        assert torch.equal(loaded(images), expected)
    view = timm.data.resolve_data_config(model=theirs)
    assert (list(view["input_size"]), view["crop_pct"], view["interpolation"]) == ([3, 64, 64], 0.9, "bilinear")
    assert (list(view["mean"]), list(view["std"])) == (model.config["mean"], model.config["std"])
    assert theirs.pretrained_cfg["label_names"] == model.class_names == loaded.class_names


def test_a_network_of_timm_can_be_fine_tuned_by_timm(tmp_path):
    """Another number of classes: the head is made anew, the backbone is kept."""
    model = tiny()
    checkpoint.save(model, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert theirs.get_classifier().out_features == 7
    assert torch.equal(theirs.layer4[0].conv1.weight, model.backbone.layer4[0].conv1.weight)


def saved_by_timm(folder, architecture="test_resnet", **config):
    """A folder as timm's own exporter writes it."""
    torch.manual_seed(0)
    arguments = {"num_classes": 3, **config.pop("arguments", {})}
    network = timm.create_model(architecture, **arguments).eval()
    timm.models.save_for_hf(network, folder, model_config=config, safe_serialization=True)
    return network


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_mambaout", "test_efficientnet"])
def test_what_timm_saves_cvlab_opens_with_the_same_logits(architecture, tmp_path):
    theirs = saved_by_timm(tmp_path, architecture, label_names=["cat", "dog", "fox"])
    known = get_pretrained_cfg(architecture)
    ours, images = checkpoint.load(tmp_path), images_of(known.input_size[-1])
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (known.mean, known.std))
    with torch.no_grad():
        assert torch.equal(ours(images), theirs((images - mean) / std))
    assert ours.class_names == ["cat", "dog", "fox"]
    expected = {"image_size": known.input_size[-1], "crop_pct": known.crop_pct, "interpolation": known.interpolation}
    assert {key: getattr(ours, key) for key in expected} == expected
    assert expected.items() <= default_view(architecture).items()
    _, attribution = grad_cam(ours, images)
    assert attribution.shape[:2] == (2, 1)


def test_what_was_opened_from_timm_is_saved_as_ours(tmp_path):
    saved_by_timm(tmp_path / "theirs", label_names=["cat", "dog", "fox"])
    ours, images = checkpoint.load(tmp_path / "theirs"), images_of(160)
    checkpoint.save(ours, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path / "ours")(images), ours(images))


def test_an_image_size_of_ones_own(tmp_path):
    theirs = saved_by_timm(tmp_path, "test_vit", arguments={"img_size": 96})
    ours, images = checkpoint.load(tmp_path), images_of(96)
    assert ours.image_size == 96
    with torch.no_grad():
        assert torch.equal(ours(images), theirs((images - 0.5) / 0.5))


def test_a_thousand_classes_are_imagenets(tmp_path):
    saved_by_timm(tmp_path, arguments={"num_classes": 1000})
    names = checkpoint.load(tmp_path).class_names
    assert [names[i] for i in (0, 207, 281, 999)] == ["tench", "golden retriever", "tabby", "toilet tissue"]
    assert len(set(names)) == 1000


def test_classes_without_names_are_numbered(tmp_path):
    saved_by_timm(tmp_path)
    assert checkpoint.load(tmp_path).class_names == ["class 0", "class 1", "class 2"]


def test_descriptions_stand_for_labels(tmp_path):
    descriptions = {"n1": "crane", "n2": "crane", "n3": "cow"}
    saved_by_timm(tmp_path, label_names=list(descriptions), label_descriptions=descriptions)
    assert checkpoint.load(tmp_path).class_names == ["crane", "crane (2)", "cow"]


def test_names_are_told_apart():
    assert unique(["a", "a", "a (2)", "b", "a"]) == ["a", "a (2)", "a (2) (2)", "b", "a (3)"]
    assert imagenet_names(3) is None


def test_half_precision_and_missing_counters_are_no_obstacle(tmp_path):
    theirs = saved_by_timm(tmp_path)
    weights = {
        k: v.half() if v.is_floating_point() else v for k, v in load_file(tmp_path / "model.safetensors").items()
    }
    counters = [name for name in weights if name.endswith("num_batches_tracked")]
    save_file({k: v for k, v in weights.items() if k not in counters}, tmp_path / "model.safetensors")
    ours, images = checkpoint.load(tmp_path), images_of(160)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(ours.normalize(images)), atol=1e-2)
    assert counters


def test_tensor_names_of_an_older_timm(tmp_path):
    """Swin's masks were in the file once."""
    theirs = saved_by_timm(tmp_path, "swin_tiny_patch4_window7_224", arguments={"img_size": 56})
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "layers.0.blocks.1.attn_mask": torch.zeros(4, 49, 49)}, tmp_path / "model.safetensors")
    ours, images = checkpoint.load(tmp_path), images_of(56)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(ours.normalize(images)))


def test_an_older_flat_config(tmp_path):
    saved_by_timm(tmp_path)
    edit(tmp_path, lambda config: config.update(config.pop("pretrained_cfg")))
    assert checkpoint.load(tmp_path).image_size == 160


def test_addresses_and_files_in_a_config_have_no_effect(tmp_path):
    saved_by_timm(tmp_path)
    before = checkpoint.load(tmp_path).config
    extra = {"url": "http://127.0.0.1:9/x.pth", "file": "/etc/passwd", "hf_hub_id": "a/b", "custom_load": True}
    edit(tmp_path, lambda config: config["pretrained_cfg"].update(extra))
    assert checkpoint.load(tmp_path).config == before


REFUSED = {
    "foreign architecture": lambda c: c.update(architecture="os.system"),
    "architecture of the Hub": lambda c: c.update(architecture="hf-hub:user/name"),
    "architecture of another type": lambda c: c.update(architecture=["resnet18"]),
    "no head": lambda c: c.update(num_classes=0),
    "classes beyond any memory": lambda c: c.update(num_classes=10**9),
    "classes of no type": lambda c: c.update(num_classes="3"),
    "too few names": lambda c: c.update(label_names=["cat"]),
    "names that are no names": lambda c: c.update(label_names=[1, 2, 3]),
    "a checkpoint of its own": lambda c: c.update(model_args={"checkpoint_path": "/etc/passwd"}),
    "features only": lambda c: c.update(model_args={"features_only": True}),
    "code for a layer": lambda c: c.update(model_args={"act_layer": "os.system"}),
    "another pool": lambda c: c.update(model_args={"global_pool": "os.system"}),
    "arguments that are no object": lambda c: c.update(model_args=[1]),
    "view that is no object": lambda c: c.update(pretrained_cfg=[1]),
    "grey images": lambda c: c.update(model_args={"in_chans": 1}),
    "an oblong": lambda c: c["pretrained_cfg"].update(input_size=[3, 64, 96]),
    "a size of no type": lambda c: c["pretrained_cfg"].update(input_size=["3", "x", "x"]),
    "a size beyond any memory": lambda c: c["pretrained_cfg"].update(input_size=[3, 10**9, 10**9]),
    "std of 0": lambda c: c["pretrained_cfg"].update(std=[0, 0, 0]),
    "mean of one": lambda c: c["pretrained_cfg"].update(mean=0.5),
    "another interpolation": lambda c: c["pretrained_cfg"].update(interpolation="random"),
    "crop_pct of a word": lambda c: c["pretrained_cfg"].update(crop_pct="all"),
    "a network of 22 billion parameters": lambda c: c.update(architecture="eva02_enormous_patch14_clip_224"),
    "another network": lambda c: c.update(architecture="test_vit"),
    "a fixed size for a network that has none": lambda c: c["pretrained_cfg"].update(fixed_input_size=True),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_a_config_of_timm_that_is_refused(damage, tmp_path):
    saved_by_timm(tmp_path)
    edit(tmp_path, REFUSED[damage])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_two_networks_in_one_config(tmp_path):
    checkpoint.save(tiny(), tmp_path)
    edit(tmp_path, lambda config: config.update(architecture="test_vit"))
    with pytest.raises(CheckpointError, match="two networks"):
        checkpoint.load(tmp_path)


def test_the_entries_that_are_read_from_timm():
    config = {"architecture": "resnet18", "num_classes": 1000, "pretrained_cfg": {"crop_pct": 0.95}}
    block = from_timm_config(config)
    assert (block["image_size"], block["crop_pct"], block["interpolation"]) == (224, 0.95, "bicubic")
    assert block["arguments"] == {"architecture": "resnet18", "fixed_input_size": False}


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("architecture", ["resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_a_photo_is_seen_as_timms_own_evaluation_transform_shows_it(architecture: str, crop_mode: str) -> None:
    """timm's crop_pct, crop_mode and interpolation, on scikit-learn's photo; one grey level for rounding."""
    given = default_view(architecture) | {"crop_mode": crop_mode}
    model = build("timm", ["a", "b"], arguments={"architecture": architecture}, **given)
    config = timm.data.resolve_data_config({"crop_mode": crop_mode}, model=model.backbone)
    transform = timm.data.create_transform(**(config | {"mean": (0, 0, 0), "std": (1, 1, 1)}))
    photo = open_image(Path(sklearn.datasets.__file__).parent / "images" / "china.jpg")
    assert (view(photo, model)[0] - transform(photo)).abs().max() <= 1.01 / 255


# --- one output, and sizes --------------------------------------------------------------------------------------------


def test_a_single_output_is_two_classes_by_its_sigmoid(tmp_path):
    """Everywhere the same: z = 0.3 is a probability of 0.574 for the second class, and evidence against the first."""
    theirs = saved_by_timm(tmp_path / "theirs", arguments={"num_classes": 1}, label_names=["healthy", "ill"])
    model, images = checkpoint.load(tmp_path / "theirs"), images_of(64, 1)
    assert model.class_names == ["healthy", "ill"]
    with torch.no_grad():
        z = theirs(model.normalize(images))
        logits = model(images)
    torch.testing.assert_close(logits.softmax(1)[:, 1:], z.sigmoid())
    predicted = int(z.sigmoid() > 0.5)
    lines = describe(model, explain_predictions(model, images))
    assert lines[0]["prediction"] == model.class_names[predicted]
    _, ill = grad_cam(model, images, 1)
    _, healthy = grad_cam(model, images, 0)
    torch.testing.assert_close(ill, -healthy)
    assert ill.abs().max() > 0
    assert Hiding(model, images, 1, None).probability == pytest.approx(z.sigmoid().item(), abs=1e-5)
    assert "Unsure" in diagnose(torch.tensor([[[[0.0, 1, 2], [2, 1, 0], [3, 1, 1]]]]), 0.01 * logits.sign())
    checkpoint.save(model, tmp_path / "ours")
    again = checkpoint.load(tmp_path / "ours")
    with torch.no_grad():
        assert again(images).equal(logits)
        assert timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()(images).shape == (1, 1)


@pytest.mark.parametrize(
    ("label_names", "found"),
    [(None, ["class 0", "class 1"]), (["cat"], ["not cat", "cat"]), ({"0": "cat"}, ["not cat", "cat"])],
)
def test_names_of_a_single_output(label_names, found, tmp_path):
    saved_by_timm(tmp_path, arguments={"num_classes": 1}, **({"label_names": label_names} if label_names else {}))
    assert checkpoint.load(tmp_path).class_names == found


def test_a_classifier_of_ours_with_one_class_is_refused(tmp_path):
    checkpoint.save(build("convnet", ["cat"], 16, {"widths": [2]}), tmp_path)
    with pytest.raises(CheckpointError, match="single class"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("network", "size", "arguments", "said"),
    [
        ("timm", 100, {"architecture": "vit_tiny_patch16_224"}, "96 or 112"),  # would never see 4 columns
        ("timm", 95, {"architecture": "vit_tiny_patch16_224"}, "80 or 96"),
        ("timm", 95, {"architecture": "test_vit"}, "95 x 95"),
        ("timm", 98, {"architecture": "test_convnext"}, "96 or 100"),
        ("timm", 32, {"architecture": "inception_v3"}, "inception_v3"),
        ("timm_head", 100, {"architecture": "vit_tiny_patch16_224"}, "96 or 112"),
        ("convnet", 8, {}, "8 x 8"),
        ("plain", 8, {}, "8 pixels"),
        ("unet", 50, {"depth": 3}, "multiples of 8"),
    ],
)
def test_an_image_size_that_a_network_cannot_take_or_see_is_refused(network, size, arguments, said):
    with pytest.raises(ValueError, match=said):
        check_size(network, size, arguments)


def test_sizes_that_fit_are_taken_and_every_column_is_seen():
    for architecture, size in (("test_vit", 96), ("test_convnext", 96), ("swin_tiny_patch4_window7_224", 100)):
        check_size("timm", size, {"architecture": architecture})
    images = images_of(96, 1).requires_grad_()
    tiny("test_vit", 96)(images).sum().backward()
    assert images.grad.abs().sum((0, 1, 2)).all()


def test_a_folder_of_timm_whose_network_would_not_see_all_is_refused(tmp_path):
    saved_by_timm(tmp_path, "vit_tiny_patch16_224", arguments={"img_size": 100})
    with pytest.raises(CheckpointError, match="last 4 columns"):
        checkpoint.load(tmp_path)
