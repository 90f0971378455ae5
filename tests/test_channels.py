"""Pictures of other than three channels: TIFF and .npy in which only the fourth of five channels tells anything."""

import base64
import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import tifffile
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from segmentation_models_pytorch.encoders import get_encoder
from torch import Tensor, nn

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError, onnx
from cvlab.data.augment import change_colours
from cvlab.data.duplicates import Copies
from cvlab.data.parts import classification_parts, segmentation_parts
from cvlab.explain import grad_cam, heatmap
from cvlab.models import Channels, Model, build
from cvlab.models.fused import fused
from cvlab.models.smp import load_encoder
from cvlab.models.timm import load_pretrained
from cvlab.page.live import answer_to_frame
from cvlab.page.many import explain_picture
from cvlab.page.models import Models
from cvlab.page.panels import reasons
from cvlab.page.question import Question
from cvlab.page.snippet import as_python
from cvlab.page.visit import Visits
from cvlab.transforms import ImageError, open_image, square_view, to_uint8, view

FIVE = Channels(5, [4, 3, 2])
SIDE, SQUARE = 32, 10


def scene(rng: np.random.Generator, spot: bool) -> tuple[np.ndarray, np.ndarray]:
    """Noise (H, W, 5) uint8, with a bright square in channel 4; and the mask of the square."""
    pixels, mask = rng.integers(0, 120, (SIDE, SIDE, 5), np.uint8), np.zeros((SIDE, SIDE), bool)
    if spot:
        top, left = rng.integers(0, SIDE - SQUARE, 2)
        mask[top : top + SQUARE, left : left + SQUARE] = True
        pixels[mask, 3] += 130
    return pixels, mask


def save(stem: Path, pixels: np.ndarray, kind: int) -> Path:
    """As .npy, as a TIFF of interleaved bands, or as one of pages."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_suffix((".npy", ".tif", ".tiff")[kind])
    if kind == 0:
        np.save(path, pixels)
    elif kind == 1:
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", compression="deflate")
    else:
        tifffile.imwrite(path, np.moveaxis(pixels, 2, 0), photometric="minisblack")
    return path


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for i in range(200):
        save(folder / ("none", "spot")[i % 2] / str(i), scene(rng, bool(i % 2))[0], i % 3)
    return folder


@pytest.fixture(scope="module")
def run(classes: Path) -> Path:
    """A trained classifier."""
    words = [*runs.SMALL_CLASSIFIER, "--epochs", 8, "--in-channels", 5, "--show", 4, 3, 2]
    runs.here("classifier", "--data", classes, "--out", classes.parent / "run", *words)
    return classes.parent / "run"


# --- the opener -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", range(3))
def test_every_kind_of_file_holds_the_same(tmp_path: Path, kind: int) -> None:
    pixels, _ = scene(np.random.default_rng(1), True)
    image = open_image(save(tmp_path / "a", pixels, kind), channels=FIVE)
    assert np.array_equal(np.array(image), pixels)
    assert np.array_equal(np.array(image.convert("RGB")), pixels[..., [3, 2, 1]])


@pytest.mark.parametrize("how", [{"planarconfig": "separate"}, {"tile": (16, 16), "compression": "lzw"}])
def test_a_tiff_may_be_in_planes_or_tiles_and_have_smaller_copies(tmp_path: Path, how: dict) -> None:
    pixels = np.moveaxis(scene(np.random.default_rng(1), True)[0], 2, 0)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in [pixels] if "planarconfig" in how else pixels:
            file.write(page, photometric="minisblack", metadata=None, **how)
        file.write(pixels[0, ::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
    assert np.array_equal(np.array(open_image(tmp_path / "a.tif", channels=FIVE)), np.moveaxis(pixels, 0, 2))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64", ">u2"])
def test_a_range_says_which_values_are_black_and_white(tmp_path: Path, dtype: str) -> None:
    values = np.array([[[0], [2500]], [[10000], [20000]]]).astype(dtype)
    path = save(tmp_path / "a", values, 0)
    image = open_image(path, channels=Channels(1, [1, 1, 1], [0, 10000]))
    assert np.array(image)[..., 0].tolist() == [[0, 64], [255, 255]]
    with pytest.raises(ImageError, match="from 0 to 20000"):
        open_image(path, channels=Channels(1, [1, 1, 1]))


def test_what_is_no_number_is_the_low_end(tmp_path: Path) -> None:
    path = save(tmp_path / "a", np.array([[[np.nan], [1]], [[np.inf], [-np.inf]]], np.float32), 0)
    assert np.array(open_image(path, channels=Channels(1, [1, 1, 1], [-1, 1])))[..., 0].tolist() == [[0, 255], [255, 0]]


def test_views_are_those_of_each_channel(tmp_path: Path) -> None:
    """Sizes, crops and resampling are what Pillow does with each channel as a grey picture."""
    pixels = np.random.default_rng(1).integers(0, 256, (90, 47, 5), np.uint8)
    image = open_image(save(tmp_path / "a", pixels, 0), channels=FIVE)
    for task, network in (("convnet", {"widths": [4, 4]}), ("unet", {"width": 4})):
        model = build(task, ["a", "b"], 24, network, [0.5] * 5, [0.25] * 5, channels=FIVE)
        seen = view(image, model)
        for i in range(5):
            alone = to_uint8(square_view(Image.fromarray(pixels[..., i]).convert("RGB"), model))
            assert torch.equal((255 * seen[0, i]).round().byte(), alone[0])


def hostile(folder: Path, name: str) -> Path:
    path = folder / name
    if name == "objects.npy":
        np.save(path, np.array([{"a": os.system}], object), allow_pickle=True)
    elif name == "header.npy":
        np.lib.format.write_array_header_1_0(
            file := io.BytesIO(), {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 5)}
        )
        path.write_bytes(file.getvalue() + bytes(99))
    elif name == "large.npy":
        with open(path, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (10**4, 10**4, 5)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 5 * 10**8)  # no block of it is on the disk
    elif name == "tile.tif":
        tifffile.imwrite(path, np.zeros((16, 16, 5), np.uint8), tile=(16, 16), planarconfig="contig")
        with tifffile.TiffFile(path, mode="r+b") as file:
            file.pages[0].tags["TileLength"].overwrite(2**28)
    elif name == "cut.tif":
        whole = save(folder / "whole", np.zeros((64, 64, 5), np.uint8), 2).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif name == "photo.jpg":
        Image.new("RGB", (40, 40)).save(path)
    elif name == "pickle.npy":
        path.write_bytes(pickle.dumps([1]))
    else:
        shape = {"four.tif": (32, 32, 4), "flat.npy": (32, 32), "line.npy": (1, 32, 5), "first.npy": (5, 32, 32)}[name]
        save(path, np.zeros(shape, np.uint8), int(name.endswith("tif")))
    return path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("objects.npy", "damaged"),
        ("header.npy", "damaged"),
        ("large.npy", "MB when decoded"),
        ("tile.tif", "MB when decoded"),
        ("cut.tif", ""),
        ("photo.jpg", "no TIFF and no .npy.*5 channels"),
        ("pickle.npy", "no TIFF and no .npy"),
        ("four.tif", "32 x 32 x 4 .*needs height x width x 5"),
        ("flat.npy", "32 x 32 values"),
        ("line.npy", "1 x 32 x 5"),
        ("first.npy", "5 x 32 x 32"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(ImageError, match=rf"(?s){name}.*{says}"):
        open_image(hostile(tmp_path, name), channels=FIVE)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch) -> None:
    path = save(tmp_path / "a", np.zeros((8, 8, 5), np.uint8), 1)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImageError, match="pip install tifffile imagecodecs"):
        open_image(path, channels=FIVE)


# --- a classifier -----------------------------------------------------------------------------------------------------


def test_it_learns_what_only_channel_4_tells(run: Path, classes: Path) -> None:
    assert max(line["val_accuracy"] for line in runs.history(run)) > 0.95
    runs.here("evaluate", run, "--data", classes)
    assert runs.read(run / "metrics.json")["accuracy"]["value"] > 0.95


def test_the_first_three_channels_tell_nothing(classes: Path, tmp_path: Path) -> None:
    for path in classes.rglob("*.*"):
        pixels = np.array(open_image(path, channels=FIVE))[..., :3]
        save(tmp_path / "data" / path.parent.name / path.stem, pixels, 0)
    words = [*runs.SMALL_CLASSIFIER, "--epochs", 4, "--in-channels", 3]
    runs.here("classifier", "--data", tmp_path / "data", "--out", tmp_path / "run", *words)
    assert runs.history(tmp_path / "run")[-1]["val_accuracy"] < 0.8


def test_the_map_lies_on_the_square(run: Path, tmp_path: Path) -> None:
    model, rng, shares = checkpoint.load(run), np.random.default_rng(7), []
    hottest = []
    assert model.channels == (5, [4, 3, 2], [])
    for i in range(10):
        pixels, mask = scene(rng, True)
        images = view(open_image(save(tmp_path / str(i), pixels, i % 3), channels=model.channels), model)
        logits, attribution = grad_cam(model, images)
        assert logits.argmax() == 1
        heat = heatmap(attribution, (SIDE, SIDE), model.stages["stage2"])[0, 0].numpy()
        shares.append(heat[mask].sum() / heat.sum())
        hottest.append(mask.flat[heat.argmax()])
    assert np.mean(shares) > 0.35  # by chance a tenth
    assert np.mean(hottest) > 0.9


def test_the_commands_explain_it(run: Path, classes: Path, tmp_path: Path) -> None:
    photo = next((classes / "spot").glob("*.tif"))
    runs.here("explain", run, photo, "--out", tmp_path / "one")
    told = json.loads((tmp_path / "one" / "manifest.json").read_text())
    assert told["prediction"] == "spot"
    drawn = np.array(Image.open(tmp_path / "one" / "grad_cam-stage1.png"))
    assert drawn[..., 0].mean() > drawn[..., 1].mean() + 5  # channel 4, the brightest, is shown as red
    runs.here("explain", run, "--data", classes, "--out", tmp_path / "many")
    assert len((tmp_path / "many" / "manifest.jsonl").read_text().splitlines()) == 30
    assert "photos" in runs.last_words("audit", run, "--data", classes)
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.jpg")
    assert "5 channels" in runs.last_words("explain", run, tmp_path / "photo.jpg", "--out", tmp_path / "none")


def test_the_page_answers_and_its_code_does_the_same(run: Path, classes: Path, tmp_path: Path, monkeypatch) -> None:
    visits, path = Visits(Models({"run": str(run)})), str(next((classes / "spot").glob("*.npy")))
    answer = visits.ask(path, "run", Question())
    assert answer.prediction.images.shape == (1, 5, SIDE, SIDE)
    assert max(answer.prediction.shares, key=answer.prediction.shares.get) == "spot"
    answer.work_out_verdict()
    assert answer.verdict.level == "believable"
    assert reasons(answer)
    assert explain_picture(answer.model, Path(path), Question(stage="stage2"), 1)[0].prediction == "spot"
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(as_python(str(run), path, answer.model, answer.question), names)
    assert torch.allclose(names["attribution"], answer.attribution, atol=1e-4)
    frame = io.BytesIO()
    Image.new("RGB", (40, 40)).save(frame, "PNG")
    sent = "data:," + base64.b64encode(frame.getvalue()).decode()
    with pytest.raises(ImageError, match="5 channels"):
        answer_to_frame(visits, "run", sent)


def test_other_programs_get_the_same(run: Path) -> None:
    model, images = checkpoint.load(run), torch.rand(2, 5, SIDE, SIDE)
    assert torch.allclose(outputs(fused(model), images), outputs(model, images), atol=1e-4)
    assert onnx.write(model, run).is_file()  # onnxruntime has given the same


def test_resuming_needs_the_same_channels(run: Path, classes: Path) -> None:
    words = ["--data", classes, "--out", run, *runs.SMALL_CLASSIFIER, "--epochs", 8, "--resume"]
    assert "--in-channels was 5 and is None" in runs.last_words("classifier", *words)


# --- a segmenter ------------------------------------------------------------------------------------------------------


def test_a_segmenter_finds_what_only_channel_4_shows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "masks").mkdir(parents=True)
    for i in range(60):
        pixels, mask = scene(rng, True)
        save(tmp_path / "data" / "images" / str(i), (pixels / 255).astype(np.float32), i % 3)
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{i}.png")
    words = [*runs.SMALL_SEGMENTER, "--epochs", 8, "--batch-size", 4, "--lr", 0.02, "--no-augment"]
    words += ["--channels", 5, "--range", 0, 1]
    runs.here("segmenter", "--data", tmp_path / "data", "--out", tmp_path / "run", *words)
    assert max(line["val_iou"] for line in runs.history(tmp_path / "run")) > 0.8
    runs.here("explain", tmp_path / "run", tmp_path / "data" / "images" / "0.npy", "--out", tmp_path / "maps")
    assert Image.open(tmp_path / "maps" / "mask.png").size == (10 * SIDE, 10 * SIDE)
    Image.fromarray(np.zeros((20, 20), bool)).save(tmp_path / "data" / "masks" / "0.png")
    parts = segmentation_parts(tmp_path / "data", channels=Channels(5, [1, 2, 3], [0, 1]))
    assert any("has a mask of another size: 1" in note for note in parts.notes)


# --- pretrained networks ----------------------------------------------------------------------------------------------


def test_a_first_layer_is_widened_as_timm_does_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    known = timm.create_model("test_resnet")
    save_file(known.state_dict(), tmp_path / "known.safetensors")
    model = build("timm", ["a", "b"], 32, {"architecture": "test_resnet"}, [0] * 5, [1] * 5, channels=FIVE)
    load_pretrained(model.backbone, "test_resnet", 32, tmp_path / "known.safetensors")
    theirs = timm.create_model(
        "test_resnet", pretrained=True, in_chans=5, pretrained_cfg_overlay={"file": str(tmp_path / "known.safetensors")}
    )
    images = torch.rand(2, 5, 32, 32)
    assert torch.allclose(model.eval().backbone.forward_features(images), theirs.eval().forward_features(images))
    checkpoint.save(model, tmp_path / "folder")
    opened = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert torch.allclose(opened(images), checkpoint.load(tmp_path / "folder")(images))


@pytest.mark.parametrize("encoder", ["resnet18", "tu-test_resnet"])
def test_the_first_layer_of_an_encoder_is_repeated(tmp_path: Path, encoder: str) -> None:
    torch.manual_seed(0)
    source = get_encoder(encoder, depth=3) if encoder == "resnet18" else timm.create_model("test_resnet")
    save_file(source.state_dict(), tmp_path / "known.safetensors")
    arguments = {"encoder": encoder, "decoder_channels": [16, 8, 8]}
    model = build("smp", ["a"], 32, arguments, [0] * 5, [1] * 5, channels=FIVE)
    load_encoder(model, tmp_path / "known.safetensors")
    known, ours = (
        next(each for each in module.modules() if isinstance(each, nn.Conv2d)).weight
        for module in (source, model.encoder)
    )
    assert torch.allclose(ours, 3 / 5 * torch.cat([known, known[:, :2]], 1))
    checkpoint.save(model, tmp_path / "folder")
    assert runs.read(tmp_path / "folder" / "config.json")["in_channels"] == 5
    assert checkpoint.load(tmp_path / "folder")(torch.rand(1, 5, 32, 32)).shape == (1, 1, 32, 32)


def test_transfer_on_a_widened_network(classes: Path, tmp_path: Path) -> None:
    words = ["--backbone", "test_resnet", "--no-pretrained", "--image-size", 32, "--batch-size", 16, "--in-channels", 5]
    words += ["--epochs", 1, "--unfreeze", 99, "--finetune-epochs", 6, "--finetune-lr", 5e-3, "--precision", "fp32"]
    runs.here("transfer", "--data", classes, "--out", tmp_path / "run", *words)
    assert max(line["val_accuracy"] for line in runs.history(tmp_path / "run")) > 0.9


# --- data and folders -------------------------------------------------------------------------------------------------


def test_copies_are_alike_in_all_channels(tmp_path: Path) -> None:
    """A channel that is much brighter than the others in all pictures does not make them alike."""
    rng = np.random.default_rng(0)
    many = rng.integers(0, 40, (3, 64, 64, 5), np.uint8) + np.array([0, 0, 0, 0, 200], np.uint8)
    other = many[0].copy()
    other[..., 4] = many[1][..., 4]  # the same but for one channel
    paths = [save(tmp_path / str(i), pixels, i % 3) for i, pixels in enumerate((*many, many[0], other))]
    assert [pair[:2] for pair in Copies(paths, FIVE).pairs] == [(0, 3)]


def test_a_folder_of_other_pictures_is_refused(classes: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"None of 200 pictures can be used.*x 5 values"):
        classification_parts(classes, channels=Channels(4, [1, 2, 3]))
    words = ["--out", tmp_path / "run", *runs.SMALL_CLASSIFIER]
    assert "--data" in runs.last_words("classifier", "--in-channels", 5, *words)
    for more in (["--in-channels", 99], ["--in-channels", 5, "--show", 4, 5, 6], ["--in-channels", 5, "--range", 9, 1]):
        assert "channels are 1 to 64" in runs.last_words("classifier", "--data", classes, *more, *words)
    assert not (tmp_path / "run").exists()


def test_colours_change_in_photos_only() -> None:
    images, u = torch.rand(2, 5, 8, 8), torch.rand(2, 6)
    assert torch.equal(change_colours(images, u), images)
    assert not torch.equal(change_colours(images[:, :3], u), images[:, :3])


@pytest.mark.parametrize(
    "channels",
    [
        {"count": 0, "shown": [1, 1, 1], "range": []},
        {"count": 5.0, "shown": [1, 1, 1], "range": []},
        {"count": "5", "shown": [1, 1, 1], "range": []},
        {"count": 10**12, "shown": [1, 1, 1], "range": []},
        {"count": 5, "shown": [1, 2, 6], "range": []},
        {"count": 5, "shown": [[1], 2, 3], "range": []},
        {"count": 5, "shown": [1, 2, 3], "range": [1, 0]},
        {"count": 5, "shown": [1, 2, 3], "range": ["0", "1"]},
        {"count": 5, "shown": [1, 2, 3], "range": 7},
        {"count": 4, "shown": [1, 2, 3], "range": []},
        {"count": 5, "shown": [1, 2, 3], "path": "/etc"},
        [5, [1, 2, 3]],
    ],
)
def test_a_strangers_channels_are_checked(run: Path, tmp_path: Path, channels: object) -> None:
    config = runs.read(run / "config.json")
    config["cvlab"]["channels"] = channels
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path)


def outputs(model: Model, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def test_a_photo_model_says_nothing_of_channels(tmp_path: Path, classifier: Model, images: Tensor) -> None:
    checkpoint.save(classifier, tmp_path)
    assert "channels" not in runs.read(tmp_path / "config.json")["cvlab"]
    assert torch.equal(outputs(checkpoint.load(tmp_path), images), outputs(classifier, images))
