"""What a trained model is told about itself at the end: how sure it may be. Fitted on val, kept in its folder."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from cvlab import checkpoint
from cvlab.data.evaluation import read_views
from cvlab.data.parts import Parts
from cvlab.explain.many import predict_views
from cvlab.metrics import fit_temperature
from cvlab.models import Model
from cvlab.transforms import resize_logits

PIXELS = 10_000  # of each picture, drawn at random


def calibrate(folder: Path, parts: Parts) -> Iterator[str]:
    """Fits what the folder of a model keeps about it on val, writes it there, and says it in sentences."""
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
