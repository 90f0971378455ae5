"""What a data folder holds: its parts, its classes or masks, and its pictures.

Training, evaluation and train/check.py all read it by these functions. What they do not read is in `left_out`.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from cvlab.files import printable
from cvlab.transforms import FORMATS

# Files of other names are opened to see whether they are pictures.
IMAGE_SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
PART_FOLDERS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
MASK_FOLDERS = ("masks", "mask", "segmentationclass", "annotations", "labels")
SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__"}
PART_WORD = re.compile(rf"(^|[^a-z])({'|'.join(PART_FOLDERS)})([^a-z]|$)")
# What the names of a picture and of its mask may have besides what they share: IMG_1.jpg, mask_1.png or 1_mask.png.
KIND_WORD = "(?:images?|img|photo|masks?|labels?|seg|segmentation|gt)"


class DataError(ValueError):
    """A data set that cannot be used as it is. The message names the folder or file and says what to do."""


@dataclass
class Found:
    """What a data folder holds."""

    # By part, "train", "val", "test", or "all" for a folder without parts: the pictures of each class
    # {"cat": [...], "dog": [...]}, or the mask of each picture {picture: mask}.
    parts: dict[str, dict] = field(default_factory=dict)
    # Pictures that are not used and files among them that are none, each with the reason.
    left_out: dict[Path, str] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Path]:
        """All pictures that are used."""
        entries = [entry for each in self.parts.values() for entry in each.items()]
        return [path for key, paths in entries for path in ([key] if isinstance(key, Path) else paths)]


def existing(folder: str | Path) -> Path:
    """The folder as a path; DataError if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Check the path.")
    return folder


def left_out_notes(left_out: dict[Path, str], folder: str | Path) -> list[str]:
    """A sentence for each reason, with the number of files and the names of the first three."""
    by_reason: dict[str, list[str]] = {}
    for path in sorted(left_out):
        name = path.relative_to(folder).as_posix()
        by_reason.setdefault(left_out[path], []).append(printable(name))
    return [
        f"Left out because it {reason}: {len(names)} ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})."
        for reason, names in by_reason.items()
    ]


# --- classification ---------------------------------------------------------------------------------------------------


def class_pictures(folder: Path, arrays: bool = False) -> Found:
    """The pictures of a classification folder, DIR/<class>/* or DIR/{train,val,test}/<class>/*, by part and class.

    The classes are the folders in train, or in all parts where there is no train; a class has the pictures of its
    subfolders too. With `arrays` .npy files are pictures.

    Raises:
        DataError: the folders are neither classes nor parts of a known name.
    """
    found, top = Found(), _unwrapped(folder)
    roots = {part: path for part, path in _part_folders(top).items() if _subfolders(path)}
    others = [path for path in _subfolders(top) if path not in roots.values()]
    seem_parts = [path for path in others if PART_WORD.search(path.name.casefold()) and _subfolders(path)]
    if not roots and len(seem_parts or set(_part_folders(top))) > 1:
        raise DataError(
            f"{folder} holds the folders {', '.join(path.name for path in others[:5])}. Expected one folder of "
            "pictures for each class, or the parts train, val and test with a folder for each class in every one."
        )

    if roots:
        for path in others:
            found.left_out |= dict.fromkeys(pictures_in(path, {}), "lies in none of the parts train, val and test")
        roots = {part: _unwrapped(path) for part, path in roots.items()}
    if not roots or list(roots) == ["train"]:
        roots = {"all": roots.get("train", top)}
    for root in {top, *roots.values()}:
        found.left_out |= dict.fromkeys(_pictures_beside(root), "lies beside the folders of the classes")
    first = [roots[part] for part in ("all", "train") if part in roots] or roots.values()
    names = sorted({path.name for root in first for path in _subfolders(root)})
    for part, root in roots.items():
        found.parts[part] = {name: pictures_in(root / name, found.left_out, arrays) for name in names}
        for path in _subfolders(root):
            if path.name not in names:
                reason = f"is of a class that train does not have, {path.name}"
                found.left_out |= dict.fromkeys(pictures_in(path, {}), reason)
    return found


# --- segmentation -----------------------------------------------------------------------------------------------------


def has_masks(folder: Path) -> bool:
    """Whether this is a segmentation folder."""
    return bool(_mask_folders(folder))


def mask_pairs(folder: Path, arrays: bool = False) -> Found:
    """The pictures (with `arrays` also .npy) of a segmentation folder, and their masks: images/NAME.*, masks/NAME.*.

    Parts may be the outer folders (train/images) or the inner ones (images/train). A mask may also be named NAME_mask,
    mask_NAME or NAME.jpg.png. Where two masks fit a picture, or two pictures a mask, none of them is used.
    """
    found = Found()
    for part, (images, masks) in _mask_folders(folder).items():
        found.parts[part] = _paired(images, masks, found.left_out, arrays)
    return found


def _mask_folders(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """By part the folders of images and of masks, maybe below a wrapper; none where these names are missing."""
    while True:
        images, masks = _named(folder, IMAGE_FOLDERS), _named(folder, MASK_FOLDERS)
        if images and masks:
            inner, inner_masks = _part_folders(images), _part_folders(masks)
            if inner and not _pictures_beside(images):
                return {part: (path, inner_masks.get(part)) for part, path in inner.items()}
            return {"all": (images, masks)}
        parts = _part_folders(folder).items()
        pairs = {part: (_named(path, IMAGE_FOLDERS), _named(path, MASK_FOLDERS)) for part, path in parts}
        if any(images and masks for images, masks in pairs.values()):
            pairs = {part: pair for part, pair in pairs.items() if pair[0]}
            return {"all": pairs["train"]} if list(pairs) == ["train"] else pairs
        if len(_subfolders(folder)) != 1:
            return {}
        (folder,) = _subfolders(folder)


def _paired(images: Path, masks: Path | None, left_out: dict[Path, str], arrays: bool) -> dict[Path, Path]:
    """The mask of each picture: one of the same name, else of the same stem, else of the same name but for its kind."""
    pictures, drawn = pictures_in(images, left_out, arrays), pictures_in(masks, left_out) if masks else []
    pairs: dict[Path, Path] = {}
    by_name, by_stem = (lambda path: path.name), (lambda path: path.stem)
    for key_of_picture, key_of_mask in ((by_name, by_stem), (by_stem, by_stem), (_plain, _plain)):
        used = {*pairs, *pairs.values(), *left_out}
        waiting = _keyed((path for path in pictures if path not in used), images, key_of_picture)
        free = _keyed((path for path in drawn if path not in used), masks, key_of_mask)
        for key in waiting.keys() & free.keys():
            if len(waiting[key]) == len(free[key]) == 1:
                pairs[waiting[key][0]] = free[key][0]
                continue
            shared = "shares its mask with a picture of the same name"
            reason = "has more than one mask of its name" if len(free[key]) > 1 else shared
            left_out |= dict.fromkeys(waiting[key], reason)
            left_out |= dict.fromkeys(free[key], "fits its image no better than another mask")
    used = {*pairs, *pairs.values(), *left_out}
    left_out |= {path: "has no mask" for path in pictures if path not in used}
    left_out |= {path: "belongs to no image" for path in drawn if path not in used}
    return {path: pairs[path] for path in pictures if path in pairs}


def _keyed(paths: Iterable[Path], root: Path, key: Callable[[Path], str]) -> dict[tuple[Path, str], list[Path]]:
    """Paths below `root` by their subfolder and their key."""
    keyed: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        keyed.setdefault((path.parent.relative_to(root), key(path)), []).append(path)
    return keyed


def _plain(path: Path) -> str:
    """The name of a picture or mask without suffixes and without a word for its kind: IMG_1.jpg, 1_mask.png -> 1."""
    name = path.name.casefold()
    while (shorter := Path(name)).suffix in IMAGE_SUFFIXES:
        name = shorter.stem
    return re.sub(rf"^{KIND_WORD}[ ._-]+|[ ._-]+{KIND_WORD}$", "", name)


# --- files ------------------------------------------------------------------------------------------------------------


def pictures_in(folder: Path, left_out: dict[Path, str], arrays: bool = False) -> list[Path]:
    """The pictures (with `arrays` also .npy) below a folder, also behind links, sorted; none if there is none.

    `left_out` takes the other files with the reason. What a system leaves is skipped, but for pictures among it.
    """

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            left_out[Path(error.filename)] = "is a folder that cannot be opened"

    pictures, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # links may lead in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not _of_the_system(name)]
        for path in (Path(place, name) for name in names):
            if reason := "" if arrays and path.suffix.lower() == ".npy" else _why_not(path):
                left_out[path] = reason
            elif not _of_the_system(path.name):
                pictures.append(path)
    return sorted(pictures)


def _why_not(path: Path) -> str:
    """Why a file is not read as a picture; empty where it is, and for what a system leaves in every folder."""
    named = path.suffix.lower() in IMAGE_SUFFIXES
    if _of_the_system(path.name):
        return "is a hidden file of the system" if named else ""
    if not path.is_file():
        return "is a link to nothing, or no plain file"
    if not named:
        try:
            with Image.open(path, formats=FORMATS):
                pass
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return ""  # a picture: whoever opens it says that it is too large
        except Exception:  # decoders raise errors of every kind
            return "is no picture"
    return ""


def _of_the_system(name: str) -> bool:
    return name.startswith(".") or name.casefold() in SYSTEM_FOLDERS | {"thumbs.db", "desktop.ini", "icon\r"}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _of_the_system(path.name))


def _pictures_beside(folder: Path) -> list[Path]:
    """The pictures in a folder itself."""
    pictures = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path for path in pictures if not _of_the_system(path.name))


def _unwrapped(folder: Path) -> Path:
    """The folder itself, or the one in it that holds the classes, where it holds nothing else."""
    while not _pictures_beside(folder) and len(inner := _subfolders(folder)) == 1:
        alone = PART_FOLDERS.get(inner[0].name.casefold()) in ("val", "test") and inner[0].name != folder.name
        if alone or not _subfolders(inner[0]):
            break
        (folder,) = inner
    return folder


def _part_folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder that have the name of a part; DataError if two are the same part."""
    parts: dict[str, Path] = {}
    for path in _subfolders(folder):
        part = PART_FOLDERS.get(path.name.casefold().strip())
        if part in parts:
            raise DataError(f"{folder} has {parts[part].name} and {path.name}, both for {part}: keep one of them.")
        if part:
            parts[part] = path
    return parts


def _named(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The folder in a folder that has the first of these names, in any case."""
    there = {path.name.casefold(): path for path in _subfolders(folder)}
    return next((there[name] for name in names if name in there), None)
