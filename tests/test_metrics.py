"""Scores against scikit-learn, against counts by hand, and against closed forms."""

import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor

from cvlab.metrics import (
    balanced_scores,
    bootstrap_intervals,
    class_counts,
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    paired_interval,
    reliability,
    segmentation_scores,
    wilson_interval,
)


def random_masks(n: int, channels: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predicted and true masks (n, channels, 9, 7) that agree more often than not."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(n, channels, 9, 7, generator=generator) < torch.rand(n, 1, 1, 1, generator=generator)
    wrong = torch.rand(masks.shape, generator=generator) < 0.3 * torch.rand(n, 1, 1, 1, generator=generator)
    return masks ^ wrong, masks


# --- classification ---------------------------------------------------------------------------------------------------


def test_confusion_matrix_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, 200), rng.integers(0, 5, 200)  # class 4 never occurs, class 5 nowhere
    counted = confusion_matrix(torch.from_numpy(labels), torch.from_numpy(predictions), 6)
    assert np.array_equal(counted, sklearn.metrics.confusion_matrix(labels, predictions, labels=range(6)))
    accuracy = counted.diag().sum().item() / counted.sum().item()
    assert accuracy == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions), abs=1e-9)
    assert confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2).tolist() == [[1, 1], [0, 1]]


def test_balanced_scores_by_hand_and_of_scikit_learn() -> None:
    """120 against 7, all called the first class: accuracy 0.94, but recalls 1 and 0, F1 240 / 247 and 0."""
    found = balanced_scores(torch.tensor([0] * 120 + [1] * 7), torch.zeros(127, dtype=torch.long))
    assert found["balanced_accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["macro_f1"]["value"] == pytest.approx(120 / 247)
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 200), rng.integers(1, 6, 200)  # classes without labels or predictions
    found = balanced_scores(torch.from_numpy(labels), torch.from_numpy(predicted))
    recalls = [(predicted[labels == name] == name).mean() for name in range(4)]
    assert found["balanced_accuracy"]["value"] == pytest.approx(np.mean(recalls))
    expected = sklearn.metrics.f1_score(labels, predicted, average="macro")
    assert found["macro_f1"]["value"] == pytest.approx(expected)
    for each in found.values():
        assert each["low"] < each["value"] < each["high"]


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_interval_of_the_tables(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_bounds_are_where_the_score_test_turns() -> None:
    """The observed proportion is z standard errors away from a bound p: (s / n - p)^2 = z^2 p (1 - p) / n."""
    z = 1.959963984540054
    for n in (1, 7, 250):
        for successes in range(0, n + 1, max(1, n // 7)):
            for bound in wilson_interval(successes, n):
                assert 0 <= bound <= 1
                assert (successes / n - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / n, abs=1e-9)
    assert wilson_interval(0, 0) == (0.0, 1.0)


# --- segmentation -----------------------------------------------------------------------------------------------------


def counts_of(predicted: Tensor, masks: Tensor) -> Tensor:
    """Over all channels of an image, (N, 4)."""
    return class_counts(predicted, masks).sum(1)


def test_counts_by_hand() -> None:
    predicted = torch.tensor([[[[1, 1, 0, 0]]], [[[0, 0, 0, 0]]]]).bool()
    masks = torch.tensor([[[[1, 0, 1, 0]]], [[[0, 0, 0, 1]]]]).bool()
    assert counts_of(predicted, masks).tolist() == [[1, 1, 1, 1], [0, 0, 1, 3]]
    scores = segmentation_scores(counts_of(predicted, masks))
    assert scores == {
        "iou": 1 / 4,
        "iou_per_image": (1 / 3 + 0) / 2,
        "dice": 2 / 5,
        "precision": 1 / 2,
        "recall": 1 / 3,
        "accuracy": 5 / 8,
    }


def test_scores_are_scikit_learns_over_all_pixels() -> None:
    predicted, masks = random_masks(12)
    scores = segmentation_scores(counts_of(predicted, masks))
    truth, guess = masks.flatten().numpy(), predicted.flatten().numpy()
    assert scores["iou"] == pytest.approx(sklearn.metrics.jaccard_score(truth, guess), abs=1e-9)
    assert scores["dice"] == pytest.approx(sklearn.metrics.f1_score(truth, guess), abs=1e-9)
    assert scores["precision"] == pytest.approx(sklearn.metrics.precision_score(truth, guess), abs=1e-9)
    assert scores["recall"] == pytest.approx(sklearn.metrics.recall_score(truth, guess), abs=1e-9)
    assert scores["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, guess), abs=1e-9)
    each = [sklearn.metrics.jaccard_score(m.flatten(), p.flatten()) for m, p in zip(masks, predicted, strict=True)]
    assert scores["iou_per_image"] == pytest.approx(np.mean(each), abs=1e-9)
    assert abs(scores["iou"] - scores["iou_per_image"]) > 1e-3  # two scores, not one


def test_scores_do_not_depend_on_the_batch_size() -> None:
    predicted, masks = random_masks(16)
    counts = {
        size: torch.cat([counts_of(*pair) for pair in zip(predicted.split(size), masks.split(size), strict=True)])
        for size in (1, 2, 16)
    }
    assert segmentation_scores(counts[1]) == segmentation_scores(counts[2]) == segmentation_scores(counts[16])


def test_empty_masks() -> None:
    nothing, something = torch.zeros(2, 1, 4, 4, dtype=torch.bool), torch.ones(2, 1, 4, 4, dtype=torch.bool)

    def scores(predicted: Tensor, masks: Tensor) -> dict[str, float]:
        return segmentation_scores(counts_of(predicted, masks))

    assert set(scores(nothing, nothing).values()) == {1.0}
    assert set(scores(something, nothing).values()) == {0.0}
    assert set(scores(nothing, something).values()) == {0.0}
    half = scores(torch.cat([nothing, something]), torch.cat([nothing, something]))
    assert set(half.values()) == {1.0}
    # Among others, an image without a mask counts in the mean over images as the rest do.
    assert scores(torch.cat([nothing, something]), torch.cat([nothing, nothing]))["iou_per_image"] == 0.5


# --- bootstrap --------------------------------------------------------------------------------------------------------


def test_bootstrap_intervals_surround_the_scores_and_repeat() -> None:
    counts = counts_of(*random_masks(40))
    intervals = bootstrap_intervals(counts)
    for name, value in segmentation_scores(counts).items():
        low, high = intervals[name]
        assert 0 <= low < value < high <= 1
    assert bootstrap_intervals(counts) == intervals


def test_bootstrap_intervals_shrink_with_the_number_of_images() -> None:
    """As the root of it: every image sixteen times, a quarter of the width."""
    counts = counts_of(*random_masks(40))
    few, many = (bootstrap_intervals(counts.repeat(times, 1)) for times in (1, 16))
    for name, (low, high) in few.items():
        assert (high - low) / (many[name][1] - many[name][0]) == pytest.approx(4, rel=0.25)


def test_the_interval_of_the_mean_iou_is_that_of_the_normal_distribution() -> None:
    counts = counts_of(*random_masks(300)).numpy()
    each = counts[:, 0] / counts[:, :3].sum(1)
    half = 1.96 * each.std() / math.sqrt(len(each))
    low, high = bootstrap_intervals(torch.from_numpy(counts))["iou_per_image"]
    assert low == pytest.approx(each.mean() - half, abs=0.2 * half)
    assert high == pytest.approx(each.mean() + half, abs=0.2 * half)


def test_paired_interval() -> None:
    rng = np.random.default_rng(0)
    hardness = rng.random(200)
    first, second = hardness < 0.8, hardness < 0.7  # the first is right wherever the second is
    difference, low, high = paired_interval(first, second, np.mean)
    assert difference == pytest.approx(first.mean() - second.mean(), abs=1e-12)
    assert 0 < low < difference < high
    assert paired_interval(first, first, np.mean) == (0, 0, 0)
    assert paired_interval(second, first, np.mean) == pytest.approx((-difference, -high, -low))
    # Images are drawn for both together: drawn apart, the interval would be more than twice as wide and hold 0.
    apart = 2 * 1.96 * math.sqrt((first.var() + second.var()) / len(first))
    assert high - low < 0.7 * apart


# --- calibration ------------------------------------------------------------------------------------------------------

PROBS = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55], [0.6, 0.4]])
LABELS = torch.tensor([0, 1, 1, 1, 1])  # right, wrong, right, right, wrong


def test_reliability_by_hand() -> None:
    table = reliability(PROBS, LABELS, bins=4)  # up to .25, .5, .75, 1
    expected = [[0, 0, 0], [0, 0, 0], [(0.7 + 0.55 + 0.6) / 3, 2 / 3, 3], [0.85, 1 / 2, 2]]
    np.testing.assert_allclose(table, expected, atol=1e-6)
    error = 3 / 5 * (2 / 3 - 1.85 / 3) + 2 / 5 * (0.85 - 0.5)
    assert expected_calibration_error(PROBS, LABELS, bins=4) == pytest.approx(error, abs=1e-6)


def test_a_model_that_is_as_often_right_as_it_says_has_no_calibration_error() -> None:
    probs = torch.tensor([[0.8, 0.2]] * 10 + [[0.4, 0.6]] * 10, dtype=torch.float64)
    labels = torch.tensor([0] * 8 + [1] * 2 + [1] * 6 + [0] * 4)
    assert expected_calibration_error(probs, labels) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("logit", [0.5, 1.0, 6.0])
def test_fit_temperature_finds_the_closed_form(logit: float) -> None:
    """Right 8 times of 10 with one logit: the best probability is 0.8, so logit / T = ln 4."""
    logits = torch.tensor([[logit, 0.0]] * 10)
    assert fit_temperature(logits, torch.tensor([0] * 8 + [1] * 2)) == pytest.approx(logit / math.log(4), rel=1e-3)
