"""What a trained model is told about itself at the end: how sure it may be, and what its photos look like."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cvlab import checkpoint
from cvlab.data.evaluation import MOST, foreign_views, read_photos, read_views
from cvlab.data.parts import Parts
from cvlab.explain import predicted_masks
from cvlab.explain.many import predict_photos, predict_views
from cvlab.metrics import class_counts, fit_temperature
from cvlab.models import Model, probabilities
from cvlab.transforms import resize_logits
from cvlab.trust import conformal
from cvlab.trust.familiarity import PRETRAINED, fit_statistics

PIXELS = 10_000  # of each picture, drawn at random


def calibrate(folder: str | Path, parts: Parts, others: Path | None = None) -> Model:
    """Fits on val what a model's folder tells about it, and writes it there. `others` are photos of anything else."""
    model = checkpoint.load_own(str(folder))
    read = read_views if model.task == "classification" else read_photos
    views, labels = read(parts, "val", model)
    before = model.temperature
    model.temperature = model.config["temperature"] = fit_temperature(*answers(model, views, labels))
    model.threshold = 1 / (1 + (1 / model.threshold - 1) ** (before / model.temperature))  # masks stay as they are
    unfit = f": none fits these {len(views)} pictures, so probabilities stay as they are" * (model.temperature == 1)
    print(f"Temperature {model.temperature:.3f}, fitted on val{unfit}.")
    if model.task == "classification" and (others or model.config["network"] in PRETRAINED):
        some = random.Random(0).sample(parts.samples["train"], min(MOST, len(parts.samples["train"])))
        own, of = read_views(replace(parts, samples={"train": some}), "train", model)
        foreign = foreign_views(others, model) if others else None
        model.statistics = fit_statistics(model, own, torch.tensor(of), views, foreign)
        print(f"Photos of none of its classes are told by {'photos of other things' if others else 'features'}.")
    for name, value in promises(model, views, labels).items():
        model.config.pop(name, None)
        if value is not None:
            model.config[name] = value
    checkpoint.save(model, folder)
    return model


def promises(model: Model, views: Tensor, labels: list) -> dict[str, float | None]:
    """The thresholds of `cvlab.trust.conformal`, by their names in config.json, fitted on val; None where none holds.

    What cannot be promised is printed.
    """
    if model.task == "classification":
        probs = probabilities(model, torch.cat([*predict_views(model, views)]))
        try:
            return {"set_threshold": conformal.set_threshold(probs, torch.tensor(labels))}
        except ValueError as error:
            print(f"No sets of classes: {error}")
            return {"set_threshold": None}
    if model.exclusive:  # its masks have no threshold
        return {}
    counts = mask_counts(model, views, labels, conformal.LEVELS)
    core, rim = conformal.outline_thresholds([each.sum(1) for each in counts])
    if core is None or rim is None:
        print(f"No {'sure core' if core is None else 'rim'} of masks can be promised from these {len(views)} pictures.")
    return {"core_threshold": core, "rim_threshold": rim}


def object_counts(model: Model, logits: Tensor, masks: Tensor) -> Tensor:
    """`class_counts` of the predicted masks, (N, C, 4), of all classes but the background; both are (N, C, H, W).

    Where classes exclude each other, a pixel without a class is not scored.
    """
    first, scored = model.first_object, masks.any(1, keepdim=True) if model.exclusive else None
    return class_counts(predicted_masks(model, logits)[:, first:], masks[:, first:], scored)


def mask_counts(model: Model, photos: list[Tensor], masks: list[Tensor], thresholds: list[float]) -> list[Tensor]:
    """`class_counts` (N, C, 4) at the masks' own size for each threshold, in rising order; classes may overlap."""
    levels, counts = torch.tensor(thresholds), []
    for logits, mask in zip(predict_photos(model, photos), masks, strict=True):
        resized = resize_logits(logits, mask.shape[-2:])
        # How many thresholds each pixel exceeds: so one pass over the pixels serves all of them.
        exceeded, by_class = torch.bucketize(probabilities(model, resized)[0], levels), []
        for ranks, true in zip(exceeded, mask, strict=True):
            each = torch.stack([torch.bincount(ranks[part], minlength=len(levels) + 1) for part in (true, ~true)])
            below = each.cumsum(1)[:, :-1]
            by_class.append(torch.cat([each.sum(1, keepdim=True) - below, below]).T)  # (thresholds, 4)
        counts.append(torch.stack(by_class))
    return list(torch.stack(counts).unbind(2))


def answers(model: Model, views: Tensor | list[Tensor], labels: list) -> tuple[Tensor, Tensor]:
    """Logits and truth for `fit_temperature`: of `read_views`, or of a sample of each one's pixels of `read_photos`."""
    if model.task == "classification":
        return torch.cat([*predict_views(model, views)]), torch.tensor(labels)
    drawn, pairs = torch.Generator().manual_seed(0), []
    for logits, mask in zip(predict_photos(model, views), labels, strict=True):
        resized = resize_logits(logits, mask.shape[-2:])
        if model.exclusive:
            scores, truth = resized[0].flatten(1)[:, mask.any(0).flatten()].T, mask.byte().argmax(0)[mask.any(0)]
        else:
            scores, truth = resized.flatten(), mask.flatten()
        if len(truth):
            chosen = torch.randint(len(truth), (PIXELS,), generator=drawn)
            pairs.append((scores[chosen], truth[chosen]))
    return tuple(map(torch.cat, zip(*pairs, strict=True)))
