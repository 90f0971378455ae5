"""Scores and calibration. Counts are added up first and scored at the end, so that the batch size changes nothing."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RESAMPLES = 1000  # of the images, for an interval by bootstrap


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """(num_classes, num_classes) int64: how many images of class row were predicted as class column."""
    index = labels.long() * num_classes + predictions.long()
    return torch.bincount(index.flatten(), minlength=num_classes**2).view(num_classes, num_classes)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson, "Probable Inference", 1927); (0, 1) if nothing was counted."""
    from scipy.stats import binomtest  # imported here: the page starts without scipy

    if n == 0:
        return 0.0, 1.0
    found = binomtest(successes, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def interval(value: float, bounds: tuple[float, float]) -> dict[str, float]:
    """A score with the bounds of its 95% interval, as metrics.json holds it."""
    return {"value": value, "low": bounds[0], "high": bounds[1]}


def normal_interval(value: float, error: float, tried: int = 1) -> dict[str, float]:
    """`interval` of a value with a standard error: of 95% for all that were tried together (Bonferroni)."""
    reach = NormalDist().inv_cdf(1 - 0.025 / max(tried, 1)) * error
    return interval(value, (value - reach, value + reach))


def balanced_scores(labels: Tensor, predicted: Tensor) -> dict[str, dict]:
    """Scores in which every class counts the same, whatever its number of images, as scikit-learn defines them.

    "balanced_accuracy" is the mean recall of the classes among the labels (N,), "macro_f1" the mean F1 of the classes
    among labels and predictions (N,). Their intervals are percentiles over images drawn with replacement.
    """
    labels, predicted = labels.numpy(), predicted.numpy()
    drawn = [_balanced(labels[rows], predicted[rows]) for rows in _resampled(len(labels))]
    pairs = zip(_balanced(labels, predicted), zip(*drawn, strict=True), strict=True)
    accuracy, f1 = (interval(value, _middle_95(values)) for value, values in pairs)
    return {"balanced_accuracy": accuracy, "macro_f1": f1}


def _balanced(labels: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    classes = int(max(labels.max(), predicted.max())) + 1
    counted = (labels, predicted, labels[labels == predicted])
    true, found, right = (np.bincount(each, minlength=classes) for each in counted)
    recalls, f1 = right[true > 0] / true[true > 0], 2 * right / np.maximum(true + found, 1)
    return float(recalls.mean()), float(f1[true + found > 0].mean())


def class_counts(predicted: Tensor, masks: Tensor, scored: Tensor | None = None) -> Tensor:
    """The true positive, false positive, false negative and true negative pixels of each image and channel, (N, C, 4).

    `predicted` and `masks` are (N, C, H, W) bool, `scored` (N, 1, H, W) the pixels that count, by default all.
    """
    scored = torch.ones_like(masks[:, :1]) if scored is None else scored
    pairs = (predicted & masks, predicted & ~masks, ~predicted & masks, ~predicted & ~masks)
    return torch.stack([(each & scored).sum((2, 3)) for each in pairs], dim=2)


def boundary(masks: Tensor) -> Tensor:
    """The pixels of masks (N, C, H, W) bool that lie within 2% of the image's diagonal of the mask's edge.

    Counted by them, an iou judges outlines, also of large objects (Cheng et al., "Boundary IoU", 2021). The frame of
    the picture is an edge. Distance is the larger one of those along rows and along columns.
    """
    reach = max(1, round(0.02 * math.hypot(*masks.shape[-2:])))
    outside = F.pad((~masks).float(), (reach,) * 4, value=1.0)
    rows = F.max_pool2d(outside, (1, 2 * reach + 1), 1)
    return masks & (F.max_pool2d(rows, (2 * reach + 1, 1), 1) > 0)


def segmentation_scores(counts: Tensor | np.ndarray) -> dict[str, float]:
    """Scores over all pixels, and the mean of the images' own iou, from counts (N, 4) of a class or of all.

    An empty mask that is predicted empty scores 1.
    """
    counts = np.asarray(counts, dtype=np.float64)
    tp, fp, fn, tn = counts.sum(axis=0)
    undefined = 0.0 if fp + fn else 1.0  # 0/0 counts as 0 if there were errors, else as 1
    union = counts[:, :3].sum(axis=1)
    per_image = np.divide(counts[:, 0], union, out=np.ones(len(counts)), where=union > 0)
    return {
        "iou": tp / (tp + fp + fn) if tp + fp + fn else undefined,
        "iou_per_image": per_image.mean(),
        "dice": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else undefined,
        "precision": tp / (tp + fp) if tp + fp else undefined,
        "recall": tp / (tp + fn) if tp + fn else undefined,
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
    }


def bootstrap_intervals(counts: Tensor) -> dict[str, tuple[float, float]]:
    """95% intervals of every score of `segmentation_scores`: percentiles over images drawn with replacement."""
    counts = np.asarray(counts)
    scores = [segmentation_scores(counts[rows]) for rows in _resampled(len(counts))]
    return {name: _middle_95([score[name] for score in scores]) for name in scores[0]}


def class_ious(counts: Tensor | np.ndarray) -> dict[int, float]:
    """The iou of each class over all pixels, by its index, from `class_counts` (N, C, 4).

    A class that is in no mask and in no prediction is left out.
    """
    counts = np.asarray(counts, dtype=np.float64)
    tp, union = counts[..., 0].sum(0), counts[..., :3].sum((0, 2))
    return {i: float(tp[i] / union[i]) for i in np.flatnonzero(union)}


def mean_iou(counts: Tensor | np.ndarray) -> float:
    """The mean of `class_ious`; 1 if no class is there."""
    return float(np.mean(list(class_ious(counts).values()) or [1.0]))


def class_scores(counts: Tensor, class_names: Sequence[str]) -> dict:
    """`class_ious` by name, None for a class that is not there, and their mean with its interval by bootstrap."""
    counts = np.asarray(counts, dtype=np.float64)
    bounds = _middle_95([mean_iou(counts[rows]) for rows in _resampled(len(counts))])
    ious = class_ious(counts)
    by_class = {name: ious.get(i) for i, name in enumerate(class_names)}
    return {"mean_iou": interval(mean_iou(counts), bounds), "iou_by_class": by_class}


def pixel_accuracy(confusions: Tensor) -> dict[str, float]:
    """The share of pixels whose class is right, with its interval by bootstrap, from (N, C, C) of each image."""
    right, pixels = confusions.diagonal(dim1=1, dim2=2).sum(1).numpy(), confusions.sum((1, 2)).numpy()
    drawn = _middle_95([right[rows].sum() / max(pixels[rows].sum(), 1) for rows in _resampled(len(right))])
    return interval(float(right.sum() / max(pixels.sum(), 1)), drawn)


def paired_interval(
    first: np.ndarray, second: np.ndarray, score: Callable[[np.ndarray], float]
) -> tuple[float, float, float]:
    """Difference of a score between two models on the same images, with its 95% bootstrap interval.

    Args:
        first, second: a row for each image, such as right or wrong, or its `class_counts`.
        score: rows to a number, such as their mean.

    Returns:
        score(first) - score(second), and the bounds of the interval. The same images are drawn for both models.
    """
    differences = [score(first[rows]) - score(second[rows]) for rows in _resampled(len(first))]
    return float(score(first) - score(second)), *_middle_95(differences)


def _resampled(n: int) -> np.ndarray:
    """Rows of n images drawn with replacement, the same in every call."""
    return np.random.default_rng(0).integers(0, n, size=(RESAMPLES, n))


def _middle_95(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def reliability(probs: Tensor, labels: Tensor, bins: int = 15) -> np.ndarray:
    """Mean confidence, accuracy and number of the images whose confidence is in each bin, (bins, 3).

    The bins have equal width over the probability of the predicted class; an empty one has zeros. `probs` are (N, C).
    """
    confidence, predicted = probs.double().max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1  # (0, 1/bins] is the first, as in Guo et al.
    count = torch.bincount(index, minlength=bins)
    totals = [
        torch.bincount(index, weights=each, minlength=bins) for each in (confidence, (predicted == labels).double())
    ]
    return torch.stack([total / count.clamp(min=1) for total in totals] + [count], dim=1).numpy()


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over the bins of `reliability`, weighted by their images.

    Guo et al., "On Calibration of Modern Neural Networks", 2017, equation 3.
    """
    confidence, accuracy, count = reliability(probs, labels, bins).T
    return float((count * np.abs(confidence - accuracy)).sum() / count.sum())


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T for which softmax(logits / T) has the lowest cross-entropy (Guo et al., section 4.2).

    Fit it on val. It changes the probabilities, but never which class is predicted. For logits (N,) of pixels it is
    sigmoid(logits / T). Where none between exp(-3) and exp(3) is best, as if every answer is right, it is 1.
    """
    from scipy.optimize import minimize_scalar  # imported here: the page starts without scipy

    logits = logits.double()
    loss, labels = (
        (F.cross_entropy, labels) if logits.ndim == 2 else (F.binary_cross_entropy_with_logits, labels.double())
    )
    found = minimize_scalar(
        lambda log_t: loss(logits / math.exp(log_t), labels).item(), bounds=(-3.0, 3.0), method="bounded"
    )
    return math.exp(found.x) if abs(found.x) < 2.99 else 1.0
