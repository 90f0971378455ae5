"""What a data folder holds: its parts, its classes and its pictures."""

from pathlib import Path

IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip


class DataError(ValueError):
    """A data set that cannot be used as it is; the message names the folder or file and says what to do."""


def existing(folder: str | Path) -> Path:
    """The folder as a path; a DataError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}. Check the path given to --data.")
    return folder


def given_parts(folder: Path) -> dict[str, str]:
    """{"train": "train", "val": "valid", ...} where the folder is cut into parts already, else {}."""
    names = {"train": ["train"], "val": ["val", "valid"], "test": ["test"]}
    given = {part: name for part, options in names.items() for name in options if (folder / name).is_dir()}
    if "train" in given and "val" in given:
        return given
    if "train" in given and "test" in given:
        raise DataError(f"{folder} has train and test but no val: add a folder val, which chooses the best model.")
    return {}


def class_folders(folder: Path) -> list[str]:
    """The names of its folders, sorted; hidden ones are left out."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted, told by the ends of their names; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
