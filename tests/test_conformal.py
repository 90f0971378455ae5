"""Sets of classes and outlines of masks that keep a promise: fitted on val, measured on pictures drawn beside it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from measure import add_outlines, add_sets
from PIL import Image

from cvlab import checkpoint
from cvlab.checkpoint import CheckpointError
from cvlab.metrics import class_counts
from cvlab.models import build
from cvlab.page.evidence import predict_photo
from cvlab.page.examples import example_files
from cvlab.page.models import Models
from cvlab.page.question import Question
from cvlab.page.unet import region_picker
from cvlab.page.visit import Visits
from cvlab.page.words import said
from cvlab.trust.conformal import COVERAGE, LEVELS, class_set, outline_thresholds, set_threshold

FEWEST = 19  # pictures: one in twenty is left out
ROOT = Path(__file__).resolve().parents[1]


def test_the_threshold_of_sets_by_hand() -> None:
    """Of 39 pictures at most two, the 5% of 40, are left out: the second lowest true probability is it."""
    true = torch.linspace(0.2, 0.96, 39)[torch.randperm(39, generator=torch.Generator().manual_seed(0))]
    probs, labels = torch.stack([true, 1 - true], 1), torch.zeros(39, dtype=torch.long)
    assert set_threshold(probs, labels) == pytest.approx(0.22)
    assert set_threshold(probs, labels, coverage=0.5) == pytest.approx(0.58)  # the twentieth


def test_a_val_part_that_is_too_small_says_from_how_many_pictures_on() -> None:
    probs = torch.full((FEWEST - 1, 2), 0.5)
    with pytest.raises(ValueError, match=r"18 pictures.*from 19 on"):
        set_threshold(probs, torch.zeros(FEWEST - 1, dtype=torch.long))
    assert set_threshold(torch.full((FEWEST, 2), 0.5), torch.zeros(FEWEST, dtype=torch.long)) == 0.5


def test_a_set_has_the_likeliest_class_first_and_is_never_empty() -> None:
    assert class_set([0.3, 0.6, 0.1], 0.3) == [1, 0]
    assert class_set([0.3, 0.6, 0.1], 0.7) == [1]


def test_sets_hold_the_true_class_as_often_as_promised() -> None:
    """Labels are drawn by the probabilities themselves: over 400 draws of val 95% are held, or a little more."""
    rng, held = np.random.default_rng(0), []
    for _ in range(400):
        probs = torch.from_numpy(rng.dirichlet([0.5] * 4, 120))
        labels = torch.multinomial(probs, 1)[:, 0]
        threshold = set_threshold(probs[:60], labels[:60])
        sets = [class_set(each, threshold) for each in probs[60:].tolist()]
        held += [label in each for label, each in zip(labels[60:].tolist(), sets, strict=True)]
    assert COVERAGE - 0.005 < np.mean(held) < COVERAGE + 0.03


def test_outlines_by_hand() -> None:
    """An object of 100 pixels; level i finds 100 - i of them and 56 - i others."""
    counts = [torch.tensor([[100 - i, max(0, 28 - i), i, 1000]]).repeat(99, 1) for i in range(len(LEVELS))]
    core, rim = outline_thresholds(counts)
    # (99 x share + 1) / 100 <= 0.05 where the share is at most 4 / 99.
    first = next(i for i in range(57) if max(0, 28 - i) / (100 - i + max(0, 28 - i)) <= 4 / 99)
    assert (core, rim) == (LEVELS[first], LEVELS[4])
    assert outline_thresholds([each[: FEWEST - 1] for each in counts]) == (None, None)
    assert outline_thresholds([torch.tensor([[1, 9, 9, 0]]).repeat(99, 1)] * len(LEVELS)) == (None, None)


def test_a_level_is_no_surer_than_the_levels_above_it() -> None:
    """At the highest level all of it is wrong: no level can be promised, though the one below is right."""
    right, wrong = torch.tensor([[5, 0, 0, 9]]).repeat(40, 1), torch.tensor([[0, 5, 5, 4]]).repeat(40, 1)
    assert outline_thresholds([right] * (len(LEVELS) - 1) + [wrong])[0] is None


def test_the_rim_holds_the_object_as_often_as_promised() -> None:
    """Blurred discs as probabilities of sharp ones: over 60 draws of val at least 95% of the object is held."""
    rng, held, true = np.random.default_rng(0), [], []
    y, x = np.mgrid[:24, :24]

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        radius, error = rng.uniform(4, 9, (n, 1, 1)), rng.normal(0, 1.5, (n, 1, 1))
        distance = np.hypot(x - 12, y - 12)
        return 1 / (1 + np.exp(distance - radius - error)), distance < radius

    for _ in range(60):
        probs, masks = drawn(60)
        val, masks_of_val = (torch.from_numpy(each[:30, None]) for each in (probs, masks))
        counts = [class_counts(val > level, masks_of_val).sum(1) for level in LEVELS]
        core, rim = outline_thresholds(counts)
        held += [(p & m).sum() / m.sum() for p, m in zip(probs[30:] > rim, masks[30:], strict=True)]
        true += [(p & m).sum() / max(p.sum(), 1) for p, m in zip(probs[30:] > core, masks[30:], strict=True) if p.any()]
    assert 0.95 <= np.mean(held) < 0.99
    assert 0.95 <= np.mean(true) < 0.99


def test_evaluation_counts_sets_by_class() -> None:
    model, found = build("convnet", ["a", "b"], 16, {"widths": [4]}), {"classes": {"a": {}, "b": {}}}
    add_sets(found, model, torch.eye(2), torch.arange(2))
    assert found == {"classes": {"a": {}, "b": {}}}
    model.config["set_threshold"] = 0.3
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.1, 0.9]])
    add_sets(found, model, probs, torch.tensor([0, 1, 1, 1]))
    assert (found["set_coverage"]["value"], found["set_size"]["value"]) == (0.75, 1.25)
    by_class = [(each["set_coverage"]["value"], each["set_size"]) for each in found["classes"].values()]
    assert by_class == [(1, 1), (pytest.approx(2 / 3), pytest.approx(4 / 3))]


def test_evaluation_measures_the_outlines() -> None:
    """Of the probability 0.5 everywhere the rim is all of the picture and the core none of it."""
    unet, found = build("unet", ["a"], 16, {"width": 4, "depth": 2}).eval(), {}
    torch.nn.init.zeros_(unet.head.weight)
    torch.nn.init.zeros_(unet.head.bias)
    unet.config |= {"core_threshold": 0.6, "rim_threshold": 0.4}
    masks = [torch.rand(1, 20, 30) > 0.5 for _ in range(3)]
    add_outlines(found, unet, torch.zeros(3, 3, 16, 16, dtype=torch.uint8), masks)
    assert (found["rim_recall"]["value"], found["core_precision"]["value"]) == (1, 1)
    unet.config["core_threshold"] = 0.4
    add_outlines(found, unet, torch.zeros(3, 3, 16, 16, dtype=torch.uint8), masks)
    assert found["core_precision"]["value"] == pytest.approx(np.mean([mask.float().mean() for mask in masks]))


@pytest.mark.parametrize("key", ["set_threshold", "core_threshold", "rim_threshold"])
@pytest.mark.parametrize("value", [-0.1, 1.5, "0.5", True, math.nan, None])
def test_a_threshold_beyond_its_limits_is_refused(tmp_path: Path, key: str, value: object) -> None:
    checkpoint.save(build("convnet", ["a", "b"], 16, {"widths": [4]}), tmp_path)
    checkpoint.annotate(tmp_path, **{key: value})
    with pytest.raises(CheckpointError, match=key):
        checkpoint.load(tmp_path)


def test_a_trained_folder_keeps_its_promises_and_the_page_says_them(tmp_path: Path) -> None:
    """A low threshold lets it hesitate between both classes, a higher one not."""
    torch.manual_seed(0)
    model = build("convnet", ["blue", "red"], 16, {"widths": [4]}).eval()
    photo = tmp_path / "photo.png"
    Image.new("RGB", (20, 20), (200, 40, 40)).save(photo)
    prediction = predict_photo(Image.open(photo).convert("RGB"), model)
    assert prediction.names is None
    low = min(prediction.shares.values())
    for threshold, expected in ((low - 0.01, 2), (low + 0.01, 1)):
        model.config["set_threshold"] = threshold
        checkpoint.save(model, tmp_path / "model")
        visits = Visits(Models({"model": str(tmp_path / "model")}))
        answer = visits.ask(str(photo), "model", Question())
        assert len(answer.prediction.names) == expected
        assert (" or " in said(answer)[0]) == (expected == 2)


def test_calibration_fits_the_promises_of_shipped_models() -> None:
    folder = ROOT / "checkpoints"
    for name, keys in (("flowers", ["set_threshold"]), ("horses", ["core_threshold", "rim_threshold"])):
        config = json.loads((folder / name / "config.json").read_text())["cvlab"]
        assert all(0 < config[key] < 1 for key in keys)


def test_the_page_draws_the_band_between_core_and_rim(tmp_path: Path) -> None:
    visits = Visits(Models({"shapes": str(ROOT / "checkpoints/shapes-segmenter")}))
    photo = list(example_files())[-1]
    assert '<path class="rim"' in region_picker(visits.ask(photo, "shapes", Question()))
    assert '<path class="rim"' not in region_picker(visits.ask(photo, "shapes", Question(threshold=0.9)))
