"""Does a model use a mark? The mark is taken out of pictures that have it, and put into pictures of other classes.

A mark that nearly all pictures of a class have may still be of no use to the model, and a change that is certain may be
of no weight: the size of the effect decides.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cvlab.audit.fixed import FixedMark
from cvlab.audit.patches import Patch
from cvlab.audit.whole import WholePicture
from cvlab.explain import predict, predicted_masks
from cvlab.explain.many import MOST_ACTIVATIONS, shared
from cvlab.metrics import class_counts, mean_iou, normal_interval
from cvlab.models import Model, probabilities
from cvlab.transforms import to_float
from cvlab.trust import hide

MATTERS = 0.06  # of probability: a smaller effect is none
OF_LIGHT = 0.2  # the same of light, in which classes differ by nature
MOST = 200  # pictures of each kind
BATCH = 50

Mark = FixedMark | Patch | WholePicture
Effect = dict[str, float] | None  # `cvlab.metrics.interval`


class Proof(NamedTuple):
    """What became of a mark."""

    mark: Mark
    level: str  # "used", "there but not used", or "cannot be told"
    removed: Effect  # by how much what is measured falls without the mark, beyond the control; None if it is too rare
    added: Effect  # by how much it rises with the mark in pictures of other classes, beyond the control
    marked: list[int]  # rows of the pictures of its class that have it
    bare: list[int]  # rows of pictures of other classes that do not
    measured: str  # what the effects are changes of; {} stands for the class

    @property
    def strength(self) -> float:
        """The larger of the two effects."""
        return max((each["value"] for each in (self.removed, self.added) if each), default=0.0)


def prove(model: Model, mark: Mark, views: Tensor, truth: Tensor, tried: int) -> Proof:
    """Measures what a mark changes on pictures that it was not found in.

    Args:
        views: (N, 3, S, S) uint8, not trained on.
        truth: their labels (N,), or of a segmenter the masks of the views (N, C, S, S) bool.
        tried: how many marks are proved in all: the bounds are of 95% for all of them together (Bonferroni).
    """
    whole, has = isinstance(mark, WholePicture), mark.has(views)
    own = truth == mark.class_idx if truth.ndim == 1 else torch.zeros(len(views), dtype=torch.bool)
    marked, bare = (each.nonzero().flatten() for each in (own & has, ~own if whole else ~own & ~has))
    shuffled = torch.randperm(len(bare), generator=torch.Generator().manual_seed(0))
    marked, bare = marked[:MOST], bare[shuffled[:MOST]].sort().values
    removed = None if whole else _effect(model, mark, views[marked], truth[marked], without, tried)
    added = _effect(model, mark, views[bare], truth[bare], type(mark).added, tried)
    effects = [each for each in (removed, added) if each]
    limit = OF_LIGHT if mark.kind == "light" and truth.ndim == 1 else MATTERS
    # What recurs may be the object itself, which may well be recognised elsewhere: its absence has to matter too.
    enough = all if isinstance(mark, Patch) else any
    if effects and enough(each["value"] >= limit and each["low"] > 0 for each in effects):
        level = "used"
    else:
        unused = effects and all(each["high"] < MATTERS for each in effects)
        level = "there but not used" if unused else "cannot be told"
    measured = "the probability of “{}”" if truth.ndim == 1 else "1 - iou"
    return Proof(mark, level, removed, added, marked.tolist(), bare.tolist(), measured)


def without(mark: Mark, images: Tensor, **control: bool) -> Tensor:
    """Pictures (N, 3, S, S) in [0, 1] with a mark taken out; `control` as in `Patch.removed`."""
    return hide(*mark.removed(images, **control))


def _effect(model: Model, mark: Mark, views: Tensor, truth: Tensor, change: Callable, tried: int) -> Effect:
    """The mean change of the probability, taken out its loss, and its bounds; None for fewer than two pictures.

    Of what changes whole pictures it is the change beyond that of the class that gains most besides.
    """
    if len(views) < 2:
        return None
    batch = max(1, min(BATCH, MOST_ACTIVATIONS // max(1, model.activations)))

    def changes(given: tuple[Tensor, Tensor]) -> Tensor:
        images, true = to_float(given[0]), given[1]
        # A patch is compared with another patch: whatever covers a part of a picture changes something.
        before = change(mark, images, control=True) if isinstance(mark, Patch) else images
        after, before = (_answers(model, each, true) for each in (change(mark, images), before))
        return before - after if change is without else after - before

    each = torch.cat([*shared(zip(views.split(batch), truth.split(batch), strict=True), changes)])
    if truth.ndim == 1:
        rival = int(each.mean(0).index_fill(0, torch.tensor(mark.class_idx), -1).argmax())
        gains_too = isinstance(mark, WholePicture) and each[:, rival].mean() > 0
        each = each[:, mark.class_idx] - (each[:, rival] if gains_too else 0)
    return normal_interval(each.mean().item(), each.std().item() / len(each) ** 0.5, tried)


def _answers(model: Model, images: Tensor, truth: Tensor) -> Tensor:
    """The probabilities of pictures (N, 3, S, S), or what the iou of each with its masks lacks, (N,)."""
    logits = predict(model, images)
    if truth.ndim == 1:
        return probabilities(model, logits)
    found, true = (each[:, model.first_object :] for each in (predicted_masks(model, logits), truth))
    counts = class_counts(found, true, truth.any(1, keepdim=True) if model.exclusive else None)
    return torch.tensor([1 - mean_iou(each[None]) for each in counts])
