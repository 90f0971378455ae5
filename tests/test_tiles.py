"""Photos as they are: tiles that are put together again, training on crops, the same scores, the page."""

import html
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import here, history
from torch import nn

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError
from cvlab.data.augment import uniforms
from cvlab.data.sets import AugmentedPairs
from cvlab.explain import predict
from cvlab.explain.many import predict_photos
from cvlab.models import Model
from cvlab.models.model import TILES
from cvlab.page.models import Models
from cvlab.page.panels import PANELS, draw
from cvlab.page.question import Question, picked
from cvlab.page.visit import Answer, Visits
from cvlab.tiles import Tiles, middle, starts, weights
from cvlab.transforms import large_view, open_image, seen_mask, seen_part, square_view, to_float, to_uint8, view

SMALL = ["--image-size", 32, "--width", 8, "--depth", 2, "--batch-size", 4, "--lr", 0.01, "--precision", "fp32"]


def photo_of(seed: int, height: int = 96, width: int = 128) -> tuple[Image.Image, np.ndarray]:
    """Bright discs of 8 to 14 pixels on noise, and their mask, bool."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(height * width // 1500):
        mask |= (x - rng.uniform(0, width)) ** 2 + (y - rng.uniform(0, height)) ** 2 < rng.uniform(4, 7) ** 2
    pixels = rng.integers(0, 120, (height, width, 3)) + 90 * mask[..., None]
    return Image.fromarray(pixels.astype(np.uint8)), mask


def folder_of(folder: Path, count: int, *size: int) -> Path:
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        photo, mask = photo_of(i, *size)
        photo.save(folder / "images" / f"{i}.png")
        Image.fromarray(np.uint8(255 * mask)).save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter of discs that saw crops of 32 pixels of photos of 128 x 96; beside it its data."""
    folder = tmp_path_factory.mktemp("crops")
    data = folder_of(folder / "data", 30)
    here("segmenter", "--data", data, "--out", folder / "run", "--crop", *SMALL, "--epochs", 9)
    return folder / "run"


def measured(*command: object, out: Path) -> dict:
    here("evaluate", *command, *([] if "--part" in command else ["--part", "all"]), "--out", out)
    return json.loads((out / "metrics.json").read_text())


def test_tiles_cover_a_photo_evenly_and_overlap_by_a_quarter() -> None:
    assert starts(64, 64) == [0]
    assert starts(65, 64) == [0, 1]
    assert starts(112, 64) == [0, 48]
    assert starts(160, 64) == [0, 48, 96]
    assert starts(161, 64) == [0, 32, 65, 97]
    for length in range(16, 200):
        found = starts(length, 16)
        assert found[0] == 0
        assert found[-1] == length - 16
        assert max(np.diff(found), default=0) <= 12


def test_what_is_said_of_each_pixel_alone_is_put_together_as_it_was() -> None:
    photos = [torch.rand(2, *size) for size in ((16, 16), (40, 23), (16, 90))]
    tiles = Tiles(photos, 16)
    assert [place[0] for place in tiles.places].count(1) == len(starts(40, 16)) * len(starts(23, 16)) == 6
    joined = list(tiles.join([torch.stack([*tiles])[:3], torch.stack([*tiles])[3:]]))
    assert joined[0].equal(photos[0][None])  # a single tile stays as it is, to the bit
    for whole, photo in zip(joined, photos, strict=True):
        torch.testing.assert_close(whole, photo[None])


def test_overlapping_tiles_are_averaged_by_their_distance_to_the_edge() -> None:
    # Two tiles of four pixels on a line of five: weights 0.25 0.75 0.75 0.25 along it.
    (joined,) = Tiles([torch.empty(1, 4, 5)], 4).join([torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)])
    expected = torch.tensor([0, 0.25 / 1.0, 0.75 / 1.5, 0.75 / 1.0, 1])
    torch.testing.assert_close(joined[0, 0], expected.expand(4, 5))
    assert weights(4)[0].tolist() == pytest.approx([0.25 * each for each in (0.25, 0.75, 0.75, 0.25)])


def test_a_photo_that_fits_is_seen_in_one_piece(segmenter: Model) -> None:
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    found = torch.cat([*predict_photos(segmenter, list(images))])
    assert found.equal(predict(segmenter, images / 255))
    segmenter.crop_mode = TILES
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8))
    assert seen_part(segmenter, (9, 14)) == (0, 0, 1, 1)
    in_tiles = view(small, segmenter)
    segmenter.crop_mode = "center"
    assert in_tiles.equal(view(small, segmenter))


def test_the_view_of_a_larger_photo_is_its_middle(segmenter: Model) -> None:
    segmenter.crop_mode = TILES
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 40, 3), np.uint8))
    large = to_uint8(large_view(photo, 16))  # the lower side is stretched to that of a tile
    assert large.shape == (3, 16, 40)
    assert to_uint8(square_view(photo, segmenter)).equal(large[:, :, 12:28])
    assert middle(large, 16).shape == (3, 16, 16)
    assert seen_part(segmenter, (12, 40)) == pytest.approx((0.3, 0, 0.4, 1))
    mask = torch.zeros(1, 12, 40, dtype=torch.bool)
    mask[..., 20:] = True
    assert seen_mask(mask, segmenter).equal(torch.arange(16)[None, None].expand(1, 16, 16) >= 8)


def test_crops_are_cut_alike_from_photo_and_mask_anywhere_and_again_in_the_same_place() -> None:
    rows, columns = torch.meshgrid(torch.arange(30), torch.arange(50), indexing="ij")
    photos = [torch.stack([rows, columns, rows]).byte()] * 200
    train_set = AugmentedPairs(photos, [(rows >= 15)[None]] * 200, seed=3, augment="none", crop=16)
    images, masks = train_set.__getitems__(list(range(200)))
    top, left = (255 * images[:, each, 0, 0] for each in (0, 1))
    assert masks[:, 0].equal((255 * images[:, 0]).round() >= 15)
    assert {*top.round().int().tolist()} == {*range(15)}
    assert left.min() < 1
    assert left.max() > 33.5
    assert train_set.__getitems__([7])[0].equal(images[7:8])
    train_set.epoch = 1
    assert not train_set.__getitems__([7])[0].equal(images[7:8])
    assert uniforms(3, 1, [7]).shape == (1, 12)


def test_scores_in_tiles_are_those_in_one_piece_where_both_fit(run: Path, tmp_path: Path) -> None:
    fits = folder_of(tmp_path / "fits", 8, 32, 30)
    pieces = [measured(run, "--data", fits, each, out=tmp_path / each) for each in ("--tiles", "--no-tiles")]
    assert pieces[0].pop("tiles")
    assert pieces[0] == pieces[1]


def test_a_training_on_crops_finds_what_is_small_in_a_large_photo(run: Path, tmp_path: Path) -> None:
    model, data = checkpoint.load(run), run.with_name("data")
    assert (model.crop_mode, model.image_size) == (TILES, 32)
    assert "tiles of 32 x 32 pixels" in (run / "README.md").read_text()
    best = max(history(run), key=lambda line: line["val_iou"])
    found = measured(run, "--data", data, "--part", "val", out=tmp_path / "val")
    assert found["tiles"]
    assert found["iou"]["value"] == pytest.approx(best["val_iou"], abs=1e-6)  # scored alike while it was trained
    assert found["iou"]["value"] > 0.8
    squashed = measured(run, "--data", data, "--no-tiles", out=tmp_path / "squashed")
    assert squashed["iou"]["value"] < 0.6


def test_tiles_are_for_segmenters(tmp_path: Path, classifier: nn.Module) -> None:
    checkpoint.save(classifier, tmp_path)
    checkpoint.folder.annotate(tmp_path, crop_mode=TILES)
    with pytest.raises(CheckpointError, match="segmenters"):
        checkpoint.load(tmp_path)
    checkpoint.folder.annotate(tmp_path, crop_mode="center")
    with pytest.raises(ValueError, match="segmenters"):
        here("evaluate", tmp_path, "--tiles")


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def answer(run: Path, tmp_path: Path) -> Answer:
    """The same segmenter before a photo of 120 x 90 pixels."""
    photo, mask = photo_of(99, 90, 120)
    photo.save(tmp_path / "photo.png")
    Image.fromarray(np.uint8(255 * mask)).save(tmp_path / "mask.png")
    visits = Visits(Models({"discs": str(run)}))
    return visits.ask(str(tmp_path / "photo.png"), "discs", Question(), str(tmp_path / "mask.png"))


def test_the_page_finds_the_mask_of_the_whole_photo(answer: Answer) -> None:
    true, (found,) = torch.from_numpy(photo_of(99, 90, 120)[1]), answer.prediction.shares.values()
    assert found == pytest.approx(true.float().mean().item(), abs=0.02)
    assert answer.prediction.logits.shape == (1, 1, 120, 120)
    assert answer.evidence.images.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("place", [(15, 20), (110, 15), (60, 60), (119, 119)])
def test_a_click_is_explained_in_the_tile_around_it(answer: Answer, place: tuple[int, int]) -> None:
    asked = answer.again(picked(Question(), answer.model, answer.prediction.logits, [place]))
    left, top = round(asked.box[0] * 120), round(asked.box[1] * 90)
    assert asked.box == pytest.approx((left / 120, top / 90, 32 / 120, 32 / 90))
    photo = open_image(answer.photo).crop((left, top, left + 32, top + 32))
    assert asked.evidence.images.equal(to_float(to_uint8(photo))[None])
    x, y = place[0] - left, int((place[1] + 0.5) * 90 / 120) - top
    assert asked.evidence.points == f"{x},{y}"
    assert asked.evidence.region[y, x]


def test_every_panel_is_drawn_and_the_code_makes_the_map(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer.again(Question(region="false negatives", threshold=0.9, stage="decoder1"))
    asked.work_out_paths()
    asked.work_out_verdict()
    drawn = draw(asked, [name for name in PANELS if name != "compared"])
    assert "tile" in drawn["picker"]
    assert all(drawn[name] for name in ("grad_cam", "stages", "errors", "reasons"))
    monkeypatch.chdir(Path(answer.photo).parent)
    lines = html.unescape(drawn["code"].partition('tabindex="0">')[2].partition("</pre>")[0])
    names: dict = {}
    exec(lines.replace("'discs'", repr(str(asked.folder))), names)
    torch.testing.assert_close(names["attribution"], asked.attribution, rtol=1e-3, atol=1e-3)


def test_a_photo_of_too_many_tiles_is_made_smaller_and_that_is_said(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvlab.page.evidence.MOST_PIXELS", 6 * 32 * 32)
    counted: list = []

    def progress(batches: list) -> list:
        counted.extend(batches)
        return batches

    asked = Visits(answer.visits.models, progress).ask(answer.photo, "discs", Question())
    assert asked.prediction.size == (90, 120)
    assert 1 < sum(map(len, counted)) <= 6
    assert any("tiles of 32 pixels" in note for note in asked.prediction.notes)
