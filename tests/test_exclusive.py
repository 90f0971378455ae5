"""Segmenters whose classes exclude each other: masks, loss, scores and maps, by hand and by an independent count."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import here, history
from scipy import ndimage
from torch import Tensor

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError, card
from cvlab.data.evaluation import parts_of, read_views
from cvlab.explain import contrast_score, explain, grad_cam, predict, predicted_classes, predicted_masks, region_score
from cvlab.learning.losses import pixel_weights, segmentation_loss
from cvlab.metrics import boundary, class_counts, class_ious, mean_iou, pixel_accuracy
from cvlab.models import Model, build, mask_levels, probabilities

NAMES = ["background", "cat", "dog"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return build("unet", NAMES, 16, {"width": 4, "depth": 2}, exclusive=True).eval()


def random_logits(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def one_hot(indices: Tensor, classes: int = 3) -> Tensor:
    """(N, H, W) to (N, C, H, W) bool; 255 is in no channel."""
    return indices[:, None] == torch.arange(classes)[:, None, None]


def test_probabilities_are_a_softmax_and_the_likeliest_class_is_the_mask(model: Model) -> None:
    logits = random_logits()
    model.temperature = 2.0
    assert probabilities(model, logits).equal((logits / 2).softmax(1))
    assert predicted_masks(model, logits).equal(one_hot(logits.argmax(1)))
    levels = mask_levels(model, torch.tensor([[[[1.0]], [[4.0]], [[2.0]]]]))
    expected = [1 / (1 + math.exp(-lead / 2)) for lead in (-3, 2, -2)]
    assert levels.flatten().tolist() == pytest.approx(expected)


def test_the_class_of_a_picture_is_the_object_that_covers_most(model: Model) -> None:
    indices = torch.zeros(3, 16, 16, dtype=torch.long)
    indices[0, :2], indices[0, 2:5] = 1, 2  # more background than dog, more dog than cat
    indices[1, :1] = 1
    assert predicted_classes(model, one_hot(indices).float() * 9).tolist() == [2, 1, 1]  # the last one is empty


@pytest.mark.parametrize("name", ["ce", "ce+dice"])
def test_the_loss_leaves_out_what_is_not_labelled(name: str) -> None:
    logits, indices = random_logits(), torch.randint(3, (2, 16, 16), generator=torch.Generator().manual_seed(2))
    indices[:, :4] = 255
    weights = torch.tensor([0.5, 1.0, 2.0])
    found = segmentation_loss(name, True, weights)(logits, one_hot(indices))
    losses = F.cross_entropy(logits, indices.masked_fill(indices == 255, -100), weights, reduction="none")
    expected = losses[:, 4:].mean()
    if name == "ce+dice":
        probs, truth = logits.softmax(1)[:, :, 4:], one_hot(indices)[:, :, 4:].float()
        overlap, total = ((each).sum((0, 2, 3)) for each in (probs * truth, probs + truth))
        expected = expected + (1 - 2 * overlap / total).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    elsewhere = logits.clone()
    elsewhere[:, :, :4] = 7.0
    assert segmentation_loss(name, True, weights)(elsewhere, one_hot(indices)).item() == pytest.approx(found.item())
    assert segmentation_loss("ce", True)(logits, torch.zeros(2, 3, 16, 16, dtype=torch.bool)) == 0


def test_the_usual_loss_follows_from_the_masks_and_weights_need_cross_entropy() -> None:
    logits, masks = random_logits(), one_hot(torch.randint(3, (2, 16, 16)))
    assert segmentation_loss(None, True)(logits, masks) == segmentation_loss("ce+dice", True)(logits, masks)
    assert segmentation_loss(None, False)(logits, masks) == segmentation_loss("bce+dice", False)(logits, masks)
    with pytest.raises(ValueError, match="ce"):
        segmentation_loss("bce", False, torch.ones(3))


def test_rare_classes_weigh_more() -> None:
    masks = one_hot(torch.tensor([[[0, 0, 0, 0], [0, 0, 1, 1]], [[0, 0, 0, 0], [0, 0, 255, 255]]]), 3)
    assert pixel_weights(list(masks)).tolist() == pytest.approx([14 / (3 * 12), 14 / (3 * 2), 14 / 3])


def test_counts_leave_out_what_is_not_scored() -> None:
    indices, predicted = torch.tensor([[[0, 1, 2, 255]]]), torch.tensor([[[1, 1, 0, 2]]])
    masks = one_hot(indices)
    counts = class_counts(one_hot(predicted), masks, masks.any(1, keepdim=True))
    assert counts.tolist() == [[[0, 1, 1, 1], [1, 1, 0, 1], [0, 0, 1, 2]]]
    assert class_ious(counts) == {0: 0, 1: 0.5, 2: 0}
    assert mean_iou(counts[:, 1:]) == 0.25
    accuracy = pixel_accuracy(torch.tensor([[[0, 1, 0], [0, 1, 0], [1, 0, 0]]]))
    assert accuracy["value"] == pytest.approx(1 / 3)


def test_a_boundary_is_the_mask_less_its_erosion() -> None:
    masks = torch.rand(1, 2, 60, 90, generator=torch.Generator().manual_seed(3)) > 0.1
    masks[0, 1] = False
    masks[0, 1, 10:50, 20:80] = True
    reach = round(0.02 * math.hypot(60, 90))
    for mask, found in zip(masks[0].numpy(), boundary(masks)[0].numpy(), strict=True):
        eroded = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=reach, border_value=0)
        assert np.array_equal(found, mask & ~eroded)


def test_its_card_says_that_one_softmax_is_over_all_classes(model: Model, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path)
    card.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "softmax" in text
    assert "sigmoid" not in text


def test_it_is_saved_and_opened_and_refused_where_it_makes_no_sense(model: Model, tmp_path: Path) -> None:
    checkpoint.save(model, tmp_path)
    opened = checkpoint.load(tmp_path)
    assert (opened.exclusive, opened.first_object) == (True, 1)
    for entries in ({"exclusive": "yes"}, {"exclusive": 1}, {"class_names": ["background"]}):
        checkpoint.annotate(tmp_path, **entries)
        with pytest.raises(CheckpointError, match=r"exclusive|class_names"):
            checkpoint.load(tmp_path)
        checkpoint.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["cvlab"]["exclusive"]  # as folders of before have it
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not checkpoint.load(tmp_path).exclusive


def test_why_one_class_rather_than_the_background_over_a_region(model: Model) -> None:
    """The map of a difference of logits is the difference of both maps, at every stage."""
    images, region = torch.rand(1, 3, 16, 16), torch.zeros(16, 16, dtype=torch.bool)
    region[2:9, 3:12] = True
    cat, background = (explain(model, images, region_score(region, i)).maps["grad_cam"] for i in (1, 0))
    both = explain(model, images, lambda z: region_score(region, 1)(z) - region_score(region, 0)(z)).maps["grad_cam"]
    for stage, attribution in both.items():
        assert torch.allclose(attribution, cat[stage] - background[stage], atol=1e-5)
    assert contrast_score(1, 0)(torch.tensor([[1.0, 3.0, 5.0]])).tolist() == [2]
    model.head.bias.data[1] += 1  # so that some pixels are cat
    logits, attribution = grad_cam(model, images)
    index = int(predicted_classes(model, logits))
    mask = predicted_masks(model, logits)[0, index]
    assert (index, mask.sum() > 0) == (1, True)
    expected = explain(model, images, region_score(mask, index)).maps["grad_cam"]["decoder2"]
    assert torch.allclose(attribution, expected)


def masks_of_three(folder: Path, n: int = 24) -> Path:
    """Pictures of a red and a green square on grey; between square and ground a line that is not labelled."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(n):
        photo, mask = rng.integers(90, 120, (40, 48, 3)), np.zeros((40, 48))
        for value, colour in ((1, (220, 30, 30)), (2, (30, 200, 30))):
            y, x = rng.integers(2, 24), rng.integers(2, 10) + 22 * (value - 1)
            mask[y - 1 : y + 13, x - 1 : x + 13] = 255
            mask[y : y + 12, x : x + 12], photo[y : y + 12, x : x + 12] = value, colour
        Image.fromarray(photo.astype(np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{i}.png")
    (folder / "classes.txt").write_text("red\ngreen\n")
    return folder


def test_a_training_of_three_classes_and_its_scores_equal_an_independent_count(tmp_path: Path) -> None:
    data, run = masks_of_three(tmp_path / "data"), tmp_path / "run"
    words = [
        "--image-size",
        32,
        "--width",
        8,
        "--depth",
        2,
        "--epochs",
        30,
        "--batch-size",
        4,
        "--lr",
        0.01,
        "--no-augment",
    ]
    here("segmenter", *words, "--data", data, "--out", run, "--class-weights", "balanced", "--precision", "fp32")
    here("evaluate", run, "--data", data)
    trained, found = checkpoint.load(run), json.loads((run / "metrics.json").read_text())
    assert (trained.class_names, trained.exclusive) == (["background", "red", "green"], True)
    assert max(line["val_iou"] for line in history(run)) > 0.8
    views, _ = read_views(parts_of(trained, data, "test")[0], "test", trained)
    samples = parts_of(trained, data, "test")[0].samples["test"]
    tp, union, edge_tp, edge_union, right, pixels = (np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(2), 0, 0)
    for view, (_, path) in zip(views, samples, strict=True):
        truth = np.asarray(Image.open(path))
        logits = predict(trained, view[None] / 255)
        logits = F.interpolate(logits, truth.shape, mode="bilinear", align_corners=False)[0].numpy()
        answer, scored = logits.argmax(0), truth != 255
        right, pixels = right + (answer == truth)[scored].sum(), pixels + scored.sum()
        for i, value in enumerate((1, 2)):
            pair = [each == value for each in (answer, truth)]
            inner = [mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), border_value=0) for mask in pair]
            for (first, second), both, either in ((pair, tp, union), (inner, edge_tp, edge_union)):
                both[i] += (first & second & scored).sum()
                either[i] += ((first | second) & scored).sum()
    assert list(found["iou_by_class"].values()) == pytest.approx((tp / union).tolist())
    assert found["mean_iou"]["value"] == pytest.approx((tp / union).mean())
    assert found["boundary_iou"]["value"] == pytest.approx((edge_tp / edge_union).mean())
    assert found["pixel_accuracy"]["value"] == pytest.approx(right / pixels)
    assert found["pixel_accuracy"]["low"] <= right / pixels <= found["pixel_accuracy"]["high"]
    assert (run / "report" / "confusion_matrix.png").is_file()
