"""What a trained model is told about itself at the end: how sure it may be. Fitted on val, kept in its folder."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cvlab import checkpoint
from cvlab.checkpoint.folder import save_statistics
from cvlab.data.evaluation import foreign_views, read_views
from cvlab.data.parts import Parts
from cvlab.explain.many import predict_views
from cvlab.metrics import fit_temperature, set_threshold
from cvlab.models import Model, probabilities
from cvlab.transforms import resize_logits
from cvlab.trust.familiarity import features, foreignness

PIXELS = 10_000  # of each picture, drawn at random
MOST = 2000  # pictures of train, and of others, that familiarity is fitted on
MOST_VAL = 1000  # numbers that are kept of val
PRETRAINED = ("timm", "timm_head")  # networks that were trained on more than the model's own classes
DIRECTIONS = 32  # of the features of such a network: tests/bench/unknown.py measures more and fewer
FAMILIARITY = {  # how it was fitted, as config.json says it
    "features": "Familiarity: by how much of a photo's features lies outside those of the own photos.",
    "others": "Familiarity: by a class for rejecting photos, trained on the photos of --others.",
    "synthetic": "Familiarity: by a class for rejecting photos, trained on pictures made of the own photos. That is "
    "weak: give a folder of photos of anything else with --others.",
}


def calibrate(folder: Path, parts: Parts, others: Path | None = None) -> Iterator[str]:
    """Fits what the folder of a model keeps about it on val, writes it there, and says it in sentences.

    Args:
        parts: those of its training.
        others: photos of anything else, for `cvlab.trust.familiarity`.
    """
    model = checkpoint.load(folder)
    views, labels = read_views(parts, "val", model)
    logits, truth = answers(model, views, labels)
    try:
        temperature = fit_temperature(logits, truth)
        yield f"Temperature {temperature:.3f}, fitted on val: probabilities are those of the logits divided by it."
    except ValueError as error:
        temperature = None
        yield f"Probabilities stay as they are: on the {len(views)} pictures of val {error}."
    checkpoint.annotate(folder, temperature=temperature)
    if model.task == "classification":
        model.temperature = temperature or 1.0
        try:
            threshold = set_threshold(probabilities(model, logits), truth)
            yield f"Sets of classes: every class with a probability from {threshold:.3f} on; 95% hold the true one."
        except ValueError as error:
            threshold = None
            yield f"No sets of classes: {error}."
        checkpoint.annotate(folder, set_threshold=threshold)
        some = random.Random(0).sample(parts.samples["train"], min(MOST, len(parts.samples["train"])))
        own, _ = read_views(replace(parts, samples={"train": some}), "train", model)
        foreign = foreign_views(others, model, MOST) if others else None
        statistics, how = familiarity_statistics(model, own, views, foreign)
        save_statistics(folder, statistics)
        checkpoint.annotate(folder, familiarity=how)
        yield FAMILIARITY[how]


def familiarity_statistics(
    model: Model, own: Tensor, val: Tensor, others: Tensor | None
) -> tuple[dict[str, Tensor], str]:
    """What `cvlab.trust.familiarity` needs, and how it was made: a key of `FAMILIARITY`.

    Args:
        own, val, others: pictures of train, of val and of anything else, (N, 3, S, S) uint8.
    """
    rows = features_of(model, own)
    if others is None and model.config["network"] in PRETRAINED:
        directions = torch.linalg.svd(F.normalize(rows, dim=1), full_matrices=False).Vh[:DIRECTIONS]
        found, how = {"basis": directions.T.half().contiguous()}, "features"
    else:
        how = "synthetic" if others is None else "others"
        found = _reject_class(rows, features_of(model, imitations(own) if others is None else others))
    foreign = foreignness(found | {"val": rows}, features_of(model, val)).sort().values
    if len(foreign) > MOST_VAL:
        foreign = foreign.quantile(torch.linspace(0, 1, MOST_VAL))
    return found | {"val": foreign}, how


def _reject_class(own: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Weight (D,) and bias (1,) of a logistic regression from features (N, D) to whether they are of others."""
    from sklearn.linear_model import LogisticRegression  # imported here: it takes a second

    mean, scale = own.mean(0), own.std(0, correction=0).clamp(min=1e-6)
    rows, of_others = (torch.cat([own, others]) - mean) / scale, [0] * len(own) + [1] * len(others)
    fitted = LogisticRegression(C=0.01, class_weight="balanced", max_iter=500).fit(rows.numpy(), of_others)
    weight = torch.from_numpy(fitted.coef_[0]).float() / scale
    return {"weight": weight, "bias": torch.from_numpy(fitted.intercept_).float() - weight @ mean}


def features_of(model: Model, views: Tensor) -> Tensor:
    """`cvlab.trust.familiarity.features` of many views (N, 3, S, S) uint8: (N, D)."""
    return torch.cat([features(model, batch / 255) for batch in tqdm(views.split(32), "features", leave=False)])


def imitations(views: Tensor) -> Tensor:
    """As many pictures made of these (N, 3, S, S) uint8: two mixed, 4x4 tiles in another order, colours exchanged."""
    drawn = torch.Generator().manual_seed(0)
    views = views[torch.randperm(len(views), generator=drawn)].float()
    mixed, cut, coloured = views.tensor_split(3)
    for side in (2, 3):
        bands = cut.tensor_split(4, side)
        cut = torch.cat([bands[i] for i in (2, 0, 3, 1)], side)
    return torch.cat([(mixed + mixed.roll(1, 0)) / 2, cut, coloured[:, [1, 2, 0]]]).to(torch.uint8)


def answers(model: Model, views: Tensor, labels: list) -> tuple[Tensor, Tensor]:
    """Logits and truth for `cvlab.metrics.fit_temperature`: of each picture, or of a sample of each picture's pixels.

    Args:
        views: (N, 3, S, S) uint8.
        labels: N classes, or masks (C, H, W) bool.
    """
    if model.task == "classification":
        return torch.cat([*predict_views(model, views)]), torch.tensor(labels)
    drawn, pairs = torch.Generator().manual_seed(0), []
    for logits, mask in zip(chain.from_iterable(predict_views(model, views)), labels, strict=True):
        chosen = torch.randint(mask.numel(), (PIXELS,), generator=drawn)
        pairs.append((resize_logits(logits[None], mask.shape[-2:]).flatten()[chosen], mask.flatten()[chosen]))
    logits, truth = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(truth)
