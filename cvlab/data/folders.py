"""What a data folder holds: its parts, its classes and its pictures. Training and train/check.py read it by these."""

from pathlib import Path

IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
PART_FOLDERS = {"train": "train", "val": "val", "valid": "val", "test": "test"}  # name of a folder to its part


class DataError(ValueError):
    """A data set that cannot be used as it is. The message names the folder or file and says what to do."""


def existing(folder: str | Path) -> Path:
    """The folder as a path; DataError if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Check the path given to --data.")
    return folder


def class_pictures(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """The pictures of a classification folder by part and class: {"train": {"cat": [...], "dog": [...]}, "val": ...}.

    A folder without parts of its own has one part, "all". The classes are the folders in train (or in "all") that are
    not hidden.
    """
    roots = {part: folder / name for name, part in PART_FOLDERS.items() if (folder / name).is_dir()}
    if "train" not in roots or len(roots) == 1:
        roots = {"all": folder}
    folders = sorted(path for path in roots.get("train", folder).iterdir() if path.is_dir())
    names = [path.name for path in folders if not path.name.startswith(".")]
    return {part: {name: pictures_in(root / name) for name in names} for part, root in roots.items()}


def mask_files(folder: Path) -> dict[Path, Path]:
    """The pictures of a segmentation folder, images/NAME.*, and where their masks belong: masks/NAME.png."""
    return {path: folder / "masks" / f"{path.stem}.png" for path in pictures_in(folder / "images")}


def pictures_in(folder: Path) -> list[Path]:
    """The files of a folder whose names end like a picture's, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
