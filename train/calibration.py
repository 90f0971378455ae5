"""What a trained model is told about itself at the end: how sure it may be, and what its photos look like."""

import random
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from cvlab import checkpoint
from cvlab.checkpoint import hub
from cvlab.data.evaluation import MOST, foreign_views, read_views
from cvlab.data.parts import Parts
from cvlab.explain.many import predict_views
from cvlab.files import whole_file
from cvlab.metrics import fit_temperature
from cvlab.models import Model, probabilities
from cvlab.render import to_picture
from cvlab.transforms import resize_logits
from cvlab.trust import conformal
from cvlab.trust.familiarity import PRETRAINED, fit_statistics

PIXELS = 10_000  # of each picture, drawn at random


def calibrate(folder: str | Path, parts: Parts, others: Path | None = None, thumbnails: bool = False) -> Model:
    """Fits on val what a model's folder tells about it, and writes it there.

    `others` are photos of anything else. Small pictures of train are kept if `thumbnails`.
    """
    model = checkpoint.load(folder)
    views, labels = read_views(parts, "val", model)
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
    if thumbnails and model.statistics:
        small = F.interpolate(own[: len(model.statistics["rows"])] / 255, hub.SIDE, mode="area")
        with whole_file(Path(folder) / hub.THUMBNAILS) as writing:
            to_picture(make_grid(small, hub.COLUMNS, padding=0)).save(writing, "JPEG")
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
    counts, _ = mask_counts(model, views, labels, conformal.LEVELS)
    core, rim = conformal.outline_thresholds([each.sum(1) for each in counts])
    if core is None or rim is None:
        print(f"No {'sure core' if core is None else 'rim'} of masks can be promised from these {len(views)} pictures.")
    return {"core_threshold": core, "rim_threshold": rim}


def mask_counts(
    model: Model, views: Tensor, masks: list[Tensor], thresholds: list[float]
) -> tuple[list[Tensor], Tensor]:
    """`segmentation_counts` by class (N, C, 4) for each threshold, in rising order, and each picture's loss, (N,).

    They are counted at the masks' own size. The loss is binary cross-entropy, a mean over pixels and classes.
    """
    levels, counts, losses = torch.tensor(thresholds), [], []
    for logits, mask in zip(chain.from_iterable(predict_views(model, views)), masks, strict=True):
        resized = resize_logits(logits[None], mask.shape[-2:])
        losses.append(F.binary_cross_entropy_with_logits(resized, mask[None].float()))
        # How many thresholds each pixel exceeds: so one pass over the pixels serves all of them.
        exceeded, by_class = torch.bucketize(probabilities(model, resized)[0], levels), []
        for ranks, true in zip(exceeded, mask, strict=True):
            each = torch.stack([torch.bincount(ranks[part], minlength=len(levels) + 1) for part in (true, ~true)])
            below = each.cumsum(1)[:, :-1]
            by_class.append(torch.cat([each.sum(1, keepdim=True) - below, below]).T)  # (thresholds, 4)
        counts.append(torch.stack(by_class))
    return list(torch.stack(counts).unbind(2)), torch.stack(losses)


def answers(model: Model, views: Tensor, labels: list) -> tuple[Tensor, Tensor]:
    """Logits and truth for `fit_temperature`: of pictures (N, 3, S, S) uint8, or of a sample of each one's pixels."""
    if model.task == "classification":
        return torch.cat([*predict_views(model, views)]), torch.tensor(labels)
    drawn, pairs = torch.Generator().manual_seed(0), []
    for logits, mask in zip(chain.from_iterable(predict_views(model, views)), labels, strict=True):
        chosen = torch.randint(mask.numel(), (PIXELS,), generator=drawn)
        resized = resize_logits(logits[None], mask.shape[-2:])
        pairs.append(torch.stack([resized.flatten()[chosen], mask.flatten()[chosen]]))
    return torch.cat(pairs, 1).unbind()
