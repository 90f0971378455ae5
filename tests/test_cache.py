"""What a cache keeps is the same to read, and leaves nothing behind."""

import resource
from pathlib import Path

import pytest
import torch

from cvlab.data import shapes
from cvlab.data.cache import Cache
from cvlab.data.parts import classification_parts
from cvlab.data.sets import AugmentedImages
from cvlab.transforms import to_uint8


def rows() -> list[tuple]:
    """Ten pictures of different sizes with a mask, a label and a word each; 3 * height * width + 20 bytes a row."""
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (3, 5 + i, 9), dtype=torch.uint8, generator=generator) for i in range(10)]
    return [(picture, torch.arange(20).view(4, 5) % (i + 2) == 0, i, "x") for i, picture in enumerate(pictures)]


def same(first: list[tuple], second: list[tuple]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[1].dtype == b[1].dtype and a[2:] == b[2:]
        for a, b in zip(first, second, strict=True)
    )


def test_rows_come_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    kept = cache.keep(rows())
    assert same(kept, rows())
    total = sum(picture.nbytes + mask.nbytes for picture, mask, *_ in rows())
    assert cache.nbytes == total
    more = cache.keep(rows())  # of another part
    assert same(more, rows())
    assert same(kept, rows())
    assert cache.nbytes == 2 * total
    assert list(tmp_path.iterdir()) == []  # nothing that a killed training would leave behind


def test_what_lies_across_in_memory_is_kept_as_it_reads(tmp_path: Path) -> None:
    across = torch.arange(24, dtype=torch.uint8).view(2, 3, 4).permute(2, 0, 1)
    ((kept,),) = Cache(tmp_path).keep([(across,)])
    assert torch.equal(kept, across)


@pytest.mark.parametrize("length", [300_000, 3000])  # more and less than what a file keeps back before it writes
def test_a_disk_that_is_full_is_a_sentence(tmp_path: Path, length: int) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"pictures cannot be kept in {tmp_path}: File too large."):
            Cache(tmp_path).keep([(torch.zeros(length, dtype=torch.uint8),)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_nothing_to_keep_is_nothing(tmp_path: Path) -> None:
    assert Cache(tmp_path).keep([]) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(24):
        path = tmp_path / "data" / shapes.CLASS_NAMES[seed % 2] / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes.scene(seed, 90 + seed).image.save(path)
    return tmp_path / "data"


def test_batches_of_kept_images_are_those_of_the_photos(folder: Path, tmp_path: Path) -> None:
    parts = classification_parts(folder)
    images, labels = parts.read("train", to_uint8, cache=Cache(tmp_path))
    opened = [to_uint8(parts.open_sample(sample)[0]) for sample in parts.samples["train"]]
    first, second = (
        AugmentedImages(each, torch.tensor(labels), 32, seed=1).__getitems__([3, 0, 7]) for each in (images, opened)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
