"""What is kept beyond the limit of a cache is the same to read, and leaves nothing behind."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cvlab.data import shapes
from cvlab.data.cache import Cache
from cvlab.data.parts import classification_parts
from cvlab.data.sets import AugmentedImages
from cvlab.transforms import to_uint8

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.mark.parametrize("limit", [0, 500, 1e9])
def test_rows_come_back_wherever_they_lie(limit: float, tmp_path: Path) -> None:
    cache = Cache(limit, tmp_path)
    kept = cache.keep(rows())
    assert same(kept, rows())
    total = sum(picture.nbytes + mask.nbytes for picture, mask, *_ in rows())
    assert cache.in_memory + cache.in_file == total
    assert cache.in_memory <= limit
    assert (cache.in_file == 0) == (limit > total)
    more = cache.keep(rows())  # of another part, under the same limit
    assert same(more, rows())
    assert same(kept, rows())
    assert cache.in_memory + cache.in_file == 2 * total
    assert list(tmp_path.iterdir()) == []  # nothing that a killed training would leave behind


def test_what_lies_across_in_memory_is_kept_as_it_reads(tmp_path: Path) -> None:
    across = torch.arange(24, dtype=torch.uint8).view(2, 3, 4).permute(2, 0, 1)
    ((kept,),) = Cache(0, tmp_path).keep([(across,)])
    assert torch.equal(kept, across)


def test_a_disk_that_is_full_is_a_sentence(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="--cache-limit"):
            Cache(0, tmp_path).keep([(torch.zeros(300_000, dtype=torch.uint8),)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in range(24):
        path = tmp_path / "data" / shapes.CLASS_NAMES[seed % 2] / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes.scene(seed, 90 + seed).image.save(path)
    return tmp_path / "data"


def test_batches_do_not_know_where_their_images_lie(folder: Path, tmp_path: Path) -> None:
    batches = []
    for limit in (1e9, 20_000):
        parts = classification_parts(folder)
        cache = Cache(limit, tmp_path)
        images, labels = parts.read("train", to_uint8, cache=cache)
        assert (cache.in_file > 0) == (limit == 20_000)
        batches.append(AugmentedImages(images, torch.tensor(labels), 32, seed=1).__getitems__([3, 0, 7]))
    assert all(torch.equal(first, second) for first, second in zip(*batches, strict=True))


def test_a_training_beyond_the_limit_ends_in_the_same_bits(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "train/classifier.py", "--data", folder, "--epochs", 1, "--image-size", 16]
    command += ["--widths", 8, 8, "--batch-size", 4, "--precision", "fp32"]
    outs = {4: tmp_path / "memory", 0: tmp_path / "file"}
    runs = [
        subprocess.Popen([*map(str, command), "--out", out, "--cache-limit", str(limit)], cwd=ROOT)
        for limit, out in outs.items()
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    in_memory, in_file = ((out / "model.safetensors").read_bytes() for out in outs.values())
    assert in_memory == in_file
