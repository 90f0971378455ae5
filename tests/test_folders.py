"""Folders as people bring them: what is read of each is known to the file, and train/check.py says the same."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import check
import cli
import numpy as np
import pytest
from PIL import Image

from cvlab.data.folders import DataError, has_masks, left_out_notes
from cvlab.data.parts import PARTS, Parts, classification_parts, segmentation_parts

RANDOM = np.random.default_rng(0)
MASK = np.zeros((10, 12), np.uint8)
MASK[2:6, 3:9] = 255


def picture(path: Path, count: int = 1) -> None:
    """One picture, or `count` of them in the folder `path`; none is like another."""
    for each in [path] if count == 1 else [path / f"{i:02}.png" for i in range(count)]:
        each.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RANDOM.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(each)


def classes(folder: Path, names: str = "ab", count: int = 8) -> None:
    for name in names:
        picture(folder / name, count)


def pairs(images: Path, masks: Path, mask: str = "{}.png", image: str = "{}.png", count: int = 8) -> None:
    masks.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(images / image.format(i))
        Image.fromarray(MASK).save(masks / mask.format(i))


def sizes(parts: Parts) -> list[int]:
    return [len(parts.samples[part]) for part in PARTS]


def left_out(notes: list[str]) -> dict[str, int]:
    """reason -> number of files, as the notes count them."""
    found = (re.match(r"Left out because it (.+): (\d+) \(", note) for note in notes)
    return {match[1]: int(match[2]) for match in found if match}


def said_by_check(folder: Path, capsys: pytest.CaptureFixture) -> str:
    """What train/check.py prints, the sentence of an error included."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train/check.py", str(folder)])
        try:
            cli.run(check.main)
        except SystemExit as end:
            return capsys.readouterr().out + str(end)
    return capsys.readouterr().out


def as_checked(folder: Path, capsys: pytest.CaptureFixture) -> tuple[list[int], int]:
    """The lengths of the parts that train/check.py expects of a training, and how many files it names as unusable."""
    said = said_by_check(folder, capsys)
    line = re.search(r"^training: train (\d+), val (\d+), test (\d+)$", said, re.M)
    unusable = said.split("cannot be used: ")[1].split("\n")[0].replace("none", "0")
    return [int(number) for number in line.groups()], int(unusable)


# --- classification ---------------------------------------------------------------------------------------------------


def outside(folder: Path) -> None:
    """A class and a picture behind links, a broken one, and one that leads in a circle."""
    classes(folder)
    elsewhere = folder.parent / "elsewhere"
    classes(elsewhere, "c")
    (folder / "c").symlink_to(elsewhere / "c")
    picture(elsewhere / "one.png")
    (folder / "a" / "linked.png").symlink_to(elsewhere / "one.png")
    (folder / "a" / "broken.png").symlink_to(elsewhere / "nothing.png")
    (folder / "b" / "circle").symlink_to(folder / "b")


def of_all_kinds(folder: Path) -> None:
    classes(folder)
    for name in ("1.tif", "2.jpe", "3.BMP"):
        picture(folder / "a" / name)
    for name in ("no suffix", "odd.suffix"):
        picture(folder / "a" / "renamed.png")
        (folder / "a" / "renamed.png").rename(folder / "a" / name)
    Image.fromarray(RANDOM.integers(0, 256, (10, 12), dtype=np.uint8)).save(folder / "b" / "grey.pgm")
    (folder / "b" / "notes.txt").write_text("no picture")


def of_a_mac(folder: Path) -> None:
    classes(folder)
    classes(folder / "__MACOSX")
    for name in ("._00.png", "._01.png", ".DS_Store", "Thumbs.db"):
        (folder / "a" / name).write_bytes(b"\0")


def with_extras(folder: Path) -> None:
    classes(folder / "train")
    classes(folder / "val", "abc", 3)
    classes(folder / "test", "ad", 2)
    picture(folder / "extra", 4)
    picture(folder / "cover.png")


# By name: what makes the folder, the lengths of its parts, and what is left out, by reason.
CLASS_FOLDERS = {
    "only classes": (classes, [12, 2, 2], {}),
    "train and validation": (lambda d: (classes(d / "train"), classes(d / "validation", count=3)), [14, 6, 2], {}),
    "Training and TESTING": (lambda d: (classes(d / "Training"), classes(d / "TESTING", count=3)), [14, 2, 6], {}),
    "only train": (lambda d: classes(d / "train"), [12, 2, 2], {}),
    "two wrappers": (lambda d: classes(d / "archive" / "pets"), [12, 2, 2], {}),
    "wrapped parts": (lambda d: [classes(d / "x" / part / part) for part in ("train", "val", "test")], [16] * 3, {}),
    "a class called train": (lambda d: classes(d, ["train", "bus", "car"]), [18, 3, 3], {}),
    "classes named like parts": (lambda d: classes(d, ["train station", "test tube"]), [12, 2, 2], {}),
    "a picture beside the classes": (
        lambda d: (classes(d / "train"), picture(d / "train" / "cover.png"), classes(d / "val", count=3)),
        [14, 6, 2],
        {"lies beside the folders of the classes": 1},
    ),
    "subfolders": (lambda d: (classes(d), picture(d / "a" / "more" / "yet", 8)), [18, 3, 3], {}),
    "only subfolders": (lambda d: [classes(d / name, ["x"]) for name in "ab"], [12, 2, 2], {}),
    "links": (outside, [19, 3, 3], {"is a link to nothing, or no plain file": 1}),
    "all kinds of files": (of_all_kinds, [16, 3, 3], {"is no picture": 1}),
    "left by a Mac": (of_a_mac, [12, 2, 2], {"is a hidden file of the system": 2}),
    "unlabelled test": (
        lambda d: (classes(d / "train"), picture(d / "test", 4)),
        [12, 2, 2],
        {"lies in none of the parts train, val and test": 4},
    ),
    "damaged": (
        lambda d: (classes(d), (d / "a" / "00.png").write_bytes(b"no picture")),
        [11, 2, 2],
        {"cannot be opened": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASS_FOLDERS)
def test_training_and_check_read_the_same_of_every_folder(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make, expected, reasons = CLASS_FOLDERS[kind]
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    parts = classification_parts(folder)
    assert sizes(parts) == expected
    assert left_out(parts.notes) == reasons
    assert as_checked(folder, capsys) == (expected, sum(reasons.values()))


def test_classes_that_the_parts_do_not_share_are_named_and_those_there_are_measured(tmp_path: Path) -> None:
    """Training wants every class in train and val; a trained model is measured on what a part has."""
    with_extras(tmp_path)
    parts = classification_parts(tmp_path)
    assert parts.class_names == ["a", "b"]
    assert sizes(parts) == [16, 6, 2]
    assert left_out(parts.notes) == {
        "is of a class that train does not have, c": 3,
        "is of a class that train does not have, d": 2,
        "lies in none of the parts train, val and test": 4,
        "lies beside the folders of the classes": 1,
    }
    measured = classification_parts(tmp_path, needed=("test",), class_names=["0", "a", "b"])
    assert [label for _, label in measured.samples["test"]] == [1, 1]
    assert any(note.startswith("Classes without a picture in test: 0, b.") for note in measured.notes)
    with pytest.raises(DataError, match="does not know: b"):
        classification_parts(tmp_path, needed=("test",), class_names=["a", "c"])
    for path in (tmp_path / "val" / "b").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"“b” .* no picture for the part val"):
        classification_parts(tmp_path)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda d: [picture(d / part, 4) for part in ("train", "test")], "test, train"),
        (lambda d: [classes(d / part) for part in ("seg_train", "seg_test")], "seg_test, seg_train"),
        (lambda d: [classes(d / part) for part in ("train", "val", "valid")], "val and valid"),
        (lambda d: classes(d / "test"), "no picture for the part train"),
        (lambda d: (classes(d), os.rename(d / "a", os.fsencode(d) + b"/caf\xe9")), "not valid UTF-8"),
        (lambda d: (classes(d), (d / "a").rename(d / "a\nb")), "control characters"),
    ],
)
def test_what_cannot_be_read_is_refused_by_both_with_what_was_seen(
    make: Callable, named: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=named):
        classification_parts(tmp_path)
    assert re.search(named, said_by_check(tmp_path, capsys).split("\nsmall classes")[-1])


# --- segmentation -----------------------------------------------------------------------------------------------------


def parts_inside(folder: Path) -> None:
    for part, count in (("train", 5), ("val", 3), ("test", 2)):
        pairs(folder / "images" / part, folder / "masks" / part, count=count)


def parts_outside(folder: Path) -> None:
    for part, count in (("Train", 5), ("valid", 3), ("testing", 2)):
        pairs(folder / part / "images", folder / part / "masks", count=count)


def voc(folder: Path) -> None:
    pairs(folder / "VOC" / "JPEGImages", folder / "VOC" / "SegmentationClass", image="{}.jpg")
    (folder / "VOC" / "Annotations").mkdir()


def two_of_a_kind(folder: Path) -> None:
    """Two photos of one stem, two masks of one photo, a photo and a mask alone."""
    images, masks = folder / "images", folder / "masks"
    pairs(images, masks, count=10)
    picture(images / "3.jpg")
    Image.fromarray(MASK).save(masks / "4.tif")
    picture(images / "alone.jpg")
    Image.fromarray(MASK).save(masks / "nobody.png")


def turned(folder: Path) -> None:
    """Photos turned by EXIF: a mask on the raw pixels, one on the upright ones, one that has the tag itself."""
    pairs(folder / "images", folder / "masks")
    exif = Image.Exif()
    exif[274] = 6
    for i in range(3):
        with Image.open(folder / "images" / f"{i}.png") as image:
            image.save(folder / "images" / f"{i}.png", exif=exif)
    Image.fromarray(np.rot90(MASK).copy()).save(folder / "masks" / "1.png")
    Image.fromarray(MASK).save(folder / "masks" / "2.png", exif=exif)


def named(mask: str, image: str = "{}.png") -> Callable:
    return lambda d: pairs(d / "images", d / "masks", mask, image)


MASK_FOLDERS = {
    "parts inside": (parts_inside, [5, 3, 2], {}),
    "parts outside": (parts_outside, [5, 3, 2], {}),
    "VOC": (voc, [6, 1, 1], {}),
    "NAME_mask.png": (named("{}_mask.png"), [6, 1, 1], {}),
    "mask_NAME.png": (named("mask_{}.png", "img_{}.jpg"), [6, 1, 1], {}),
    "NAME.PNG": (named("{}.PNG"), [6, 1, 1], {}),
    "NAME.jpg.png": (named("{}.jpg.png", "{}.jpg"), [6, 1, 1], {}),
    "NAME.tif": (named("{}.tif"), [6, 1, 1], {}),
    "subfolders": (lambda d: [pairs(d / "images" / c, d / "masks" / c, count=4) for c in "xy"], [6, 1, 1], {}),
    "two of a kind": (two_of_a_kind, [6, 1, 1], {
        "shares its mask with a picture of the same name": 2,
        "has more than one mask of its name": 1,
        "fits its image no better than another mask": 3,
        "has no mask": 1,
        "belongs to no image": 1,
    }),
    "turned by EXIF": (turned, [5, 1, 1], {"is turned by EXIF, and its mask lies on the pixels before the turn": 1}),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASK_FOLDERS)
def test_training_and_check_read_the_same_of_every_folder_of_masks(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make, expected, reasons = MASK_FOLDERS[kind]
    make(tmp_path)
    assert has_masks(tmp_path)
    parts = segmentation_parts(tmp_path)
    assert sizes(parts) == expected
    assert left_out(parts.notes) == reasons
    for part in PARTS:
        for image, mask in parts.samples[part]:
            assert re.search(r"\d+", image.name)[0] == re.search(r"\d+", mask.name)[0]
            assert int(parts.open_sample((image, mask))[1].sum()) == 24
    assert as_checked(tmp_path, capsys)[0] == expected


def test_masks_of_other_names_are_refused_with_what_was_found(tmp_path: Path) -> None:
    pairs(tmp_path / "images", tmp_path / "masks", "other{}.png")
    with pytest.raises(DataError, match=r"has no mask: 8 \(images/0.png.*belongs to no image: 8 \(masks/other0.png"):
        segmentation_parts(tmp_path)


def test_odd_names_and_encodings_become_sentences(tmp_path):
    """Found by tests/bench/fuzz.py: bytes that are no UTF-8 in classes.txt, and names that cannot be printed."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "\udcff\n.png").write_bytes(b"")
    (left_out,) = left_out_notes({tmp_path / "images" / "\udcff\n.png": "has no mask"}, tmp_path)
    assert left_out.isprintable()
    for name in ("images", "masks"):
        Image.new("1", (20, 20), 1).save(tmp_path / name / "a.png")
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="not valid UTF-8"):
        segmentation_parts(tmp_path, 0)
