"""Scores of a trained model on pictures, as metrics.json holds them."""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from cvlab import metrics, plots
from cvlab.checkpoint import card
from cvlab.data.evaluation import foreign_views
from cvlab.explain.many import predict_views
from cvlab.learning.calibration import features_of
from cvlab.models import Model, class_sets, probabilities
from cvlab.transforms import resize_logits
from cvlab.trust.familiarity import FOREIGN, foreignness, share_of_val


def mean_loss(losses: Tensor) -> dict:
    """The mean of the losses of all pictures (N,), with its 95% interval by bootstrap."""
    value, *bounds = metrics.paired_interval(losses.numpy(), np.zeros(len(losses)), np.mean)
    return metrics.interval(value, bounds)


def mask_counts(
    model: Model, views: Tensor, masks: list[Tensor], thresholds: list[float]
) -> tuple[list[Tensor], Tensor]:
    """Counts by class (N, C, 4) at the masks' own size for each threshold, and each picture's cross-entropy, (N,).

    The cross-entropy is binary, a mean over pixels and classes.
    """
    counts: list[list[Tensor]] = [[] for _ in thresholds]
    losses = []
    for logits, mask in zip(chain.from_iterable(predict_views(model, views)), masks, strict=True):
        resized = resize_logits(logits[None], mask.shape[-2:])
        losses.append(F.binary_cross_entropy_with_logits(resized, mask[None].float()))
        probs = probabilities(model, resized)
        for each, threshold in zip(counts, thresholds, strict=True):
            each.append(metrics.segmentation_counts((probs > threshold)[0, :, None], mask[:, None]))
    return [torch.stack(each) for each in counts], torch.stack(losses)


def iou(counts: Tensor) -> float:
    """Over all images of `segmentation_counts`."""
    return metrics.segmentation_scores(counts)["iou"]


def add_calibration(found: dict, model: Model, bare: Tensor, probs: Tensor, labels: Tensor) -> str:
    """Adds the calibration error to what metrics.json holds, and returns the line of the report.

    Args:
        bare, probs: probabilities (N, C) by the logits as they are, and as the model shows them.
        labels: (N,).
    """
    error, after = (metrics.expected_calibration_error(each, labels) for each in (bare, probs))
    found["expected_calibration_error"] = error
    if "temperature" not in model.config:
        return f"\nExpected calibration error {error:.4f}. No temperature was fitted: train/calibrate.py does that."
    found |= {"temperature": model.temperature, "expected_calibration_error_at_temperature": after}
    return (
        f"\nExpected calibration error {error:.4f}, at temperature {model.temperature:.3f} (fitted on val) {after:.4f}."
    )


def add_sets(found: dict, model: Model, logits: Tensor, labels: Tensor) -> str:
    """Adds how often the sets of classes (`cvlab.models.class_sets`) hold the true one; returns the report's line."""
    if "set_threshold" not in model.config:
        return ""
    sets = class_sets(model, logits)
    held = np.array([model.class_names[label] in each for label, each in zip(labels, sets, strict=True)])
    coverage = metrics.interval(held.mean(), metrics.wilson_interval(int(held.sum()), len(held)))
    by_class = {name: held[labels == i].mean() for i, name in enumerate(model.class_names) if (labels == i).any()}
    size = float(np.mean([len(each) for each in sets]))
    found["sets"] = {"coverage": coverage, "size": size, "coverage_by_class": by_class}
    each = ", ".join(f"{name} {share:.2f}" for name, share in by_class.items())
    return (
        f"\nSets of {size:.2f} classes on average hold the true class of {coverage['value']:.4f} of the pictures "
        f"(95% interval {coverage['low']:.4f} to {coverage['high']:.4f}; promised .95); by class: {card.escaped(each)}."
    )


def add_unknown(found: dict, model: Model, views: Tensor, folders: Sequence[Path]) -> tuple[str, Image.Image]:
    """Adds how many own pictures and pictures of anything else are refused (`cvlab.trust.familiarity`).

    Args:
        views: of the own pictures, (N, 3, S, S) uint8.
        folders: of pictures of anything else.

    Returns:
        The table of the report, and the picture of the ROC curves.
    """
    statistics, curves = model.statistics or {}, {}
    own = foreignness(statistics, features_of(model, views))
    rows = [("pictures", "number", "refused", "95% interval", "area under ROC")]
    found["unknown"] = {}
    for folder in (None, *folders):
        name = folder.name if folder else "own"
        foreign = foreignness(statistics, features_of(model, foreign_views(folder, model))) if folder else own
        refused = int((share_of_val(statistics, foreign) < FOREIGN).sum())
        share = metrics.interval(refused / len(foreign), metrics.wilson_interval(refused, len(foreign)))
        found["unknown"][name] = {"n": len(foreign), "refused": share}
        area = ""
        if folder:
            truth, scores = [0] * len(own) + [1] * len(foreign), torch.cat([own, foreign]).numpy()
            found["unknown"][name]["roc_area"] = roc_auc_score(truth, scores)
            area, curves[name] = f"{found['unknown'][name]['roc_area']:.3f}", roc_curve(truth, scores)[:2]
        interval = f"{share['low']:.3f} to {share['high']:.3f}"
        rows.append((name, str(len(foreign)), f"{share['value']:.3f}", interval, area))
    return "\n" + card.table(rows), plots.roc_picture(curves)


def add_comparison(found: dict, other: str, score: str, ours: Tensor, theirs: Tensor, score_of: Callable) -> str:
    """Adds the difference from another model to what metrics.json holds, and returns the line of the report."""
    value, low, high = metrics.paired_interval(ours.numpy(), theirs.numpy(), score_of)
    found["compared"] = {"with": other, "score": score, "difference": metrics.interval(value, (low, high))}
    return f"\n{score} minus that of {other}, same pictures: {value:+.4f} (95% interval {low:+.4f} to {high:+.4f})."
