"""What an answer may cost: memory of masks, of models and of pictures, and the length of lists, whatever is sent."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import app
from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError
from cvlab.models import build, probabilities
from cvlab.page import evidence
from cvlab.page.events import Events, masked
from cvlab.page.evidence import mask_size, open_mask
from cvlab.page.html import MOST_NAMES, bars, table
from cvlab.page.models import Models
from cvlab.page.panels import draw
from cvlab.page.question import Question
from cvlab.page.visit import Visits
from cvlab.transforms import ImageError, open_image, resize_logits

ROOT = Path(__file__).resolve().parents[1]
MEASURE = """
import sys
from cvlab.transforms import ImageError, open_image
from PIL import Image
import numpy as np

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

def opened(path):
    try:
        open_image(path)
    except ImageError as error:
        return str(error)
    return ""

opened(sys.argv[1])
before = peak()
print(opened(sys.argv[2]))
print(peak() - before)
"""


def segmenter(folder, classes, side=16):
    torch.manual_seed(0)
    model = build("unet", [f"c{i}" for i in range(classes)], side, {"width": 2, "depth": 1})
    model.head.bias.data.uniform_(-1, 1)
    checkpoint.save(model, folder)
    return str(folder)


def photo(path, width, height):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(path)
    return str(path)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_of_a_large_photo_are_computed_smaller_and_the_shares_stay_right(tmp_path, monkeypatch):
    visits = Visits(Models({"many": segmenter(tmp_path / "many", 40)}))
    answer = visits.ask(photo(tmp_path / "p.png", 400, 300), "many", Question())
    picture, exact, sentence = masked(open_image(answer.photo), answer)
    monkeypatch.setattr(evidence, "MOST_LOGITS", 40 * 3_000)
    asked = []
    monkeypatch.setattr(
        "cvlab.page.events.resize_logits", lambda logits, size: asked.append(size) or resize_logits(logits, size)
    )
    smaller, shares, about = masked(open_image(answer.photo), answer)
    assert np.prod(asked, axis=1).max() <= 3_000
    assert picture.size == smaller.size == (400, 300)
    assert shares == pytest.approx(exact, abs=0.03)
    assert "of 120,000 pixels" in sentence
    assert "of 120,000 pixels" in about


def test_the_budget_of_masks():
    model = build("unet", ["a"] * 1000, 16, {"width": 1, "depth": 1})
    for size in ((3000, 4000), (2, 40_000_000), (8000, 10_000)):
        height, width = mask_size(model, size)
        assert 1000 * height * width <= evidence.MOST_LOGITS
    assert mask_size(build("unet", ["a"], 16, {"width": 1, "depth": 1}), (3000, 4000)) == [3000, 4000]


def test_a_true_mask_is_bounded_too(tmp_path, monkeypatch):
    model = build("unet", ["a", "b", "c"], 16, {"width": 1, "depth": 1})
    model.class_names = ["a", "b", "c"]
    Image.fromarray(np.arange(30_000, dtype=np.uint8).reshape(150, 200) % 3).save(tmp_path / "mask.png")
    monkeypatch.setattr(evidence, "MOST_LOGITS", 3 * 1_000)
    masks = open_mask(str(tmp_path / "mask.png"), model, (150, 200))
    assert masks.numel() <= 4 * 1_000


def test_a_segmenter_of_many_classes_answers_on_a_large_photo(tmp_path):
    """Forty classes and 12 megapixels took all memory of the machine."""
    folder = segmenter(tmp_path / "many", 40, 64)
    code = (
        "import sys; from cvlab.page.models import Models; from cvlab.page.visit import Visits;"
        "from cvlab.page.question import Question; from cvlab.page.events import masked;"
        "from cvlab.transforms import open_image;"
        "answer = Visits(Models({'m': sys.argv[1]})).ask(sys.argv[2], 'm', Question());"
        "print(masked(open_image(sys.argv[2]), answer)[2]);"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, folder, photo(tmp_path / "p.jpg", 4000, 3000)]
    ran = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    sentence, peak = ran.stdout.splitlines()[-2:]
    assert "of 12,000,000 pixels" in sentence
    assert int(peak) < 3 * 2**20


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["views", "classes", "weights"])
def test_a_strangers_model_that_does_not_fit_the_page_is_refused_in_a_sentence(tmp_path, what):
    """No weights are read: none are there. The owner of the page may open the same one."""
    network = {
        "views": ("unet", ["a", "b"], 1024, {"width": 32}),
        "classes": ("unet", [f"c{i}" for i in range(1000)], 512, {"width": 1, "depth": 1}),
        "weights": ("plain", ["a", "b"], 64, {"widths": [512], "hidden": [400]}),
    }[what]
    with torch.device("meta"):
        config = build(*network).config
    (tmp_path / "config.json").write_text(json.dumps({"cvlab": config | {"format": 1}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"takes about [\d.]+ GiB of memory"):
        _ = Models({}, fetch=lambda name: tmp_path)["user/large"]
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        _ = Models({"large": str(tmp_path)})["large"]


def test_the_shipped_models_fit():
    for folder in sorted((ROOT / "checkpoints").iterdir()):
        assert checkpoint.load(folder, 1.5).activations > 0


# --- lists ------------------------------------------------------------------------------------------------------------


def test_lists_of_classes_are_cut_and_any_class_can_be_typed(tmp_path):
    names = [f"{i:05}" + "x" * 95 for i in range(5_000)]
    torch.manual_seed(0)
    checkpoint.save(build("convnet", names, 16, {"widths": [2]}), tmp_path / "many")
    visits = Visits(Models({"many": str(tmp_path / "many")}))
    page = app.build_page(visits.models)
    path = photo(tmp_path / "p.png", 16, 16)
    answer = visits.ask(path, "many", Question(class_name=names[4_321]))
    predict = next(each.fn for each in page.fns.values() if each.api_name == "predict")
    told = predict(path, "many")
    probs = probabilities(answer.model, answer.prediction.logits)[0]
    assert [each["confidence"] for each in told["confidences"]] == probs.sort(descending=True).values[:1000].tolist()
    assert len(told["confidences"]) == MOST_NAMES
    for widget in ("class_name", "rather_than"):
        begun = Events(visits.models, lambda *done: None).begin("session", {}, "", path, "many", None)
        choices = begun[widget]["choices"]
        assert len(choices) == 1 + MOST_NAMES
    shown = draw(answer, ("sentence", "side", "facts", "grad_cam", "record"))
    assert names[4_321][:50] in shown["grad_cam"]
    assert sum(map(len, shown.values())) < 1_000_000
    assert bars(dict.fromkeys(names, 0.1), "").count("<tr>") == MOST_NAMES
    assert "4995 more" in bars(dict.fromkeys(names, 0.1), "")
    assert table(("",), [[name] for name in names]).count("<tr>") == 1 + MOST_NAMES - 1


# --- pictures ---------------------------------------------------------------------------------------------------------


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_jpeg_2000_is_off():
    with pytest.raises(ImageError, match="not a picture in a format"):
        open_image(io.BytesIO(saved(Image.new("RGB", (64, 64)), "JPEG2000")))


WIDE = np.zeros((6000, 6000), np.float32)
WIDE[0, 0] = 1000
LARGE = {  # name: picture, format, options, whether it is opened, MB that opening it takes at most
    "float.tiff": (lambda: Image.fromarray(WIDE), "TIFF", {"compression": "tiff_adobe_deflate"}, True, 400),
    "int.tiff": (
        lambda: Image.fromarray(WIDE.astype(np.int32)),
        "TIFF",
        {"compression": "tiff_adobe_deflate"},
        True,
        400,
    ),
    "uint16.png": (lambda: Image.fromarray(WIDE.astype(np.uint16)), "PNG", {"compress_level": 1}, True, 400),
    "rgba.png": (lambda: Image.new("RGBA", (6000, 6000), (9, 9, 9, 9)), "PNG", {"compress_level": 1}, True, 400),
    "too many floats.tiff": (
        lambda: Image.new("F", (8900, 8900)),
        "TIFF",
        {"compression": "tiff_adobe_deflate"},
        False,
        50,
    ),
    "too much.png": (lambda: Image.new("RGBA", (8900, 8900)), "PNG", {"compress_level": 1}, False, 50),
    "cmyk.jpg": (lambda: Image.new("CMYK", (8900, 8900)), "JPEG", {}, True, 400),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_picture_takes_little_memory_or_is_refused(tmp_path, name):
    make, form, options, opens, most = LARGE[name]
    make().save(tmp_path / name, form, **options)
    small = photo(tmp_path / "small.png", 32, 32)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, small, tmp_path / name],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said, growth = ran.stdout.splitlines()
    assert (said == "") == opens, said
    assert float(growth) < most


def test_a_jpeg_beyond_the_budget_is_decoded_smaller():
    content = saved(Image.new("CMYK", (8000, 6000)), "JPEG")
    assert open_image(io.BytesIO(content)).size == (4000, 3000)


def test_frames_are_not_counted(tmp_path, monkeypatch):
    """Each page of a TIFF is looked for among all before it."""
    from PIL import TiffImagePlugin

    pages = [Image.new("L", (16, 16))] * 3
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "n_frames", property(lambda self: pytest.fail("counted")))
    assert open_image(tmp_path / "pages.tiff").info["notes"]
