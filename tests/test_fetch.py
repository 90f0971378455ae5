"""cvlab.data.public: torchvision's loaders, on small copies of its layouts, become folders that cvlab reads."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from photos import PHOTOS, needs_photos
from PIL import Image, ImageFilter
from runs import here
from scipy.io import savemat
from torchvision.datasets import Flowers102

from cvlab import checkpoint
from cvlab.data.parts import classification_parts, segmentation_parts
from cvlab.data.public import LISTINGS, folder_of


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CVLAB_DATA", str(tmp_path))
    return tmp_path


def photo(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")
    return path


def test_flowers102_keeps_its_official_parts_and_labels(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve pictures of labels 1, 2, 1, 2, ...: numbers 1 to 4 are train, 5 to 8 val, 9 to 12 test."""
    flowers = root / "flowers-102"
    for i in range(1, 13):
        photo(flowers / "jpg" / f"image_{i:05d}.jpg", i)
    savemat(flowers / "imagelabels.mat", {"labels": [1, 2] * 6})
    parts = {"trnid": range(1, 5), "valid": range(5, 9), "tstid": range(9, 13)}
    savemat(flowers / "setid.mat", {key: list(ids) for key, ids in parts.items()})
    known = {  # torchvision compares the hashes of the true files
        key: (name, key != "image" and hashlib.md5((flowers / name).read_bytes()).hexdigest())
        for key, (name, _) in Flowers102._file_dict.items()
    }
    monkeypatch.setattr(Flowers102, "_file_dict", known)

    found = classification_parts(folder_of("torchvision:flowers102"))
    assert found.class_names == ["001 pink primrose", "002 hard-leaved pocket orchid"]
    numbers = {part: [(path.name[8:11], label) for path, label in found.samples[part]] for part in found.samples}
    assert numbers["train"] == [("001", 0), ("003", 0), ("002", 1), ("004", 1)]
    assert numbers["test"] == [("009", 0), ("011", 0), ("010", 1), ("012", 1)]


@pytest.mark.parametrize(
    ("name", "inside", "classes", "file"),
    [
        ("caltech101", "caltech101/101_ObjectCategories", ["accordion", "wrench"], "image_{i:04d}.jpg"),
        ("caltech256", "caltech256/256_ObjectCategories", ["001.ak47", "002.flag"], "{label:03d}_{i:04d}.jpg"),
    ],
)
def test_caltech_is_a_folder_of_classes(root: Path, name: str, inside: str, classes: list[str], file: str) -> None:
    for label, class_name in enumerate(classes, start=1):
        for i in range(1, 8):
            photo(root / inside / class_name / file.format(label=label, i=i), 10 * label + i)
    if name == "caltech101":
        photo(root / inside / "BACKGROUND_Google" / "image_0001.jpg", 0)
    folder = folder_of(f"torchvision:{name}")
    found = classification_parts(folder)
    assert found.class_names == classes
    assert sum(map(len, found.samples.values())) == 14
    path, label = found.samples["train"][0]
    assert path.read_bytes() == (root / inside / classes[label] / path.name).read_bytes()
    assert folder_of(f"torchvision:{name}") == folder  # laid out once


def test_the_masks_of_the_pets_are_the_animal_with_its_outline(root: Path) -> None:
    trimap = np.full((12, 16), 2, np.uint8)
    trimap[3:9, 3:9] = 3
    trimap[4:8, 4:8] = 1
    pets = root / "oxford-iiit-pet"
    (pets / "annotations" / "trimaps").mkdir(parents=True)
    for part, numbers in (("trainval", range(1, 9)), ("test", range(9, 13))):
        lines = [f"Abyssinian_{i} 1 1 1" for i in numbers]
        (pets / "annotations" / f"{part}.txt").write_text("\n".join(lines))
        for i in numbers:
            photo(pets / "images" / f"Abyssinian_{i}.jpg", i)
            Image.fromarray(trimap).save(pets / "annotations" / "trimaps" / f"Abyssinian_{i}.png")
    found = segmentation_parts(folder_of("torchvision:oxfordiiitpet"), class_names=["pet"])
    assert sum(map(len, found.samples.values())) == 12
    _, mask = found.open_sample(found.samples["val"][0])
    assert mask.sum() == 36
    assert mask[0, 3:9, 3:9].all()
    found = segmentation_parts(folder_of("torchvision:oxfordiiitpet-segmentation"))
    assert found.class_names == ["background", "foreground"]
    _, mask = found.open_sample(found.samples["val"][0])
    assert np.array_equal(mask, [trimap == 2, trimap == 1])  # the outline is in neither


@needs_photos("horses")
def test_the_recipe_pets_learns_from_real_photos_without_their_outlines(root: Path, tmp_path: Path) -> None:
    pets = root / "oxford-iiit-pet"
    (pets / "annotations" / "trimaps").mkdir(parents=True)
    (pets / "images").mkdir()
    taken = sorted((PHOTOS / "horses" / "images").iterdir())[:24]
    for path in taken:
        mask = Image.open(PHOTOS / "horses" / "masks" / f"{path.stem}.png").convert("L").point(lambda v: 255 * (v > 0))
        inner, outer = (np.asarray(mask.filter(kind(5))) > 0 for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
        trimap = np.where(inner, 1, np.where(outer, 3, 2)).astype(np.uint8)
        Image.fromarray(trimap).save(pets / "annotations" / "trimaps" / f"{path.stem}.png")
        Image.open(path).save(pets / "images" / f"{path.stem}.jpg")
    for part, chosen in (("trainval", taken[:20]), ("test", taken[20:])):
        (pets / "annotations" / f"{part}.txt").write_text("".join(f"{path.stem} 1 1 1\n" for path in chosen))
    words = ["--no-pretrained", "--image-size", 64, "--batch-size", 4, "--epochs", 1, "--precision", "fp32"]
    here("segmenter", "--recipe", "pets", *words, "--out", tmp_path / "run")
    here("evaluate", tmp_path / "run", "--data", "torchvision:oxfordiiitpet-segmentation")
    assert checkpoint.load(tmp_path / "run").class_names == ["background", "foreground"]
    assert {"boundary_iou", "pixel_accuracy", "iou"} <= json.loads(
        (tmp_path / "run" / "metrics.json").read_text()
    ).keys()


def test_voc_has_its_classes_and_a_line_that_is_not_scored(root: Path) -> None:
    voc, mask = root / "VOCdevkit" / "VOC2012", np.zeros((12, 16), np.uint8)
    mask[3:9, 3:9] = 255
    mask[4:8, 4:8] = 8
    for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (voc / name).mkdir(parents=True)
    for part, numbers in (("train", range(1, 13)), ("val", range(13, 16))):
        names = [f"2007_{i:06}" for i in numbers]
        (voc / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for i, name in zip(numbers, names, strict=True):
            photo(voc / "JPEGImages" / f"{name}.jpg", i)
            drawn = Image.fromarray(mask).convert("P")
            drawn.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tolist())
            drawn.save(voc / "SegmentationClass" / f"{name}.png")
    found = segmentation_parts(folder_of("torchvision:voc"))
    assert (len(found.class_names), found.class_names[8]) == (21, "cat")
    assert (len(found.samples["train"]) + len(found.samples["test"]), len(found.samples["val"])) == (12, 3)
    _, channels = found.open_sample(found.samples["val"][0])
    assert np.array_equal(channels[0], mask == 0)
    assert np.array_equal(channels[8], mask == 8)
    assert channels.sum() == (mask != 255).sum()


def test_a_data_set_that_cannot_be_had_says_where_it_belongs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(root: Path) -> None:
        raise OSError("no route to host")

    monkeypatch.setitem(LISTINGS, "caltech256", offline)
    with pytest.raises(FileNotFoundError, match="no route to host") as raised:
        folder_of("torchvision:caltech256")
    assert str(root) in str(raised.value)
    with pytest.raises(ValueError, match="torchvision:caltech256"):
        folder_of("torchvision:caltech")
    assert not (root / "folders").exists()
