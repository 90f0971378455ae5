"""Public data sets by name: torchvision downloads them, and they are arranged once into folders that cvlab reads.

    torchvision:flowers102      ROOT/folders/flowers102/{train,val,test}/001 pink primrose/image_06734.jpg
    torchvision:caltech101      ROOT/folders/caltech101/accordion/image_0001.jpg
    torchvision:caltech256      ROOT/folders/caltech256/001.ak47/001_0001.jpg
    torchvision:oxfordiiitpet   ROOT/folders/oxfordiiitpet/{images,masks}/Abyssinian_1.*
    torchvision:oxfordiiitpet-segmentation     the same, but the pets' outlines are 255: not to be scored
    torchvision:voc             ROOT/folders/voc/{train,val}/{images,masks}/2007_000032.*, of 2012, 20 classes
    hf:user/dataset             of the Hugging Face Hub (from_hub.py)

ROOT is the folder in the environment variable CVLAB_DATA, by default ~/.cache/cvlab. torchvision's own files are beside
`folders`; the pictures are hard links to them and take no extra space.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import Caltech101, Caltech256, Flowers102, OxfordIIITPet, VOCSegmentation

from cvlab.data import from_hub
from cvlab.files import new_folder

SCHEME = "torchvision:"
VOC_CLASSES = (  # the values 1 to 20 of its masks
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def folder_of(data: str | Path | None) -> Path | None:
    """The folder that --data means: torchvision:NAME and hf:user/dataset are downloaded if they are not there yet.

    Raises:
        ValueError: there is no data set of this name.
        FileNotFoundError: it is not there and cannot be downloaded; the message says where it belongs.
    """
    name, root = str(data), Path(os.environ.get("CVLAB_DATA", Path.home() / ".cache" / "cvlab"))
    if name.startswith(from_hub.SCHEME):
        return from_hub.folder_of(name, root)
    if not name.startswith(SCHEME):
        return data
    key = name.removeprefix(SCHEME)
    if key not in LISTINGS:
        raise ValueError(
            f"{name} is not known. Data sets of torchvision: {', '.join(SCHEME + known for known in LISTINGS)}."
        )
    folder = root / "folders" / key
    if not folder.is_dir():
        try:
            files = dict(LISTINGS[key](root))
        except (OSError, RuntimeError) as error:  # no network, or files that differ from torchvision's
            raise FileNotFoundError(
                f"{name} is not in {root} and could not be downloaded ({str(error).rstrip('.')}). Download it on a "
                f"computer with a network and copy {root} here, or give your own folder with --data."
            ) from error
        with new_folder(folder) as filling:
            for path, content in files.items():
                (filling / path).parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    os.link(content, filling / path)
                elif isinstance(content, str):
                    (filling / path).write_text(content)
                else:
                    Image.fromarray(content).save(filling / path)
    return folder


def _flowers102(root: Path) -> Iterator[tuple[str, Path]]:
    """The official parts. The number before the name of a class is its label, from 1."""
    for part in ("train", "val", "test"):
        flowers = Flowers102(root, part, download=True, loader=Path)
        for path, label in (flowers[i] for i in range(len(flowers))):
            yield f"{part}/{label + 1:03d} {Flowers102.classes[label]}/{path.name}", path


def _caltech(root: Path, kind: type, folder: str, file: str) -> Iterator[tuple[str, Path]]:
    """As torchvision lists it, which leaves out the background pictures of Caltech-101."""
    caltech = kind(root, download=True)
    for y, i in zip(caltech.y, caltech.index, strict=True):
        name = f"{caltech.categories[y]}/{file.format(label=y + 1, number=i)}"
        yield name, Path(caltech.root) / folder / name


def _oxfordiiitpet(root: Path, animal: int = 255, outline: int = 255) -> Iterator[tuple[str, Path | np.ndarray]]:
    """Both official parts together. In the trimaps 1 is the animal, 2 the background and 3 the outline."""
    values = np.array([0, animal, 0, outline], np.uint8)
    for part in ("trainval", "test"):
        pets = OxfordIIITPet(root, part, "segmentation", download=True)
        for image, trimap in zip(pets._images, pets._segs, strict=True):
            yield f"images/{image.name}", image
            yield f"masks/{image.stem}.png", values[np.asarray(Image.open(trimap))]


def _voc(root: Path) -> Iterator[tuple[str, Path | str]]:
    """The official parts; 255 is the line around objects, and what is hard to tell. There is no test part."""
    for part in ("train", "val"):
        voc = VOCSegmentation(root, "2012", part, download=not (root / "VOCdevkit" / "VOC2012").is_dir())
        for kind, files in (("images", voc.images), ("masks", voc.masks)):
            yield from ((f"{part}/{kind}/{Path(file).name}", Path(file)) for file in files)
    yield "classes.txt", "\n".join(VOC_CLASSES) + "\n"


LISTINGS = {
    "flowers102": _flowers102,
    "caltech101": lambda root: _caltech(root, Caltech101, "101_ObjectCategories", "image_{number:04d}.jpg"),
    "caltech256": lambda root: _caltech(root, Caltech256, "256_ObjectCategories", "{label:03d}_{number:04d}.jpg"),
    "oxfordiiitpet": _oxfordiiitpet,
    "oxfordiiitpet-segmentation": lambda root: _oxfordiiitpet(root, animal=1),
    "voc": _voc,
}
