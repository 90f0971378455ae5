"""Annotations become masks: files that datumaro (for CVAT) and labelme wrote, and COCO as pycocotools reads it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from runs import as_process

from cvlab.data.annotations import to_masks
from cvlab.data.folders import DataError
from cvlab.data.masks import read_mask
from cvlab.data.parts import segmentation_parts

WRITTEN = Path(__file__).parent / "data" / "annotations"
COLOURS = {"bar": (128, 0, 0), "shape": (0, 128, 0), "box": (128, 128, 0)}


def photo(path: Path, width: int = 128, height: int = 96, **settings: object) -> Path:
    """A picture of noise that is no other's copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([*str(path).encode()]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **settings)
    return path


def names(out: Path) -> list[str]:
    return (out / "classes.txt").read_text("utf-8").splitlines()


def values(out: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(out / "masks" / name))


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


def coco(path: Path, images: list, annotations: list, categories: tuple[str, ...] = ("cat", "dog")) -> Path:
    """A COCO file; an image is (name, width, height), an annotation (image, category, segmentation[, "crowd"])."""
    content = {
        "images": [
            {"id": i, "file_name": name, "width": width, "height": height}
            for i, (name, width, height) in enumerate(images, 1)
        ],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "segmentation": area, "iscrowd": int(bool(crowd))}
            for i, (image, category, area, *crowd) in enumerate(annotations, 1)
        ],
        "categories": [{"id": 10 * i, "name": name} for i, name in enumerate(categories, 1)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def cvat(path: Path, *shapes: str, name: str = "a.png", size: tuple[int, int] = (128, 96)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = f'<image id="0" name="{name}" width="{size[0]}" height="{size[1]}">{"".join(shapes)}</image>'
    path.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>{image}</annotations>')
    return path


def polygon(label: str, z: int, left: int, right: int) -> str:
    points = f"{left},10;{right},10;{right},80;{left},80"
    return f'<polygon label="{label}" points="{points}" z_order="{z}"/>'


BOX = [[10, 20, 60, 20, 60, 70, 10, 70]]  # a polygon of COCO: 50 x 50 pixels


# --- files of the tools -----------------------------------------------------------------------------------------------


def of_datumaro(tool: str, here: Path) -> tuple[Path, list[str]]:
    """A folder with its files and the photos that they name, and what is said of it."""
    shutil.copytree(WRITTEN / tool, here / "in")
    for name in ("clip/one.png", "two.png"):
        photo(here / "in" / "images" / name)
    return here / "out", to_masks(here / "in", here / "out")


def drawn_by_datumaro(name: str, label: str) -> np.ndarray:
    return (np.asarray(Image.open(WRITTEN / "drawn" / name)) == COLOURS[label]).all(axis=2)


def test_masks_of_cvat_are_those_that_datumaro_draws(tmp_path: Path) -> None:
    out, notes = of_datumaro("cvat", tmp_path)
    assert notes == []
    assert names(out) == ["bar", "shape", "box"]
    for name, inside in (("clip/one.png", ["bar", "shape"]), ("two.png", ["bar", "shape", "box"])):
        for value, label in enumerate(inside, 1):
            assert iou(values(out, name) == value, drawn_by_datumaro(name, label)) >= 0.98
        assert values(out, name).max() == len(inside)
        assert (out / "images" / name).samefile(tmp_path / "in" / "images" / name)


def test_masks_of_coco_are_those_that_datumaro_draws(tmp_path: Path) -> None:
    """COCO has no z_order: one.png is drawn in the order of the file. A painted mask is a crowd to datumaro."""
    out, notes = of_datumaro("coco", tmp_path)
    assert len(notes) == 1
    assert "box alone" in notes[0]
    assert names(out) == ["shape", "bar"]
    for value, label in ((2, "bar"), (255, "shape")):
        assert iou(values(out, "two.png") == value, drawn_by_datumaro("two.png", label)) >= 0.98
    either = drawn_by_datumaro("clip/one.png", "bar") | drawn_by_datumaro("clip/one.png", "shape")
    assert iou(values(out, "clip/one.png") > 0, either) >= 0.98


def test_masks_in_colour_with_the_palette_of_cvat(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "colours", tmp_path / "in" / "export")
    for name in ("clip/one.jpg", "two.jpg"):
        photo(tmp_path / "in" / "export" / "JPEGImages" / name)
    assert to_masks(tmp_path / "in", tmp_path / "out") == []
    assert names(tmp_path / "out") == ["bar", "box", "shape"]
    for name, place in (("clip/one.png", "export/clip/one.png"), ("two.png", "export/two.png")):
        for value, label in ((1, "bar"), (3, "shape")):
            assert ((values(tmp_path / "out", place) == value) == drawn_by_datumaro(name, label)).all()
    (tmp_path / "in/export/labelmap.txt").write_text("background:0,0,0::\nbar:250,50,83::\n")
    with pytest.raises(DataError, match="colour"):
        to_masks(tmp_path / "in", tmp_path / "again")


def test_masks_are_those_that_labelme_draws(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "labelme", tmp_path / "in" / "labels")
    photo(tmp_path / "in" / "photos" / "one.png", 640, 480)
    photo(tmp_path / "in" / "other" / "one.png", 640, 480)
    notes = to_masks(tmp_path / "in", tmp_path / "out")
    ours, theirs = values(tmp_path / "out", "photos/one.png"), np.asarray(Image.open(WRITTEN / "drawn" / "labelme.png"))
    assert names(tmp_path / "out") == ["disc", "plate"]
    assert min(iou(ours == value, theirs == value) for value in (1, 2)) >= 0.98
    assert len(notes) == 1
    assert "line" in notes[0]


def test_polygons_and_rle_of_coco_are_those_of_pycocotools(tmp_path: Path) -> None:
    rng, turns = np.random.default_rng(0), np.linspace(0, 2 * np.pi, 9)[:-1]
    rings = [  # uneven, of two parts, and beyond the border
        [(np.stack([np.cos(turns), np.sin(turns)], 1) * rng.uniform(30, 50, (8, 1)) + centre).ravel().tolist()]
        for centre in ((60, 55), (180, 60), (60, 170), (190, 210))
    ]
    rings[0] += [[100, 100, 140, 100, 140, 150, 120, 128.5, 100, 150]]
    disc = np.hypot(*(np.mgrid[:240, :240] - 120)) < 30
    runs = np.flatnonzero(np.diff(disc.ravel("F").astype(int), prepend=0, append=0))
    counts = np.diff(runs, prepend=0, append=disc.size).tolist()
    areas = [*rings, {"size": [240, 240], "counts": counts}]
    file = coco(tmp_path / "in/annotations/a.json", [(f"{i}.png", 240, 240) for i in range(5)], [
        (i + 1, 10 * (1 + i % 2), area, *(["crowd"] if i == 4 else [])) for i, area in enumerate(areas)
    ])  # fmt: skip
    for i in range(5):
        photo(tmp_path / "in" / "val2017" / f"{i}.png", 240, 240)
    assert to_masks(tmp_path / "in", tmp_path / "out") == []
    theirs = COCO(file)
    for i, value in enumerate((1, 2, 1, 2, 255)):
        truth = theirs.annToMask(theirs.anns[i + 1]).astype(bool)
        assert iou(values(tmp_path / "out", f"val2017/{i}.png") == value, truth) >= 0.98
    assert names(tmp_path / "out") == ["cat", "dog"]
    compressed = rle.encode(np.asfortranarray(disc))
    content = json.loads(file.read_text())
    content["annotations"][4]["segmentation"]["counts"] = compressed["counts"].decode()
    file.write_text(json.dumps(content))
    assert to_masks(tmp_path / "in", tmp_path / "again") == []
    assert ((values(tmp_path / "again", "val2017/4.png") == 255) == disc).all()
    noise = np.random.default_rng(1).random((240, 240)) < 0.3
    content["annotations"][4]["segmentation"]["counts"] = rle.encode(np.asfortranarray(noise))["counts"].decode()
    file.write_text(json.dumps(content))
    to_masks(tmp_path / "in", tmp_path / "noise")
    assert ((values(tmp_path / "noise", "val2017/4.png") == 255) == noise).all()
    content["annotations"][4]["segmentation"]["counts"] = "no runs: ~"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"a\.json"):
        to_masks(tmp_path / "in", tmp_path / "damaged")


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_whole_pixels_are_exact_and_later_shapes_lie_over_earlier_ones(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    over = [[40, 20, 90, 20, 90, 70, 40, 70]]
    coco(tmp_path / "in/a.json", [("a.png", 128, 96)], [(1, 10, BOX), (1, 20, over)])
    to_masks(tmp_path / "in", tmp_path / "out")
    expected = np.zeros((96, 128), np.uint8)
    expected[20:70, 10:60] = 1
    expected[20:70, 40:90] = 2
    assert (values(tmp_path / "out", "a.png") == expected).all()


def test_cvat_draws_by_z_order(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    mask = '<mask label="low" rle="0, 4, 2, 4" left="90" top="50" width="5" height="2" z_order="3"/>'
    cvat(tmp_path / "in/a.xml", polygon("high", 2, 30, 70), polygon("low", 1, 10, 50), mask)
    to_masks(tmp_path / "in", tmp_path / "out")
    expected = np.zeros((96, 128), np.uint8)
    expected[10:80, 10:50] = 1
    expected[10:80, 30:70] = 2
    expected[50, 90:94] = expected[51, 91:95] = 1
    assert (values(tmp_path / "out", "a.png") == expected).all()
    assert names(tmp_path / "out") == ["low", "high"]


def test_large_photos_are_drawn_at_their_place_too(tmp_path: Path) -> None:
    side = {"a": 2600, "b": 4200}  # drawn at 3 and 2 times the size
    for name, pixels in side.items():
        photo(tmp_path / f"in/{name}.png", pixels, pixels)
    square = [[100, 200, 400, 200, 400, 600, 100, 600]]
    coco(tmp_path / "in/a.json", [(f"{n}.png", s, s) for n, s in side.items()], [(1, 10, square), (2, 10, square)])
    to_masks(tmp_path / "in", tmp_path / "out")
    for name in side:
        drawn = values(tmp_path / "out", f"{name}.png")
        assert drawn.sum() == drawn[200:600, 100:400].sum() == 300 * 400


def test_names_for_what_is_no_class(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    inner = (
        ("background", 20, 25),
        ("_background_", 25, 30),
        ("ignored", 40, 44),
        ("__ignore__", 44, 47),
        ("void", 47, 50),
    )
    shapes = [polygon("cat", 0, 10, 60), *(polygon(label, 1, left, right) for label, left, right in inner)]
    cvat(tmp_path / "in/a.xml", *shapes)
    to_masks(tmp_path / "in", tmp_path / "out")
    drawn = values(tmp_path / "out", "a.png")
    assert [set(drawn[40, a:b]) for a, b in ((10, 20), (20, 30), (30, 40), (40, 50))] == [{1}, {0}, {1}, {255}]
    assert names(tmp_path / "out") == ["cat"]


def test_kinds_that_are_not_drawn_are_named(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    line = '<polyline label="road" points="1,1;50,50"/>'
    turned = '<box label="cat" xtl="1" ytl="1" xbr="9" ybr="9" rotation="30.0"/>'
    cvat(tmp_path / "in/a.xml", polygon("cat", 0, 10, 60), line, line, turned)
    notes = to_masks(tmp_path / "in", tmp_path / "out")
    assert sorted(notes) == [
        "Shapes of the kind “polyline” are left out. (2 times)",
        "Shapes of the kind “turned box” are left out.",
    ]
    assert values(tmp_path / "out", "a.png").sum() == 50 * 70


# --- photos -----------------------------------------------------------------------------------------------------------


def test_a_missing_photo_is_named_and_the_others_are_used(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    coco(tmp_path / "in/a.json", [("a.png", 128, 96), ("gone.png", 128, 96)], [(1, 10, BOX), (2, 10, BOX)])
    (note,) = to_masks(tmp_path / "in", tmp_path / "out")
    assert "gone.png" in note
    assert [path.name for path in (tmp_path / "out/masks").iterdir()] == ["a.png"]


def test_photos_keep_their_folders_and_the_nearest_is_meant(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        photo(tmp_path / f"in/{part}/images/1.png")
        shapes = polygon("cat", 0, 10, 60 if part == "train" else 20)
        cvat(tmp_path / f"in/{part}/annotations.xml", shapes, name="1.png")
    assert to_masks(tmp_path / "in", tmp_path / "out") == []
    assert [int(values(tmp_path / "out", f"{part}/1.png").sum()) for part in ("train", "valid")] == [3500, 700]
    parts = segmentation_parts(tmp_path / "out", class_names=["cat"], needed=["train", "val"])
    assert [len(parts.samples[part]) for part in ("train", "val", "test")] == [1, 1, 0]


def test_two_photos_of_one_name_are_not_guessed_at(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        photo(tmp_path / f"in/{folder}/1.png")
    coco(tmp_path / "in/labels/x.json", [("1.png", 128, 96), ("b/1.png", 128, 96)], [(2, 10, BOX)])
    (note,) = to_masks(tmp_path / "in", tmp_path / "out")
    assert "2 such photos" in note
    assert [path.name for path in (tmp_path / "out/masks").iterdir()] == ["b"]


def test_two_annotations_of_a_photo_are_an_error(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    coco(tmp_path / "in/a.json", [("a.png", 128, 96)], [(1, 10, BOX)])
    cvat(tmp_path / "in/b.xml", polygon("cat", 0, 10, 60))
    with pytest.raises(DataError, match=r"b\.xml .*a\.png"):
        to_masks(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_link_to_a_photo_becomes_the_photo(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    photo(tmp_path / "elsewhere.png")
    os.symlink("../elsewhere.png", tmp_path / "in/a.png")
    cvat(tmp_path / "in/a.xml", polygon("cat", 0, 10, 60))
    to_masks(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out/images/a.png").is_symlink()
    assert (tmp_path / "out/images/a.png").samefile(tmp_path / "elsewhere.png")


def test_polygons_lie_on_the_photo_as_exif_turns_it_or_the_check_says_so(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    photo(tmp_path / "in/turned.jpg", 128, 96, exif=turned)
    photo(tmp_path / "in/stored.jpg", 128, 96, exif=turned)
    photo(tmp_path / "in/unlike.jpg", 100, 90)
    images = [("turned.jpg", 96, 128), ("stored.jpg", 128, 96), ("unlike.jpg", 200, 180)]
    coco(tmp_path / "in/a.json", images, [(i, 10, BOX) for i in (1, 2, 3)])
    answer = as_process("check", tmp_path / "in", "--to-masks", tmp_path / "out")
    faults = answer.stdout.split("\nmasks: ")[1].split("\n\n")[0]
    assert "masks/stored.png is 128 x 96 pixels, its image 96 x 128. The photo is turned by EXIF" in faults
    assert "masks/unlike.png is 200 x 180 pixels, its image 100 x 90." in faults
    assert "turned.png" not in faults
    assert read_mask(tmp_path / "out/masks/turned.png", 1).shape == (1, 128, 96)


def test_sizes_that_an_old_labelme_did_not_write_are_those_of_the_photo(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    photo(tmp_path / "in/a.jpg", 128, 96, exif=turned)
    shape = {"label": "cat", "points": [[10, 10], [50, 10], [50, 100], [10, 100]]}
    (tmp_path / "in/a.json").write_text(json.dumps({"imagePath": "a.jpg", "imageHeight": None, "shapes": [shape]}))
    to_masks(tmp_path / "in", tmp_path / "out")
    assert values(tmp_path / "out", "a.png").shape == (128, 96)
    assert values(tmp_path / "out", "a.png")[10:100, 10:50].sum() == 40 * 90


# --- strangers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../secret.png", "{here}/secret.png", "..\\secret.png", "..", "", "/", "\0", "*"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    photo(tmp_path / "secret.png")
    photo(tmp_path / "in/a.png")
    images = [("a.png", 128, 96), (name.format(here=tmp_path), 128, 96)]
    coco(tmp_path / "in/labels/a.json", images, [(1, 10, BOX), (2, 10, BOX)])
    (note,) = to_masks(tmp_path / "in", tmp_path / "out")
    assert "0 such photos" in note
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    made = {"out/images/a.png", "out/masks/a.png", "out/classes.txt"}
    assert written == {"secret.png", "in/a.png", "in/labels/a.json", *made}


def test_a_class_name_is_one_line(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    coco(tmp_path / "in/a.json", [("a.png", 128, 96)], [(1, 10, BOX)], ("a\nb\u2028c",))
    to_masks(tmp_path / "in", tmp_path / "out")
    assert names(tmp_path / "out") == ["a b c"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("entity", ['"cat"', 'SYSTEM "{here}/secret.txt"'])
def test_entities_are_not_read(tmp_path: Path, entity: str, encoding: str) -> None:
    photo(tmp_path / "in/a.png")
    (tmp_path / "secret.txt").write_text("secret")
    file = cvat(tmp_path / "in/a.xml", polygon("&leak;", 0, 10, 60))
    declared = f"<!DOCTYPE annotations [<!ENTITY leak {entity.format(here=tmp_path)}>]>\n<annotations>"
    text = file.read_text().replace("<annotations>", declared).replace("utf-8", encoding)
    file.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=r"a\.xml cannot be used"):
        to_masks(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("size", "area"),
    [
        ((200_000, 200_000), BOX),
        ((-128, -96), BOX),
        (("wide", 96), BOX),
        ((128, 96), [[float("nan"), 1, 20, 20, 30, 1]]),
        ((128, 96), [[1, 2, 3]]),
        ((128, 96), [["a", "b"] * 3]),
        ((128, 96), {"size": [96, 128], "counts": [10, 10]}),
        ((128, 96), {"size": [96, 128], "counts": [-10, 96 * 128 + 10]}),
        ((128, 96), {"size": [200_000, 200_000], "counts": [0, 40_000_000_000]}),
        ((128, 96), {"size": [96]}),
    ],
)
def test_damaged_annotations_are_named_and_nothing_is_left(tmp_path: Path, size: tuple, area: object) -> None:
    photo(tmp_path / "in/a.png")
    coco(tmp_path / "in/a.json", [("a.png", *size)], [(1, 10, area)])
    with pytest.raises(DataError, match=r"a\.json cannot be used"):
        to_masks(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_more_classes_than_a_mask_can_hold_are_an_error(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    labels = tuple(f"class {i}" for i in range(255))
    for count in (255, 254):
        annotations = [(1, 10 * i, BOX) for i in range(1, count + 1)]
        coco(tmp_path / "in/a.json", [("a.png", 128, 96)], annotations, labels)
        if count == 255:
            with pytest.raises(DataError, match="1 to 254"):
                to_masks(tmp_path / "in", tmp_path / "out")
    to_masks(tmp_path / "in", tmp_path / "out")
    assert values(tmp_path / "out", "a.png").max() == len(names(tmp_path / "out")) == 254


def test_coordinates_far_away_are_cut_at_the_border(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    coco(
        tmp_path / "in/a.json",
        [("a.png", 128, 96)],
        [(1, 10, [[-1e300, -1e300, 1e300, -1e300, 1e300, 50, -1e300, 50]])],
    )
    to_masks(tmp_path / "in", tmp_path / "out")
    assert values(tmp_path / "out", "a.png")[:50].all()
    assert not values(tmp_path / "out", "a.png")[50:].any()


def test_other_files_are_no_annotations(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.png")
    for name, text in {"list.json": '[{"a": 1}]', "info.json": '{"images": 3}', "voc.xml": "<annotation/>"}.items():
        (tmp_path / "in" / name).write_text(text)
    with pytest.raises(DataError, match="1 to 254 classes"):
        to_masks(tmp_path / "in", tmp_path / "out")
    cvat(tmp_path / "in/a.xml", polygon("cat", 0, 10, 60))
    assert to_masks(tmp_path / "in", tmp_path / "out") == []
    with pytest.raises(DataError, match="exists already"):
        to_masks(tmp_path / "in", tmp_path / "out")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_makes_a_folder_that_trains(tmp_path: Path) -> None:
    kinds = {"coco": "cat", "cvat": "dog", "labelme": "fox"}
    for i, (kind, label) in enumerate(kinds.items()):
        for number in range(10 * i, 10 * i + 10):
            name = f"{number}.png"
            photo(tmp_path / kind / "images" / name)
            file = tmp_path / kind / f"labels/{number}"
            if kind == "coco":
                coco(file.with_suffix(".json"), [(name, 128, 96)], [(1, 10, BOX)], (label,))
            elif kind == "cvat":
                cvat(file.with_suffix(".xml"), polygon(label, 0, 10, 60), name=name)
            else:
                file.parent.mkdir(exist_ok=True)
                points = [[10.0, 20.0], [60.0, 70.0]]
                shapes = [{"label": label, "points": points, "shape_type": "rectangle"}]
                content = {"imagePath": f"../images/{name}", "imageWidth": 128, "imageHeight": 96, "shapes": shapes}
                file.with_suffix(".json").write_text(json.dumps(content))
        answer = as_process("check", tmp_path / kind, "--to-masks", tmp_path / f"{kind}-out")
        assert f"{kind}-out: 10 files, 10 pictures" in answer.stdout
        assert "masks: none" in answer.stdout
        assert "training: train " in answer.stdout
        parts = segmentation_parts(tmp_path / f"{kind}-out", class_names=[label])
        assert sum(len(samples) for samples in parts.samples.values()) == 10
        mask = read_mask(tmp_path / f"{kind}-out/masks/{10 * i}.png", 1)[0]
        assert mask[20:70, 10:60].all()
