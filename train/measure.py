"""Scores of a trained model on pictures, as metrics.json holds them."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from calibration import mask_counts, object_counts
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from tqdm import tqdm

from cvlab import metrics, plots
from cvlab.checkpoint import annotate, card
from cvlab.data.duplicates import fingerprint
from cvlab.data.evaluation import foreign_views, read_views
from cvlab.data.parts import Parts
from cvlab.explain import predicted_masks
from cvlab.explain.many import predict_photos
from cvlab.files import read_json, to_json, write_text
from cvlab.learning.losses import segmentation_loss
from cvlab.metrics import boundary
from cvlab.models import Model
from cvlab.models.fused import fused
from cvlab.transforms import resize_logits
from cvlab.trust import conformal
from cvlab.trust.familiarity import FOREIGN, familiarity, features, foreignness
from cvlab.trust.reliability import examine, summary


def mean_loss(losses: Tensor) -> dict:
    """The mean of the losses of all pictures (N,), with its 95% interval by bootstrap."""
    value, *bounds = metrics.paired_interval(losses.numpy(), np.zeros(len(losses)), np.mean)
    return metrics.interval(value, bounds)


def pixel_counts(model: Model, photos: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What N photos, of `read_photos`, say of a segmenter at the own size of their masks (C, H, W).

    Returns:
        `object_counts` (N, C, 4); the same of the masks' boundaries; where classes exclude each other the confusion
        matrix of each picture's pixels (N, C, C), else an empty tensor; its loss (N,), the cross-entropy of a pixel.
    """
    criterion, found = segmentation_loss("ce" if model.exclusive else "bce", model.exclusive), []
    for logits, mask in zip(predict_photos(model, photos), masks, strict=True):
        resized, mask = resize_logits(logits, mask.shape[-2:]), mask[None]
        first, scored = model.first_object, mask.any(1, keepdim=True) if model.exclusive else None
        pair = (boundary(each)[:, first:] for each in (predicted_masks(model, resized), mask))
        confusion = torch.empty(0)
        if model.exclusive:
            labels = mask.byte().argmax(1)[scored[:, 0]]
            confusion = metrics.confusion_matrix(labels, resized.argmax(1)[scored[:, 0]], len(model.class_names))
        counts = object_counts(model, resized, mask)[0], metrics.class_counts(*pair, scored)[0]
        found.append((*counts, confusion, criterion(resized, mask)))
    return tuple(map(torch.stack, zip(*found, strict=True)))


def add_calibration(found: dict, model: Model, logits: Tensor, labels: Tensor) -> None:
    """Adds the calibration error of logits (N, C), or (N,) of pixels, as `answers` gives them."""
    both = logits if logits.ndim == 2 else torch.stack([-logits / 2, logits / 2], 1)
    shares = (both.softmax(1), (both / model.temperature).softmax(1))
    error, after = (metrics.expected_calibration_error(each, labels.long()) for each in shares)
    found["expected_calibration_error"] = error
    if "temperature" in model.config:
        found |= {"temperature": model.temperature, "expected_calibration_error_at_temperature": after}


def add_sets(found: dict, model: Model, probs: Tensor, labels: Tensor) -> None:
    """Adds how often the set of a picture's classes holds the true one, and its size, (N, C) and (N,); by class too."""
    if "set_threshold" not in model.config:
        return
    sets = [conformal.class_set(each, model.config["set_threshold"]) for each in probs.tolist()]
    holds = torch.tensor([label in each for label, each in zip(labels.tolist(), sets, strict=True)])
    sizes = torch.tensor([float(len(each)) for each in sets])
    found["set_coverage"], found["set_size"] = share_of(holds), mean_loss(sizes)
    for label, each in enumerate(found["classes"].values()):
        if (own := labels == label).any():
            each |= {"set_coverage": share_of(holds[own]), "set_size": sizes[own].mean().item()}


def share_of(true: Tensor) -> dict:
    """The share of True among (N,) bool, with its interval by Wilson."""
    return metrics.interval(true.double().mean().item(), metrics.wilson_interval(int(true.sum()), len(true)))


def add_outlines(found: dict, model: Model, photos: list[Tensor], masks: list[Tensor]) -> None:
    """Adds the share of the sure core that is object, and of the object that the rim holds, as means over pictures."""
    for name, key, wrong in (("core_precision", "core_threshold", 1), ("rim_recall", "rim_threshold", 2)):
        if key in model.config:
            (counts,) = mask_counts(model, photos, masks, [model.config[key]])
            tp, *errors = counts.sum(1).double().unbind(1)
            total = tp + errors[wrong - 1]
            found[name] = mean_loss(torch.where(total > 0, tp / total, 1.0))


def add_unknown(found: dict, pictures: dict, model: Model, views: Tensor, folders: Sequence[Path]) -> None:
    """Adds how many own views (N, 3, S, S), and pictures of anything else in folders, are refused."""
    if not folders:
        return
    familiarity(model, views[:1])  # says what is missing
    own, curves = foreignness(model.statistics, features(model, views)), {}
    for folder in (None, *folders):
        name = folder.name if folder else "own"
        scores = foreignness(model.statistics, features(model, foreign_views(folder, model))) if folder else own
        refused = (model.statistics["val"] >= scores[:, None]).float().mean(1) < FOREIGN
        truth, both = [0] * len(own) + [1] * len(scores), torch.cat([own, scores])
        area, curves[name] = roc_auc_score(truth, both), roc_curve(truth, both)[:2]
        found[f"refused {name}"] = share_of(refused) | {"n": len(scores), "roc_area": area}
    pictures["unknown.png"] = partial(plots.lines_picture, curves, FOREIGN, "share of own pictures refused")


def add_pictures(found: dict, samples: Sequence, values: list[bool | float]) -> None:
    """Adds right or wrong, or the iou, of each picture by the hash of its file, or the seed of its scene."""
    names = [str(each) if isinstance(each, int) else fingerprint(each[0]) for each in samples]
    found["pictures"] = dict(zip(names, values, strict=True))


def add_comparison(found: dict, other: str, score: str, ours: Tensor, theirs: Tensor, score_of: Callable) -> None:
    """Adds the difference from another model, whose rows are of the same pictures."""
    value, low, high = metrics.paired_interval(ours.numpy(), theirs.numpy(), score_of)
    found["compared"] = {"with": other, "score": score, "difference": metrics.interval(value, (low, high))}


def measure_trust(model: Model, parts: Parts, most: int, folder: Path) -> None:
    """Examines the maps of `most` pictures of val; writes trust.json, the model's limits and its card into its folder.

    trust.json is written after every picture: a run that was stopped goes on there if the weights are the same.
    """
    views, _ = read_views(parts, "val", model)
    views = views[torch.randperm(len(views), generator=torch.Generator().manual_seed(0))]
    most = min(most, len(views))
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    known, served = read_json(folder / "trust.json"), fused(model)
    pictures = known["maps"][:most] if known.get("weights") == weights else []
    for i in tqdm(range(len(pictures), most), "trust", most, initial=len(pictures)):
        one, *others = views.roll(-i, 0)[:13] / 255
        pictures.append(examine(served, one[None], torch.stack(others)))
        write_text(folder / "trust.json", to_json({"weights": weights, "maps": pictures}) + "\n")
    found = {"weights": weights, **summary(model, pictures), "maps": pictures}
    write_text(folder / "trust.json", to_json(found) + "\n")
    annotate(folder, limits=found["limits"])
    card.write(folder)
