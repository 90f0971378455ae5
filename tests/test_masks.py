"""One mask in every form that people save it in: the trainers and the page read the same of it, or refuse it alike."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate import evaluate_segmenter
from PIL import Image
from torch import nn

from cvlab.checkpoint import card
from cvlab.data.folders import DataError
from cvlab.data.masks import read_mask
from cvlab.data.parts import PARTS, segmentation_parts
from cvlab.models import build
from cvlab.page.evidence import open_mask

SHAPE = np.zeros((20, 24), bool)
SHAPE[5:12, 6:15] = True  # 63 of 480 pixels
ONE = SHAPE.astype(np.uint8)
WHITE, BLACK, FULL = 255 * ONE, np.zeros_like(ONE), np.full_like(ONE, 255)
TURNED = Image.Exif()
TURNED[274] = 6


@pytest.fixture(scope="module")
def of_one_class() -> nn.Module:
    return build("unet", ["horse"], 16, {"width": 4, "depth": 2})


def stacked(*channels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack(channels))


def palette(indices: np.ndarray, *colours: int) -> Image.Image:
    image = Image.fromarray(indices, "P")
    image.putpalette(colours)
    return image


SAME = {
    "0 and 255.png": (Image.fromarray(WHITE), {}),
    "0 and 1.png": (Image.fromarray(ONE), {}),
    "1 bit.png": (Image.fromarray(SHAPE), {}),
    "1 bit.bmp": (Image.fromarray(SHAPE), {}),
    "16 bit 1.png": (Image.fromarray(ONE.astype(np.uint16)), {}),
    "16 bit white.png": (Image.fromarray(65535 * ONE.astype(np.uint16)), {}),
    "32 bit.tif": (Image.fromarray(WHITE.astype(np.int32)), {}),
    "float.tif": (Image.fromarray(ONE.astype(np.float32)), {}),
    "grey as RGB.png": (stacked(WHITE, WHITE, WHITE), {}),
    "black and white.jpg": (Image.fromarray(WHITE), {"quality": 80}),
    "white ink.png": (stacked(FULL, FULL, FULL, WHITE), {}),
    "black ink.png": (stacked(BLACK, BLACK, BLACK, WHITE), {}),
    "black ink of two channels.png": (Image.fromarray(np.dstack([BLACK, WHITE]), "LA"), {}),
    "red ink.png": (stacked(FULL, BLACK, BLACK, WHITE), {}),
    "opaque.png": (stacked(WHITE, WHITE, WHITE, FULL), {}),
    "transparent grey.png": (Image.fromarray(WHITE), {"transparency": 0}),
    "palette.png": (palette(ONE, 0, 0, 0, 128, 0, 0), {}),
    "palette on transparent.png": (palette(ONE, 0, 0, 0, 128, 0, 0), {"transparency": 0}),
    "palette white first.png": (palette(1 - ONE, 255, 255, 255, 0, 0, 0), {}),
    "turned.png": (Image.fromarray(np.rot90(WHITE).copy()), {"exif": TURNED}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_same_mask_in_every_form(name: str, tmp_path: Path, of_one_class: nn.Module) -> None:
    image, options = SAME[name]
    image.save(tmp_path / name, **options)
    assert np.array_equal(read_mask(tmp_path / name, 1)[0], SHAPE)
    assert np.array_equal(open_mask(str(tmp_path / name), of_one_class, (20, 24))[1], SHAPE)


HALF = Image.fromarray(WHITE // 2 + np.roll(WHITE, 2, 0) // 2)
UNCLEAR = {
    "three greys.png": (HALF, {}, "0, 127, 254"),
    "0 and 128.png": (Image.fromarray(128 * ONE), {}, "0, 128"),
    "soft.png": (Image.fromarray(WHITE).resize((40, 30)), {}, "hard edges"),
    "soft ink.png": (stacked(BLACK, BLACK, BLACK, np.asarray(HALF)), {}, "0, 127, 254"),
    "grey.jpg": (Image.fromarray(WHITE // 2), {}, "save masks as PNG"),
    "0 and 1.jpg": (Image.fromarray(ONE), {}, "save masks as PNG"),
    "colour.png": (stacked(WHITE, BLACK, BLACK), {}, "is in colour"),
    "colours on transparent.png": (stacked(WHITE, BLACK, BLACK, np.roll(WHITE, 3, 0)), {}, "transparent"),
    "fractions.tif": (Image.fromarray(ONE * np.float32(0.5)), {}, "fractions"),
    "two frames.gif": (Image.fromarray(WHITE), {"save_all": True, "append_images": [HALF]}, "2 pages"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_mask_that_may_mean_two_things_is_refused_by_both(name: str, tmp_path: Path, of_one_class: nn.Module) -> None:
    image, options, said = UNCLEAR[name]
    image.save(tmp_path / name, **options)
    for read in (lambda path: read_mask(path, 1), lambda path: open_mask(str(path), of_one_class, (20, 24))):
        with pytest.raises(DataError, match=said) as refusal:
            read(tmp_path / name)
        assert str(refusal.value).startswith(f"{name} ")  # and not the folder, which on the page is the server's


def test_on_the_page_black_and_white_shows_the_class_that_is_asked_about(tmp_path: Path) -> None:
    for name, values in (("white.png", WHITE), ("numbers.png", 2 * ONE)):
        Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(read_mask(tmp_path / "white.png", 3, white=1), np.stack([BLACK, ONE, BLACK]))
    assert np.array_equal(read_mask(tmp_path / "numbers.png", 3, white=0), np.stack([BLACK, ONE, BLACK]))
    with pytest.raises(DataError, match="255"):  # a trainer cannot know which class it is
        read_mask(tmp_path / "white.png", 3)
    for exclusive in (False, True):
        names = ["background"] * exclusive + ["sky", "tree", "car"]
        model = build("unet", names, 16, {"width": 4, "depth": 2}, exclusive=exclusive)
        white, numbers = (open_mask(str(tmp_path / f"{name}.png"), model, (20, 24)) for name in ("white", "numbers"))
        assert np.array_equal(white, np.stack([1 - ONE, ONE, ONE, ONE]))
        assert np.array_equal(numbers, np.stack([1 - ONE, BLACK, ONE, BLACK]))


def test_pixels_of_255_are_in_no_channel_where_classes_exclude_each_other(tmp_path: Path) -> None:
    border = np.roll(ONE, 3, 0) * (1 - ONE)
    Image.fromarray(2 * ONE + 255 * border).save(tmp_path / "numbers.png")
    model = build("unet", ["background", "sky", "tree"], 16, {"width": 4, "depth": 2}, exclusive=True)
    found = open_mask(str(tmp_path / "numbers.png"), model, (20, 24))
    assert np.array_equal(found, np.stack([1 - ONE - border, BLACK, ONE]))
    overlapping = build("unet", ["sky", "tree"], 16, {"width": 4, "depth": 2})
    with pytest.raises(DataError, match="0, 2, 255"):
        open_mask(str(tmp_path / "numbers.png"), overlapping, (20, 24))


# --- the masks of a folder --------------------------------------------------------------------------------------------


def folder_of(folder: Path, mask_of: Callable[[int], np.ndarray], count: int = 20) -> Path:
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for i in range(count):
        mask = mask_of(i)
        pixels = np.random.default_rng(i).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{i}.png")
    return folder


def test_what_the_masks_hold_is_counted(tmp_path: Path) -> None:
    """Of 20 masks of 200 x 200: one full, two empty, nine of a single pixel, eight of 40 x 40."""

    def mask_of(i: int) -> np.ndarray:
        mask = np.full((200, 200), 255 if i == 0 else 0)
        if i > 2:
            mask[50 : 51 + 39 * (i % 2 == 0), 50 : 51 + 39 * (i % 2 == 0)] = 255
        return mask

    share = (1 + 9 / 40000 + 8 * 0.04) / 20
    notes = segmentation_parts(folder_of(tmp_path, mask_of), image_size=64).notes
    assert notes[0] == (
        f"Masks: {share:.1%} of the pixels of a picture on average (0.0% to 100.0%); empty 2, full 1, of 20."
    )
    assert "nothing is left at 64 x 64 pixels: 9 of 20" in notes[1]
    assert len(segmentation_parts(tmp_path, image_size=200).notes) == 1


def test_the_number_of_classes_is_what_is_stated_not_what_occurs(tmp_path: Path) -> None:
    folder_of(tmp_path, lambda i: ONE * (1 + i % 2))
    for exclusive, first in ((False, []), (True, ["background"]), (None, ["background"])):
        parts = segmentation_parts(tmp_path, class_names=["sky", "tree", "car"], exclusive=exclusive)
        assert parts.class_names == [*first, "sky", "tree", "car"]
        assert parts.open_sample(parts.samples["train"][0])[1].shape == (len(first) + 3, 20, 24)
        assert "Pictures with each class: sky 10, tree 10, car 0." in parts.notes
    assert segmentation_parts(tmp_path).class_names == ["background", "class 1", "class 2"]
    (tmp_path / "classes.txt").write_text("sky\ntree\n")
    assert segmentation_parts(tmp_path).class_names == ["background", "sky", "tree"]
    with pytest.raises(DataError, match="they must be 0 and 1"):
        segmentation_parts(tmp_path, class_names=["sky"])
    with pytest.raises(DataError, match="control characters"):
        segmentation_parts(tmp_path, class_names=["sky", "tree\n"])


def test_an_evaluation_tells_the_iou_of_every_class(tmp_path: Path) -> None:
    """The network finds all of each picture sky, and nothing else: 63 of 480 pixels in half of the pictures."""
    folder = folder_of(tmp_path, lambda i: ONE * (1 + i % 2))
    parts = segmentation_parts(folder, class_names=["sky", "low", "car"], exclusive=False)
    model = build("unet", parts.class_names, 16, {"width": 4, "depth": 2})
    model.head.weight.data.zero_()
    model.head.bias.data = torch.tensor([5.0, -5.0, -5.0])
    parts.samples["all"] = [sample for part in PARTS for sample in parts.samples[part]]
    found, _ = evaluate_segmenter(model.eval(), None, parts, Namespace(part="all", images=None, explain="six"))
    sky = 10 * 63 / (20 * 480)
    assert found["iou_by_class"] == {"sky": pytest.approx(sky), "low": 0.0, "car": None}
    assert found["mean_iou"]["value"] == pytest.approx(sky / 2)
    assert "| low | 0.0000 |" in card.markdown(card.scores(found))


def test_a_border_label_is_refused_with_what_to_do_where_classes_may_overlap(tmp_path: Path) -> None:
    folder_of(tmp_path, lambda i: np.where(SHAPE, 2, np.where(np.roll(SHAPE, 3, 0), 255, 0)))
    with pytest.raises(DataError, match=r"masks/0.png has the values 0, 2, 255.*border.*Such masks: 20 of 20"):
        segmentation_parts(tmp_path, exclusive=False)


@pytest.mark.parametrize("value", [1, 2])
def test_a_border_is_in_no_channel(tmp_path: Path, value: int) -> None:
    border = np.roll(SHAPE, 3, 0) & ~SHAPE
    parts = segmentation_parts(folder_of(tmp_path, lambda i: np.where(SHAPE, value, np.where(border, 255, 0))))
    _, mask = parts.open_sample(parts.samples["train"][0])
    assert np.array_equal(mask, np.stack([~SHAPE & ~border, *([SHAPE & False] * (value - 1)), SHAPE]))
    assert any(f"{20 * border.sum():,}" in note for note in parts.notes)


def test_black_and_white_masks_are_one_class_with_nothing_left_out(tmp_path: Path) -> None:
    folder_of(tmp_path, lambda i: SHAPE * 255)
    for exclusive, first in ((None, []), (True, ["background"])):
        parts = segmentation_parts(tmp_path, exclusive=exclusive)
        assert parts.class_names == [*first, "foreground"]
        assert np.array_equal(parts.open_sample(parts.samples["train"][0])[1][-1], SHAPE)
