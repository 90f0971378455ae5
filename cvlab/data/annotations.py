"""Turns what annotation tools export (COCO, labelme, CVAT, masks in colour) into what train/segmenter.py reads."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PureWindowsPath
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from cvlab.data.folders import IMAGE_FOLDERS, DataError, existing, mask_pairs, pictures_in
from cvlab.files import new_folder, read_json, write_text
from cvlab.transforms import MAX_PIXELS, open_image

SPECIAL = {"background": 0, "_background_": 0, "ignored": 255, "__ignore__": 255, "void": 255}  # names of no class
NUMBERS = ("points", "xtl", "ytl", "xbr", "ybr", "left", "top", "width", "height", "rle")  # attributes of CVAT's shapes


def to_masks(folder: Path, out: Path) -> list[str]:
    """Makes `out`, whole or not at all: images/, masks/ (8 bits), and classes.txt with the names of 1, 2, ... Returns
    sentences on what is left out; DataError where annotations are damaged, double or missing, or `out` exists.
    """
    if out.exists():
        raise DataError(f"{out} exists already: choose a new folder.")
    files, photos, notes, values = {}, defaultdict(list), Counter(), dict(SPECIAL)
    for photo in pictures_in(existing(folder), files):
        photos[photo.name].append(photo)
    with new_folder(out) as filling:
        for file in sorted(files):
            try:
                if file.name == "labelmap.txt":
                    _add_coloured(file, folder, filling, values)
                for name, size, shapes in _pictures(file):
                    wanted = PureWindowsPath(name).as_posix()  # a name may have either slash
                    near = [Path(os.path.normpath(file.parent / place / wanted)) for place in ("", "images")]
                    alike = [photo for photo in photos[near[0].name] if f"/{photo.as_posix()}".endswith(f"/{wanted}")]
                    found = [photo for photo in near if photo in photos[photo.name]] or alike
                    if len(found) == 1:
                        _add(found[0], found[0].relative_to(folder), size, shapes, filling, values, notes)
                    else:
                        notes[f"{file} names {name}: there are {len(found)} such photos in {folder}."] += 1
            except Exception as error:  # damaged files raise errors of every kind
                raise DataError(f"{file} cannot be used: {error} ({type(error).__name__}).") from error
        if not 0 < len(names := list(values)[len(SPECIAL) :]) < 255:
            kinds = "COCO, labelme or CVAT files, or masks in colour with a labelmap.txt,"
            raise DataError(f"{folder} needs {kinds} of 1 to 254 classes. {' '.join([*notes][:3])}")
        write_text(filling / "classes.txt", "".join(f"{name}\n" for name in names))
    return [f"{note} ({count} times)" if count > 1 else note for note, count in notes.items()]


def _value_of(label: str, values: dict) -> int:
    return values.setdefault(" ".join(label.split()), len(values) - len(SPECIAL) + 1)


def _add_coloured(palette: Path, folder: Path, filling: Path, values: dict) -> None:
    """Masks in colour beside a palette as CVAT writes it: a line NAME:RED,GREEN,BLUE:... for each class."""
    lines = [line.split(":") for line in palette.read_text("utf-8").splitlines() if line.strip() and line[0] != "#"]
    known = {tuple(map(int, colour.split(","))): _value_of(name, values) for name, colour, *_ in lines}
    for photo, drawn in chain.from_iterable(pairs.items() for pairs in mask_pairs(palette.parent).parts.values()):
        pixels = np.asarray(open_image(drawn))
        mask, left = np.zeros(pixels.shape[:2], np.uint8), np.ones(pixels.shape[:2], bool)
        for colour, value in known.items():
            here = (pixels == colour).all(2)
            mask[here], left[here] = value, False
        if left.any():
            raise DataError(f"{drawn} has the colour {','.join(map(str, pixels[left][0]))}, which no class has")
        _save(photo, photo.relative_to(folder), mask, filling)


def _add(photo: Path, name: Path, size: tuple, shapes: list, filling: Path, values: dict, notes: Counter) -> None:
    width, height = map(int, size if all(size) else open_image(photo).size)
    if not 0 < width * height <= MAX_PIXELS:
        raise DataError(f"{name} is too large ({width} x {height})")
    scale = min(5, int((MAX_PIXELS / (width * height)) ** 0.5))  # ImageDraw knows only whole pixels, and widens by half
    canvas = Image.new("L", (width * scale, height * scale))
    for label, kind, numbers in shapes:  # later ones lie over earlier ones
        if kind not in ("polygon", "rectangle", "box", "rows", "columns"):
            notes[f"Shapes of the kind “{kind}” are left out."] += 1
            continue
        value = _value_of(label, values)
        if kind in ("rows", "columns"):  # runs of pixels outside and inside in turn, in a part of the picture
            left, top, across, down, *runs = map(int, numbers)
            if sum(runs) != across * down or across * down > width * height:
                raise DataError(f"{name} has a mask of {across} x {down} pixels with runs of {sum(runs)}")
            inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
            inside = inside.reshape((down, across), order="C" if kind == "rows" else "F")
            inside = inside.repeat(scale, axis=0).repeat(scale, axis=1)
            canvas.paste(value, (left * scale, top * scale), Image.fromarray(inside))
        else:
            x, y = (np.array(numbers, float).reshape(-1, 2).T.clip(-1e6, 1e6) - 0.5) * scale + scale // 2
            if len(x) == 2:  # opposite corners
                x, y = x[[0, 1, 1, 0]], y[[0, 0, 1, 1]]
            ImageDraw.Draw(canvas).polygon([(round(a), round(b)) for a, b in zip(x, y, strict=True)], value)
    _save(photo, name, np.asarray(canvas)[scale // 2 :: scale, scale // 2 :: scale], filling)


def _save(photo: Path, name: Path, values: np.ndarray, filling: Path) -> None:
    place = Path(*(part for part in name.parts if part.casefold() not in IMAGE_FOLDERS))  # train, val and others stay
    image, mask = filling / "images" / place, (filling / "masks" / place).with_suffix(".png")
    if mask.exists():
        raise DataError(f"{name} has a mask already")
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(mask)
    try:
        image.hardlink_to(photo.resolve())
    except OSError:  # another disk
        image.write_bytes(photo.read_bytes())


def _pictures(file: Path) -> Iterator[tuple[str, tuple, list]]:
    """Of each picture in an annotation file the name, (width, height) or Nones, and shapes (class, kind, numbers)."""
    content = read_json(file) if file.suffix == ".json" else {}
    if file.suffix == ".xml":
        if "<!DOCTYPE" in (text := file.read_text("utf-8")):
            raise DataError("it has a DOCTYPE, which can define entities")
        for image in ElementTree.fromstring(text).findall("image"):
            shapes = []
            for shape in sorted(image, key=lambda each: int(each.get("z_order", 0))):
                kind = "turned box" if float(shape.get("rotation", 0)) else shape.tag.replace("mask", "rows")
                numbers = ",".join(filter(None, map(shape.get, NUMBERS))).replace(";", ",").split(",")
                shapes.append((shape.get("label"), kind, numbers))
            yield image.get("name"), (image.get("width"), image.get("height")), shapes
    elif all(key in content for key in ("images", "annotations", "categories")):
        names, shapes = {each["id"]: each["name"] for each in content["categories"]}, defaultdict(list)
        for each in content["annotations"]:
            label = "ignored" if each.get("iscrowd") else names[each["category_id"]]
            area, kind = each.get("segmentation") or [()], "polygon" if each.get("segmentation") else "box alone"
            if isinstance(area, dict):
                counts, kind = area["counts"], "columns"
                counts = counts if isinstance(counts, list) else _uncompressed(counts)
                area = [[0, 0, *area["size"][::-1], *counts]]
            shapes[each["image_id"]] += [(label, kind, numbers) for numbers in area]
        for image in content["images"]:
            yield image["file_name"], (image.get("width"), image.get("height")), shapes[image["id"]]
    elif all(key in content for key in ("shapes", "imagePath")):
        shapes = [(each["label"], each.get("shape_type") or "polygon", each["points"]) for each in content["shapes"]]
        yield content["imagePath"], (content.get("imageWidth"), content.get("imageHeight")), shapes


def _uncompressed(text: str) -> list[int]:
    """The runs in COCO's compressed RLE: groups of five bits; from the fourth on, the change since two runs before."""
    runs, value, shift = [], 0, 0
    for group in (ord(character) - 48 for character in text):
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:  # the last group of a number, with its sign
            value -= (group & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
