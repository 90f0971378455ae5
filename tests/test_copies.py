"""Copies are found however they were saved, and other photos are left alone."""

from pathlib import Path

import numpy as np
import pytest
from photos import PHOTOS, needs_photos
from PIL import Image, ImageOps

from cvlab.data import shapes
from cvlab.data.duplicates import Copies, Copy


@pytest.fixture
def scenes(tmp_path: Path) -> list[Path]:
    """Twelve scenes that resemble each other no more than photos do."""
    paths = [tmp_path / f"scene-{seed:02}.png" for seed in range(12)]
    for seed, path in enumerate(paths):
        shapes.scene(seed, 160).image.save(path)
    return paths


def saved_again(path: Path, kind: str) -> Path:
    image = Image.open(path).convert("RGB")
    copy = path.with_name(f"{path.stem} {kind}.jpg")
    match kind:
        case "exact":
            copy = path.with_name(f"{path.stem} exact{path.suffix}")
            copy.write_bytes(path.read_bytes())
        case "quality 40":
            image.save(copy, quality=40)
        case "half size":
            image.resize((image.width // 2, image.height // 2)).save(copy)
        case "mirrored":
            ImageOps.mirror(image).save(copy)
        case "mirrored, small, quality 50":
            ImageOps.mirror(image).resize((100, 100 * image.height // image.width)).save(copy, quality=50)
        case "turned, with the tag that says so":
            tag = Image.Exif()
            tag[274] = 6
            image.transpose(Image.Transpose.ROTATE_90).save(copy, exif=tag)
        case "webp":
            copy = copy.with_suffix(".webp")
            image.save(copy)
    return copy


KINDS = [
    "exact", "quality 40", "half size", "mirrored", "mirrored, small, quality 50",
    "turned, with the tag that says so", "webp",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_copy_is_found_and_nothing_else(scenes: list[Path], kind: str) -> None:
    copies = [saved_again(path, kind) for path in scenes]
    n = len(scenes)
    assert Copies([*scenes, *copies]).pairs == [Copy(i, i + n, exact=kind == "exact") for i in range(n)]


def test_copies_of_copies_are_one_group(scenes: list[Path]) -> None:
    mirrored = saved_again(scenes[5], "mirrored")
    paths = [*scenes, saved_again(mirrored, "half size"), mirrored]
    group = Copies(paths).group
    assert len(set(group.values())) == len(scenes)
    assert group[paths[5]] == group[paths[12]] == group[paths[13]]
    assert list(Copies(scenes[:2]).group.values()) == [0, 1]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_files_that_are_cut_off_are_told_though_jpegs_are_decoded_small(
    suffix: str, share: float, tmp_path: Path
) -> None:
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    shapes.scene(0, 700).image.save(whole)
    cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    assert Copies([whole, cut]).faults.keys() == {cut}


def test_pictures_without_structure_and_broken_files_resemble_nothing(tmp_path: Path) -> None:
    for name, grey in (("black", 0), ("white", 255), ("other", 254)):
        Image.fromarray(np.full((40, 40), grey, np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken-1.jpg").write_text("not a picture")
    (tmp_path / "broken-2.jpg").write_text("not a picture either")
    (tmp_path / "broken-3.jpg").write_text("not a picture")
    assert Copies(sorted(tmp_path.iterdir())).pairs == [Copy(1, 3, exact=True)]
    assert Copies([]).pairs == []


@needs_photos("flower_photos", "flowers17", "caltech101", "scenes8")
def test_planted_copies_among_photographs_are_found_without_false_alarms(tmp_path: Path) -> None:
    """160 photos of four sets, each saved again in some way: at least 95% found, no other pair alarmed."""
    photos = [
        path
        for folder in ("flower_photos/roses", "flowers17/daisy", "caltech101/airplanes", "scenes8/coast")
        for path in sorted((PHOTOS / folder).glob("*.jpg"))[:40]
    ]
    copies = []
    for i, photo in enumerate(photos):
        (tmp_path / f"{i}.jpg").write_bytes(photo.read_bytes())
        copies.append(saved_again(tmp_path / f"{i}.jpg", KINDS[i % len(KINDS)]))
    n = len(photos)
    found = Copies([*photos, *copies]).pairs
    planted = [copy for copy in found if copy.second == copy.first + n]
    assert len(photos) >= 100
    assert len(planted) >= 0.95 * n
    assert len(found) - len(planted) == 0


@needs_photos("flowers102_64px")
def test_the_known_pairs_across_the_official_parts_of_flowers102_are_found() -> None:
    paths = sorted((PHOTOS / "flowers102_64px").rglob("*.*"))
    across = [
        copy
        for copy in Copies(paths).pairs
        if copy.exact and paths[copy.first].parts[-3] != paths[copy.second].parts[-3]
    ]
    assert len(across) == 3
