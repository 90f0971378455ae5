"""Scores of a trained model on pictures, as metrics.json holds them."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from calibration import mask_counts
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from tqdm import tqdm

from cvlab import metrics, plots
from cvlab.checkpoint import annotate, card
from cvlab.data.evaluation import foreign_views, read_views
from cvlab.data.parts import Parts
from cvlab.files import read_json, to_json, write_text
from cvlab.models import Model
from cvlab.models.fused import for_serving
from cvlab.trust import conformal
from cvlab.trust.familiarity import FOREIGN, familiarity, features, foreignness
from cvlab.trust.reliability import examine, summary


def mean_loss(losses: Tensor) -> dict:
    """The mean of the losses of all pictures (N,), with its 95% interval by bootstrap."""
    value, *bounds = metrics.paired_interval(losses.numpy(), np.zeros(len(losses)), np.mean)
    return metrics.interval(value, bounds)


def iou(counts: Tensor) -> float:
    """Over all images of `segmentation_counts`."""
    return metrics.segmentation_scores(counts)["iou"]


def add_calibration(found: dict, model: Model, logits: Tensor, labels: Tensor) -> str:
    """Adds the calibration error of logits (N, C), or (N,) of pixels, as `answers` gives them; returns a line."""
    both = logits if logits.ndim == 2 else torch.stack([-logits / 2, logits / 2], 1)
    shares = (both.softmax(1), (both / model.temperature).softmax(1))
    error, after = (metrics.expected_calibration_error(each, labels.long()) for each in shares)
    found["expected_calibration_error"] = error
    told = f"\nExpected calibration error {error:.4f}"
    if "temperature" not in model.config:
        return f"{told}; --calibrate fits a temperature that may mend it."
    found |= {"temperature": model.temperature, "expected_calibration_error_at_temperature": after}
    return f"{told}, at temperature {model.temperature:.3f} (fitted on val) {after:.4f}."


def add_sets(found: dict, model: Model, probs: Tensor, labels: Tensor) -> str:
    """Adds how often the set of a picture's classes holds the true one, and its size, (N, C) and (N,); a table."""
    if "set_threshold" not in model.config:
        return "\nNo sets of classes: val was too small for a promise, or --calibrate was not run."
    sets = [conformal.class_set(each, model.config["set_threshold"]) for each in probs.tolist()]
    holds = torch.tensor([label in each for label, each in zip(labels.tolist(), sets, strict=True)])
    found["set_coverage"] = metrics.interval(holds.double().mean().item(), wilson(holds))
    found["set_size"] = mean_loss(torch.tensor([float(len(each)) for each in sets]))
    rows = [("class", "sets that hold it (95% interval)", "classes in a set")]
    for name, own in [("all", labels >= 0), *((name, labels == i) for i, name in enumerate(model.class_names))]:
        if own.any():
            low, high = wilson(holds[own])
            size = sum(len(each) for each, is_own in zip(sets, own, strict=True) if is_own) / int(own.sum())
            rows.append((name, f"{holds[own].double().mean():.3f} ({low:.3f} to {high:.3f})", f"{size:.2f}"))
    return "\n" + card.table(rows)


def wilson(right: Tensor) -> tuple[float, float]:
    """The interval of the share of True among (N,) bool."""
    return metrics.wilson_interval(int(right.sum()), len(right))


def add_outlines(found: dict, model: Model, views: Tensor, masks: list[Tensor]) -> str:
    """Adds the share of the sure core that is object, and of the object that the rim holds, as means over pictures."""
    lines = []
    for name, key, wrong, words in (
        ("core_precision", "core_threshold", 1, "of the sure core is object"),
        ("rim_recall", "rim_threshold", 2, "of the object lies inside the rim"),
    ):
        if key in model.config:
            (counts,), _ = mask_counts(model, views, masks, [model.config[key]])
            tp, *errors = counts.sum(1).double().unbind(1)
            total = tp + errors[wrong - 1]
            found[name] = mean_loss(torch.where(total > 0, tp / total, 1.0))
            lines.append("{value:.3f} ({low:.3f} to {high:.3f}) ".format(**found[name]) + words)
    told = "; ".join(lines) or "none could be promised, or --calibrate was not run"
    return f"\nOutlines fitted on val for 0.95 (means over pictures): {told}."


def add_unknown(found: dict, pictures: dict, model: Model, views: Tensor, folders: Sequence[Path]) -> str:
    """Adds how many own views (N, 3, S, S), and pictures of anything else in folders, are refused; returns a table."""
    if not folders:
        return ""
    familiarity(model, views[:1])  # says what is missing
    own, curves = foreignness(model.statistics, features(model, views)), {}
    rows = [("pictures", "number", "refused (95% interval)", "area under ROC")]
    for folder in (None, *folders):
        name = folder.name if folder else "own"
        scores = foreignness(model.statistics, features(model, foreign_views(folder, model))) if folder else own
        refused = int(((model.statistics["val"] >= scores[:, None]).float().mean(1) < FOREIGN).sum())
        share = metrics.interval(refused / len(scores), metrics.wilson_interval(refused, len(scores)))
        truth, both = [0] * len(own) + [1] * len(scores), torch.cat([own, scores])
        area, curves[name] = roc_auc_score(truth, both), roc_curve(truth, both)[:2]
        found[f"refused {name}"] = share | {"n": len(scores), "roc_area": area}
        told = "{value:.3f} ({low:.3f} to {high:.3f})".format(**share)
        rows.append((name, str(len(scores)), told, f"{area:.3f}"))
    pictures["unknown.png"] = partial(plots.lines_picture, curves, FOREIGN, "share of own pictures refused")
    return "\n" + card.table(rows)


def add_comparison(found: dict, other: str, score: str, ours: Tensor, theirs: Tensor, score_of: Callable) -> str:
    """Adds the difference from another model to what metrics.json holds, and returns the line of the report."""
    value, low, high = metrics.paired_interval(ours.numpy(), theirs.numpy(), score_of)
    found["compared"] = {"with": other, "score": score, "difference": metrics.interval(value, (low, high))}
    return f"\n{score} minus that of {other}, same pictures: {value:+.4f} (95% interval {low:+.4f} to {high:+.4f})."


def measure_trust(model: Model, parts: Parts, most: int, folder: Path) -> None:
    """Examines the maps of `most` pictures of val; writes trust.json, the model's limits and its card into its folder.

    trust.json is written after every picture: a run that was stopped goes on there if the weights are the same.
    """
    views, _ = read_views(parts, "val", model)
    views = views[torch.randperm(len(views), generator=torch.Generator().manual_seed(0))]
    most = min(most, len(views))
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    known, served = read_json(folder / "trust.json"), for_serving(model)
    pictures = known["maps"][:most] if known.get("weights") == weights else []
    for i in tqdm(range(len(pictures), most), "trust", most, initial=len(pictures)):
        one, *others = views.roll(-i, 0)[:13] / 255
        pictures.append(examine(served, one[None], torch.stack(others)))
        write_text(folder / "trust.json", to_json({"weights": weights, "maps": pictures}) + "\n")
    found = {"weights": weights, **summary(model, pictures), "maps": pictures}
    write_text(folder / "trust.json", to_json(found) + "\n")
    annotate(folder, limits=found["limits"])
    card.write(folder)
