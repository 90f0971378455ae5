"""Parts of folders of generated pictures, whose cut and notes are known beforehand."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import PHOTOS, needs_photos
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cvlab.data.duplicates import fingerprint
from cvlab.data.folders import DataError, class_pictures
from cvlab.data.masks import read_mask
from cvlab.data.parts import PARTS, Parts, classification_parts, segmentation_parts
from cvlab.transforms import to_uint8, whole_mask


def noise(seed: int, height: int = 4, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(pixels: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def save_pictures(folder: Path, count: int, seed: int) -> None:
    """`count` pictures, none like another; `seed` keeps those of one folder apart from those of others."""
    for i in range(count):
        save(noise(1000 * seed + i), folder / f"{i:03}.png")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """20 cats and 45 dogs, not cut."""
    save_pictures(tmp_path / "pets" / "dog", 45, seed=1)
    save_pictures(tmp_path / "pets" / "cat", 20, seed=2)
    return tmp_path / "pets"


def labels_of(parts: Parts, part: str) -> Counter:
    return Counter(parts.class_names[label] for _, label in parts.samples[part])


def all_of(lists: dict[str, list]) -> list:
    """What the parts hold together."""
    return sorted(each for part in PARTS for each in lists[part])


def paths_of(parts: Parts, part: str) -> set[Path]:
    return {sample[0] for sample in parts.samples[part]}


# --- classification ---------------------------------------------------------------------------------------------------


def test_each_class_is_cut_70_15_15(pets: Path) -> None:
    parts = classification_parts(pets)
    assert parts.class_names == ["cat", "dog"]
    assert labels_of(parts, "train") == {"cat": 14, "dog": 31}
    assert labels_of(parts, "val") == {"cat": 3, "dog": 7}  # 6.75
    assert labels_of(parts, "test") == {"cat": 3, "dog": 7}
    for part in PARTS:
        assert all(path.parent.name == parts.class_names[label] for path, label in parts.samples[part])
    assert parts.notes == []


def test_parts_are_disjoint_and_complete(pets: Path) -> None:
    parts = classification_parts(pets, split_seed=3)
    assert [path for path, _ in all_of(parts.samples)] == sorted(pets.glob("*/*.png"))


def test_the_split_seed_decides_the_cut(pets: Path) -> None:
    first, again, other = (classification_parts(pets, split_seed=seed) for seed in (0, 0, 1))
    assert first.samples == again.samples
    assert first.fingerprints == again.fingerprints
    assert paths_of(first, "test") != paths_of(other, "test")
    assert first.facts["split_seed"] == 0
    assert other.facts["split_seed"] == 1


def test_exact_copies_stay_in_one_part(tmp_path: Path) -> None:
    for i in range(20):
        original = save(noise(i), tmp_path / "a" / f"{i}.png")
        shutil.copy(original, tmp_path / "a" / f"copy of {i}.png")
    save_pictures(tmp_path / "b", 20, seed=1)
    for split_seed in range(5):
        parts = classification_parts(tmp_path, split_seed)
        assert sum(len(parts.samples[part]) for part in PARTS) == 60
        for part in PARTS:
            prints = [fingerprint(path) for path, label in parts.samples[part] if label == 0]
            assert set(Counter(prints).values()) == {2}  # the original and its copy
        assert parts.notes == ["Pairs of copies within a part and class: 20. They are kept; train/check.py names them."]


def test_copies_in_two_classes_are_named_and_train_loses_its_own(tmp_path: Path) -> None:
    for seed, name in enumerate(["cat", "dog"]):
        save_pictures(tmp_path / name, 20, seed)
    twice = shutil.copy(tmp_path / "cat" / "000.png", tmp_path / "dog" / "a cat.png")
    seen = set()
    for split_seed in range(8):
        parts = classification_parts(tmp_path, split_seed, allow_leaks=True)
        (note,) = parts.notes
        assert "000.png" in note
        assert "a cat.png" in note
        where = {path: part for part in PARTS for path, _ in parts.samples[part]}
        pair = {where.get(tmp_path / "cat" / "000.png"), where.get(twice)}
        assert "train" not in pair or pair == {"train"}
        seen.add(len(where))
    assert seen == {40, 41}  # with and without the copy in train


def test_small_classes_are_named_and_a_single_one_refused(tmp_path: Path) -> None:
    for seed, (name, count) in enumerate({"cat": 20, "dog": 19}.items()):
        save_pictures(tmp_path / name, count, seed)
    assert classification_parts(tmp_path).notes == ["Classes of fewer than 20 pictures: dog (19)."]
    shutil.rmtree(tmp_path / "dog")
    with pytest.raises(DataError, match="one class only, “cat”"):
        classification_parts(tmp_path)


@pytest.mark.parametrize("val", ["val", "valid"])
def test_given_parts_are_kept(tmp_path: Path, val: str) -> None:
    for seed, (part, count) in enumerate({"train": 5, val: 2, "test": 3}.items()):
        save_pictures(tmp_path / part / "cat", count, 2 * seed)
        save_pictures(tmp_path / part / "dog", count + 1, 2 * seed + 1)
    for split_seed in (0, 1):
        parts = classification_parts(tmp_path, split_seed)
        assert parts.class_names == ["cat", "dog"]
        for part, folder in {"train": "train", "val": val, "test": "test"}.items():
            assert paths_of(parts, part) == set((tmp_path / folder).glob("*/*.png"))
        assert labels_of(parts, "test") == {"cat": 3, "dog": 4}
        assert parts.notes == ["Classes of fewer than 20 pictures: cat (10), dog (13)."]


def test_the_classes_are_the_folders_of_train(tmp_path: Path) -> None:
    for part, name in (("train", "cat"), ("train", "dog"), ("valid", "cat"), ("valid", "parrot")):
        save_pictures(tmp_path / part / name, 2, seed=0)
    (tmp_path / "train" / ".cache").mkdir()
    found = class_pictures(tmp_path).parts
    assert {part: list(classes) for part, classes in found.items()} == {
        part: ["cat", "dog"] for part in ("train", "val")
    }
    assert found["val"] == {"cat": [tmp_path / "valid" / "cat" / f"00{i}.png" for i in range(2)], "dog": []}
    assert list(class_pictures(tmp_path / "train").parts) == ["all"]


def test_without_a_test_part_one_is_cut_from_train(tmp_path: Path) -> None:
    for seed, name in enumerate(["cat", "dog"]):
        save_pictures(tmp_path / "train" / name, 20, seed)
        save_pictures(tmp_path / "val" / name, 5, seed + 10)
    parts = classification_parts(tmp_path)
    assert labels_of(parts, "test") == {"cat": 3, "dog": 3}
    assert labels_of(parts, "train") == {"cat": 17, "dog": 17}
    assert paths_of(parts, "val") == set((tmp_path / "val").glob("*/*.png"))
    assert paths_of(parts, "train") | paths_of(parts, "test") == set((tmp_path / "train").glob("*/*.png"))
    assert len(parts.notes) == 1


def test_train_and_test_without_val_are_refused(tmp_path: Path) -> None:
    for seed, part in enumerate(["train", "test"]):
        save_pictures(tmp_path / part / "cat", 5, seed)
    with pytest.raises(DataError):
        classification_parts(tmp_path)


def test_per_class_counts(tmp_path: Path) -> None:
    save_pictures(tmp_path / "coast", 72, seed=1)
    save_pictures(tmp_path / "street", 90, seed=2)
    parts = classification_parts(tmp_path, per_class=(50, 20))
    assert labels_of(parts, "train") == {"coast": 50, "street": 50}
    assert labels_of(parts, "val") == {"coast": 20, "street": 20}
    assert labels_of(parts, "test") == {"coast": 2, "street": 20}
    assert len(set().union(*(paths_of(parts, part) for part in PARTS))) == 162
    for too_many in ((80, 20), (60, 20)):  # there are 72 pictures of the coast
        with pytest.raises(DataError):
            classification_parts(tmp_path, per_class=too_many)


def test_what_cannot_be_read_is_left_out_and_named(pets: Path) -> None:
    """Before the parts are cut; a file that is damaged later is named when it is read."""
    broken = sorted(pets.glob("dog/*.png"))[:8]
    for i, path in enumerate(broken):
        path.write_bytes(b"no picture" if i % 2 else path.read_bytes()[:60] + bytes([i]))
    parts = classification_parts(pets)
    assert [path for path, _ in all_of(parts.samples)] == sorted(set(pets.glob("*/*.png")) - set(broken))
    assert parts.notes == ["Left out because it cannot be opened: 8 (dog/000.png, dog/001.png, dog/002.png ...)."]
    late, *expected = list(parts.samples["val"])
    late[0].write_bytes(b"no picture")
    images, labels = parts.read("val", to_uint8)
    assert parts.samples["val"] == expected
    assert labels == [label for _, label in expected]
    for image, (path, _) in zip(images, expected, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(Image.open(path)))
    assert late[0].name in parts.notes[-1]


def test_a_part_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    for seed, name in enumerate(["cat", "dog"]):
        save_pictures(tmp_path / name, 10, seed)
    parts = classification_parts(tmp_path)
    for path in paths_of(parts, "val"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError):
        parts.read("val", to_uint8)


def test_folders_that_hold_no_classes_are_refused(tmp_path: Path, pets: Path) -> None:
    (tmp_path / "empty").mkdir()
    (pets / "parrot").mkdir()  # a class without pictures
    for folder in (tmp_path / "missing", tmp_path / "empty", pets, pets / "cat", pets / "cat" / "000.png"):
        with pytest.raises(DataError):
            classification_parts(folder)
        with pytest.raises(DataError):
            segmentation_parts(folder)


def test_files_beside_the_classes_and_other_files_in_them_do_not_count(pets: Path) -> None:
    (pets / "README.md").write_text("two kinds of pets")
    (pets / "cat" / "notes.txt").write_text("no picture")
    (pets / ".cache").mkdir()
    parts = classification_parts(pets)
    assert parts.class_names == ["cat", "dog"]
    assert sum(len(parts.samples[part]) for part in PARTS) == 65


def test_fingerprints_are_of_the_contents(pets: Path) -> None:
    one, two = sorted(pets.glob("cat/*.png"))[:2]
    assert fingerprint(one) != fingerprint(two)
    before = classification_parts(pets)
    kept = fingerprint(one)
    renamed = one.rename(one.with_name("another name.png"))
    assert fingerprint(renamed) == kept
    assert all_of(classification_parts(pets).fingerprints) == all_of(before.fingerprints)
    renamed.write_bytes(renamed.read_bytes() + b"\0")
    assert fingerprint(renamed) != kept
    assert before.facts["fingerprints"] == before.fingerprints


# --- segmentation -----------------------------------------------------------------------------------------------------


def save_pairs(folder: Path, masks: list[np.ndarray]) -> Path:
    """An image of noise for each mask (h, w)."""
    for i, mask in enumerate(masks):
        save(noise(i, *mask.shape), folder / "images" / f"{i:02}.png")
        save(mask, folder / "masks" / f"{i:02}.png")
    return folder


def random_masks(count: int, values: list[int], height: int = 6, width: int = 8) -> list[np.ndarray]:
    """Every mask holds all of the values."""
    rng = np.random.default_rng(0)
    cells = [np.resize(np.array(values, np.uint8), height * width) for _ in range(count)]
    return [rng.permutation(cell).reshape(height, width) for cell in cells]


@pytest.mark.parametrize("values", [[0, 1], [0, 255]])
def test_masks_of_one_class(tmp_path: Path, values: list[int]) -> None:
    written = random_masks(20, values)
    parts = segmentation_parts(save_pairs(tmp_path, written))
    assert parts.class_names == ["foreground"]
    assert [len(parts.samples[part]) for part in PARTS] == [14, 3, 3]
    for part in PARTS:
        images, masks = parts.read(part, to_uint8)
        for image, mask, (image_path, mask_path) in zip(images, masks, parts.samples[part], strict=True):
            assert image_path.stem == mask_path.stem
            assert mask.dtype == torch.bool
            assert np.array_equal(mask[0], written[int(mask_path.stem)] > 0)
            assert np.array_equal(image.permute(1, 2, 0), noise(int(image_path.stem), 6, 8))


def test_masks_of_one_bit_and_empty_masks(tmp_path: Path) -> None:
    bits = [mask == 1 for mask in random_masks(8, [0, 1])]
    bits[3][:] = False
    parts = segmentation_parts(save_pairs(tmp_path, bits))
    assert parts.class_names == ["foreground"]
    masks = {path.stem: mask for part in PARTS for (_, path), mask in zip(*read_pairs(parts, part), strict=True)}
    assert len(masks) == 8
    assert all(np.array_equal(masks[f"{i:02}"][0], bits[i]) for i in range(8))


def read_pairs(parts: Parts, part: str) -> tuple[list, list[Tensor]]:
    _, masks = parts.read(part, to_uint8)
    return parts.samples[part], masks


def test_class_indices_become_channels(tmp_path: Path) -> None:
    written = random_masks(10, [0, 1, 2, 3])
    written[4][written[4] == 3] = 0  # not every class in every mask
    parts = segmentation_parts(save_pairs(tmp_path, written))
    assert len(parts.class_names) == 4
    for part in PARTS:
        for (_, path), mask in zip(*read_pairs(parts, part), strict=True):
            expected = written[int(path.stem)]
            assert mask.shape == (4, 6, 8)
            assert all(np.array_equal(mask[c], expected == c) for c in range(4))
    assert segmentation_parts(tmp_path, class_names=["a", "b", "c"]).class_names == ["background", "a", "b", "c"]
    with pytest.raises(DataError):
        segmentation_parts(tmp_path, class_names=["a", "b"])


def test_a_palette_masks_colours_are_no_values(tmp_path: Path) -> None:
    indices = random_masks(1, [0, 1, 2])[0]
    mask = Image.new("P", (8, 6))
    mask.putdata(indices.flatten())
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    mask.save(tmp_path / "mask.png")
    assert np.array_equal(read_mask(tmp_path / "mask.png", 2), np.stack([indices == 1, indices == 2]))


@pytest.mark.parametrize("values", [[0, 7, 200], [0, 128], [3, 200]])
def test_masks_of_odd_values_are_refused(tmp_path: Path, values: list[int]) -> None:
    with pytest.raises(DataError):
        segmentation_parts(save_pairs(tmp_path, random_masks(8, values)))


def test_a_mask_of_values_that_stand_for_no_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_mask(save(random_masks(1, [0, 3])[0], tmp_path / "one class.png"), 1)
    with pytest.raises(DataError):
        read_mask(save(random_masks(1, [0, 1, 3])[0], tmp_path / "two classes.png"), 2)
    (tmp_path / "text.png").write_text("no mask")
    Image.new("L", (4, 4)).save(tmp_path / "postscript.png", "EPS")  # a program for Ghostscript
    for name in ("text.png", "postscript.png"):
        with pytest.raises(DataError) as refusal:
            read_mask(tmp_path / name, 1)
        assert isinstance(refusal.value.__cause__, UnidentifiedImageError)


def test_pairs_that_do_not_fit_are_left_out_and_named(tmp_path: Path) -> None:
    save_pairs(tmp_path, random_masks(20, [0, 255]))
    (tmp_path / "masks" / "02.png").unlink()
    save(random_masks(1, [0, 255], 8, 6)[0], tmp_path / "masks" / "05.png")  # turned: 8 x 6, its image 6 x 8
    (tmp_path / "masks" / "11.png").write_bytes(b"damaged")
    (tmp_path / "images" / "13.png").write_bytes(b"damaged")
    parts = segmentation_parts(tmp_path)
    left = {path.stem for part in PARTS for path, _ in parts.samples[part]}
    assert left == {f"{i:02}" for i in range(20)} - {"02", "05", "11", "13"}
    for name in ("02.png", "05.png", "11.png", "13.png"):
        assert sum(f"1 (images/{name})" in note for note in parts.notes) == 1


def test_too_few_pairs_and_no_pairs_are_refused(tmp_path: Path) -> None:
    save_pairs(tmp_path / "few", random_masks(2, [0, 1]))
    save_pictures(tmp_path / "no masks" / "images", 5, seed=0)
    for folder in (tmp_path / "few", tmp_path / "no masks"):
        with pytest.raises(DataError):
            segmentation_parts(folder)


def test_pairs_are_cut_by_the_split_seed_and_copies_stay_together(tmp_path: Path) -> None:
    masks = random_masks(20, [0, 1])
    save_pairs(tmp_path, masks)
    for i in range(20):
        shutil.copy(tmp_path / "images" / f"{i:02}.png", tmp_path / "images" / f"{i + 20}.png")
        save(masks[i], tmp_path / "masks" / f"{i + 20}.png")
    first, again, other = (segmentation_parts(tmp_path, split_seed=seed) for seed in (0, 0, 1))
    assert first.samples == again.samples
    assert paths_of(first, "test") != paths_of(other, "test")
    for part in PARTS:
        assert set(Counter(first.fingerprints[part]).values()) == {2}
    assert sum(len(first.samples[part]) for part in PARTS) == 40


def test_masks_stay_binary_in_any_size(tmp_path: Path) -> None:
    """Every pixel of the small mask is a pixel of the mask: none in between, and of no two classes at once."""
    indices = random_masks(1, [0, 1, 2], 37, 53)[0]
    mask = read_mask(save(indices, tmp_path / "mask.png"), 2)
    for size in (5, 32, 96):
        small = whole_mask(mask, size)
        assert small.dtype == torch.bool
        assert (small.sum(0) <= 1).all()
        assert abs(small[0].float().mean() - mask[0].float().mean()) < 0.25


# --- synthetic scenes -------------------------------------------------------------------------------------------------


def test_without_a_folder_the_parts_are_scenes() -> None:
    labelled, outlined = classification_parts(None, image_size=32), segmentation_parts(None, image_size=32)
    assert [len(labelled.samples[part]) for part in PARTS] == [3000, 500, 500]
    assert all_of(labelled.samples) == list(range(4000))  # no scene in two parts
    assert labelled.samples == outlined.samples
    image, label = labelled.open_sample(labelled.samples["val"][0])
    same_image, mask = outlined.open_sample(outlined.samples["val"][0])
    assert image.size == (32, 32)
    assert label in range(len(labelled.class_names))
    assert np.array_equal(np.asarray(image), np.asarray(same_image))
    assert mask.shape == (1, 32, 32)
    assert mask.dtype == torch.bool
    assert len(outlined.class_names) == 1


# --- photographs ------------------------------------------------------------------------------------------------------


@needs_photos("horses")
def test_horses() -> None:
    parts = segmentation_parts(PHOTOS / "horses")
    assert parts.class_names == ["foreground"]
    assert [len(parts.samples[part]) for part in PARTS] == [194, 42, 42]
    assert not any(note.startswith("Left out") for note in parts.notes)


@needs_photos("flower_photos")
def test_flower_photos() -> None:
    parts = classification_parts(PHOTOS / "flower_photos")
    names = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    assert parts.class_names == names
    for part, count in {"train": 280, "val": 60, "test": 60}.items():
        assert labels_of(parts, part) == dict.fromkeys(names, count)
    assert not set(parts.fingerprints["train"]) & set(parts.fingerprints["test"] + parts.fingerprints["val"])
