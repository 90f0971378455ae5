"""Data sets of the Hugging Face Hub by name: `datasets` downloads them, and they are laid out once as folders.

    hf:user/dataset           ROOT/folders/hf--user--dataset/{train,val,test}/<class>/train-0000012.jpeg
    hf:user/dataset:config    one of several configurations

ROOT is that of public.py. A set, of parquet files or folders of pictures, has a column of pictures and one of class
labels, or of masks: {train,val,test}/{images,masks}. Rows without a label and splits of other names are left out. The
files are those of the set, byte by byte; who reads one checks its size before decoding. Nothing of a set is executed.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from cvlab.data.folders import IMAGE_SUFFIXES, PART_FOLDERS, DataError
from cvlab.files import new_folder, printable
from cvlab.models.model import unique

SCHEME = "hf:"
NAME = re.compile(r"hf:\w[\w.-]*/\w[\w.-]*(:\w[\w.-]*)?", re.ASCII)
OF_MASKS = re.compile("mask|label|annot|segm|trimap", re.IGNORECASE)  # in the name of a column of pictures


def name_of(folder: Path) -> str:
    """hf:user/dataset for its folder, for another folder the folder's name."""
    key = folder.name.removeprefix("hf--")
    return folder.name if key == folder.name else SCHEME + key.replace("--", "/", 1).replace("--", ":", 1)


def folder_of(name: str, root: Path) -> Path:
    """The folder of "hf:user/dataset" below ROOT. It is downloaded if it is not there yet.

    DataError if its name or columns are of no use; FileNotFoundError if it cannot be fetched.
    """
    if "--" in name or not NAME.fullmatch(name):
        raise DataError(f"{name} is no name of a data set: write hf:user/dataset or hf:user/dataset:config.")
    folder = root / "folders" / re.sub("[:/]", "--", name)
    if folder.is_dir():
        return folder
    repo, _, config = name.removeprefix(SCHEME).partition(":")
    prepared = folder.with_name(f".{folder.name}.arrow")  # of `datasets`, which goes on there after a stop
    try:
        from datasets import load_dataset_builder
        from huggingface_hub import HfApi

        builder = load_dataset_builder(repo, config or None, cache_dir=str(prepared))
        if builder.name not in ("parquet", "imagefolder"):  # the others decode in ways of their own
            raise ValueError(f"it is of the kind {builder.name}; cvlab reads parquet files and folders of pictures")
        files = {file.partition("@")[2] for each in builder.config.data_files.values() for file in each}
        commit = min(files).split("/")[0]  # of commit/path
        listed = HfApi().list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
        size = sum(entry.size for entry in listed if f"{commit}/{entry.path}" in files)
        print(f"{name}: {size / 1e6:.1f} MB to download, for {folder}", flush=True)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except ImportError as error:
        raise DataError(f"--data {name} needs: pip install datasets") from error
    except Exception as error:  # of datasets, pyarrow, the client of the Hub, or its connection
        said = printable(" ".join(str(error.__cause__ or error).split()))[:500]
        raise FileNotFoundError(f"{name} could not be fetched: {said.rstrip('.')}.") from error
    with new_folder(folder) as filling:
        left_out = Counter(_lay_out(name, splits, filling, builder.name == "imagefolder"))
    shutil.rmtree(prepared)
    for reason, number in left_out.items():
        print(f"{name}: rows left out because {reason}: {number}.")
    return folder


def _lay_out(name: str, splits: dict, folder: Path, with_paths: bool) -> Iterator[str]:
    """Writes the pictures; yields why rows are left out. With paths only from `datasets`: a table may name any file."""
    from datasets import ClassLabel
    from datasets import Image as Picture

    features = next(iter(splits.values())).features
    pictures = [column for column, feature in features.items() if isinstance(feature, Picture)]
    images = [column for column in pictures if not OF_MASKS.search(column)]
    labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    targets = [column for column in pictures if column not in images] or labels
    if not images or not targets:
        raise DataError(f"{name} has no column of pictures with one of labels or masks: {printable(str([*features]))}.")
    image, target = images[0], targets[0]
    print(printable(f"{name}: the column {image} has the pictures, {target} what they show."))
    classes = features[target].names if targets is labels else []
    places = unique([re.sub(r"^\.|/", "-", class_name) for class_name in classes])
    columns = [image] if classes else [image, target]
    for split, rows in splits.items():
        part = PART_FOLDERS.get(split.casefold(), "train" if len(splits) == 1 else "")
        for column in columns:
            rows = rows.cast_column(column, Picture(decode=False))
        for i, row in enumerate(tqdm(rows.select_columns([image, target]), f"writing {split}", leave=False)):
            if not part:
                yield f"{split} is none of train, validation and test"
            elif classes and row[target] not in range(len(classes)):
                yield "they have no label"
            elif not all(row[column] and (row[column]["bytes"] or with_paths) for column in columns):
                yield "they have no picture"
            else:
                kinds = [places[row[target]]] if classes else ["images", "masks"]
                for place, file in zip(kinds, [row[column] for column in columns], strict=True):
                    content = file["bytes"] or Path(file["path"]).read_bytes()
                    suffix = Path(file["path"] or "").suffix.lower()
                    path = folder / part / place / f"{split}-{i:07d}{suffix if suffix in IMAGE_SUFFIXES else ''}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
